"""Prompt lists as data: DreamBench's subjects and prompts, unrelated prompts for drift; and a prompt's rare word.

DreamBench: github.com/google/dreambooth, dataset/prompts_and_classes.txt (CC BY 4.0).
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Sequence
from pathlib import Path

from ..options import expanded
from .image_files import DataError

log = logging.getLogger(__name__)


def read_prompts(prompts: Sequence[str], file: str | None = None, *, option: str) -> list[str]:
    """The prompts, then those of `file`, each once; a prompt that ends in .txt is a file that stands for its lines.

    One with spaces is a prompt nevertheless ("a sign that says readme.txt") where there is no such file.

    Raises:
        DataError: a file that cannot be read or holds no prompt; the message names `option`.
        OptionError: a path with a variable or user that there is not.
    """
    lists = [_meant(prompt, option) for prompt in prompts]
    lists += [prompt_lines(Path(file), option=option)] if file else []
    return list(dict.fromkeys(prompt for some in lists for prompt in some))


def _meant(prompt: str, option: str) -> list[str]:
    if not prompt.endswith(".txt"):
        return [prompt]
    path = expanded(prompt, option) if prompt[0] in "~$" else prompt
    if " " in prompt and not os.path.isfile(path):
        log.info("%s: %r is taken for a prompt, since there is no such file", option, prompt)
        return [prompt]
    return prompt_lines(Path(path), option=option)


def prompt_lines(path: Path, *, option: str) -> list[str]:
    """A prompt a line; empty lines and lines that start with # are skipped.

    Raises:
        DataError: the file cannot be read, or holds no prompt; the message names `option`.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # splitlines() would split inside of prompts
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {option} {path}: {error}") from error
    found = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not found:
        raise DataError(f"{option} {path} holds no prompt; write one a line")
    return found


#: Subject -> class word: 30 subjects.
DREAMBENCH_CLASSES = {
    "backpack": "backpack", "backpack_dog": "backpack", "bear_plushie": "stuffed animal", "berry_bowl": "bowl",
    "can": "can", "candle": "candle", "cat": "cat", "cat2": "cat", "clock": "clock", "colorful_sneaker": "sneaker",
    "dog": "dog", "dog2": "dog", "dog3": "dog", "dog5": "dog", "dog6": "dog", "dog7": "dog", "dog8": "dog",
    "duck_toy": "toy", "fancy_boot": "boot", "grey_sloth_plushie": "stuffed animal", "monster_toy": "toy",
    "pink_sunglasses": "glasses", "poop_emoji": "toy", "rc_car": "toy", "red_cartoon": "cartoon", "robot_toy": "toy",
    "shiny_sneaker": "sneaker", "teapot": "teapot", "vase": "vase", "wolf_plushie": "stuffed animal",
}  # fmt: skip
#: The class words whose subjects get the live prompts.
DREAMBENCH_LIVE = ("cat", "dog")
_EITHER = (
    "a {} in the jungle", "a {} in the snow", "a {} on the beach", "a {} on a cobblestone street",
    "a {} on top of pink fabric", "a {} on top of a wooden floor", "a {} with a city in the background",
    "a {} with a mountain in the background", "a {} with a blue house in the background",
    "a {} on top of a purple rug in a forest",
)  # fmt: skip
_CHANGED = ("a red {}", "a purple {}", "a shiny {}", "a wet {}", "a cube shaped {}")
#: Kind of subject -> its 25 prompts, {} stands for the rare word and the class.
DREAMBENCH_PROMPTS = {
    "object": (
        *_EITHER, "a {} with a wheat field in the background",
        "a {} with a tree and autumn leaves in the background", "a {} with the Eiffel Tower in the background",
        "a {} floating on top of water", "a {} floating in an ocean of milk",
        "a {} on top of green grass with sunflowers around it", "a {} on top of a mirror",
        "a {} on top of the sidewalk in a crowded street", "a {} on top of a dirt road", "a {} on top of a white rug",
        *_CHANGED,
    ),
    "live": (
        *_EITHER, "a {} wearing a red hat", "a {} wearing a santa hat", "a {} wearing a rainbow scarf",
        "a {} wearing a black top hat and a monocle", "a {} in a chef outfit", "a {} in a firefighter outfit",
        "a {} in a police outfit", "a {} wearing pink glasses", "a {} wearing a yellow shirt",
        "a {} in a purple wizard outfit", *_CHANGED,
    ),
}  # fmt: skip
#: Everyday scenes in which an adapter of one subject should change nothing.
UNRELATED_PROMPTS = (
    "a red car on a street", "a bowl of fruit on a table", "a sailing boat on the sea", "a house in the snow",
    "a bicycle in front of a brick wall", "a horse in a field", "a city at night", "a cup of coffee on a wooden table",
    "a tree on a hill at sunset", "a train crossing a bridge", "an old man reading a book", "a guitar on a chair",
)  # fmt: skip


def has_token(prompt: str, trigger_token: str) -> bool:
    """Whether the subject's rare word stands in the prompt, as a word of its own."""
    return re.search(_word(trigger_token), prompt, flags=re.IGNORECASE) is not None


def without_token(prompt: str, trigger_token: str) -> str:
    """The prompt without the subject's rare word, as a text encoder that never learned it should read it.

    >>> without_token("a sks dog on the beach", "sks")
    'a dog on the beach'
    """
    return " ".join(re.sub(_word(trigger_token), " ", prompt, flags=re.IGNORECASE).split())


def _word(trigger_token: str) -> str:
    return rf"(?<!\w){re.escape(trigger_token)}(?!\w)"
