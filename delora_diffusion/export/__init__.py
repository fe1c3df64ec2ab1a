"""Adapters for other programs, and the proof that they are the same."""
