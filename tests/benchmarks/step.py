"""Time and memory of one training step of an attention block: frozen base, PEFT LoRA, PEFT DeLoRA, ours.

    python tests/benchmarks/step.py --output tests/benchmarks/results/step.json

Every repeat times one forward and backward of each of the four, in rotating order, and divides by the frozen base's
time of that repeat; printed is the median of these ratios, so that other load on the machine hits all four alike. On
a machine that is busy otherwise, `--threads 1 --clock cpu` counts this process's own CPU time instead of wall time.
"Saved" are the bytes that autograd keeps from forward to backward (each storage once; parameters, base weights and
buffers not counted), and "added" is their excess over the frozen base. q, k and v share one input, which requires a
gradient, as it does inside a network.

Two bars, for every width: our step is faster than PEFT DeLoRA's, and we save at most 1.05 times the bytes PEFT LoRA
saves, in all and added. The exit status is 1 if one is missed.
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor, nn

from delora_diffusion import DeloraConfig, inject_delora

TARGETS = ["to_q", "to_k", "to_v", "to_out"]
VARIANTS = ("frozen base", "PEFT LoRA", "PEFT DeLoRA", "ours")
SAVED_BAR = 1.05
HEAD = 64
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


class Attention(nn.Module):
    """Self-attention over (batch, tokens, width) with heads of 64."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.to_out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (-1, HEAD)).transpose(1, 2) for f in (self.to_q, self.to_k, self.to_v))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        out: Tensor = self.to_out(mixed.transpose(1, 2).flatten(-2))
        return out


def build(variant: str, width: int, rank: int) -> nn.Module:
    """The block with one kind of adapter on all four layers, every factor random."""
    torch.manual_seed(0)
    block: nn.Module = Attention(width).requires_grad_(False)
    if variant == "PEFT LoRA":
        config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=TARGETS, init_lora_weights=False)
        block = peft.get_peft_model(block, config)
    elif variant == "PEFT DeLoRA":
        block = peft.get_peft_model(block, peft.DeloraConfig(r=rank, target_modules=TARGETS, init_weights=False))
    elif variant == "ours":
        inject_delora(block, DeloraConfig(r=rank, target_modules=TARGETS, init_weights="kaiming"))
    return block


def seconds_of_step(block: nn.Module, x: Tensor, direction: Tensor, clock: str) -> float:
    now = CLOCKS[clock]
    block.zero_grad()
    x.grad = None
    wait(x)
    start = now()
    block(x).backward(direction)
    wait(x)
    return now() - start


