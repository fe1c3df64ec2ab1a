"""`delora benchmark`: subjects x prompts x seeds -> train, sample, evaluate -> one table and one plot.

A benchmark is one YAML file. A second run does only what is missing: adapters, images and tables that are there stay.
Under `accelerate launch` the processes share the subjects in training and the images in sampling.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from ..atomic import complete_file
from ..data.prompts import DREAMBENCH_PROMPTS, read_prompts
from ..errors import DeloraError
from ..options import OptionError
from ..reports.table import Row, markdown, mean_row, protocol_lines, read_report, write_report
from ..run_folder import RunFolder
from ..sampling.config import DrawingConfig
from ..sampling.sample import processes
from ..yaml_text import from_yaml, to_yaml_text
from .choose import FIDELITY
from .config import BenchmarkConfig, MeasuringConfig, Subject
from .evaluate import check_prompts, drawing_protocol, drawn_pictures, scorer_of, unrelated_prompts
from .images import batches_of, read_photos
from .plot import dial_plot, need_matplotlib
from .scorer import Scorer, measure, protocol_of
from .scores import METRICS

log = logging.getLogger(__name__)
#: What an outer launcher sets for its own processes; a training run inside starts without it.
_LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")
PHOTOS = ("training photos", "held-out photos")


class BenchmarkError(DeloraError):
    """A benchmark that cannot go on; the message says what was asked, what was found and what to do."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """A subject with all that it takes, checked."""

    name: str
    subject: Subject
    prompts: list[str]
    training: str | None  # the YAML file of its training run; None where an adapter is given
    folder: Path

    @property
    def adapter(self) -> str:
        return self.subject.adapter or str(self.folder / "adapter")


def benchmark(config: BenchmarkConfig, measuring: MeasuringConfig, drawing: DrawingConfig) -> Path:
    """Do what is missing in `output_dir`, print the table and write it; returns the Markdown file.

    Raises:
        OptionError, DataError, EncoderError: before anything is done, where it can be told.
        BenchmarkError: a training run failed, or a folder holds one with other settings.
    """
    if config.plot:
        need_matplotlib("plot")
    unrelated = unrelated_prompts(measuring)
    tasks = plan_tasks(config, measuring.trigger_token)
    for task in tasks:
        check_prompts(task.prompts, unrelated, token=measuring.trigger_token)
    state = processes(drawing.device)
    out = Path(config.output_dir)
    train_missing(tasks, Path(config.train_script), state)
    state.wait_for_everyone()
    scorer = scorer_of(measuring, device=drawing.device or state.device) if state.is_main_process else None
    tables: dict[str, list[Row]] = {}
    for number, task in enumerate(tasks, start=1):
        if state.is_main_process:
            log.info("%s (%d of %d)", task.name, number, len(tasks))
        pictures = drawn_pictures(
            [task.adapter],
            task.prompts,
            unrelated,
            drawing,
            base=config.pretrained_model_name_or_path,
            folder=task.folder,
            shared=out / "base",
        )
        if scorer is not None:
            batches = batches_of(pictures, name=task.name, token=measuring.trigger_token)
            tables[task.name] = _measured(task, scorer, batches)
    if scorer is not None:
        rows, protocol = table_of(tables), _protocol(tasks, config)
        written = write_report(out, "benchmark", rows, protocol, METRICS)
        print(markdown(rows, METRICS), *protocol_lines(protocol), sep="\n")
        log.info("table: %s (and .csv, .json)", written)
        if config.plot:
            log.info("plot: %s", _plot(out / "benchmark.png", tables))
    state.wait_for_everyone()
    return out / "benchmark.md"


def plan_tasks(config: BenchmarkConfig, token: str) -> list[Task]:
    """The subjects with their prompts and the settings of their training runs. Nothing is written.

    Raises:
        OptionError, DataError: a file or folder that is missing or cannot be read.
    """
    shared = _training_options(config)
    tasks = []
    for name, subject in config.chosen.items():
        read_photos(Path(subject.photos), option=f"subjects[{name}]: photos")
        called = f"{token} {subject.class_word}"
        folder = Path(config.output_dir) / name
        training = None
        if not subject.adapter:
            options = {
                "instance_data_dir": subject.photos,
                "instance_prompt": config.instance_prompt.format(called),
                "output_dir": str(folder / "adapter"),
            }
            if shared.get("with_prior_preservation"):
                options |= {
                    "class_prompt": config.instance_prompt.format(subject.class_word),
                    "class_data_dir": str(Path(config.output_dir) / "class" / subject.class_word),
                }
            training = to_yaml_text(shared | options)
        tasks.append(
            Task(name=name, subject=subject, prompts=_prompts(name, subject, called), training=training, folder=folder)
        )
    return tasks


def _prompts(name: str, subject: Subject, called: str) -> list[str]:
    """The subject's own, DreamBench's, or the captions of the held-out photos."""
    captions: list[str] = []
    if subject.holdout:
        captions = list(read_photos(Path(subject.holdout), option=f"subjects[{name}]: holdout").captions.values())
    if subject.prompts_file:
        return read_prompts([], subject.prompts_file, option=f"subjects[{name}]: prompts_file")
    if subject.kind == "captions" and not captions:
        raise OptionError(
            f"subjects[{name}]: kind is captions, but the held-out photos have none; "
            f"give holdout, a folder with PHOTO.txt beside each photo or with metadata.jsonl"
        )
    if subject.kind == "captions":
        return list(dict.fromkeys(captions))
    return [template.format(called) for template in DREAMBENCH_PROMPTS[subject.kind]]


def train_missing(tasks: Sequence[Task], script: Path, state: Any) -> None:
    """Train this process's share of the subjects whose adapters are not there, one after the other.

    Args:
        state: accelerate's PartialState.

    Raises:
        BenchmarkError: a training run failed, or a folder holds one with other settings.
    """
    for task in [task for task in tasks if task.training is not None][state.process_index :: state.num_processes]:
        _train(task, script, state)


def table_of(tables: Mapping[str, Sequence[Row]]) -> list[Row]:
    """Means over the subjects first (photos, then every strength), then the rows of each subject."""
    rows = [row for table in tables.values() for row in table]
    means = [
        mean_row(f"mean, {name}", found) for name in PHOTOS if (found := [row for row in rows if row.name == name])
    ]
    means += [mean_row("mean", found) for found in _by_strength(tables)]
    named = [
        replace(row, name=f"{name}, {row.name}" if row.name in PHOTOS else name)
        for name, table in tables.items()
        for row in table
    ]
    return [*means, *named]


def _training_options(config: BenchmarkConfig) -> dict[str, Any]:
    if config.train_config is None:
        return {}
    if not Path(config.train_script).is_file():
        raise OptionError(f"train_script {config.train_script} is not there; give the path of the training script")
    try:
        options = from_yaml(Path(config.train_config).read_text(encoding="utf-8-sig")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise OptionError(f"cannot read train_config {config.train_config}: {error}") from error
    if not isinstance(options, dict):
        raise OptionError(f"train_config {config.train_config} must be a list of `option: value` lines")
    if config.pretrained_model_name_or_path:
        options["pretrained_model_name_or_path"] = config.pretrained_model_name_or_path
    return options


def _train(task: Task, script: Path, state: Any) -> None:
    """Train the subject unless its adapter is there; an interrupted run goes on where it stopped."""
    assert task.training is not None
    adapter, settings = RunFolder(task.folder / "adapter"), task.folder / "training.yaml"
    if settings.is_file() and settings.read_text(encoding="utf-8") != task.training:
        raise BenchmarkError(
            f"{task.folder} was trained with other settings than it would be now (compare {settings}); "
            f"give another output_dir, or delete {task.folder}"
        )
    if adapter.adapter.is_file():
        return
    with complete_file(settings) as aside:
        aside.write_text(task.training, encoding="utf-8")
    log.info("training %s", task.name)
    start = ["--resume_from_checkpoint", "latest"] if adapter.checkpoints() else ["--overwrite_output_dir"]
    command = [sys.executable, str(script), "--config", str(settings), *start]
    code = _run(command, _environment(state))
    if code in (130, -signal.SIGINT, -signal.SIGTERM):
        raise KeyboardInterrupt
    if code:
        raise BenchmarkError(f"training of {task.name} failed with exit code {code}: {' '.join(command)}")


def _run(command: Sequence[str], environment: Mapping[str, str]) -> int:
    """The exit code of a command. Ctrl-C reaches it through here, once, which waits for it to write a checkpoint."""
    job = subprocess.Popen(command, env=environment, start_new_session=True)
    with _passed_on(job):
        return job.wait()


@contextlib.contextmanager
def _passed_on(job: subprocess.Popen[bytes]) -> Iterator[None]:
    """Give SIGINT and SIGTERM to `job` instead of this process."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    try:
        before = {number: signal.signal(number, lambda n, _: job.send_signal(n)) for number in numbers}
    except ValueError:  # not in the main thread: nothing to catch
        yield
        return
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _environment(state: Any) -> dict[str, str]:
    """For a training run of its own: on this process's device, unaware of the launcher that started the benchmark."""
    kept = {k: v for k, v in os.environ.items() if k not in _LAUNCHER and not k.startswith(("TORCHELASTIC", "ROLE_"))}
    if state.num_processes > 1 and state.device.type == "cuda":
        visible = [part for part in kept.get("CUDA_VISIBLE_DEVICES", "").split(",") if part]
        place = state.local_process_index
        kept["CUDA_VISIBLE_DEVICES"] = visible[place] if place < len(visible) else str(place)
    return kept


