"""Figures -> something to read: tables, the model card, what an adapter does to each layer."""
