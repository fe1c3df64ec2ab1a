"""`delora evaluate`: how well an adapter learned its subject, and what it cost the base model -> one table.

Folders of images are judged as they are. For an adapter, images are drawn first: its own prompts at every strength,
and unrelated prompts with the same seeds by the base and by the adapter. A second run draws only what is missing.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..adapters.adapter import adapter_hash
from ..adapters.read import read_adapter
from ..data.prompts import UNRELATED_PROMPTS, has_token, read_prompts
from ..option_checks import refuse_same_folder
from ..options import OptionError
from ..reports.card import set_strength
from ..reports.table import Row, markdown, protocol_lines, write_report
from ..run_folder import CARD_NAME
from ..sampling.config import DrawingConfig, SamplingConfig
from ..sampling.sample import plan, processes, sample
from .choose import Measured, strength_text
from .config import EvaluationConfig, MeasuringConfig
from .images import Batch, Picture, batches_of, read_photos, read_pictures
from .scorer import Scorer, load_scorer, measure, protocol_of
from .scores import METRIC, METRICS

log = logging.getLogger(__name__)


def evaluate(config: EvaluationConfig, measuring: MeasuringConfig, drawing: DrawingConfig) -> Path:
    """Draw what is missing, measure, print the table and write it; returns the Markdown file in `output_dir`.

    Raises:
        OptionError, EncoderError, DataError, AdapterFileError, BaseModelError: what was drawn stays.
    """
    refuse_same_folder({"real": config.real, "holdout": config.holdout, "output_dir": config.output_dir})
    state = processes(drawing.device)
    real = read_photos(Path(config.real), option="real")
    holdout = read_photos(Path(config.holdout), option="holdout") if config.holdout else None
    unrelated = unrelated_prompts(measuring)
    scorer = scorer_of(measuring, device=drawing.device or state.device) if state.is_main_process else None
    batches: list[Batch] = []
    for source in config.images:
        name = str(source) if len({Path(s).name for s in config.images}) < len(config.images) else Path(source).name
        batches += batches_of(read_pictures(Path(source)), name=name, token=measuring.trigger_token)
    out = Path(config.output_dir)
    if config.adapter:
        prompts = read_prompts(config.prompts, config.prompts_file, option="prompts_file")
        check_prompts(prompts, unrelated, token=measuring.trigger_token)
        pictures = drawn_pictures(
            config.adapter,
            prompts,
            unrelated,
            drawing,
            base=config.pretrained_model_name_or_path,
            folder=out,
            shared=out / "base",
        )
        name = Path(config.adapter[0]).name if len(config.adapter) == 1 else "adapter"
        batches += batches_of(pictures, name=name, token=measuring.trigger_token)
    if scorer is not None:
        rows = measure(scorer, batches, real=real, holdout=holdout)
        protocol = protocol_of(scorer, real=real, holdout=holdout) | drawing_protocol(batches)
        written = write_report(out, "evaluation", rows, protocol, METRICS)
        print(markdown(rows, METRICS), *protocol_lines(protocol), sep="\n")
        log.info("table: %s (and .csv, .json)", written)
        recommend(rows, batches)
    state.wait_for_everyone()
    return out / "evaluation.md"


def scorer_of(measuring: MeasuringConfig, *, device: str | torch.device) -> Scorer:
    """The encoders that the options name, in memory.

    Raises:
        EncoderError: see `load_scorer`.
    """
    return load_scorer(
        dino=measuring.dino, clip=measuring.clip, token=measuring.trigger_token, device=device, lpips=measuring.lpips
    )


def recommend(rows: Sequence[Row], batches: Sequence[Batch]) -> None:
    """Say which of the measured strengths to use if all are of one adapter, also in its card: if it has one, and is
    still the adapter that drew the images."""
    measured = [
        Measured(
            row.strength,
            {name: figure.value for name, figure in row.figures.items() if METRIC[name].panel is not None},
        )
        for row in rows
        if row.strength is not None
    ]
    drew = {
        (p.settings["adapter"], p.settings["adapter_hash"])
        for batch in batches
        for p in batch.pictures
        if p.settings.get("adapter")
    }
    strengths = {row.strength for row in measured}
    if len(drew) != 1 or not 1 < len(strengths) == len(measured) or not (text := strength_text(measured)):
        return
    log.info("%s", text.splitlines()[0])
    ((source, content),) = drew
    folder = Path(source)
    if (folder / CARD_NAME).is_file() and adapter_hash(read_adapter(folder)) == content and set_strength(folder, text):
        log.info("the card %s says so", folder / CARD_NAME)


def drawn_pictures(
    adapters: Sequence[str],
    prompts: Sequence[str],
    unrelated: Sequence[str],
    drawing: DrawingConfig,
    *,
    base: str | None,
    folder: Path,
    shared: Path,
) -> list[Picture]:
    """What an evaluation looks at, drawn where it is missing.

    Args:
        base: the base model; None for the one that the adapters name.
        folder: gets subject/ with the prompts of the subject and unrelated/ with the others, at every strength.
        shared: folder for what the base draws for the unrelated prompts, the same for every subject.
    """
    wanted = SamplingConfig(
        adapter=list(adapters),
        pretrained_model_name_or_path=base,
        prompts=list(prompts),
        output_dir=str(folder / "subject"),
    )
    adapted = replace(wanted, prompts=list(unrelated), output_dir=str(folder / "unrelated"))
    plain = replace(
        adapted, adapter=[], pretrained_model_name_or_path=plan(wanted, drawing).base, output_dir=str(shared)
    )
    pictures = []
    for config in (wanted, plain, adapted):
        settings = drawing if config.adapter else replace(drawing, strengths=[1.0])  # the base has no strength
        sample(config, settings)
        pictures += [Picture(Path(config.output_dir) / job.file, job.settings) for job in plan(config, settings).jobs]
    return pictures


def check_prompts(prompts: Sequence[str], unrelated: Sequence[str], *, token: str) -> None:
    """Refuse prompts that would be taken for the other kind.

    Raises:
        OptionError: a prompt lacks the rare word, or an unrelated one has it.
    """
    for prompt in prompts:
        if not has_token(prompt, token):
            raise OptionError(f"the prompt {prompt!r} lacks the rare word {token!r}; give the right --trigger_token")
    for prompt in unrelated:
        if has_token(prompt, token):
            raise OptionError(f"the unrelated prompt {prompt!r} has the rare word {token!r}; take it out")


def unrelated_prompts(measuring: MeasuringConfig) -> list[str]:
    """The prompts of drift: those of the file, or a short list of ours."""
    file = measuring.unrelated_prompts_file
    return read_prompts([], file, option="unrelated_prompts_file") if file else list(UNRELATED_PROMPTS)


def drawing_protocol(batches: Sequence[Batch]) -> dict[str, Any]:
    """Prompts, seeds and how the images were drawn, as far as their manifests tell."""
    pictures = [p for batch in batches for p in batch.pictures]
    others = [pair[1] for batch in batches for pair in batch.pairs]
    protocol: dict[str, Any] = {
        "prompts": list(dict.fromkeys(p.prompt for p in pictures if p.prompt is not None)),
        "unrelated prompts": list(dict.fromkeys(p.prompt for p in others)),
        "seeds": sorted({p.settings["seed"] for p in [*pictures, *others] if "seed" in p.settings}),
    }
    shared = (
        "base",
        "scheduler",
        "dtype",
        "num_inference_steps",
        "guidance_scale",
        "negative_prompt",
        "height",
        "width",
    )
    drawn = {
        name: sorted({_drawn_with(name, p.settings[name]) for p in pictures if name in p.settings}) for name in shared
    }
    protocol |= {"drawing": {name: ", ".join(values) for name, values in drawn.items() if values}}
    return {name: value for name, value in protocol.items() if value}


def _drawn_with(name: str, value: Any) -> str:
    unset = "none" if name == "negative_prompt" else "the base's own"
    return unset if value is None else str(value)
