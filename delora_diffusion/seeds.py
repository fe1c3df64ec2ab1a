"""Seeds that follow from what they are for, so that no generator has a state to carry along."""

from __future__ import annotations

import hashlib
from typing import Any


def derived_seed(*parts: Any) -> int:
    """A seed in 0 .. 2^63 - 1 that depends on all of `parts` and on nothing else, the same on every machine."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1
