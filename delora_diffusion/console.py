"""What a command prints."""

from __future__ import annotations

import logging


def quiet_libraries() -> None:
    """Keep diffusers' and transformers' notes on optional packages out of what a command prints."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    for library in (diffusers_logging, transformers_logging):
        library.set_verbosity_error()
        library.disable_progress_bar()
    for noisy in ("httpx", "httpx2", "PIL", "urllib3"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
