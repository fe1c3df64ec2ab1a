"""The same pictures from every form of an adapter, drawn by plain diffusers: how far are they from the native one's?

    python tests/benchmarks/forms.py --adapter runs/spotted_dog --output tests/benchmarks/results/forms.json

The adapter is exported in each form (LoRA in diffusers' and in kohya's names, fp32 and fp16; PEFT's folders; the
merged pipeline), opened by whatever opens that form, and the same prompts and seeds are drawn in fp32 on the CPU.
Printed is the largest difference of any pixel to the native adapter's picture, in grey levels of 255 before rounding,
and the largest relative error of any layer's dW. The exit status is 1 if an fp32 LoRA or PEFT's folder is off by more
than 1e-5 of the range, the merged pipeline by 1/20 of a grey level (it rounds W + dW), or fp16 by a whole one.
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import peft
import torch

from delora_diffusion import export_lora, export_peft, load_delora_weights, read_adapter, verify_lora
from delora_diffusion.console import quiet_libraries
from delora_diffusion.export.config import MergingConfig
from delora_diffusion.export.merged_pipeline import merge_into_base

#: Bars in grey levels.
EXACT, MERGED, HALF = 1e-5 * 255, 0.05, 1.0
Opener = Callable[[], Any]


def pixels(pipe: Any, prompts: Sequence[str], seeds: Sequence[int], steps: int) -> np.ndarray:
    """Pictures (prompts x seeds, height, width, 3) from 0 to 255, unrounded."""
    pipe.set_progress_bar_config(disable=True)
    drawn = []
    for prompt in prompts:
        for seed in seeds:
            generator = torch.Generator().manual_seed(seed)
            with torch.no_grad():
                drawn += list(pipe(prompt, generator=generator, num_inference_steps=steps, output_type="np").images)
    return 255 * np.stack(drawn).astype(np.float64)


def plain(base: str | Path) -> Any:
    """The base in plain diffusers, in fp32."""
    return diffusers.DiffusionPipeline.from_pretrained(base, dtype=torch.float32)


def forms(adapter: str, base: str, folder: Path) -> dict[str, tuple[float, Opener, Path | None]]:
    """For each form its bar, what opens it in plain diffusers, and the file to verify; all are written to `folder`."""
    found: dict[str, tuple[float, Opener, Path | None]] = {}

    def with_lora(file: Path) -> Opener:
        def opened() -> Any:
            pipe = plain(base)
            pipe.load_lora_weights(str(file))
            return pipe

        return opened

    if (left := Path(adapter) / "pytorch_lora_weights.safetensors").is_file():
        found["LoRA that training left"] = EXACT, with_lora(left), left
    for dtype, bar in (("fp32", EXACT), ("fp16", HALF)):
        for format in ("diffusers", "comfyui"):
            file = folder / f"{format}_{dtype}.safetensors"
            style = export_lora(adapter, file, format=format, dtype=dtype).style
            found[f"LoRA for {format} ({style} names), {dtype}"] = bar, with_lora(file), file
    parts = export_peft(adapter, folder / "peft")

    def with_peft() -> Any:
        pipe = plain(base)
        for component, part in parts.items():
            peft.PeftModel.from_pretrained(getattr(pipe, component), str(part))  # in place
        return pipe

    found["PEFT's folders"] = EXACT, with_peft, folder / "peft"
    merged = folder / "merged"
    merge_into_base(MergingConfig(adapter=[adapter], base=base, output=str(merged), dtype="fp32"))
    found["merged pipeline, fp32"] = MERGED, lambda: plain(merged), None
    return found


def measure(adapter: str, base: str, prompts: Sequence[str], seeds: Sequence[int], steps: int) -> dict[str, Any]:
    """Largest difference of a pixel and largest error of a layer, for every form."""
    native = plain(base)
    untouched = pixels(native, prompts, seeds, steps)
    load_delora_weights(native, adapter)
    expected = pixels(native, prompts, seeds, steps)
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, (bar, opener, file) in forms(adapter, base, Path(folder)).items():
            off = float(np.abs(pixels(opener(), prompts, seeds, steps) - expected).max())
            report = verify_lora(file, adapter) if file else None
            rows[name] = {
                "largest_pixel_difference": off,
                "layers": report.layers - len(report.missing) if report else None,
                "largest_error_of_dw": report.largest_error if report else None,
                "within_bar": off <= bar and (report is None or report.agrees(1e-6 if bar == EXACT else 1e-3)),
            }
    return {"base_to_adapter": float(np.abs(expected - untouched).max()), "pictures": len(expected), "forms": rows}


def table(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    lines = [
        "| form | layers | largest error of a layer's dW | largest difference of a pixel, of 255 |",
        "|---|---|---|---|",
    ]
    for name, row in result["forms"].items():
        error = "" if row["largest_error_of_dw"] is None else f"{row['largest_error_of_dw']:.1e}"
        lines.append(f"| {name} | {row['layers'] or ''} | {error} | {row['largest_pixel_difference']:.2g} |")
    moved = f"{result['base_to_adapter']:.0f}"
    return "\n".join([*lines, f"| (the base itself, without the adapter) | | | {moved} |"])


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--adapter", required=True, help="a native adapter: file or folder")
    parser.add_argument("--base", help="its base; unset: the one it was trained on")
    parser.add_argument("--prompts", nargs="+", help="unset: the prompt it was trained with, in five places")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--output", help="JSON record to write")
    words = list(sys.argv[1:] if argv is None else argv)
    args = parser.parse_args(words)
    quiet_libraries()
    told = read_adapter(args.adapter).provenance
    places = ("", " on the beach", " in the snow", " on the moon", " under water")
    prompts = args.prompts or [told.get("instance_prompt", "a sks dog") + place for place in places]
    result = measure(args.adapter, args.base or told["base_model"], prompts, args.seeds, args.steps)
    print(table(result))
    if args.output:
        commit = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True).stdout
        record = {
            "command": shlex.join(["python", "tests/benchmarks/forms.py", *words]),
            "commit": commit.strip(),
            "hardware": {"cpu": platform.processor() or platform.machine(), "threads": torch.get_num_threads(),
                         "torch": torch.__version__, "diffusers": diffusers.__version__, "peft": peft.__version__},
            "settings": {"prompts": prompts, "seeds": args.seeds, "steps": args.steps},
            **result,
        }  # fmt: skip
        Path(args.output).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return 0 if all(row["within_bar"] for row in result["forms"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
