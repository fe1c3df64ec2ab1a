"""How many operations an adapter costs, and a step of the pocket UNet: frozen base, PEFT LoRA, PEFT DeLoRA, ours.

    python tests/benchmarks/launches.py --output tests/benchmarks/results/launches.json

A GPU at batch 1 waits for launches, so what is counted are the operations that reach a kernel, in forward and
backward: every call that a dispatch mode sees, views excluded. "Added" is the excess over the frozen base, for each
adapted layer. Times are CPU time (on a GPU those between two `torch.cuda.Event`s), medians over repeats in rotating
order, as ratios to the frozen base.
"""

from __future__ import annotations

import argparse
import copy
import json
import shlex
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from diffusers import UNet2DConditionModel
from step import commit, hardware
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from delora_diffusion import DeloraConfig, inject_delora

POCKET = Path(__file__).parents[2] / "samples" / "pocket" / "base" / "unet"
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
RANK = 16
VARIANTS = ("frozen base", "PEFT LoRA", "PEFT DeLoRA", "ours")
ADDED_BAR = 9.0  # operations for each adapted layer, forward and backward


class Counting(TorchDispatchMode):
    """Counts the operations that do something; views are only another look at what is there."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view and func.overloadpacket.__name__ not in ("_unsafe_view", "detach", "alias"):
            self.seen[str(func.overloadpacket)] += 1
        return func(*args, **(kwargs or {}))


def build(variant: str, base: nn.Module) -> nn.Module:
    """The UNet with one kind of adapter on its attention."""
    torch.manual_seed(0)
    unet = copy.deepcopy(base).requires_grad_(False)
    if variant == "ours":
        inject_delora(unet, DeloraConfig(r=RANK, delora_lambda=1.8))
    elif variant == "PEFT LoRA":
        peft.inject_adapter_in_model(peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=TARGETS), unet)
    elif variant == "PEFT DeLoRA":
        peft.inject_adapter_in_model(peft.DeloraConfig(r=RANK, delora_lambda=1.8, target_modules=TARGETS), unet)
    for name, p in unet.named_parameters():
        if p.requires_grad and ("lora_B" in name or "delora_B" in name):
            nn.init.normal_(p, std=0.02)
    if variant != "frozen base":
        for name, p in unet.named_parameters():
            if "lambda" in name:
                p.requires_grad_(False)  # as it is trained by default
    return unet


def step_of(unet: nn.Module, batch: int, device: str, *, backward: bool = True) -> Callable[[], None]:
    """One forward (and backward) pass; the input requires a gradient, so that the frozen base has a backward too."""
    config: Any = unet.config
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, config.in_channels, config.sample_size, config.sample_size, generator=generator).to(device)
    text = torch.randn(batch, 24, config.cross_attention_dim, generator=generator).to(device)
    t = torch.arange(batch, device=device) * 100 + 50

    def run() -> None:
        with torch.set_grad_enabled(backward):
            out: Tensor = unet(x.requires_grad_(backward), t, text, return_dict=False)[0]
        if backward:
            out.square().mean().backward()  # type: ignore[no-untyped-call]
            x.grad = None
            for p in unet.parameters():
                p.grad = None

    return run


def count(run: Callable[[], None]) -> Counter[str]:
    """The operations of a step."""
    run()
    with Counting() as counting:
        run()
    return counting.seen


def seconds(run: Callable[[], None], device: str) -> float:
    """CPU time of a step, or the time between two events on a GPU."""
    if device == "cpu":
        start = time.process_time()
        run()
        return time.process_time() - start
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    run()
    last.record()
    torch.cuda.synchronize()
    return first.elapsed_time(last) / 1e3


def measure(batch: int, *, repeats: int, device: str, backward: bool) -> dict[str, Any]:
    """Operations and ratios of the four variants at one batch size."""
    base = UNet2DConditionModel.from_pretrained(POCKET).float().to(device)
    units = {name: build(name, base).to(device) for name in VARIANTS}
    layers = sum(hasattr(module, "delora") for module in units["ours"].modules())
    runs = {name: step_of(unet, batch, device, backward=backward) for name, unet in units.items()}
    counted = {name: sum(count(run).values()) for name, run in runs.items()}
    times: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for repeat in range(repeats):
        for name in (*VARIANTS[repeat % 4 :], *VARIANTS[: repeat % 4]):
            times[name].append(seconds(runs[name], device))
    base_times = times["frozen base"]
    ratios = {n: statistics.median(t / b for t, b in zip(times[n], base_times, strict=True)) for n in VARIANTS}
    added = {name: (counted[name] - counted["frozen base"]) / layers for name in VARIANTS}
    against = statistics.median(t / p for t, p in zip(times["ours"], times["PEFT LoRA"], strict=True))
    return {
        "batch": batch,
        "passes": "forward and backward" if backward else "no_grad",
        "layers": layers,
        "operations": counted,
        "added_per_layer": {name: round(value, 2) for name, value in added.items()},
        "step_over_frozen_base": {name: round(value, 4) for name, value in ratios.items()},
        "ours_over_peft_lora": round(against, 4),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, help="write the figures to this JSON file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = [
        measure(batch, repeats=args.repeats, device=args.device, backward=backward)
        for batch, backward in ((4, True), (1, True), (2, False))
    ]
    for row in rows:
        print(f"batch {row['batch']}, {row['passes']}, {row['layers']} adapted layers")
        for name in VARIANTS:
            count_of, added, ratio = (row[k][name] for k in ("operations", "added_per_layer", "step_over_frozen_base"))
            print(
                f"  {name:<12}{count_of:>6} operations, {added:>6.2f} added a layer, x {ratio:.3f} of the base's time"
            )
        print(f"  ours over PEFT LoRA: x {row['ours_over_peft_lora']:.3f}", flush=True)
    met = all(row["added_per_layer"]["ours"] <= ADDED_BAR for row in rows[:2])
    print(f"{'met   ' if met else 'MISSED'}  at most {ADDED_BAR:g} operations added for each adapted layer and step")
    if args.output:
        record = {"command": shlex.join(["python", *sys.argv]), "commit": commit(), "hardware": hardware(args.device),
                  "settings": {"repeats": args.repeats, "rank": RANK}, "results": rows}  # fmt: skip
        args.output.write_text(json.dumps(record, indent=2) + "\n")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
