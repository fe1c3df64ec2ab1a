"""The dial: which strength is recommended, the sheet at the end of training, evaluations over the dial."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml
from diffusers import StableDiffusionPipeline
from PIL import Image

from delora_diffusion import DeloraConfig, inject_delora
from delora_diffusion.cli import main
from delora_diffusion.data.image_files import load_image
from delora_diffusion.evaluation.choose import Measured, recommended, strength_text
from delora_diffusion.evaluation.encoders import embed_images, load_encoder
from delora_diffusion.evaluation.metrics import fidelity_scores
from delora_diffusion.method.inject import delora_adapters, set_delora_adapters
from delora_diffusion.reports.card import write_card
from delora_diffusion.reports.table import read_report
from delora_diffusion.run_folder import ADAPTER_NAME, RunFolder
from delora_diffusion.sampling.generate import Prompts
from delora_diffusion.training.config import ValidationConfig
from delora_diffusion.training.log import figures_by_step, read_log
from delora_diffusion.training.preview import Previews
from delora_diffusion.training.strength_sheet import draw_strengths

from ..runs import Run, same, tensors
from ..sampling.test_sample import adapters
from .test_best import CLIP, SUBJECT, VIT, WATCHED

__all__ = ["adapters"]  # a fixture

SHEET, TABLE = "strength_sheet.png", "strengths.json"


def rows(**likeness: float) -> list[Measured]:
    return [Measured(float(name[1:]) / 100, {"dino": value, "drift": 0.1}) for name, value in likeness.items()]


@pytest.mark.parametrize(
    ("measured", "chosen"),
    [
        (rows(s050=0.60, s075=0.686, s100=0.70, s125=0.69), 0.75),  # .686 = .98 x .70
        (rows(s050=0.60, s075=0.685, s100=0.70, s125=0.69), 1.0),
        (rows(s125=0.70, s100=0.70, s075=0.10), 1.0),
        (rows(s000=0.99, s100=0.5), 1.0),
        (rows(s050=-0.51, s100=-0.50), 0.5),
        (rows(s000=0.9), None),
        ([Measured(1.0, {})], None),
    ],
)
def test_the_smallest_strength_within_two_percent_of_the_best(measured: list[Measured], chosen: float | None) -> None:
    assert recommended(measured) == chosen


def test_the_card_says_which_strength_and_why_and_can_be_told_later(tmp_path: Path) -> None:
    text = strength_text(rows(s050=0.60, s075=0.69, s100=0.70), sheet=SHEET)
    assert "Recommended: **0.75**, the smallest strength whose fidelity (DINO) is within 2% of the best" in text
    assert "| **0.75** | 0.690 | 0.100 |" in text and f"![{SHEET}]({SHEET})" in text
    assert "DINO, CLIP-I: likeness to the photos, up to 1; drift: how far pictures of other" in text
    assert "One picture a prompt" in text and "One picture" not in strength_text(rows(s100=0.70))
    assert strength_text([Measured(1.0, {})]) == "" and SHEET in strength_text([Measured(1.0, {})], sheet=SHEET)
    told = {"base_model": "b", "trigger": "a sks dog", "pipeline": "P", "options": {}, "pictures": []}
    card = write_card(tmp_path, **told, strength=text, figures="| figures |")  # type: ignore[arg-type]
    assert text in card.read_text() and "## Figures\n\n| figures |" in card.read_text()
    plain = write_card(tmp_path, **told).read_text()  # type: ignore[arg-type]
    assert "## Strength" not in plain and "## Figures" not in plain


def test_training_ends_with_the_sheet_and_leaves_the_adapter_as_it_was(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = run("plain", *WATCHED)
    out = run("out", *WATCHED, "--strength_sheet=0.001,0.5,1")
    said = capsys.readouterr().err
    assert f"strength sheet: {out / SHEET}" in said and "Recommended: **" in said and "![" not in said
    assert same(tensors(out), tensors(plain)) and not (plain / SHEET).exists()
    told = json.loads((out / TABLE).read_text())
    tiny, half, full = told["strengths"]
    assert [row["strength"] for row in told["strengths"]] == [0.001, 0.5, 1.0]
    assert full["figures"] == figures_by_step(read_log(out / "log.jsonl"))[6], "the last preview, not drawn again"
    assert tiny["figures"]["drift"] < 1e-3 < half["figures"]["drift"] < full["figures"]["drift"]
    card = (out / "README.md").read_text()
    assert f"Recommended: **{told['recommended']:g}**" in card and "(training.png)" in card
    assert "| the base |" in card and "| this adapter, step 6 |" in card and "kept by balanced" in card
    assert "| the photos themselves |" in card
    with Image.open(out / SHEET) as sheet:
        assert sheet.width > 3 * 160 and sheet.height > 3 * 160


def test_strength_one_is_judged_by_the_first_picture_of_each_prompt_like_the_others(run: Run) -> None:
    out = run("out", *WATCHED, "--num_validation_images=2", "--strength_sheet=1", "--max_train_steps=1")
    (full,) = json.loads((out / TABLE).read_text())["strengths"]
    shown = [load_image(out / "previews" / "step_000001" / f"{row}_0.png") for row in (0, 1)]
    vit = load_encoder(VIT, device="cpu")
    config = yaml.safe_load((out / "config.yaml").read_text())
    photos = [load_image(path) for path in sorted(Path(config["instance_data_dir"]).iterdir())]
    expected = float(fidelity_scores(embed_images(vit, shown), embed_images(vit, photos)).mean())
    assert full["figures"]["dino"] == pytest.approx(expected, abs=1e-5)


def test_strengths_are_multiples_of_the_weight_the_adapter_has_which_it_keeps(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = StableDiffusionPipeline.from_pretrained(base)
    inject_delora(pipe.unet, DeloraConfig(r=2))
    set_delora_adapters(pipe.unet, "default", 0.8)

    def weight() -> float:
        return float(next(iter(delora_adapters(pipe.unet).values())).delora_weight)

    seen = []
    picture = Image.new("RGB", (16, 16))
    monkeypatch.setattr(Previews, "draw", lambda *_: seen.append(weight()) or [[picture]])
    previews = Previews(
        pipe=pipe,
        run=RunFolder(tmp_path),
        config=ValidationConfig(validation_prompt=["a sks dog"], strength_sheet=[0.5, 1.5]),
        shown=Prompts(texts=["a sks dog"]),
        unrelated=Prompts(texts=[]),
        size=16,
        seed=0,
    )
    draw_strengths(previews, {"unet": pipe.unet})
    assert seen == pytest.approx([0.4, 1.2]) and weight() == pytest.approx(0.8) and (tmp_path / SHEET).is_file()


def test_an_evaluation_over_the_dial_recommends_a_strength_in_the_card(
    adapters: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    card = write_card(adapters[0], base_model="b", trigger=None, pipeline="P", options={}, pictures=[])
    before = card.read_text()
    command = [
        "evaluate", f"--adapter={adapters[0]}", "--prompts=a sks dog", f"--output_dir={tmp_path}", f"--dino={VIT}",
        f"--clip={CLIP}", f"--real={SUBJECT}", "--strengths", "0,0.5,...,1", "--num_inference_steps=2",
    ]  # fmt: skip
    assert main(command) == 0
    rows, _ = read_report(tmp_path / "evaluation.json")
    scores = {row.strength: row.figures["dino"].value for row in rows if row.strength}
    chosen = min(s for s, score in scores.items() if score >= max(scores.values()) - 0.02 * abs(max(scores.values())))
    assert f"Recommended: **{chosen:g}**" in capsys.readouterr().err
    assert f"Recommended: **{chosen:g}**" in card.read_text()
    assert main(command) == 0 and card.read_text().count("Recommended:") == 1
    told = card.read_text().partition("<!-- strength -->")[2].partition("<!-- end")[0]
    assert card.read_text().replace(told, "\n") == before


def test_images_of_the_sampler_over_the_dial_recommend_a_strength_in_the_card_of_their_adapter(
    adapters: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine, other = tmp_path / "mine", tmp_path / "other"
    for folder in (mine, other):
        shutil.copytree(adapters[0], folder)
        write_card(folder, base_model="b", trigger=None, pipeline="P", options={}, pictures=[])
    drawing = ["--prompts=a sks dog", "--num_inference_steps=2", f"--output_dir={tmp_path / 's'}"]
    assert main(["sample", f"--adapter={mine}", *drawing, "--strengths", "0,0.5,...,1"]) == 0
    judging = ["evaluate", f"--images={tmp_path / 's'}", f"--dino={VIT}", f"--real={SUBJECT}"]
    assert main([*judging, f"--output_dir={tmp_path / 'e'}"]) == 0
    assert "Recommended: **" in (mine / "README.md").read_text()
    assert "Recommended: **" not in (other / "README.md").read_text()
    card = (other / "README.md").read_text()
    (mine / "README.md").write_text(card)
    shutil.copyfile(adapters[1] / ADAPTER_NAME, mine / ADAPTER_NAME)  # trained again since
    capsys.readouterr()
    assert main([*judging, f"--output_dir={tmp_path / 'e'}"]) == 0
    assert "Recommended: **" in capsys.readouterr().err and (mine / "README.md").read_text() == card
    shutil.copyfile(adapters[0] / ADAPTER_NAME, mine / ADAPTER_NAME)
    both = ["sample", "--adapter", str(mine), str(adapters[1]), *drawing, "--strengths", "0.5", "1"]
    assert main(both) == 0
    capsys.readouterr()
    assert main([*judging, f"--output_dir={tmp_path / 'e'}"]) == 0
    assert "Recommended: **" not in capsys.readouterr().err, "of which adapter?"
