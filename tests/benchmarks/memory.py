"""The estimate of a run's memory against measurement: one training step of a full-size denoiser, with random weights.

    python tests/benchmarks/memory.py --output tests/benchmarks/results/memory.json              # on the CPU
    python tests/benchmarks/memory.py --device cuda --dtype bf16 --sizes 512 1024 \\
        --models "Stable Diffusion 1.5" SDXL "SD3.5 medium" --output memory_gpu.json             # on a GPU
    python tests/benchmarks/memory.py --presets                                                  # nothing is measured

Every row is a process of its own. "Predicted" is what `delora_diffusion.training.memory` says that a step has alive
besides the weights. Measured is, on the CPU, how much the process's resident memory grew at most during a second step
(the first warms up), and on a GPU `torch.cuda.max_memory_allocated` less what was allocated before. "Kept" are the
bytes that autograd keeps for the backward pass, by `saved_tensors_hooks`, without the weights.
`--presets` prints the estimate of every file in train_scripts/configs/memory_*.yaml for the bases it names.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from diffusers import AutoencoderKL, AutoencoderKLFlux2, AutoencoderKLQwenImage
from torch import Tensor

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # so that it runs as a file as well

from delora_diffusion import DeloraConfig, inject_delora  # noqa: E402
from delora_diffusion.base.config import ModelConfig  # noqa: E402
from delora_diffusion.data.config import DataConfig  # noqa: E402
from delora_diffusion.families import FAMILIES, Setting, placed, stack_conditioning  # noqa: E402
from delora_diffusion.options import build, read_yaml  # noqa: E402
from delora_diffusion.training import memory  # noqa: E402
from delora_diffusion.training.config import AdapterConfig, Options, TrainingConfig, ValidationConfig  # noqa: E402
from tests import full_size  # noqa: E402
from tests.benchmarks.step import commit, hardware  # noqa: E402

#: Makes glibc hand large blocks back to the system when they are freed, so that resident memory is what is alive.
RETURNING = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PRESETS = sorted((ROOT / "train_scripts" / "configs").glob("memory_*.yaml"))
#: Preset -> bases that it is for, with what differs from the file.
FITTING: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "memory_8gb": [("Stable Diffusion 1.5", {}), ("SDXL", {"resolution": 768})],
    "memory_12gb": [("SDXL", {})],
    "memory_16gb": [("SDXL", {}), ("SD3.5 medium", {})],
    "memory_24gb": [("SDXL", {}), ("SD3.5 medium", {})],
    "memory_flux1_12gb": [("FLUX.1", {})],
    "memory_flux1_24gb": [("FLUX.1", {})],
    "memory_flux2_klein_8gb": [("FLUX.2 klein 4B", {})],
    "memory_flux2_klein_16gb": [("FLUX.2 klein 4B", {})],
    "memory_flux2_dev_24gb": [("FLUX.2 dev", {})],
}
_CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
_CLIP_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}
_T5_XXL = {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64, "vocab_size": 32128,
           "feed_forward_proj": "gated-gelu"}  # fmt: skip
_QWEN3_4B = tf.Qwen3Config(
    hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, num_attention_heads=32, num_key_value_heads=8,
    head_dim=128, vocab_size=151936, tie_word_embeddings=True,
)  # fmt: skip
_QWEN25_VL_7B = tf.Qwen2_5_VLConfig(
    text_config={"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
                 "num_key_value_heads": 4, "vocab_size": 152064},
    vision_config={"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16,
                   "out_hidden_size": 3584},
)  # fmt: skip
_MISTRAL_24B = tf.Mistral3Config(
    text_config={"model_type": "mistral", "hidden_size": 5120, "intermediate_size": 32768, "num_hidden_layers": 40,
                 "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 131072},
    vision_config={"model_type": "pixtral", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
                   "num_attention_heads": 16},
)  # fmt: skip
#: Base -> pipeline class, text encoders, and channels of the latents.
BASES: dict[str, tuple[str, dict[str, tuple[str, Any]], int]] = {
    "Stable Diffusion 1.5": (
        "StableDiffusionPipeline", {"text_encoder": ("CLIPTextModel", tf.CLIPTextConfig(**_CLIP_L))}, 4),
    "SDXL": ("StableDiffusionXLPipeline", {
        "text_encoder": ("CLIPTextModel", tf.CLIPTextConfig(**_CLIP_L)),
        "text_encoder_2": ("CLIPTextModelWithProjection", tf.CLIPTextConfig(**_CLIP_G, projection_dim=1280))}, 4),
    "SD3.5 medium": ("StableDiffusion3Pipeline", {
        "text_encoder": ("CLIPTextModelWithProjection", tf.CLIPTextConfig(**_CLIP_L)),
        "text_encoder_2": ("CLIPTextModelWithProjection", tf.CLIPTextConfig(**_CLIP_G, projection_dim=1280)),
        "text_encoder_3": ("T5EncoderModel", tf.T5Config(**_T5_XXL))}, 16),
    "FLUX.1": ("FluxPipeline", {
        "text_encoder": ("CLIPTextModel", tf.CLIPTextConfig(**_CLIP_L)),
        "text_encoder_2": ("T5EncoderModel", tf.T5Config(**_T5_XXL))}, 16),
    "FLUX.2 klein 4B": ("Flux2KleinPipeline", {"text_encoder": ("Qwen3ForCausalLM", _QWEN3_4B)}, 128),
    "FLUX.2 dev": ("Flux2Pipeline", {"text_encoder": ("Mistral3ForConditionalGeneration", _MISTRAL_24B)}, 128),
    "Qwen-Image": (
        "QwenImagePipeline", {"text_encoder": ("Qwen2_5_VLForConditionalGeneration", _QWEN25_VL_7B)}, 16),
    "Z-Image": ("ZImagePipeline", {"text_encoder": ("Qwen3Model", _QWEN3_4B)}, 16),
}  # fmt: skip
BASES["SD3.5 large"] = BASES["SD3.5 medium"]
#: Bases whose VAE is of a class of its own.
VAES: dict[str, Callable[[], Any]] = {
    "FLUX.2 klein 4B": AutoencoderKLFlux2,
    "FLUX.2 dev": AutoencoderKLFlux2,
    "Qwen-Image": AutoencoderKLQwenImage,
}


def paper_base(name: str, folder: Path) -> ModelConfig:
    """A base of the full size that has every config.json and no weights: what an estimate reads."""
    kind, texts, channels = BASES[name]
    denoiser = full_size.denoiser(name)
    family = next(family for family in FAMILIES if kind in family.pipelines)
    with torch.device("meta"):
        vae = VAES[name]() if name in VAES else AutoencoderKL(
            block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=channels,
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        )  # fmt: skip
    denoiser.save_config(folder / family.denoiser)
    vae.save_config(folder / "vae")
    listed: dict[str, Any] = {
        "_class_name": kind, "_diffusers_version": "0.42.1", "scheduler": ["diffusers", "DDPMScheduler"],
        "vae": ["diffusers", type(vae).__name__], family.denoiser: ["diffusers", type(denoiser).__name__],
    }  # fmt: skip
    for part, (cls, config) in texts.items():
        config.save_pretrained(folder / part)
        listed[part] = ["transformers", cls]
    (folder / "model_index.json").write_text(json.dumps(listed))
    return ModelConfig(pretrained_model_name_or_path=str(folder))


# ---- one step, measured ----------------------------------------------------------------------------


class Step:
    """A training step of a full-size denoiser with adapters, at random weights, on a real device."""

    def __init__(self, name: str, *, side: int, dtype: torch.dtype, checkpointing: bool, device: str) -> None:
        family = next(family for family in FAMILIES if family.name == full_size.MODELS[name][0])
        self.family, self.setting, self.device = family, Setting(side, side), torch.device(device)
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with torch.device("meta"):
                denoiser: Any = full_size.MODELS[name][1]()
        finally:
            torch.set_default_dtype(before)
        denoiser.to_empty(device=self.device).to(dtype).requires_grad_(False)
        with torch.no_grad():
            for tensor in (*denoiser.parameters(), *denoiser.buffers()):
                if tensor.is_floating_point():
                    tensor.normal_(std=0.02)
        inject_delora(denoiser, adapter_of(name))
        denoiser.train()
        if checkpointing:
            denoiser.enable_gradient_checkpointing()
        channels, factor = BASES[name][2], 16 if name.startswith("FLUX.2") else 8
        self.denoiser, self.dtype = denoiser, dtype
        self.x_t = torch.randn(1, channels, side // factor, side // factor, device=self.device, dtype=dtype)
        self.cond = placed(stack_conditioning([family.blank(denoiser)]), self.device, dtype)

    def forward(self) -> Tensor:
        t = torch.full([1], 500.0, device=self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype != torch.float32):
            prediction = self.family.predict(self.denoiser, self.x_t, t, self.cond, self.setting)
        return prediction.float().square().mean()

    def run(self) -> None:
        self.forward().backward()
        self.denoiser.zero_grad()

    def kept(self) -> int:
        """Bytes of the distinct storages that autograd keeps for backward, without the model's own tensors."""
        own = {t.untyped_storage().data_ptr() for t in (*self.denoiser.parameters(), *self.denoiser.buffers())}
        sizes: dict[int, int] = {}
        held: list[Tensor] = []

        def pack(tensor: Tensor) -> Tensor:
            held.append(tensor)
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = self.forward()
        del loss
        return sum(size for address, size in sizes.items() if address not in own)


