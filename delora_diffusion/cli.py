"""The `delora` command.

    delora sample --adapter my-dog/ --prompts "a sks dog on the beach" --seeds 0 1 2
    delora export --adapter my-dog/ --format comfyui
    delora verify --adapter my-dog/ --file my-dog/my-dog_comfyui.safetensors

Under accelerate: `accelerate launch -m delora_diffusion.cli sample ...`.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from .adapters.read import read_adapter
from .atomic import complete_file
from .console import lasting_output, quiet_libraries
from .data.config import MasksConfig
from .data.make_masks import make_masks
from .errors import USER_ERRORS, sentence_of
from .evaluation.benchmark import benchmark
from .evaluation.config import BenchmarkConfig, EvaluationConfig, MeasuringConfig
from .evaluation.evaluate import evaluate
from .export.config import ExportConfig, InspectionConfig, LoraConfig, MergingConfig, PushConfig, VerifyConfig
from .export.lora import beside, export_lora, folder_of
from .export.lora_names import LoraError
from .export.merged_pipeline import merge_into_base
from .export.peft_folder import export_peft
from .export.verify import verify_lora
from .options import OptionError, parse
from .reports.card import push_to_hub
from .reports.inspect import as_json, as_table, inspect_adapter
from .reports.inspect_plot import plot_inspections
from .sampling.config import DrawingConfig, SamplingConfig
from .sampling.sample import sample
from .training.check_data import CheckDataConfig, OptionalModelConfig, check_data
from .training.config import GROUPS
from .training.diffusers_flags import DiffusersFlags

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


def _merge(argv: Sequence[str]) -> None:
    """write the base with adapters in its weights, as a complete pipeline"""
    (config,) = parse(argv, MergingConfig, prog="delora merge", description="Merge adapters into a copy of the base.")
    for component, report in merge_into_base(config).items():
        log.info("%s: %d layers, %.2g of the update lost to rounding", component, report.layers, report.rounding_loss)
    log.info("merged pipeline: %s", config.output)


def _inspect(argv: Sequence[str]) -> None:
    """show what an adapter does to each layer"""
    (config,) = parse(
        argv, InspectionConfig, prog="delora inspect", description="Show what adapters do to each layer."
    )
    inspections = [inspect_adapter(read_adapter(source), source) for source in config.adapter]
    print(as_table(inspections), end="")
    if config.json:
        with complete_file(Path(config.json)) as aside:
            aside.write_text(as_json(inspections) + "\n", encoding="utf-8")
        log.info("figures: %s", config.json)
    if config.plot:
        log.info("plot: %s", plot_inspections(inspections, config.plot))


def _push(argv: Sequence[str]) -> None:
    """upload an adapter with its model card to the Hub"""
    (config,) = parse(argv, PushConfig, prog="delora push", description="Upload an adapter to the Hub.")
    sheet = Path(config.contact_sheet) if config.contact_sheet else None
    log.info("uploaded to %s", push_to_hub(Path(config.folder), config.repo, private=config.private, sheet=sheet))


def _export(argv: Sequence[str]) -> None:
    """write adapters as one LoRA file for diffusers, ComfyUI, A1111 or Forge, or as PEFT's folders"""
    title = "Write an adapter, or the sum of several, as one LoRA file."
    source, config = parse(argv, LoraConfig, ExportConfig, prog="delora export", description=title)
    if config.format == "peft":
        if len(source.adapter) > 1 or source.weights != [1.0]:
            raise OptionError("format peft writes one adapter at the strength it was trained; leave weights out")
        if source.component or source.architecture or not source.text_encoders:
            raise OptionError(
                "format peft writes every component as it is; leave component, architecture and text_encoders out"
            )
        output = config.output or f"{folder_of(source.adapter[0]).resolve()}_peft"
        for component, folder in export_peft(source.adapter[0], output, overwrite=config.overwrite).items():
            log.info("%s: %s", component or "adapter", folder)
        return
    report = export_lora(
        source.adapter,
        config.output or beside(source.adapter[0], config.format),
        format=config.format,
        weights=source.strengths,
        rank=config.rank,
        dtype=config.lora_dtype,
        component=source.component,
        architecture=source.architecture,
        text_encoders=source.text_encoders,
        sidecar=config.sidecar and config.format != "diffusers",
        trigger=config.trigger,
        metadata=config.metadata,
        allow_partial=config.allow_partial,
        overwrite=config.overwrite,
    )
    log.info("%s", report)


def _verify(argv: Sequence[str]) -> None:
    """compare a LoRA file or PEFT folder with the adapters it was exported from, layer by layer"""
    title = "Compare a LoRA file or PEFT folder with the adapters it was exported from."
    source, config = parse(argv, LoraConfig, VerifyConfig, prog="delora verify", description=title)
    report = verify_lora(
        config.file,
        source.adapter,
        weights=source.strengths,
        component=source.component,
        architecture=source.architecture,
        text_encoders=source.text_encoders,
    )
    log.info("%s", report)
    if not report.agrees(config.tolerance):
        raise LoraError(
            f"{config.file} is not {', '.join(source.adapter)} (tolerance {config.tolerance:g}); see above"
        )


def _check_data(argv: Sequence[str]) -> None:
    """what the trainer will make of photos: sizes, crops, captions, masks, twins; with the trainer's own options"""
    title = "Say what the trainer will make of the photos, before training."
    groups = (CheckDataConfig, OptionalModelConfig, *GROUPS[1:])
    parsed = parse(argv, *groups, prog="delora check-data", description=title, translation=DiffusersFlags())
    config, model, _, data, training, validation = parsed
    print(check_data(config, model, data, seed=training.seed, trigger=validation.trigger_token))


def _masks(argv: Sequence[str]) -> None:
    """make masks of the subject for a folder of photos (needs the extra masks)"""
    (config,) = parse(argv, MasksConfig, prog="delora masks", description="Make masks for a folder of photos.")
    make_masks(config)


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "check-data": _check_data,
    "masks": _masks,
    "sample": _sample,
    "evaluate": _evaluate,
    "benchmark": _benchmark,
    "export": _export,
    "verify": _verify,
    "merge": _merge,
    "inspect": _inspect,
    "push": _push,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    with lasting_output():
        return _main(argv)


def _main(argv: Sequence[str] | None) -> int:
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
    except USER_ERRORS as error:
        log.error("error: %s", sentence_of(error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
