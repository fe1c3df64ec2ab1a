"""Images -> figures -> which adapter or strength to use."""
