"""A blank picture to draw on, with matplotlib: the extra `plots`."""

from __future__ import annotations

import os
from typing import Any


def blank_figure(**settings: Any) -> Any:
    """A matplotlib figure that needs no window, whatever window the environment names: notebooks name their own,
    which matplotlib refuses anywhere else.

    Raises:
        ImportError: matplotlib is not installed.
    """
    window = os.environ.pop("MPLBACKEND", None)
    try:
        from matplotlib.figure import Figure
    finally:
        if window is not None:
            os.environ["MPLBACKEND"] = window
    return Figure(**settings)
