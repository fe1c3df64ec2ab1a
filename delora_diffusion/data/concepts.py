"""What captions are made of: the words that [trigger] and [name] stand for, and the orders of tags."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch

from ..seeds import derived_seed
from .config import DataConfig
from .image_files import DataError

_PLACE = re.compile(r"\[([\w -]+)\]")


def triggers_of(config: DataConfig) -> dict[str, str]:
    """The rare word of each concept that has one, by the concept's name."""
    return {concept.name: concept.trigger for concept in config.subjects if concept.name and concept.trigger}


def with_triggers(text: str, words: Mapping[str, str], *, where: object) -> str:
    """A text with rare words for [trigger] and [name]; other brackets stay.

    Raises:
        DataError: [trigger] where there is no word for it; the message names `where`.
    """
    if "[trigger]" in text and not words.get("trigger"):
        raise DataError(f"{where} has [trigger] in {text[:60]!r}, and its concept has none; give it a trigger")
    return _PLACE.sub(lambda place: words.get(place[1]) or place[0], text)


def expanded_prompts(prompts: Sequence[str], config: DataConfig, *, trigger: str, option: str) -> list[str]:
    """Prompts with rare words: one with [trigger] stands for one of each concept that has a rare word.

    Args:
        trigger: the rare word where concepts have none.
    """
    words = triggers_of(config)
    several = list(words.values()) or [trigger]
    return list(
        dict.fromkeys(
            with_triggers(prompt, words | {"trigger": word}, where=option)
            for prompt in prompts
            for word in (several if "[trigger]" in prompt else several[:1])
        )
    )


def orders_of(caption: str, config: DataConfig, *, seed: int, content: str) -> tuple[str, ...]:
    """The caption with its tags, which have commas between them, in several orders; none where it is not shuffled.

    Args:
        content: names the photo.
    """
    tags = [tag.strip() for tag in caption.split(",")]
    first, rest = tags[: config.keep_tokens], tags[config.keep_tokens :]
    if not config.shuffle_caption or len(rest) < 2:
        return ()
    orders = []
    for number in range(config.num_caption_orders):
        generator = torch.Generator().manual_seed(derived_seed(seed, "caption order", content, number))
        places = torch.randperm(len(rest), generator=generator).tolist()
        orders.append(", ".join([*first, *(rest[place] for place in places)]))
    return tuple(dict.fromkeys(orders))