def adapter_of(name: str) -> DeloraConfig:
    return DeloraConfig(r=16, exclude_modules=full_size_dead(name))


def full_size_dead(name: str) -> list[str] | None:
    module = full_size.denoiser(name)
    family = next(family for family in FAMILIES if family.name == full_size.MODELS[name][0])
    return family.dead_layers(family.denoiser, module) or None


def resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def measured(step: Step) -> int:
    """Bytes that a step has alive at its peak, besides what was there before it."""
    step.run()
    gc.collect()
    if step.device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step.run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    step.run()
    return resident("VmHWM") - before


def predicted(name: str, *, side: int, dtype: str, checkpointing: bool, device: str) -> int:
    """The same by the estimate."""
    with tempfile.TemporaryDirectory() as folder:
        plan = plan_of(paper_base(name, Path(folder)), name, side=side, dtype=dtype, checkpointing=checkpointing,
                       device=device)  # fmt: skip
        (training,) = (phase for phase in memory.estimate(plan) if phase.name == "training")
    return training.parts["step"]


def plan_of(model: ModelConfig, name: str, *, side: int, dtype: str, checkpointing: bool, device: str) -> memory.Plan:
    family = next(family for family in FAMILIES if family.name == full_size.MODELS[name][0])
    return memory.Plan(
        options=Options(
            model=replace(model, base_dtype=dtype),
            adapter=AdapterConfig(),
            data=DataConfig(instance_data_dir="photos", resolution=side),
            training=TrainingConfig(gradient_checkpointing=checkpointing),
            validation=ValidationConfig(),
        ),
        family=family,
        adapter=adapter_of(name),
        text_adapter=None,
        precision="no" if dtype == "fp32" else dtype,
        like_cuda=device == "cuda",
    )


