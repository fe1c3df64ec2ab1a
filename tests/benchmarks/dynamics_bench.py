"""What every run of `dynamics.py` shares: the pocket base, the subjects, the encoders, and the figures taken.

* fidelity: mean cosine of the pocket ViT between generated pictures (places the subject was not photographed in) and
  held-out pictures of the subject;
* following: share of these pictures that the pocket CLIP finds nearer to their own prompt than to the other ones
  (the cosine itself falls as the subject appears: it is unlike its class, and is meant to be);
* drift: (1 - cos) / 2 of the ViT between base and adapted model on unrelated prompts at equal seeds;
* heldout_loss: denoising loss on the held-out pictures, fixed noise at fixed noise levels;
* prediction_drift: mean squared difference to the base's prediction on the base's own pictures of unrelated prompts,
  fixed noise at fixed levels;
* share: mean over layers of |dW|_F / |W|_F, dW from what the adapted layer does to the identity.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from delora_diffusion.base.config import ModelConfig
from delora_diffusion.base.latents import normalise
from delora_diffusion.base.load import load_base
from delora_diffusion.base.objective import objective_of
from delora_diffusion.data.config import DataConfig
from delora_diffusion.data.encode import Cache, cache_latents, cache_prompts
from delora_diffusion.data.image_files import load_image
from delora_diffusion.data.photos import class_examples, instance_examples
from delora_diffusion.evaluation.encoders import embed_images, embed_texts, load_encoder
from delora_diffusion.evaluation.metrics import drift_scores, fidelity_scores
from delora_diffusion.families import Conditioning, Setting, family_of, stack_conditioning
from delora_diffusion.method.config import DeloraConfig
from delora_diffusion.method.targets import target_layers
from delora_diffusion.sampling.generate import Prompts, generate, quiet
from delora_diffusion.seeds import derived_seed
from delora_diffusion.training.loss import Examples

POCKET = Path(__file__).parents[2] / "samples" / "pocket"
SUBJECTS = {"spotted_dog": "dog", "striped_teddy": "teddy bear", "mantel_clock": "clock"}  # name -> class word
#: Drawn after the defaults were set on the others, to check them.
UNSEEN = {"party_cat": "cat", "dotted_backpack": "backpack", "racing_car": "car"}
TOKEN = "sks"
SIZE = 64  # px
GUIDANCE, SAMPLING_STEPS, IMAGES = 3.0, 10, 3
NOISE_LEVELS = (0.25, 0.5, 0.75)  # shares of the schedule's length
CHUNK = 24
CLASS_IMAGES = 24

Noised = tuple[Tensor, Tensor, Tensor, Conditioning]  # x_t, target, t, conditioning


@dataclass(frozen=True)
class Subject:
    """One subject: what is trained on and what it is measured against."""

    class_word: str
    examples: Examples
    prompts: list[str]
    heldout: Noised
    real: Tensor  # (m, d) embeddings of the held-out pictures


class Bench:
    """The base model, the encoders and the subjects; the base is never changed."""

    def __init__(self) -> None:
        self.pipe = load_base(ModelConfig(pretrained_model_name_or_path=str(POCKET / "base")), precision="no")
        self.family, self.objective = family_of(self.pipe), objective_of(self.pipe.scheduler)
        self.denoiser: nn.Module = self.pipe.unet
        self.targets = list(target_layers(self.denoiser, DeloraConfig()))
        self.dino, self.clip = (load_encoder(POCKET / name, device="cpu") for name in ("vit", "clip"))
        self.cache = Cache()
        self.world = _lines(POCKET / "prompts" / "world.txt")
        self.world_seeds = [derived_seed("world", number) for number in range(len(self.world))]
        pictures = self.draw(self.denoiser, self.world, self.world_seeds)
        self.world_embedding = embed_images(self.dino, pictures)
        self.world_noised = self._noised(pictures, self.world)
        self.world_prediction = self._predict(self.denoiser, self.world_noised)
        self.subjects = {name: self._subject(name, word) for name, word in (SUBJECTS | UNSEEN).items()}

    def _subject(self, name: str, class_word: str) -> Subject:
        caption = f"a {TOKEN} {class_word}"
        data = DataConfig(instance_data_dir=str(POCKET / "subjects" / name), instance_prompt=caption, resolution=SIZE)
        photos = instance_examples(data, seed=0)
        latents = cache_latents(self.cache, self.pipe.vae, photos, identity="pocket")
        examples = Examples(
            instances=photos,
            classes=[],
            latents=latents,
            conditioning={caption: self.encode([caption])[0]},
            encode=lambda texts: stack_conditioning(self.encode(texts)),
        )
        folder = POCKET / "holdout" / name
        rows = [json.loads(line) for line in _lines(folder / "metadata.jsonl")]
        pictures = [
            load_image(folder / row["file_name"]).resize((SIZE, SIZE), Image.Resampling.LANCZOS) for row in rows
        ]
        return Subject(
            class_word, examples, _lines(POCKET / "prompts" / f"{name}.txt"),
            self._noised(pictures, [row["text"] for row in rows]), embed_images(self.dino, pictures),
        )  # fmt: skip

    def preserving(self, name: str) -> Examples:
        """A subject's examples, with the base's predictions for its class to be kept."""
        examples, prompt = self.subjects[name].examples, f"a {self.subjects[name].class_word}"
        preserved = {prompt: self.encode([prompt])[0]}
        return replace(examples, preserved=preserved, conditioning={**(examples.conditioning or {}), **preserved})

    def with_class_images(self, name: str) -> Examples:
        """A subject's examples, with images of its class that the base draws."""
        examples, prompt = self.subjects[name].examples, f"a {self.subjects[name].class_word}"
        seeds = [derived_seed("class", number) for number in range(CLASS_IMAGES)]
        with tempfile.TemporaryDirectory() as folder:
            for number, image in enumerate(self.draw(self.denoiser, [prompt] * CLASS_IMAGES, seeds)):
                image.save(Path(folder) / f"{number:02}.png")
            data = DataConfig(
                instance_data_dir=folder,
                resolution=SIZE,
                with_prior_preservation=True,
                class_data_dir=folder,
                class_prompt=prompt,
                num_class_images=CLASS_IMAGES,
            )
            classes = class_examples(data, seed=0)
            latents = cache_latents(self.cache, self.pipe.vae, classes, identity="pocket")
        cond = {**(examples.conditioning or {}), prompt: self.encode([prompt])[0]}
        return replace(examples, classes=classes, latents={**examples.latents, **latents}, conditioning=cond)

    def encode(self, prompts: Sequence[str]) -> list[Conditioning]:
        """The conditioning of every prompt."""
        found = cache_prompts(self.cache, self.pipe, self.family, prompts, identity="pocket")
        return [found[prompt] for prompt in prompts]

    def draw(self, denoiser: nn.Module, prompts: Sequence[str], seeds: Sequence[int]) -> list[Image.Image]:
        """One picture for each prompt and seed with `denoiser` in the base's place."""
        images: list[Image.Image] = []
        self.pipe.unet = denoiser
        with quiet(self.pipe):
            for first in range(0, len(prompts), CHUNK):
                part = slice(first, first + CHUNK)
                shown = Prompts(
                    texts=prompts[part], negative="", encoded=self.encode(prompts[part]), against=self.encode([""])[0]
                )
                images += generate(
                    self.pipe, shown, seeds[part],
                    guidance_scale=GUIDANCE, num_inference_steps=SAMPLING_STEPS,
                )  # fmt: skip
        self.pipe.unet = self.denoiser
        return images

    def cheap(self, denoiser: nn.Module, name: str) -> dict[str, float]:
        """The figures that need no sampling."""
        heldout = self.subjects[name].heldout
        was_training = denoiser.training
        denoiser.eval()
        loss = (self._predict(denoiser, heldout) - heldout[1]).square().mean()
        moved = (self._predict(denoiser, self.world_noised) - self.world_prediction).square().mean()
        denoiser.train(was_training)
        return {"heldout_loss": float(loss), "prediction_drift": float(moved), "share": self.share(denoiser)}

    def sampled(self, denoiser: nn.Module, name: str) -> dict[str, float]:
        """The figures on generated pictures: `IMAGES` for each of the subject's prompts, one for each unrelated."""
        subject = self.subjects[name]
        denoiser.eval()
        prompts = [prompt for prompt in subject.prompts for _ in range(IMAGES)]
        pictures = self.draw(denoiser, prompts, [derived_seed("subject", number) for number in range(len(prompts))])
        others = self.draw(denoiser, self.world, self.world_seeds)
        texts = embed_texts(self.clip, [prompt.replace(f"{TOKEN} ", "") for prompt in subject.prompts])
        nearest = (embed_images(self.clip, pictures) @ texts.T).argmax(1)
        own = torch.arange(len(subject.prompts)).repeat_interleave(IMAGES)
        return {
            "fidelity": float(fidelity_scores(embed_images(self.dino, pictures), subject.real).mean()),
            "following": float((nearest == own).float().mean()),
            "drift": float(drift_scores(self.world_embedding, embed_images(self.dino, others)).mean()),
        }

    @torch.no_grad()
    def share(self, adapted: nn.Module) -> float:
        """Mean over layers of |dW|_F / |W|_F."""
        shares = []
        for name in self.targets:
            base = self.denoiser.get_submodule(name)
            assert isinstance(base, nn.Linear)
            eye = torch.eye(base.in_features)
            shares.append(float((adapted.get_submodule(name)(eye) - base(eye)).norm() / base.weight.norm()))
        return sum(shares) / len(shares)

    @torch.no_grad()
    def _noised(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Noised:
        """Every picture at every noise level, with fixed noise."""
        pixels = torch.stack([to_pixels(image) for image in images])
        latents = normalise(self.pipe.vae, self.pipe.vae.encode(pixels).latent_dist.mean)
        latents = latents.repeat(len(NOISE_LEVELS), 1, 1, 1)
        levels = [int(level * len(self.objective.alphas_cumprod)) for level in NOISE_LEVELS]
        t = torch.tensor(levels).repeat_interleave(len(images))
        noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(derived_seed("noise")))
        x_t, target = self.objective.noised(latents, noise, t)
        return x_t, target, t, stack_conditioning(self.encode(prompts) * len(levels))

    @torch.no_grad()
    def _predict(self, denoiser: nn.Module, noised: Noised) -> Tensor:
        x_t, _, t, cond = noised
        parts = []
        for first in range(0, len(t), CHUNK):
            part = slice(first, first + CHUNK)
            own = {name: value[part] for name, value in cond.items()}
            parts.append(self.family.predict(denoiser, x_t[part], t[part], own, Setting(SIZE, SIZE, GUIDANCE)))
        return torch.cat(parts)


def to_pixels(image: Image.Image) -> Tensor:
    """(3, h, w) in -1 .. 1."""
    import numpy as np

    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float() / 127.5 - 1


def _lines(path: Path) -> list[str]:
    return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
