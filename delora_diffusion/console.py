"""What a command prints, and what it is told from there."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from .errors import USER_ERRORS, sentence_of

log = logging.getLogger(__name__)
_STOPPING = ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK")
#: The signals that ask a command to end, as far as this system has them: SIGHUP comes when a terminal is closed.
STOP_SIGNALS = tuple(signal.Signals[name] for name in _STOPPING if hasattr(signal, name))


def quiet_libraries() -> None:
    """Keep diffusers' and transformers' notes on optional packages out of what a command prints."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    for library in (diffusers_logging, transformers_logging):
        library.set_verbosity_error()
        library.disable_progress_bar()
    for noisy in ("httpx", "httpx2", "PIL", "urllib3"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


@contextlib.contextmanager
def lasting_output() -> Iterator[None]:
    """Let no print end the work: not where the terminal is closed or the reader gone, the disk full or a letter
    missing from the terminal's encoding."""
    before = sys.stdout, sys.stderr
    lasting = [_Lasting(stream) for stream in before]
    sys.stdout, sys.stderr = lasting  # type: ignore[assignment]
    try:
        yield
    finally:
        for stream in lasting:
            stream.flush()
        sys.stdout, sys.stderr = before


@contextlib.contextmanager
def optional(what: str) -> Iterator[None]:
    """Do without what fails in the block, and say so: nothing that only looks at a run may end it."""
    try:
        yield
    except Exception as error:
        log.warning("no %s: %s", what, one_line(error))


def one_line(error: BaseException) -> str:
    """An error in one line: its own words; of one that does not speak to users, also what it is and where it arose."""
    if isinstance(error, USER_ERRORS):
        return sentence_of(error).splitlines()[0]
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if isinstance(error, ValueError) or trace is None:
        return text
    return f"{type(error).__name__}: {text} ({Path(trace.tb_frame.f_code.co_filename).name}, line {trace.tb_lineno})"


class _Lasting:
    """A stream that goes on without whoever reads it."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except UnicodeEncodeError as error:
            return self._stream.write(text.encode(error.encoding, "backslashreplace").decode(error.encoding))
        except (OSError, ValueError):  # gone, or closed
            self._do_without()
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except (OSError, ValueError):
            self._do_without()

    def _do_without(self) -> None:
        """Send what is still to be written to nowhere: Python would complain of it at the end."""
        with contextlib.suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)