def _measured(task: Task, scorer: Scorer, batches: Sequence[Any]) -> list[Row]:
    """The rows of one subject, from its report where that is of the same images, photos and encoders."""
    real = read_photos(Path(task.subject.photos), option="photos")
    holdout = read_photos(Path(task.subject.holdout), option="holdout") if task.subject.holdout else None
    protocol = protocol_of(scorer, real=real, holdout=holdout) | drawing_protocol(batches)
    looked_at = [[p.path.name for p in [*b.pictures, *(p for pair in b.pairs for p in pair)]] for b in batches]
    captions = [list(photos.captions.values()) for photos in (real, holdout) if photos]
    inputs = json.dumps([protocol, looked_at, captions], sort_keys=True)
    protocol["inputs"] = hashlib.sha256(inputs.encode()).hexdigest()[:16]
    report = task.folder / "evaluation.json"
    if report.is_file():
        rows, known = read_report(report)
        if known.get("inputs") == protocol["inputs"]:
            return rows
    rows = measure(scorer, batches, real=real, holdout=holdout)
    write_report(task.folder, "evaluation", rows, protocol, METRICS)
    return rows


def _protocol(tasks: Sequence[Task], config: BenchmarkConfig) -> dict[str, Any]:
    """What all subjects share, and what is of each."""
    each = {task.name: read_report(task.folder / "evaluation.json")[1] for task in tasks}
    of_each = ("training photos", "held-out photos", "prompts", "inputs")
    first = next(iter(each.values()))
    protocol = {key: value for key, value in first.items() if key not in of_each}
    protocol["mean"] = "over subjects, each counted once; interval 1.96 s / sqrt(n) over subjects"
    if config.train_config:
        protocol["training"] = _training_options(config)
    protocol["subjects"] = {
        name: {key: settings[key] for key in of_each if key in settings} | {"adapter": task.adapter}
        for task, (name, settings) in zip(tasks, each.items(), strict=True)
    }
    return protocol


def _by_strength(tables: Mapping[str, Sequence[Row]]) -> list[list[Row]]:
    strengths = sorted({row.strength for table in tables.values() for row in table if row.strength is not None})
    return [[row for table in tables.values() for row in table if row.strength == s] for s in strengths]


def _plot(path: Path, tables: Mapping[str, Sequence[Row]]) -> Path:
    groups = _by_strength(tables)
    mean = [mean_row("mean", rows) for rows in groups]
    column = next(name for name in FIDELITY if all(name in row.figures for rows in groups for row in rows))
    dials = {
        name: sorted((row for row in table if row.strength is not None), key=lambda row: row.strength or 0.0)
        for name, table in tables.items()
    }
    photos = [row for table in tables.values() for row in table if row.name == PHOTOS[0] and column in row.figures]
    reference = mean_row("photos", photos).figures[column].value if photos else None
    dial_plot(path, mean, dials, column=column, reference=reference)
    return path
