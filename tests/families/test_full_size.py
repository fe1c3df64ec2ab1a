"""Which layers are adapted in the real models, on the meta device.

python -m tests.families.test_full_size      # writes the table of families into train_scripts/README.md
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from torch import nn

from delora_diffusion.families import FAMILIES
from delora_diffusion.method.targets import excluding

from ..full_size import MODELS, adapted, denoiser, parameters, table

PAGE = Path(__file__).parents[2] / "train_scripts" / "README.md"
START, END = "<!-- families -->\n", "<!-- end of families -->"


def kinds(names: object) -> set[str]:
    """Names of layers with all numbers replaced."""
    return {re.sub(r"\d+", "N", str(name)) for name in names}  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "name, count, trained",
    [
        ("Stable Diffusion 1.5", 128, 3_188_864),  # the paper's setup
        ("SDXL", 560, None),
        ("SD3.5 medium", 24 * 8 - 1 - 1 + 13 * 4, None),  # no to_add_out in the last block, add_q_proj dead there
        ("FLUX.1", 19 * 8 + 38 * 3, None),
        ("FLUX.2 dev", 8 * 8 + 48 * 2, None),
        ("PixArt-alpha, -Sigma", 28 * 8, None),
        ("Sana 1.6B", 20 * 8, None),
        ("Lumina-Image 2.0", 30 * 4, None),
        ("Qwen-Image", 60 * 8 - 2, None),
        ("Z-Image", 34 * 4, None),
    ],
)
def test_the_attention_layers_of_the_real_models_are_counted(name: str, count: int, trained: int | None) -> None:
    layers = adapted(name, "attention")
    assert len(layers) == count
    assert trained is None or parameters(layers) == trained


@pytest.mark.parametrize("name", MODELS)
def test_what_is_left_out_belongs_to_no_block_or_is_modulation(name: str) -> None:
    """Every Linear in a block that mixes or transforms tokens is found, the fused ones of FLUX.2 as well."""
    linears = {n for n, child in denoiser(name).named_modules() if isinstance(child, nn.Linear)}
    family = next(family for family in FAMILIES if family.name == MODELS[name][0])
    dead = set(family.dead_layers(family.denoiser, denoiser(name)))
    left = kinds(linears - set(adapted(name, "attention+ff")) - dead)
    inside = {n for n in left if re.search(r"(blocks|layers|refiner)\.N\.", n) and "resnets" not in n}
    assert not [n for n in inside if not re.search(r"norm|adaLN|_mod\.N|attentions\.N\.proj_(in|out)$", n)]
    assert set(adapted(name, "attention")) <= set(adapted(name, "attention+ff"))


def test_the_page_has_the_table() -> None:
    found = PAGE.read_text(encoding="utf-8").partition(START)[2].partition(END)[0]
    assert found == f"\n{table()}\n\n", "out of date: run `python -m tests.families.test_full_size`"


def test_every_family_is_in_the_table() -> None:
    assert {family for family, _ in MODELS.values()} == {family.name for family in FAMILIES}


@pytest.mark.parametrize(
    "exclude, names, expected",
    [
        (None, [], None),
        (None, ["a.b"], ["a.b"]),
        (["c"], ["a.b"], ["c", "a.b"]),
        (r".*\.c", [], r".*\.c"),
        (r".*\.c", ["a.b"], r"(.*\.c)|(a\.b)"),
    ],
)
def test_dead_layers_join_what_the_user_excludes(exclude: object, names: list[str], expected: object) -> None:
    assert excluding(exclude, names) == expected  # type: ignore[arg-type]


if __name__ == "__main__":
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(START)
    PAGE.write_text(before + START + f"\n{table()}\n\n" + END + rest.partition(END)[2], encoding="utf-8")
