"""The `delora` command.

    delora sample --adapter my-dog/ --prompts "a sks dog on the beach" --seeds 0 1 2

Under accelerate: `accelerate launch -m delora_diffusion.cli sample ...`.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence

from .adapter_file import AdapterFileError
from .base import BaseModelError, quiet_libraries
from .benchmark import benchmark
from .config import DrawingConfig, SamplingConfig
from .evaluate import evaluate
from .evaluation_config import BenchmarkConfig, EvaluationConfig, MeasuringConfig
from .families import FamilyError
from .options import OptionError, parse
from .sample import sample

log = logging.getLogger(__name__)


def _sample(argv: Sequence[str]) -> None:
    """draw a batch of images: prompts x adapters x strengths x seeds"""
    configs = parse(argv, SamplingConfig, DrawingConfig, prog="delora sample", description="Draw a batch of images.")
    log.info("contact sheet: %s", sample(*configs))


def _evaluate(argv: Sequence[str]) -> None:
    """likeness, prompt following, drift and diversity of images or adapters, in one table"""
    groups = (EvaluationConfig, MeasuringConfig, DrawingConfig)
    evaluate(*parse(argv, *groups, prog="delora evaluate", description="Measure images, or what an adapter draws."))


def _benchmark(argv: Sequence[str]) -> None:
    """train, sample and evaluate a list of subjects; a table and a plot of likeness against drift"""
    groups = (BenchmarkConfig, MeasuringConfig, DrawingConfig)
    benchmark(*parse(argv, *groups, prog="delora benchmark", description="Measure a method on a list of subjects."))


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "sample": _sample,
    "evaluate": _evaluate,
    "benchmark": _benchmark,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    logging.basicConfig(format="%(message)s", level=logging.INFO, force=True)
    quiet_libraries()
    name, *rest = (sys.argv[1:] if argv is None else list(argv)) or ["--help"]
    if name in ("-h", "--help"):
        print("usage: delora COMMAND ...\n\ncommands (each with --help):")
        for command, function in COMMANDS.items():
            print(f"  {command:10} {function.__doc__}")
        return 0
    if name not in COMMANDS:
        log.error("delora: there is no command %r; commands are %s", name, ", ".join(COMMANDS))
        return 2
    try:
        COMMANDS[name](rest)
    except KeyboardInterrupt:
        log.warning("stopped; the same command goes on where it stopped")
        return 130
    except (OptionError, AdapterFileError, BaseModelError, FamilyError, ValueError) as error:
        log.error("error: %s", error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
