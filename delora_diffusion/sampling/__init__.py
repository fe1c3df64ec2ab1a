"""Prompts and seeds -> images."""
