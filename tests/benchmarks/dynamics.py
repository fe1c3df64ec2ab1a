"""Training dynamics on the pocket base: LoRA, DoRA and DeLoRA as PEFT has them, and this package, side by side.

    python tests/benchmarks/dynamics.py --plan small       # under ten minutes on one core
    python tests/benchmarks/dynamics.py --plan full        # hours; a second call goes on where the first stopped
    python tests/benchmarks/dynamics.py --plan unseen      # the bars on subjects that no default was set on; an hour
    python tests/benchmarks/dynamics_report.py             # tables, bars and figure from the record

Every run teaches one of three subjects (five pictures) to the same base, rank 8 on the attention projections, batch 4,
AdamW without weight decay, gradients clipped to norm 1. Order of the photos, noise and timesteps are the same for all
methods (they follow from the seed), and the loss is the package's own. PEFT's adapters are trained by a loop of that
loss; ours by the package's `train`. The figures are described in `dynamics_bench.py`.

The record is one JSON line a run, appended when the run is done. `--part 0/2` and `--part 1/2` split a plan over two
processes that write to the same record.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import logging
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import peft
import torch
from accelerate import Accelerator
from dynamics_bench import POCKET, SIZE, SUBJECTS, UNSEEN, Bench
from torch import nn

from delora_diffusion.base.config import ModelConfig
from delora_diffusion.base.denoiser import Denoiser
from delora_diffusion.console import quiet_libraries
from delora_diffusion.data.config import DataConfig
from delora_diffusion.method.config import DeloraConfig
from delora_diffusion.method.inject import inject_delora
from delora_diffusion.seeds import derived_seed
from delora_diffusion.training.config import AdapterConfig, Options, TrainingConfig, ValidationConfig
from delora_diffusion.training.log import due
from delora_diffusion.training.loop import ramp_weight, set_strength, step_gradients, take_step
from delora_diffusion.training.state import new_state, put_average

BATCH, RANK, ONCE = 4, 8, 100  # ONCE: steps of a run of length "1x"
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
RESULTS = Path(__file__).parent / "results"
OURS, LORA, SHIPPED = "ours", "PEFT LoRA", "PEFT DeLoRA"
PEFT_CONFIGS: dict[str, Any] = {
    LORA: peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=TARGETS),
    "PEFT DoRA": peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=TARGETS, use_dora=True),
    SHIPPED: peft.DeloraConfig(r=RANK, target_modules=TARGETS),  # as shipped: lambda 15
    "PEFT DeLoRA, lambda 1.8": peft.DeloraConfig(r=RANK, delora_lambda=1.8, target_modules=TARGETS),
}


@dataclass(frozen=True)
class Run:
    """One training run. `options` are fields of AdapterConfig and TrainingConfig that differ from the defaults.

    `also` are earlier steps at which a run with PEFT is measured too: its schedule is constant, so they are the ends
    of shorter runs.
    """

    subject: str
    seed: int
    method: str
    learning_rate: float | None = None  # None: ours, with its default
    steps: int = ONCE
    options: tuple[tuple[str, Any], ...] = ()
    also: tuple[int, ...] = ()

    @property
    def key(self) -> str:
        """Names the run in the record."""
        told = "".join(f" {name}={value}" for name, value in self.options)
        return f"{self.subject} {self.seed} {self.method} {self.learning_rate} {self.steps}{told}"


# ---- the plans -----------------------------------------------------------------------------------


def small_plan() -> list[Run]:
    """One subject, one seed: enough to see the methods apart."""
    runs = [(LORA, 1e-3), (LORA, 3e-3), (SHIPPED, 1e-3), (OURS, None)]
    return [Run("striped_teddy", 0, method, rate) for method, rate in runs]


def full_plan() -> list[Run]:
    """Every subject and two seeds (PEFT's long runs: one), the most telling runs first."""
    stages: list[dict[str, Any]] = [{"method": OURS}]
    stages += [{"method": LORA, "learning_rate": rate} for rate in (1e-3, 3e-3, 1e-2)]
    stages += [{"method": SHIPPED, "learning_rate": 1e-3}, {"method": OURS, "steps": 10 * ONCE}]
    stages += [{"method": OURS, "learning_rate": rate} for rate in (1e-3 / 32, 1e-3 * 32)]
    stages += [{"method": SHIPPED, "learning_rate": rate} for rate in (1e-4, 1e-2, 1e-1)]
    stages += [{"method": LORA, "learning_rate": rate} for rate in (1e-4, 3e-4, 3e-2, 1e-1)]
    long = {"steps": 10 * ONCE, "also": (4 * ONCE,), "seeds": (0,)}
    stages += [{"method": LORA, "learning_rate": 3e-3, **long}, {"method": OURS, "steps": 4 * ONCE}]
    stages += [{"method": SHIPPED, "learning_rate": 1e-3, **long}]
    stages += [{"method": "PEFT DoRA", "learning_rate": rate, "seeds": (0,)} for rate in (1e-3, 3e-3, 1e-2)]
    choices: list[dict[str, Any]] = [
        {"relative_lambda": 0.025}, {"relative_lambda": 0.1}, {"init_weights": "paired", "direction_turn": 0.3},
        {"init_weights": "residual", "direction_turn": 0.3}, {"lambda_learning_rate": 1e-3},
        {"lambda_warmup_steps": 0}, {"with_base_preservation": True}, {"with_prior_preservation": True},
        {"direction_turn": 0.05}, {"direction_turn": 0.2}, {"max_grad_norm": 0.0}, {"adam_beta2": 0.95},
        {"lr_scheduler": "cosine"}, {"lr_scheduler": "constant_with_warmup", "lr_warmup_steps": 20}, {"use_ema": True},
    ]  # fmt: skip
    stages += [{"method": OURS, "options": tuple(choice.items())} for choice in choices]
    stages.append({"method": "PEFT DeLoRA, lambda 1.8", "learning_rate": 1e-3})
    kaiming = (("direction_turn", 0.0),)  # lengths as initialised: here the learning rate counts
    stages += [{"method": OURS, "learning_rate": rate, "options": kaiming} for rate in (1e-4, 1e-3, 1e-2, 1e-1)]
    return _runs(stages, SUBJECTS)


def unseen_plan() -> list[Run]:
    """What the bars are about, on subjects that no default was set on."""
    stages: list[dict[str, Any]] = [{"method": OURS}]
    stages += [{"method": LORA, "learning_rate": rate} for rate in (1e-3, 3e-3, 1e-2)]
    stages += [{"method": SHIPPED, "learning_rate": rate} for rate in (1e-4, 1e-3, 1e-2)]
    stages += [{"method": OURS, "learning_rate": rate} for rate in (1e-3 / 32, 1e-3 * 32)]
    stages += [{"method": OURS, "steps": 10 * ONCE}]
    return _runs(stages, UNSEEN)


def _runs(stages: Sequence[dict[str, Any]], subjects: Iterable[str]) -> list[Run]:
    """Every stage for each seed (0 and 1 unless it says otherwise) and subject."""
    return [
        Run(subject, seed, **{name: value for name, value in stage.items() if name != "seeds"})
        for stage in stages for seed in stage.get("seeds", (0, 1)) for subject in subjects
    ]  # fmt: skip


PLANS = {"small": small_plan, "full": full_plan, "unseen": unseen_plan}


# ---- one run -------------------------------------------------------------------------------------


def train_peft(bench: Bench, run: Run) -> Iterator[tuple[int, nn.Module, dict[str, float]]]:
    """Train with one of PEFT's methods; yields the model at every step that is measured, with |dW|/|W| on the way."""
    denoiser = copy.deepcopy(bench.denoiser)
    torch.manual_seed(derived_seed(run.seed, "init", 0))
    peft.inject_adapter_in_model(PEFT_CONFIGS[run.method], denoiser)
    parameters = [p for p in denoiser.parameters() if p.requires_grad]
    assert run.learning_rate is not None
    optimizer = torch.optim.AdamW(parameters, lr=run.learning_rate, weight_decay=0.0)
    training = TrainingConfig(train_batch_size=BATCH, seed=run.seed)
    accelerator, examples = Accelerator(cpu=True), bench.subjects[run.subject].examples
    shares: dict[str, float] = {}
    denoiser.train()
    for step in range(run.steps):
        step_gradients(
            accelerator, parameters, examples, Denoiser(denoiser, bench.family), bench.objective, training, step=step
        )  # fmt: skip
        torch.nn.utils.clip_grad_norm_(parameters, training.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        if step + 1 in (1, run.steps // 4, run.steps // 2):
            shares[str(step + 1)] = bench.share(denoiser)
        if step + 1 in (*run.also, run.steps):
            yield step + 1, denoiser, dict(shares)
            denoiser.train()


def train_ours(bench: Bench, run: Run) -> Iterator[tuple[int, nn.Module, dict[str, float]]]:
    """Train with the package's own loop and defaults, but for `run.options`."""
    options: dict[str, Any] = {"rank": RANK, "train_batch_size": BATCH, "seed": run.seed, "max_train_steps": run.steps}
    options |= dict(run.options)
    if run.learning_rate is not None:
        options["learning_rate"] = run.learning_rate
    examples = bench.subjects[run.subject].examples
    if options.pop("with_base_preservation", False):
        examples = bench.preserving(run.subject)
    if options.pop("with_prior_preservation", False):
        examples = bench.with_class_images(run.subject)
    known = [{f.name for f in dataclasses.fields(config)} for config in (AdapterConfig, TrainingConfig)]
    adapter = AdapterConfig(**{name: value for name, value in options.items() if name in known[0]})
    denoiser = copy.deepcopy(bench.denoiser)
    strength: dict[str, Any] = {"relative_lambda": adapter.relative_lambda}
    config = DeloraConfig(r=RANK, init_weights=adapter.init_weights, **strength)
    inject_delora(denoiser, config, generator=torch.Generator().manual_seed(derived_seed(run.seed, "init", 0)))
    shares: dict[str, float] = {}

    with tempfile.TemporaryDirectory() as folder:
        training = TrainingConfig(output_dir=folder, checkpointing_steps=0,
                                  **{name: value for name, value in options.items() if name in known[1]})  # fmt: skip
        asked = Options(
            model=ModelConfig(pretrained_model_name_or_path=str(POCKET / "base")),
            adapter=adapter,
            data=DataConfig(instance_data_dir="photos", resolution=SIZE),
            training=training,
            validation=ValidationConfig(),
        )
        modules = {"unet": denoiser.train()}
        state = new_state(modules, asked, processes=1, identity={})
        accelerator, called = Accelerator(cpu=True), Denoiser(denoiser, bench.family)
        for step in range(run.steps):
            set_strength(modules, ramp_weight(step, state.warmup))
            parameters = list(state.parameters.values())
            loss, _ = step_gradients(accelerator, parameters, examples, called, bench.objective, training, step=step)
            take_step(state, modules, training, accelerator, state.optimizer, loss)
            if state.step == 1 or (state.step < run.steps and due(state.step, max(1, run.steps // 4))):
                shares[str(state.step)] = bench.share(denoiser)
        set_strength(modules, ramp_weight(run.steps - 1, state.warmup))
        put_average(state)
    yield run.steps, denoiser, shares


def measure(bench: Bench, run: Run) -> Iterator[dict[str, Any]]:
    """The row of a run, and before it those of its earlier ends."""
    clock = time.perf_counter()
    for step, denoiser, shares in (train_ours if run.method == OURS else train_peft)(bench, run):
        seconds = time.perf_counter() - clock
        figures = bench.cheap(denoiser, run.subject) | bench.sampled(denoiser, run.subject)
        done = replace(run, steps=step, also=())
        told = {name: value for name, value in dataclasses.asdict(done).items() if name != "also"}
        yield {
            "key": done.key, **told, "options": dict(run.options), **{n: round(v, 5) for n, v in figures.items()},
            "shares": {n: round(v, 5) for n, v in shares.items()}, "seconds": round(seconds, 1),
        }  # fmt: skip


# ---- the record ----------------------------------------------------------------------------------


def circumstances() -> dict[str, Any]:
    """Command, commit and hardware."""
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    cpu = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                if line.startswith("model name")), platform.processor())  # fmt: skip
    versions = {package.__name__: package.__version__ for package in (torch, peft)}
    return {"command": f"python tests/benchmarks/dynamics.py {shlex.join(sys.argv[1:])}", "commit": commit,
            "hardware": f"{cpu}, {torch.get_num_threads()} thread", **versions}  # fmt: skip


def finished(record: Path) -> set[str]:
    """Keys of the runs in the record."""
    lines = record.read_text(encoding="utf-8").splitlines() if record.is_file() else []
    return {row["key"] for row in map(json.loads, lines) if "key" in row}


def main() -> None:
    """Do what the record lacks of a plan."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", choices=PLANS, default="small")
    parser.add_argument("--part", default="0/1", help="k/n: every n-th run, starting with the k-th")
    parser.add_argument("--record", type=Path, help="default: results/dynamics_PLAN.jsonl")
    arguments = parser.parse_args()
    record = arguments.record or RESULTS / f"dynamics_{arguments.plan}.jsonl"
    part, parts = map(int, arguments.part.split("/"))
    quiet_libraries()
    logging.disable(logging.WARNING)
    bench = Bench()

    def note(row: dict[str, Any]) -> None:
        with record.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    note(circumstances())
    for number, run in enumerate(PLANS[arguments.plan]()):
        if number % parts != part or run.key in finished(record):
            continue
        for row in measure(bench, run):
            note(row)
            print(f"{row['key']:60} fidelity {row['fidelity']:.3f}  drift {row['drift']:.3f}  "
                  f"following {row['following']:.2f}  share {row['share']:.3f}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
