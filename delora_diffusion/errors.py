"""What users can cause: a command says it in a sentence; any other error is a fault of the program, and raises."""

from __future__ import annotations


class DeloraError(ValueError):
    """Something asked for that cannot be; the message says what was asked, what was found and what to do."""
