"""`delora evaluate`: what is compared with what, what is written, what is refused."""

from __future__ import annotations

import csv
import json
import sys
import types
from pathlib import Path
from typing import Any
from urllib.error import URLError

import diffusers
import pytest
import torch
import transformers
from PIL import Image

from delora_diffusion import DeloraConfig, inject_delora, save_delora_weights
from delora_diffusion.cli import main
from delora_diffusion.data.image_files import load_image
from delora_diffusion.evaluation.encoders import embed_images, embed_texts, load_encoder
from delora_diffusion.evaluation.images import Picture, batches_of
from delora_diffusion.evaluation.metrics import bootstrap
from delora_diffusion.evaluation.scores import METRICS
from delora_diffusion.reports.table import Figure, Row, comma_separated, markdown, mean_row, read_report

from .. import tiny

POCKET = Path(__file__).parents[2] / "samples" / "pocket"
ENCODERS = (f"--dino={POCKET / 'vit'}", f"--clip={POCKET / 'clip'}")
REAL = POCKET / "subjects" / "spotted_dog"
HOLDOUT = POCKET / "subjects" / "mantel_clock"


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of the tiny base, strong enough to be seen."""
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(base)
    config = DeloraConfig(r=2, delora_lambda=5.0, init_weights="kaiming")
    inject_delora(pipe.unet, config, generator=torch.Generator().manual_seed(0))
    folder = tmp_path_factory.mktemp("adapter") / "mine"
    save_delora_weights(folder, pipe, provenance={"base_model": str(base)})
    return folder


def evaluate(out: Path, *arguments: object, code: int = 0) -> tuple[dict[tuple[str, float | None], Row], Any]:
    """Run the command; returns its rows by name and strength, and the protocol."""
    common = [f"--real={REAL}", f"--output_dir={out}", "--num_inference_steps=2"]
    assert main(["evaluate", *common, *map(str, arguments)]) == code
    if code:
        assert not (out / "evaluation.md").exists()
        return {}, {}
    rows, protocol = read_report(out / "evaluation.json")
    return {(row.name, row.strength): row for row in rows}, protocol


def cosine(one: list[Path], other: list[Path]) -> float:
    """Mean cosine of all pairs, from transformers alone."""
    vit = transformers.ViTModel.from_pretrained(POCKET / "vit", add_pooling_layer=False, dtype=torch.float32)
    process = transformers.AutoImageProcessor.from_pretrained(POCKET / "vit", backend="pil")
    with torch.no_grad():
        a, b = (
            vit(**process([load_image(p) for p in paths], return_tensors="pt")).last_hidden_state[:, 0]
            for paths in (one, other)
        )
    return float(torch.nn.functional.cosine_similarity(a[:, None], b[None], dim=-1).mean())


def test_a_folder_of_photos_is_measured_as_by_hand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for number, path in enumerate((REAL / "00.jpg", HOLDOUT / "00.jpg")):
        (images / f"{number}.jpg").write_bytes(path.read_bytes())
    rows, protocol = evaluate(tmp_path / "out", f"--images={images}", f"--holdout={HOLDOUT}", *ENCODERS)
    mine, real, held = sorted(images.iterdir()), sorted(REAL.iterdir()), sorted(HOLDOUT.iterdir())
    figures = rows["images", None].figures
    assert figures["dino"].value == pytest.approx(cosine(mine, real), abs=1e-4)
    assert figures["dino_holdout"].value == pytest.approx(cosine(mine, held), abs=1e-4)
    assert set(figures) == {"dino", "dino_holdout", "clip_i", "clip_i_holdout"}  # no prompts, so nothing more
    photos, held_out = rows["training photos", None].figures, rows["held-out photos", None].figures
    assert photos["dino"].value == pytest.approx((25 * cosine(real, real) - 5) / 20, abs=1e-4)
    assert photos["dino_holdout"].value == pytest.approx(cosine(real, held), abs=1e-4)
    assert held_out["dino"].value == pytest.approx(cosine(real, held), abs=1e-4)
    assert held_out["dino_holdout"].value == pytest.approx((25 * cosine(held, held) - 5) / 20, abs=1e-4)
    assert protocol["training photos"]["count"] == 5 and protocol["DINO encoder"]["resample"] == "bilinear"
    shown = capsys.readouterr().out
    assert (tmp_path / "out" / "evaluation.md").read_text().splitlines()[0] in shown
    assert "class token of the last hidden state" in shown
    assert "DINO and CLIP-I: mean cosine of every" in shown and "CLIP-T: mean cosine" in shown


@pytest.fixture(scope="module")
def drawn(adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[Any, Row], Any]:
    """An evaluation of the adapter at three strengths."""
    out = tmp_path_factory.mktemp("drawn")
    (out / "unrelated.txt").write_text("a cat\na cow\n")
    rows, protocol = evaluate(out, *arguments(adapter, out))
    return out, rows, protocol


def arguments(adapter: Path, out: Path) -> list[object]:
    return [f"--adapter={adapter}", "--prompts", "sks dog", "red sks", "--seeds", 0, 1, "--strengths", 0, 0.5, 1,
            f"--unrelated_prompts_file={out / 'unrelated.txt'}", *ENCODERS]  # fmt: skip


def test_an_adapter_is_drawn_and_measured_at_every_strength(drawn: tuple[Path, dict[Any, Row], Any]) -> None:
    out, rows, protocol = drawn
    assert list(rows) == [("training photos", None), ("mine", 0.0), ("mine", 0.5), ("mine", 1.0)]
    for strength in (0.0, 0.5, 1.0):
        row = rows["mine", strength]
        assert row.images == 4 and set(row.figures) == {"dino", "clip_i", "clip_t", "drift", "diversity"}
        assert row.figures["drift"].count == 4 and row.figures["diversity"].count == 2
        assert all(figure.low <= figure.value <= figure.high for figure in row.figures.values())
    assert rows["mine", 0.0].figures["drift"].value == pytest.approx(0, abs=1e-6)
    assert 0.001 < rows["mine", 0.5].figures["drift"].value < rows["mine", 1.0].figures["drift"].value
    assert protocol["prompts"] == ["sks dog", "red sks"] and protocol["unrelated prompts"] == ["a cat", "a cow"]
    assert "\n* seeds: 0, 1\n" in (out / "evaluation.md").read_text()
    assert protocol["seeds"] == [0, 1] and protocol["drawing"]["num_inference_steps"] == "2"
    assert protocol["drawing"]["guidance_scale"] == "the base's own"
    assert protocol["drawing"]["negative_prompt"] == "none"
    assert protocol["measured with"]["transformers"] == transformers.__version__
    with (out / "evaluation.csv").open() as file:
        table = list(csv.DictReader(file))
    assert float(table[3]["drift"]) == rows["mine", 1.0].figures["drift"].value
    assert float(table[3]["drift_low"]) == rows["mine", 1.0].figures["drift"].low


def test_the_measures_are_those_of_the_images_drawn(drawn: tuple[Path, dict[Any, Row], Any]) -> None:
    out, rows, _ = drawn
    vit, clip = (load_encoder(POCKET / name, device="cpu") for name in ("vit", "clip"))

    def opened(folder: str, **wanted: object) -> list[Image.Image]:
        lines = [json.loads(line) for line in (out / folder / "manifest.jsonl").read_text().splitlines()]
        chosen = [line for line in lines if all(line[name] == value for name, value in wanted.items())]
        return [Image.open(out / folder / line["file"]) for line in chosen]

    figures = rows["mine", 1.0].figures
    said = embed_texts(clip, ["dog", "red"])
    shown = [embed_images(clip, opened("subject", strength=1.0, prompt=p)) for p in ("sks dog", "red sks")]
    scores = torch.cat([images @ text for images, text in zip(shown, said, strict=True)])
    assert figures["clip_t"].value == pytest.approx(float(scores.mean()), abs=1e-5)
    whole_prompts = bootstrap(scores, seed=0, groups=["sks dog", "sks dog", "red sks", "red sks"])
    assert (figures["clip_t"].low, figures["clip_t"].high) == pytest.approx(whole_prompts, abs=1e-5)
    assert whole_prompts != pytest.approx(bootstrap(scores, seed=0), abs=1e-3)
    base, adapted = (embed_images(vit, opened(f, strength=s)) for f, s in (("base", None), ("unrelated", 1.0)))
    assert figures["drift"].value == pytest.approx(float((1 - (base * adapted).sum(-1)).mean() / 2), abs=1e-5)
    pairs = [embed_images(vit, opened("subject", strength=1.0, prompt=p)) for p in ("sks dog", "red sks")]
    apart = [1 - float(pair[0] @ pair[1]) for pair in pairs]
    assert figures["diversity"].value == pytest.approx(sum(apart) / 2, abs=1e-5)


def test_a_second_run_draws_nothing_and_says_the_same(drawn: tuple[Path, dict[Any, Row], Any], adapter: Path) -> None:
    out, rows, protocol = drawn
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*_*.png") if path.stem != "contact_sheet"}
    again, told = evaluate(out, *arguments(adapter, out))
    assert again == rows and told == protocol
    assert {path: path.stat().st_mtime_ns for path in before} == before and len(before) == 12 + 4 + 12


def test_a_manifest_gives_the_same_as_the_adapter(drawn: tuple[Path, dict[Any, Row], Any], tmp_path: Path) -> None:
    out, rows, _ = drawn
    both = tmp_path / "both"
    both.mkdir()
    lines = []
    for folder in ("subject", "unrelated", "base"):
        lines += (out / folder / "manifest.jsonl").read_text().splitlines()
        for path in (out / folder).glob("*.png"):
            (both / path.name).write_bytes(path.read_bytes())
    (both / "manifest.jsonl").write_text("\n".join(lines) + "\n")
    found, _ = evaluate(tmp_path / "a", "--images", both, *ENCODERS)
    assert found["both", 1.0].figures == rows["mine", 1.0].figures
    found, _ = evaluate(tmp_path / "b", "--images", both / "manifest.jsonl", ENCODERS[1])
    assert set(found["manifest.jsonl", 1.0].figures) == {"clip_i", "clip_t", "drift", "diversity"}


def test_drift_pairs_only_images_that_were_drawn_alike() -> None:
    def picture(prompt: str, seed: int, adapter: str | None, strength: float | None = 1.0, steps: int = 2) -> Picture:
        settings = {"prompt": prompt, "seed": seed, "adapter": adapter, "num_inference_steps": steps, "file": "x",
                    "adapter_hash": adapter, "strength": strength if adapter else None}  # fmt: skip
        return Picture(Path(f"{prompt}-{seed}-{adapter}-{strength}-{steps}"), settings)

    base = [picture("a cat", 0, None), picture("a cat", 1, None), picture("a cat", 2, None, steps=4)]
    mine = [picture("a cat", seed, "mine") for seed in (2, 1, 0)]
    (batch,) = batches_of([*base, *mine, picture("a sks", 0, "mine")], name="x", token="sks")
    assert [(a.path.name, b.path.name) for a, b in batch.pairs] == [
        ("a cat-1-None-1.0-2", "a cat-1-mine-1.0-2"), ("a cat-0-None-1.0-2", "a cat-0-mine-1.0-2"),
    ]  # fmt: skip
    zero = [picture("a cat", 0, "mine", 0), picture("a sks", 0, "mine", 0), picture("a sks", 0, "other")]
    batches = batches_of([*zero, *mine, picture("a sks", 0, "mine")], name="x", token="sks")
    assert [(b.name, b.strength, len(b.pairs)) for b in batches] == [
        ("x, mine", 0, 1), ("x, other", 1.0, 0), ("x, mine", 1.0, 1),
    ]  # fmt: skip


def test_an_adapter_that_was_trained_again_is_another_row() -> None:
    pictures = [
        Picture(Path(f"{content}.png"), {"prompt": "a sks", "seed": 0, "adapter": "runs/mine", "strength": 1.0,
                                         "adapter_hash": content * 8})
        for content in "ab"
    ]  # fmt: skip
    found = batches_of(pictures, name="x", token="sks")
    assert [(batch.name, [p.path.name for p in batch.pictures]) for batch in found] == [
        ("x, mine (aaaaaa)", ["a.png"]), ("x, mine (bbbbbb)", ["b.png"]),
    ]  # fmt: skip


def test_lpips_is_an_extra(tmp_path: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch,
                           capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    some = (f"--adapter={adapter}", "--prompts=sks", "--seeds", 0, 1, 2, ENCODERS[0], "--lpips")
    monkeypatch.setitem(sys.modules, "lpips", None)
    evaluate(tmp_path / "none", *some, code=1)
    assert 'pip install "delora_diffusion[lpips]"' in capsys.readouterr().err
    assert not (tmp_path / "none").exists()

    broken = types.SimpleNamespace(LPIPS=lambda net, verbose: (_ for _ in ()).throw(URLError("no network")))
    monkeypatch.setitem(sys.modules, "lpips", broken)
    evaluate(tmp_path / "none", *some, code=1)
    assert "no network>. It needs a torchvision that fits torch" in capsys.readouterr().err

    class Network(torch.nn.Module):  # what lpips.LPIPS is given: one pair of (1, 3, h, w) in -1 .. 1
        def forward(self, one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
            assert one.shape == other.shape == (1, 3, 16, 16) and -1 <= one.min() < 0 < one.max() <= 1
            return (one - other).abs().mean().view(1, 1, 1, 1)

    fake = types.SimpleNamespace(LPIPS=lambda net, verbose: Network())
    monkeypatch.setitem(sys.modules, "lpips", fake)
    (tmp_path / "u.txt").write_text("a cat")
    rows, _ = evaluate(tmp_path / "out", *some, f"--unrelated_prompts_file={tmp_path / 'u.txt'}")
    images = [tiny.as_array(Image.open(p)) for p in (tmp_path / "out" / "subject").glob("sks_*.png")]
    apart = [abs(images[i] - images[j]).mean() / 127.5 for i, j in ((0, 1), (0, 2), (1, 2))]
    assert rows["mine", 1.0].figures["lpips"].value == pytest.approx(sum(apart) / 3, abs=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--images=nowhere",), "images nowhere does not exist"),
        (("--images=nowhere.jsonl",), "give a folder, or a manifest"),
        ((f"--images={REAL}", "--holdout=nowhere"), "holdout nowhere does not exist"),
        ((f"--images={REAL}", f"--dino={POCKET / 'clip'}"), "is a CLIPModel, given as dino; give it as clip"),
        ((f"--images={REAL}", f"--dino={POCKET / 'base'}"), "there is no encoder"),
        (("--adapter=x", "--prompts=a dog"), "'a dog' lacks the rare word 'sks'"),
        (("--adapter=x", "--prompts=a v1", "--trigger_token=v1", "--unrelated_prompts_file=PROMPTS"), "take it out"),
    ],
)
def test_refuses_what_cannot_be_measured(
    arguments: tuple[str, ...], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompts.txt").write_text("a v1 cat\n")
    evaluate(tmp_path / "out", ENCODERS[0], *(a.replace("PROMPTS", f"{tmp_path}/prompts.txt") for a in arguments),
             code=1)  # fmt: skip
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((ENCODERS[0],), "nothing to evaluate"),
        (("--images=x",), "no encoder; give --dino"),
        (("--images=x", ENCODERS[0], "--prompts=a sks"), "do nothing without adapter"),
        (("--adapter=x", ENCODERS[0]), "no prompts to draw with the adapter"),
        (("--images=x", ENCODERS[0], "--real="), "real is missing"),
        (("--images=x", ENCODERS[0], "--trigger_token="), "trigger_token is empty"),
    ],
)
def test_refuses_options(
    arguments: tuple[str, ...], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        evaluate(tmp_path, *arguments)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("", "is empty"),
        ("{}", "line 1 is no line of `delora sample`"),
        ('{"file": "gone.png", "prompt": "a sks"}', "lists gone.png, which is missing"),
    ],
)
def test_refuses_a_damaged_manifest(
    lines: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "manifest.jsonl").write_text(lines)
    evaluate(tmp_path / "out", f"--images={tmp_path}", ENCODERS[0], code=1)
    assert message in capsys.readouterr().err


def test_a_manifest_without_the_rare_word_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny.photos(tmp_path / "images", 1)
    (tmp_path / "images" / "manifest.jsonl").write_text('{"file": "00.png", "prompt": "a v1 dog"}')
    evaluate(tmp_path / "out", f"--images={tmp_path / 'images'}", ENCODERS[0], code=1)
    assert "no prompt of images has the rare word 'sks': 'a v1 dog'" in capsys.readouterr().err


def test_the_mean_over_subjects_counts_each_once() -> None:
    rows = [
        Row(name="a", strength=1.0, images=100, figures={"dino": Figure(value=0.2, low=0, high=1, count=100)}),
        Row(name="b", strength=1.0, images=2, figures={"dino": Figure(value=0.4, low=0, high=1, count=2)}),
    ]
    row = mean_row("mean", rows)
    figure = row.figures["dino"]
    assert (row.images, figure.count, figure.value) == (102, 2, pytest.approx(0.3))
    assert figure.high - figure.value == pytest.approx(1.96 * 0.1)  # s = .1414, over sqrt(2)
    alone = mean_row("mean", rows[:1])
    assert "| 0.200 |" in markdown([alone], METRICS)
    nothing = Row(
        name="a", strength=1.0, images=1, figures={"drift": Figure(value=-1e-9, low=-0.0004, high=0.0006, count=1)}
    )
    assert "| 0.000 [0.000, 0.001] |" in markdown([nothing], METRICS)
    assert comma_separated(rows, METRICS).splitlines()[1:] == ["a,1.0,100,0.2,0,1,100", "b,1.0,2,0.4,0,1,2"]
