"""Merging an adapter into Stable Diffusion 1.5's attention layers: ours, a bare loop, and copying the bytes.

    python tests/benchmarks/merge.py --output tests/benchmarks/results/merge.json

The bare loop does for each of the 128 layers what has to be done: the half-precision weight in fp32, `addmm` of ready
factors, and the cast back, in place. Ours forms the factors, checks that every layer is finite, measures what
rounding loses, and keeps the base for `unmerge_delora` (or not, with `permanently`). Medians of interleaved repeats,
as ratios to the bare loop.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from step import commit, hardware
from torch import nn

from delora_diffusion import DeloraConfig, inject_delora, merge_delora, unmerge_delora
from delora_diffusion.method.inject import delora_adapters, delora_layers

#: (inputs, outputs): how many of the UNet's attention projections
SHAPES = {
    (320, 320): 30, (640, 640): 30, (1280, 1280): 36, (768, 320): 10, (768, 640): 10, (768, 1280): 12
}  # fmt: skip
BAR = 2.5


def adapted(dtype: torch.dtype, device: str, rank: int) -> nn.Module:
    """Layers of these shapes in half precision, with an adapter that changes something."""
    torch.manual_seed(0)
    module = nn.ModuleList(nn.Linear(i, o, bias=False) for (i, o), n in SHAPES.items() for _ in range(n))
    module = module.to(device, dtype)
    inject_delora(module, DeloraConfig(r=rank, delora_lambda=2.0, target_modules="all-linear", init_weights="kaiming"))
    return module


def timed(work: Callable[[], Any], device: str) -> float:
    """Wall seconds, the device's work included."""
    start = time.perf_counter()
    work()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start


@torch.no_grad()
def measure(dtype: torch.dtype, device: str, *, rank: int, repeats: int) -> dict[str, Any]:
    """Seconds and ratios for one precision."""
    module = adapted(dtype, device, rank)
    layers, adapters = delora_layers(module), delora_adapters(module)
    factors = {name: adapter.factors() for name, adapter in adapters.items()}
    weights = [layer.weight for layer in layers.values()]

    def bare() -> None:
        for name, layer in layers.items():
            exact = torch.addmm(layer.weight.float(), factors[name].up, factors[name].down)
            layer.weight.copy_(exact.to(dtype))

    def copied() -> list[torch.Tensor]:
        return [weight.clone() for weight in weights]

    seconds: dict[str, list[float]] = {"bare loop": [], "copy": [], "ours": [], "ours, permanently": []}
    for _ in range(repeats):
        seconds["copy"].append(timed(copied, device))
        seconds["ours"].append(timed(lambda: merge_delora(module), device))
        unmerge_delora(module)
        seconds["bare loop"].append(timed(bare, device))
        fresh = adapted(dtype, device, rank)
        seconds["ours, permanently"].append(timed(lambda fresh=fresh: merge_delora(fresh, permanently=True), device))
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "mib": round(sum(weight.nbytes for weight in weights) / 2**20),
        "seconds": {name: round(value, 4) for name, value in medians.items()},
        "over_bare_loop": {name: round(value / medians["bare loop"], 3) for name, value in medians.items()},
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, help="write the figures to this JSON file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = [measure(d, args.device, rank=args.rank, repeats=args.repeats) for d in (torch.float16, torch.bfloat16)]
    for row in rows:
        print(f"{row['dtype']}, {row['mib']} MiB")
        for name, value in row["seconds"].items():
            print(f"  {name:<18}{value:>9.4f} s   x {row['over_bare_loop'][name]:.2f} of the bare loop", flush=True)
    met = all(row["over_bare_loop"][name] <= BAR for row in rows for name in ("ours", "ours, permanently"))
    print(f"{'met   ' if met else 'MISSED'}  at most {BAR} times the bare loop")
    if args.output:
        record = {"command": shlex.join(["python", *sys.argv]), "commit": commit(), "hardware": hardware(args.device),
                  "settings": {"rank": args.rank, "repeats": args.repeats}, "results": rows}  # fmt: skip
        args.output.write_text(json.dumps(record, indent=2) + "\n")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