def row(args: argparse.Namespace) -> dict[str, Any]:
    name, side, checkpointing = args.models[0], args.sizes[0], args.checkpointing
    settings = {"side": side, "checkpointing": checkpointing, "device": args.device}
    said = predicted(name, dtype=args.dtype, **settings)
    step = Step(name, dtype=DTYPES[args.dtype], **settings)
    kept = step.kept()
    found = measured(step)
    return {"model": name, "dtype": args.dtype, **settings, "kept": kept, "predicted": said, "measured": found,
            "predicted_over_measured": round(said / found, 3)}  # fmt: skip


# ---- presets ---------------------------------------------------------------------------------------


def of_presets(names: Sequence[str]) -> list[dict[str, Any]]:
    """The estimate of every preset, or of those named, for the bases it is for."""
    found = []
    for path in (path for path in PRESETS if not names or path.stem in names):
        values = read_yaml(path, AdapterConfig, DataConfig, TrainingConfig, ValidationConfig, ModelConfig)
        for name, more in FITTING[path.stem]:
            with tempfile.TemporaryDirectory() as folder:
                phases = memory.estimate(preset_plan(paper_base(name, Path(folder)), name, values | more))
            print(f"{path.stem}, {name}\n{memory.summary(phases)}", flush=True)
            parts = {phase.name: phase.parts for phase in phases}
            found.append({"preset": path.stem, "base": name, "options": values | more, "phases": parts})
    return found


def preset_plan(model: ModelConfig, name: str, values: dict[str, Any]) -> memory.Plan:
    """A preset on a base, with previews of two prompts."""
    given = values | {"instance_data_dir": "photos", "validation_prompt": ["a", "b"]}
    data, training, shown = (build(group, given) for group in (DataConfig, TrainingConfig, ValidationConfig))
    family = next(family for family in FAMILIES if family.name == full_size.MODELS[name][0])
    adapter = replace(adapter_of(name), r=values.get("rank", 16))
    return memory.Plan(
        options=Options(
            model=replace(model, **{k: v for k, v in values.items() if hasattr(model, k)}),
            adapter=AdapterConfig(),
            data=data,
            training=training,
            validation=shown,
        ),
        family=family,
        adapter=adapter,
        text_adapter=None,
        precision=training.mixed_precision or "no",
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["Stable Diffusion 1.5"], choices=list(BASES))
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 512])
    parser.add_argument("--dtype", default="fp32", choices=list(DTYPES), help="of weights and autocast")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--output", type=Path, help="write the figures to this JSON file")
    parser.add_argument("--presets", nargs="*", help="print the estimates of these presets instead; no names: of all")
    parser.add_argument("--checkpointing", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.presets is not None:
        rows = of_presets(args.presets)
        if args.output:
            args.output.write_text(json.dumps({"commit": commit(), "results": rows}, indent=2) + "\n")
        return 0
    if args.one:
        print(json.dumps(row(args)))
        return 0
    rows = []
    for name in args.models:
        for side in args.sizes:
            for checkpointing in (False, True):
                command = [sys.executable, __file__, "--one", "--models", name, "--sizes", str(side), "--dtype",
                           args.dtype, "--device", args.device]  # fmt: skip
                command += ["--checkpointing"] if checkpointing else []
                done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **RETURNING})
                if done.returncode:
                    print(f"{name} {side}: {done.stderr.splitlines()[-1:]}", flush=True)
                    continue
                rows.append(json.loads(done.stdout.splitlines()[-1]))
                print({k: round(v / 2**20) if k in ("kept", "predicted", "measured") else v for k, v in
                       rows[-1].items()}, flush=True)  # fmt: skip
    if args.output:
        record = {"command": shlex.join(["python", *sys.argv]), "commit": commit(),
                  "hardware": hardware("cuda:0" if args.device == "cuda" else "cpu"), "results": rows}  # fmt: skip
        args.output.write_text(json.dumps(record, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
