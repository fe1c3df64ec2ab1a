"""Figures of previews, the best adapter, patience: by hand, and through the real script."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from diffusers import StableDiffusionPipeline
from PIL import Image

from delora_diffusion import DeloraConfig, inject_delora, read_adapter, update_norms
from delora_diffusion.evaluation.choose import BestPreview, best_preview, score_of
from delora_diffusion.evaluation.encoders import EncoderError, embed_images, embed_texts, load_encoder
from delora_diffusion.evaluation.scorer import Scorer, photo_figures, preview_figures
from delora_diffusion.evaluation.scores import METRIC
from delora_diffusion.method.state import current_lambdas
from delora_diffusion.options import OptionError
from delora_diffusion.run_folder import ADAPTER_NAME, LORA_NAME, RunFolder
from delora_diffusion.sampling.generate import Prompts
from delora_diffusion.training import best as best_module
from delora_diffusion.training import preview as preview_module
from delora_diffusion.training.best import Best, preview_protocol, preview_scorer, read_best
from delora_diffusion.training.config import ValidationConfig
from delora_diffusion.training.log import PreviewResult, TrainingLog, block_names, figures_by_step, read_log
from delora_diffusion.training.preview import Previews

from ..runs import Run, same, tensors

POCKET = Path(__file__).parents[2] / "samples" / "pocket"
VIT, CLIP, SUBJECT = POCKET / "vit", POCKET / "clip", POCKET / "subjects" / "spotted_dog"
ENCODERS = (f"--validation_dino={VIT}", f"--validation_clip={CLIP}")
WATCHED = (*ENCODERS, "--validation_prompt", "a sks dog", "a sks cat", "--num_validation_images=1",
           "--validation_steps=2", "--lambda_warmup_steps=3", "--validation_world_prompt=a cow",
           "--delora_lambda=4", "--direction_turn=0")  # fmt: skip
PHOTOS = sorted(SUBJECT.iterdir())


def picture(seed: int, size: int = 40) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8))


def scorer_of(photos: list[Path], *, dino: str | None, clip: str | None, holdout: str | None = None) -> Scorer:
    options = {"validation_dino": dino, "validation_clip": clip, "validation_holdout_dir": holdout}
    return preview_scorer(ValidationConfig(validation_prompt=["a sks dog"], **options), photos)  # type: ignore[arg-type]


# ---- figures


def test_figures_are_those_of_the_definitions() -> None:
    """Likeness: mean of all cosines. Prompt following: each with its own prompt. Drift: (1 - cos) / 2, paired. A
    preview that does not ask for the subject is not measured."""
    images, prompts = [picture(0), picture(1), picture(2)], ["a sks dog on the beach", "a cat", "a sks dog"]
    base, others = [picture(3), picture(4)], [picture(5), picture(4)]
    scorer = scorer_of(PHOTOS[:3], dino=str(VIT), clip=str(CLIP))
    made = preview_figures(scorer, images, prompts, unrelated=others, base=base)
    vit, clip = load_encoder(VIT, device="cpu"), load_encoder(CLIP, device="cpu")
    photos = [Image.open(path).convert("RGB") for path in PHOTOS[:3]]
    of_subject = [images[0], images[2]]
    g, r = embed_images(vit, of_subject), embed_images(vit, photos)
    x, y = embed_images(clip, of_subject), embed_texts(clip, ["a dog on the beach", "a dog"])
    b, a = embed_images(vit, base), embed_images(vit, others)
    assert made["dino"] == pytest.approx(np.mean([float(p @ q) for p in g for q in r]), abs=1e-5)
    assert made["clip_t"] == pytest.approx(np.mean([float(x[i] @ y[i]) for i in range(2)]), abs=1e-5)
    assert made["drift"] == pytest.approx((1 - float(b[0] @ a[0])) / 4, abs=1e-5), "the second pair did not move"
    assert made["drift"] > 0.001 and set(made) == {"dino", "clip_i", "clip_t", "drift"}


def test_held_out_photos_and_single_encoders_have_figures_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "held.jpg").write_bytes(PHOTOS[4].read_bytes())
    scorer = scorer_of(PHOTOS[:4], dino=str(VIT), clip=None, holdout=str(tmp_path))
    shown = [Image.open(PHOTOS[4])]
    made = preview_figures(scorer, shown, ["a sks dog"], unrelated=[], base=[])
    assert set(made) == {"dino", "dino_holdout"} and made["dino"] < 0.99
    assert made["dino_holdout"] == pytest.approx(1, abs=1e-5)
    only_clip = scorer_of(PHOTOS, dino=None, clip=str(CLIP))
    made = preview_figures(only_clip, shown, ["a sks dog"], unrelated=[picture(0)], base=[picture(0)])
    assert set(made) == {"clip_i", "clip_t", "drift"} and made["drift"] == pytest.approx(0, abs=1e-6)


def test_photos_score_against_one_another_against_the_held_out_and_with_their_captions(tmp_path: Path) -> None:
    (tmp_path / "held.jpg").write_bytes(PHOTOS[3].read_bytes())
    scorer = scorer_of(PHOTOS[:3], dino=str(VIT), clip=str(CLIP), holdout=str(tmp_path))
    made = photo_figures(scorer, ["a sks dog", "a sks dog on grass", "a dog"])
    vit, clip = load_encoder(VIT, device="cpu"), load_encoder(CLIP, device="cpu")
    opened = [Image.open(path).convert("RGB") for path in PHOTOS[:4]]
    r, x, y = embed_images(vit, opened), embed_images(clip, opened), embed_texts(clip, ["a dog", "a dog on grass"])
    assert made["dino"] == pytest.approx(np.mean([float(r[i] @ r[j]) for i, j in ((0, 1), (0, 2), (1, 2))]), abs=1e-5)
    assert made["dino_holdout"] == pytest.approx(np.mean([float(r[i] @ r[3]) for i in range(3)]), abs=1e-5)
    assert made["clip_t"] == pytest.approx(float(x[0] @ y[0] + x[1] @ y[1] + x[2] @ y[0]) / 3, abs=1e-5)
    assert set(made) == {"dino", "dino_holdout", "clip_i", "clip_i_holdout", "clip_t"}
    alone = scorer_of(PHOTOS[:1], dino=str(VIT), clip=None)
    assert photo_figures(alone, ["a sks dog"]) == {}


def test_an_encoder_of_the_other_kind_is_refused() -> None:
    with pytest.raises(EncoderError, match="CLIPModel, given as dino; give it as clip"):
        scorer_of(PHOTOS, dino=str(CLIP), clip=None)


# ---- the rule


def test_rules_go_by_the_photos_training_never_saw_and_by_dino() -> None:
    figures = {"dino": 0.9, "dino_holdout": 0.7, "clip_i": 0.95, "drift": 0.1}
    assert score_of(figures, "fidelity") == 0.7
    assert score_of(figures, "balanced") == pytest.approx(0.5)
    assert score_of({"clip_i": 0.8, "drift": 0.05}, "balanced") == pytest.approx(0.7)


@pytest.mark.parametrize(
    ("scores", "found"),
    [
        ({}, None),
        ({0: 0.9}, None),
        ({0: 0.9, 10: 0.1}, BestPreview(10, 0.1, 0)),
        ({0: 0.9, 10: 0.5, 20: 0.6, 30: 0.6, 40: 0.2}, BestPreview(20, 0.6, 2)),
        ({40: 0.2, 20: 0.6, 10: 0.5}, BestPreview(20, 0.6, 1)),
    ],
)
def test_the_best_is_the_earliest_of_the_highest_after_the_first_step(
    scores: dict[int, float], found: BestPreview | None
) -> None:
    assert best_preview({step: {"dino": score} for step, score in scores.items()}, "fidelity") == found


def test_rules_choose_different_steps() -> None:
    history = {10: {"dino": 0.6, "drift": 0.02}, 20: {"dino": 0.7, "drift": 0.1}}
    assert best_preview(history, "fidelity") == BestPreview(20, 0.7, 0)
    assert best_preview(history, "balanced") == BestPreview(10, pytest.approx(0.56), 1)


def looks_of(
    folder: Path, scores: list[float], monkeypatch: pytest.MonkeyPatch, *, start: int = 0, protocol: str = "p"
) -> list[PreviewResult]:
    """Look at a preview every 10 steps from `start`, with these fidelities; each look is logged as training does."""
    training_log, looks = TrainingLog(folder / "log.jsonl", start), []

    def save(aside: Path, step: int) -> None:
        (aside / "adapter").write_text(str(step))

    scorer = scorer_of(PHOTOS[:1], dino=str(VIT), clip=None)
    best = Best(
        scorer=scorer, prompts=[], base=[], folder=folder, protocol=protocol, rule="fidelity", patience=2, save=save
    )
    for number, score in enumerate(scores):
        monkeypatch.setattr(best_module, "preview_figures", lambda *args, score=score, **kwargs: {"dino": score})
        looks.append(best.measure(start + 10 * number, [], []))
        training_log.measured(start + 10 * number, looks[-1])
        if looks[-1].enough:
            break
    return looks


def test_the_best_is_kept_and_patience_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looks = looks_of(tmp_path, [0.9, 0.3, 0.5, 0.4, 0.5, 0.8], monkeypatch)
    assert [look.enough for look in looks] == [False, False, False, False, True]
    assert [look.kept for look in looks] == [False, True, True, False, False]
    assert read_best(tmp_path) == {"step": 20, "rule": "fidelity", "score": 0.5, "dino": 0.5}
    assert (tmp_path / "best" / "adapter").read_text() == "20"


@pytest.mark.parametrize("start", [10, 20, 30, 40])
def test_patience_and_the_best_go_on_after_a_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start: int
) -> None:
    scores = [0.9, 0.3, 0.5, 0.4, 0.5, 0.8]
    looks_of(tmp_path, scores, monkeypatch)
    log = (tmp_path / "log.jsonl").read_bytes()
    looks = looks_of(tmp_path, scores[start // 10 :], monkeypatch, start=start)
    assert looks[-1].enough and start + 10 * (len(looks) - 1) == 40
    assert (tmp_path / "log.jsonl").read_bytes() == log and (tmp_path / "best" / "adapter").read_text() == "20"


def test_figures_of_other_prompts_or_encoders_are_not_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks_of(tmp_path, [0.9, 0.3, 0.8], monkeypatch)
    looks_of(tmp_path, [0.2, 0.1], monkeypatch, start=30, protocol="q")
    assert read_best(tmp_path) == {"step": 30, "rule": "fidelity", "score": 0.2, "dino": 0.2}


def test_the_protocol_is_of_prompts_encoders_and_photos_and_not_of_what_follows() -> None:
    shown = {"validation_prompt": ["a sks dog"], "validation_dino": "x"}

    def named(photos: list[Path] = PHOTOS[:2], clip: str | None = None, **options: object) -> str:
        scorer = scorer_of(photos, dino=str(VIT), clip=clip)
        return preview_protocol(scorer, ValidationConfig(**{**shown, **options}))  # type: ignore[arg-type]

    same = named()
    assert named(patience=3, validation_dino="elsewhere", validation_steps=7) == same
    others = [
        named(validation_prompt=["a sks"]), named(num_validation_images=1), named(validation_world_prompt=["a cow"]),
        named(validation_guidance_scale=1.0), named(clip=str(CLIP)), named(PHOTOS[2:3]),
    ]  # fmt: skip
    assert same not in others and len(set(others)) == len(others)


# ---- the log


def test_blocks_are_the_first_part_and_its_number_or_ranges() -> None:
    unet = ["down_blocks.0.attentions.1.to_q", "mid_block.attentions.0.to_q", "up_blocks.3.attentions.0.to_q"]
    assert list(block_names(unet).values()) == ["down_blocks.0", "mid_block", "up_blocks.3"]
    flux = [f"transformer_blocks.{number}.attn.to_q" for number in range(19)] + ["proj"]
    made = block_names(flux)
    assert list(dict.fromkeys(made.values())) == [
        *(f"transformer_blocks.{span}" for span in ("0-4", "5-9", "10-14", "15-18")), "proj",
    ]  # fmt: skip
    assert made["transformer_blocks.14.attn.to_q"] == "transformer_blocks.10-14"
    assert set(block_names([f"blocks.{number}" for number in range(9)]).values()) == {
        "blocks.0-2", "blocks.3-5", "blocks.6-8"
    }  # fmt: skip


def test_a_line_of_the_log_has_the_mean_of_each_block(tmp_path: Path) -> None:
    model = torch.nn.ModuleDict({"a": torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)),
                                 "b": torch.nn.Linear(8, 8)})  # fmt: skip
    config = DeloraConfig(r=2, target_modules="all-linear", init_weights="kaiming", lambda_pattern={"b": 3.0})
    inject_delora(model, config, generator=torch.Generator().manual_seed(0))
    norms = update_norms(model)
    training_log = TrainingLog(tmp_path / "log.jsonl", 0)
    training_log.add(1, [0.5], [1e-3], model, line=True)
    (line,) = read_log(tmp_path / "log.jsonl")
    assert line == training_log.fresh and line["lambda/b"] == 3.0
    assert line["update_norm/b"] == pytest.approx(norms["b"], abs=1e-6)
    assert line["update_norm/a.1"] == pytest.approx(norms["a.1"], abs=1e-6)
    assert line["update_norm"] == pytest.approx(sum(norms.values()) / 3, abs=1e-6)


def test_lambda_is_told_at_the_strength_of_the_ramp() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    inject_delora(model, DeloraConfig(r=2, delora_lambda=2.0, target_modules="all-linear"))
    model[0].delora["default"].delora_weight.fill_(0.25)  # type: ignore[index, union-attr, operator]
    assert current_lambdas(model) == {"0": 0.5}


def test_names_of_figures_in_a_row_have_no_commas_of_their_own() -> None:
    assert METRIC["dino_holdout"].in_a_row == "DINO held-out" and METRIC["drift"].in_a_row == "drift"


def test_lines_that_cannot_be_read_are_left_out_and_all_but_a_cut_off_end_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "dino": 0.5}\n{"step": 1')
    assert [line["step"] for line in read_log(path)] == [1, 2]
    assert figures_by_step(read_log(path)) == {2: {"dino": 0.5}}
    assert not caplog.text
    path.write_bytes(b'{"step": 1, "lo\xff\n{"step": 2, "dino": 0.5}\n[]\n{"loss": 1}\n{"step": 4, "loss": 1.0}\n')
    assert [line["step"] for line in read_log(path)] == [2, 4]
    assert [line for line in (1, 3, 4) if f"line {line} cannot be read" in caplog.text] == [1, 3, 4]


def test_a_resumed_log_drops_what_comes_after_and_the_preview_that_is_looked_at_again(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    lines = [{"step": 4, "loss": 1.0}, {"step": 4, "dino": 0.4}, {"step": 8, "loss": 0.9}, {"step": 8, "dino": 0.5}]
    for start, kept in ((8, lines[:3]), (6, lines[:2]), (0, [])):
        path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
        TrainingLog(path, start)
        assert read_log(path) == kept


# ---- through the script


def figures(folder: Path) -> dict[int, dict[str, float]]:
    return figures_by_step(read_log(folder / "log.jsonl"))


@pytest.mark.parametrize(
    "options", [(), ("--train_text_encoder", "--module_dropout=0.2", "--use_ema")], ids=["plain", "everything"]
)
def test_a_resumed_run_measures_and_keeps_the_same_bit_for_bit(run: Run, options: tuple[str, ...]) -> None:
    options = (*WATCHED, *options, "--keep_best=fidelity", "--checkpointing_steps=2")
    straight, resumed = run("straight", *options), run("resumed", *options)
    run("resumed", *options, "--resume_from_checkpoint=checkpoint-2")  # which is drawn again
    assert figures(resumed) == figures(straight) and list(figures(straight)) == [0, 2, 4, 6]
    assert read_best(resumed) == read_best(straight) is not None
    assert same(tensors(resumed / "best"), tensors(straight / "best"))
    assert same(tensors(resumed), tensors(straight))


def scripted(scores: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    """Previews with these fidelities, whatever they show."""
    left: Iterator[float] = iter(scores)
    monkeypatch.setattr(best_module, "preview_figures", lambda *args, **kwargs: {"dino": next(left), "drift": 0.0})


def test_patience_ends_a_run_cleanly_and_the_best_is_a_whole_adapter(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = (*WATCHED, "--max_train_steps=20")
    short = run("short", *WATCHED, "--max_train_steps=4")
    scripted([0.9, 0.5, 0.6, 0.55, 0.6, 0.1], monkeypatch)
    out = run("out", *options, "--patience=2", "--checkpointing_steps=2")
    assert list(figures(out)) == [0, 2, 4, 6, 8]
    assert read_adapter(out).provenance["steps"] == "8" and (out / "before_after.png").is_file()
    best = read_best(out)
    assert best is not None and (best["step"], best["rule"], best["score"]) == (4, "balanced", 0.6)
    assert read_adapter(out / "best").provenance["steps"] == "4"
    assert same(tensors(out / "best"), tensors(short)), "what four steps of training give"
    final, kept = tensors(out), tensors(out / "best")
    scripted([0.55, 0.6, 0.1], monkeypatch)  # the previews of steps 6 and 8 again
    run("out", *options, "--patience=2", "--resume_from_checkpoint=checkpoint-6")
    assert list(figures(out)) == [0, 2, 4, 6, 8]
    assert same(tensors(out), final) and same(tensors(out / "best"), kept) and read_best(out) == best


def test_no_picture_is_drawn_twice(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[object] = []
    original = preview_module.generate

    def counted(pipe: object, prompts: list[object], seeds: list[int], **settings: object) -> list[Image.Image]:
        drawn.extend(seeds)
        return original(pipe, prompts, seeds, **settings)  # type: ignore[arg-type]

    monkeypatch.setattr(preview_module, "generate", counted)
    run("out", *WATCHED, "--validation_steps=3", "--strength_sheet=0.5,1")
    looks, prompts, world = 3, 2, 1
    assert len(drawn) == looks * prompts + world + (looks - 1) * world + (prompts + world)


def test_every_preview_is_told_in_a_line_and_is_not_counted_as_time_of_training(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = Previews.draw

    def slow(previews: Previews, count: int) -> object:
        time.sleep(3)
        return original(previews, count)

    monkeypatch.setattr(Previews, "draw", slow)
    out = run("out", *WATCHED, "--validation_steps=1", "--max_train_steps=1", "--keep_best=fidelity")
    (line,) = [line for line in read_log(out / "log.jsonl") if "loss" in line]
    assert 0 < line["seconds_per_step"] < 2, "without the three seconds of the first preview"
    told = [line for line in capsys.readouterr().err.replace("\r", "\n").splitlines() if line.startswith("step ")]
    by_step = figures(out)
    assert told == [
        f"step {step}: DINO {by_step[step]['dino']:.3f}, CLIP-I {by_step[step]['clip_i']:.3f}, "
        f"CLIP-T {by_step[step]['clip_t']:.3f}, drift {by_step[step]['drift']:.3f}{kept}"
        for step, kept in ((0, ""), (1, "; the best yet, kept in best/"))
    ]


def test_prompts_of_previews_may_lie_in_a_file(run: Run, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("# places\na sks dog\na sks cat\n")
    out = run("out", f"--validation_prompt={tmp_path / 'prompts.txt'}", *ENCODERS, "--validation_world_prompt=a cow",
              "--num_validation_images=1", "--max_train_steps=1")  # fmt: skip
    assert sorted(path.name for path in (out / "previews" / "step_000001").iterdir()) == ["0_0.png", "1_0.png"]
    assert yaml.safe_load((out / "config.yaml").read_text())["validation_prompt"] == ["a sks dog", "a sks cat"]
    (tmp_path / "prompts.txt").write_text("a dog\n")
    run("other", f"--validation_prompt={tmp_path / 'prompts.txt'}", *ENCODERS, code=1)


def test_previews_are_drawn_without_dropout_and_training_goes_on_with_it(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = StableDiffusionPipeline.from_pretrained(base)
    pipe.unet.train()
    modes: list[bool] = []
    monkeypatch.setattr(preview_module, "generate", lambda *args, **kwargs: modes.append(pipe.unet.training) or [])
    previews = Previews(
        pipe=pipe, run=RunFolder(tmp_path), config=ValidationConfig(validation_prompt=["a sks dog"]),
        shown=Prompts(texts=["a sks dog"]), unrelated=Prompts(texts=["a cow"]), size=16, seed=0,
    )  # fmt: skip
    previews.draw_unrelated()
    previews.draw(1)
    assert modes == [False, False] and pipe.unet.training and not pipe.text_encoder.training


def test_without_keeping_there_are_figures_but_no_best(run: Run) -> None:
    out = run("out", *WATCHED, "--keep_best=none", "--max_train_steps=2")
    assert len(figures(out)) == 2 and not (out / "best").exists()


def test_the_best_goes_with_the_run_that_is_replaced(run: Run) -> None:
    out = run("out", *WATCHED, "--max_train_steps=2")
    assert same(tensors(out / "best"), tensors(out))
    run("out", "--overwrite_output_dir", "--max_train_steps=1")
    assert sorted(path.name for path in out.iterdir()) == [
        "README.md", "config.yaml", ADAPTER_NAME, "log.jsonl", LORA_NAME, "training.png",
    ]  # fmt: skip


def test_figures_reach_the_tracker(run: Run) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = run("out", *WATCHED, "--report_to=tensorboard")
    folder = min((path.parent for path in out.rglob("events.out.tfevents.*")), key=lambda path: len(path.parts))
    events = EventAccumulator(str(folder))
    events.Reload()
    logged = {event.step: event.value for event in events.Scalars("drift")}
    assert logged == pytest.approx({step: told["drift"] for step, told in figures(out).items()}, abs=1e-6)
    assert "lambda/mid_block" in events.Tags()["scalars"]


# ---- refusals
SHOWN: dict[str, object] = {"validation_dino": "x", "validation_prompt": ["a sks dog"]}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patience": 2}, "patience need figures to go by; give an encoder: validation_dino"),
        ({"keep_best": "fidelity", "validation_holdout_dir": "x"}, "validation_holdout_dir and keep_best need"),
        ({"validation_dino": "x"}, "validation_dino look at the previews; give validation_prompt"),
        ({"strength_sheet": [1.0]}, "strength_sheet look at the previews"),
        ({**SHOWN, "patience": 0}, "patience is 0; it must be at least 1"),
        ({**SHOWN, "patience": 1, "keep_best": "none"}, "keep_best fid"),
        ({**SHOWN, "validation_world_prompt": []}, "keep_best fidelity"),
        ({**SHOWN, "validation_prompt": ["a v1 dog"]}, "the rare word 'sks' .'a v1 dog', ..."),
        ({**SHOWN, "trigger_token": ""}, "trigger_token is empty"),
        ({**SHOWN, "validation_world_prompt": ["a cow", "a sks cow"]}, "'a sks cow' has the rare word"),
        ({"validation_prompt": ["a"], "strength_sheet": [0.0, 1.0]}, "must be positive"),
    ],
)
def test_options_that_need_others_say_which(options: dict[str, object], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        ValidationConfig(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (("--validation_dino=no/such",), "there is no encoder no/such"),
        ((*ENCODERS, "--validation_holdout_dir=nowhere"), "validation_holdout_dir nowhere does not exist"),
        ((*ENCODERS, "--validation_world_prompt=none.txt"), "cannot read validation_world_prompt none.txt"),
    ],
)
def test_refusals_come_before_anything_is_written(
    run: Run, capsys: pytest.CaptureFixture[str], extra: tuple[str, ...], message: str
) -> None:
    out = run("out", "--validation_prompt=a sks dog", *extra, code=1)
    assert message in capsys.readouterr().err and not out.exists()