def wait(x: Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize(x.device)


def saved_bytes(block: nn.Module, x: Tensor) -> int:
    """Bytes of the distinct storages that autograd keeps for backward, other than the block's own tensors."""
    own = {t.untyped_storage().data_ptr() for t in (*block.parameters(), *block.buffers())}
    kept: list[Tensor] = []  # holding them keeps their addresses apart

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = block(x)
    sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
    del out
    return sum(size for address, size in sizes.items() if address not in own)


def measure(
    width: int, *, rank: int, tokens: int, repeats: int, device: str, clock: str, dtype: torch.dtype
) -> dict[str, Any]:
    """Ratios and bytes of the four variants at one width."""
    blocks = {name: build(name, width, rank).to(device) for name in VARIANTS}
    if dtype != torch.float32:
        for block in blocks.values():
            for name, p in block.named_parameters():
                if not p.requires_grad and "lora" not in name:
                    p.data = p.data.to(dtype)
    x = torch.randn(1, tokens, width, device=device, dtype=dtype, requires_grad=True)
    direction = torch.randn_like(x)
    saved = {name: saved_bytes(block, x) for name, block in blocks.items()}
    times: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for repeat in range(-1, repeats):
        turn = repeat % len(VARIANTS)
        for name in VARIANTS[turn:] + VARIANTS[:turn]:
            seconds = seconds_of_step(blocks[name], x, direction, clock)
            if repeat >= 0:  # the first round warms up
                times[name].append(seconds)
    base = times["frozen base"]
    ratios = {n: statistics.median(t / b for t, b in zip(times[n], base, strict=True)) for n in VARIANTS}
    against_peft = statistics.median(t / p for t, p in zip(times["ours"], times["PEFT DeLoRA"], strict=True))
    added = {name: saved[name] - saved["frozen base"] for name in VARIANTS}
    return {
        "width": width,
        "step_ms": {name: round(1e3 * statistics.median(t), 2) for name, t in times.items()},
        "step_over_frozen_base": {name: round(r, 4) for name, r in ratios.items()},
        "ours_over_peft_delora": round(against_peft, 4),
        "saved_bytes": saved,
        "added_bytes": added,
        "saved_over_peft_lora": round(saved["ours"] / saved["PEFT LoRA"], 4),
        "added_over_peft_lora": round(added["ours"] / added["PEFT LoRA"], 4),
        "faster_than_peft_delora": against_peft < 1,
        "saved_within_bar": max(saved["ours"] / saved["PEFT LoRA"], added["ours"] / added["PEFT LoRA"]) <= SAVED_BAR,
    }


def hardware(device: str) -> dict[str, Any]:
    """What the figures depend on."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else "cpu",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "peft": peft.__version__,
    }


def commit() -> str:
    """The code that was measured; "-dirty" marks changes that are not committed."""
    git = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    found = subprocess.run(git, cwd=Path(__file__).parent, capture_output=True, text=True)
    return found.stdout.strip() or "unknown"


def print_row(row: dict[str, Any]) -> None:
    for name in VARIANTS:
        print(
            f"{row['width'] if name == VARIANTS[0] else '':>6}  {name:<12}{row['step_ms'][name]:>10.2f}"
            f"{row['step_over_frozen_base'][name]:>10.3f}{row['saved_bytes'][name] / 2**20:>11.2f}"
            f"{row['added_bytes'][name] / 2**20:>11.2f}"
        )
    print(
        f"        faster than PEFT DeLoRA: {'yes' if row['faster_than_peft_delora'] else 'NO'} "
        f"(x {row['ours_over_peft_delora']:.3f});  saved bytes <= {SAVED_BAR} x PEFT LoRA: "
        f"{'yes' if row['saved_within_bar'] else 'NO'} "
        f"(x {row['saved_over_peft_lora']:.3f}, added x {row['added_over_peft_lora']:.3f})",
        flush=True,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[320, 640, 1280, 3072], help=f"multiples of {HEAD}")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=12)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--clock", default="wall", choices=list(CLOCKS))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"], help="of the base")
    parser.add_argument("--output", type=Path, help="write the figures to this JSON file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    settings: dict[str, Any] = {name: getattr(args, name) for name in ("rank", "tokens", "repeats", "device", "clock")}
    print(f"{'width':>6}  {'':<12}{'step ms':>10}{'x base':>10}{'saved MiB':>11}{'added MiB':>11}")
    rows = []
    for width in args.widths:
        rows.append(measure(width, **settings, dtype=getattr(torch, args.dtype)))
        print_row(rows[-1])
    bars = {
        "faster than PEFT DeLoRA at every width": all(row["faster_than_peft_delora"] for row in rows),
        f"saved bytes <= {SAVED_BAR} x PEFT LoRA at every width": all(row["saved_within_bar"] for row in rows),
    }
    for bar, met in bars.items():
        print(f"{'met   ' if met else 'MISSED'}  {bar}")
    if args.output:
        record = {
            "command": shlex.join(["python", *sys.argv]),
            "commit": commit(),
            "hardware": hardware(args.device),
            "settings": settings | {"dtype": args.dtype},
            "bars": bars,
            "results": rows,
        }
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(record, indent=2) + "\n")
    return 0 if all(bars.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
