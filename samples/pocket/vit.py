"""The pocket DINO: a small `ViTModel` that tells instances of one kind of thing apart.

    python samples/pocket/vit.py --work WORK      # trains, then writes WORK/vit

Trained by supervised contrast: pictures of one instance (a thing with its own colour and marks) in different places,
sizes and rotations attract each other; all others repel, also other instances of the same thing. The class token is
the embedding, compared by cosine, as with DINO.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from clip import degrade
from scenes import VARIANTS, VIEWS, draw_thing, load_instances
from torch import nn
from torch.nn import functional as F
from training import Plan, to_tensor, train
from transformers import ViTConfig, ViTModel
from transformers.models.vit import ViTImageProcessorPil
from world import THING_NAMES

WIDTH = 128
SIBLINGS, TOGETHER = 4, 4  # a batch: instances of one thing, and views of each instance
TEMPERATURE = 0.1
PLAN = Plan(steps=1200, minutes=20, batch=96, save_every=50, report_every=50)


def new_vit() -> ViTModel:
    """Untrained, 0.9 M parameters; patches of 8 x 8 px."""
    config = ViTConfig(
        hidden_size=WIDTH,
        intermediate_size=3 * WIDTH,
        num_hidden_layers=5,
        num_attention_heads=4,
        image_size=64,
        patch_size=8,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return ViTModel(config, add_pooling_layer=False)


def attract(z: torch.Tensor, instance: torch.Tensor) -> torch.Tensor:
    """Supervised contrastive loss (Khosla et al. 2020, Eq. 2) of embeddings [n, d] with instance numbers [n]."""
    z = F.normalize(z, dim=-1)
    itself = torch.eye(len(z), dtype=torch.bool)
    log_share = (z @ z.T / TEMPERATURE).masked_fill(itself, -1e4).log_softmax(-1)
    same = (instance[:, None] == instance[None]) & ~itself
    return -(log_share * same).sum(-1).div(same.sum(-1)).mean()


def train_vit(work: Path, *, plan: Plan = PLAN) -> ViTModel:
    """Train on random groups of look-alikes; returns the EMA model."""
    images = load_instances(work)
    groups = plan.batch // (SIBLINGS * TOGETHER)

    def loss_of(model: nn.Module, rng: np.random.Generator, generator: torch.Generator) -> torch.Tensor:
        things = rng.choice(len(THING_NAMES), groups, replace=False).repeat(SIBLINGS)
        variants = np.concatenate([rng.choice(VARIANTS, SIBLINGS, replace=False) for _ in range(groups)])
        views = np.stack([rng.choice(VIEWS, TOGETHER, replace=False) for _ in things])
        batch = images[things[:, None], variants[:, None], views].reshape(-1, 64, 64, 3)
        x = degrade(to_tensor(batch), generator).contiguous()
        embedding = model(pixel_values=x).last_hidden_state[:, 0]
        return attract(embedding, torch.arange(len(things)).repeat_interleave(TOGETHER))

    model = train(new_vit(), loss_of, plan=plan, checkpoint=work / "vit.pt")
    assert isinstance(model, ViTModel)
    return model


@torch.inference_mode()
def retrieval(model: ViTModel, *, variants: int = 6) -> float:
    """Share of pictures whose nearest neighbour, by cosine, shows the same instance.

    The gallery holds two pictures of each of `variants` instances of every thing, none of them seen in training.
    """
    pictures = [draw_thing(t, first=VARIANTS, variants=variants, views=2) for t in range(len(THING_NAMES))]
    x = to_tensor(np.concatenate(pictures).reshape(-1, 64, 64, 3)).contiguous()
    z = F.normalize(torch.cat([model(pixel_values=part).last_hidden_state[:, 0] for part in x.split(96)]), dim=-1)
    nearest = (z @ z.T).fill_diagonal_(-1).argmax(-1)
    return float((nearest // 2 == torch.arange(len(z)) // 2).float().mean())


def save_vit(model: ViTModel, work: Path) -> None:
    """Write WORK/vit with its image processor."""
    model.save_pretrained(work / "vit")
    size = {"height": 64, "width": 64}
    ViTImageProcessorPil(size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3).save_pretrained(work / "vit")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    work = parser.parse_args().work
    vit = train_vit(work)
    print(f"vit: {retrieval(vit):.1%} of pictures find their own instance first")
    save_vit(vit, work)
