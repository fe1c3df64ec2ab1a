"""`delora benchmark`: trains what is missing, draws what is missing, one table and one plot."""

from __future__ import annotations

import csv
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import yaml
from PIL import Image

from delora_diffusion import DeloraConfig, inject_delora, save_delora_weights
from delora_diffusion.adapters.read import read_adapter
from delora_diffusion.base.config import ModelConfig
from delora_diffusion.cli import main
from delora_diffusion.data.config import DataConfig
from delora_diffusion.data.prompts import DREAMBENCH_CLASSES, DREAMBENCH_LIVE
from delora_diffusion.evaluation import benchmark as module
from delora_diffusion.evaluation.benchmark import plan_tasks, table_of, train_missing
from delora_diffusion.evaluation.config import BenchmarkConfig, MeasuringConfig
from delora_diffusion.evaluation.plot import dial_plot
from delora_diffusion.options import OptionError, build, read_yaml
from delora_diffusion.reports.table import Figure, Row, read_report
from delora_diffusion.sampling.config import DrawingConfig
from delora_diffusion.training.config import AdapterConfig, TrainingConfig, ValidationConfig

from .. import tiny, tiny_families

ROOT = Path(__file__).parents[2]
POCKET = ROOT / "samples" / "pocket"
CONFIGS = ROOT / "train_scripts" / "configs"
SCRIPT = ROOT / "train_scripts" / "train_dreambooth_delora.py"
GROUPS = (BenchmarkConfig, MeasuringConfig, DrawingConfig)
TRAINING = (ModelConfig, AdapterConfig, DataConfig, TrainingConfig, ValidationConfig)


@pytest.fixture(scope="module")
def bench(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a benchmark of two subjects, one of them with an adapter, and its first run in out/."""
    folder = tmp_path_factory.mktemp("bench")
    for name in ("cat", "dog", "dog_held_out"):
        tiny.photos(folder / name, 3, seed=len(name))
    (folder / "dog_held_out" / "metadata.jsonl").write_text(
        "".join(f'{{"file_name": "0{n}.png", "text": "a sks dog{"!" * n}"}}\n' for n in range(3))
    )
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(base)
    config = DeloraConfig(r=2, delora_lambda=5.0, init_weights="kaiming")
    inject_delora(pipe.unet, config, generator=torch.Generator().manual_seed(0))
    save_delora_weights(folder / "given", pipe, provenance={"base_model": str(base)})
    training = {"pretrained_model_name_or_path": str(base), "resolution": 16, "rank": 2, "max_train_steps": 2}
    (folder / "training.yaml").write_text(yaml.safe_dump(training))
    (folder / "unrelated.txt").write_text("a cow\na car\n")
    (folder / "cat.txt").write_text("a sks cat\nsks\n")
    (folder / "dog.txt").write_text("a sks dog\na sks dog!!\n")
    told = {
        "subjects": {
            "cat": {"class_word": "cat", "photos": str(folder / "cat"), "prompts_file": str(folder / "cat.txt"),
                    "adapter": str(folder / "given")},
            "dog": {"class_word": "dog", "photos": str(folder / "dog"), "prompts_file": str(folder / "dog.txt"),
                    "holdout": str(folder / "dog_held_out")},
        },
        "train_script": str(SCRIPT), "train_config": str(folder / "training.yaml"),
        "dino": str(POCKET / "vit"), "clip": str(POCKET / "clip"),
        "unrelated_prompts_file": str(folder / "unrelated.txt"),
        "strengths": [0, 1], "seeds": [0, 1], "num_inference_steps": 2, "device": "cpu",
    }  # fmt: skip
    (folder / "bench.yaml").write_text(yaml.safe_dump(told))
    assert run(folder) == 0
    return folder


def run(folder: Path, *arguments: str) -> int:
    return main(["benchmark", f"--config={folder / 'bench.yaml'}", f"--output_dir={folder / 'out'}", *arguments])


def rows_of(folder: Path) -> dict[tuple[str, float | None], Row]:
    return {(row.name, row.strength): row for row in read_report(folder / "out" / "benchmark.json")[0]}


def test_one_table_with_the_means_and_a_row_for_every_subject(bench: Path) -> None:
    rows = rows_of(bench)
    assert list(rows) == [
        ("mean, training photos", None), ("mean, held-out photos", None), ("mean", 0.0), ("mean", 1.0),
        ("cat, training photos", None), ("cat", 0.0), ("cat", 1.0),
        ("dog, training photos", None), ("dog, held-out photos", None), ("dog", 0.0), ("dog", 1.0),
    ]  # fmt: skip
    for column in ("dino", "clip_i", "clip_t", "drift", "diversity"):
        values = [rows[name, 1.0].figures[column].value for name in ("cat", "dog")]
        assert rows["mean", 1.0].figures[column].value == pytest.approx(sum(values) / 2)
    assert rows["mean", 0.0].figures["drift"].value == pytest.approx(0, abs=1e-6)
    assert rows["cat", 1.0].figures["drift"].value > 0.001
    assert "dino_holdout" in rows["dog", 1.0].figures and "dino_holdout" not in rows["cat", 1.0].figures
    with (bench / "out" / "benchmark.csv").open() as file:
        assert [row["name"] for row in csv.DictReader(file)] == [name for name, _ in rows]
    text = (bench / "out" / "benchmark.md").read_text()
    assert "| mean | 1 | 8 |" in text and "\n* subjects: cat, dog\n" in text
    with Image.open(bench / "out" / "benchmark.png") as plot:
        assert plot.width > 600 and len(plot.convert("RGB").getcolors(1 << 24)) > 50


def test_images_are_paired_with_the_photos_of_their_caption(bench: Path) -> None:
    figures = rows_of(bench)["dog", 1.0].figures
    assert figures["dino_paired"].count == 4 and figures["dino_holdout"].count == 4
    assert figures["dino_paired"].value != pytest.approx(figures["dino_holdout"].value, abs=1e-4)
    held_out = rows_of(bench)["dog, held-out photos", None].figures
    assert held_out["clip_t"].count == 3  # what real photos score with their captions


def test_the_subject_is_trained_on_its_own_photos(bench: Path) -> None:
    assert not (bench / "out" / "cat" / "adapter").exists()
    told = read_yaml(bench / "out" / "dog" / "adapter" / "config.yaml", *TRAINING)
    assert (told["instance_data_dir"], told["instance_prompt"]) == (str(bench / "dog"), "a sks dog")
    assert told["max_train_steps"] == 2 and told["rank"] == 2
    assert read_adapter(str(bench / "out" / "dog" / "adapter")).provenance["steps"] == "2"


def test_a_second_run_does_nothing_again(bench: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path: path.stat().st_mtime_ns for path in (bench / "out").rglob("*_*.png") if "sheet" not in path.name}
    rows = rows_of(bench)
    monkeypatch.setattr(module, "measure", lambda *_, **__: pytest.fail("measured again"))
    monkeypatch.setattr(module.subprocess, "Popen", lambda *_, **__: pytest.fail("trained again"))
    assert run(bench) == 0
    assert rows_of(bench) == rows
    assert {path: path.stat().st_mtime_ns for path in before} == before and len(before) == 2 * (8 + 8) + 4


def test_what_changed_is_measured_again_and_nothing_else(bench: Path, tmp_path: Path) -> None:
    mine = tmp_path / "bench"
    shutil.copytree(bench, mine)
    text = (mine / "bench.yaml").read_text()
    (mine / "bench.yaml").write_text(text.replace(str(bench), str(mine)).replace("cat: ", "cat: "))
    (mine / "out" / "dog" / "training.yaml").write_text(
        (mine / "out" / "dog" / "training.yaml").read_text().replace(str(bench), str(mine))
    )
    rows = rows_of(bench)
    assert run(mine, "--only", "dog", "--strengths", "1") == 0
    few = rows_of(mine)
    assert ("cat", 1.0) not in few and few["dog", 1.0].figures == rows["dog", 1.0].figures
    tiny.photos(mine / "dog_held_out", 3, seed=99)
    assert run(mine, "--only", "dog", "--strengths", "1") == 0
    more = rows_of(mine)["dog", 1.0].figures
    assert more["dino"] == few["dog", 1.0].figures["dino"]
    assert more["dino_holdout"].value != few["dog", 1.0].figures["dino_holdout"].value


def test_other_training_settings_are_not_passed_off_as_the_old(
    bench: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "training.yaml").write_text((bench / "training.yaml").read_text() + "learning_rate: 0.1\n")
    assert run(bench, f"--train_config={tmp_path / 'training.yaml'}") == 1
    assert "was trained with other settings" in capsys.readouterr().err


def test_a_training_run_that_fails_stops_the_benchmark(
    bench: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "script.py").write_text("import sys; sys.exit(3)")
    code = run(bench, f"--output_dir={tmp_path / 'out'}", f"--train_script={tmp_path / 'script.py'}", "--only", "dog")
    assert code == 1 and "training of dog failed with exit code 3" in capsys.readouterr().err


def test_an_interrupted_training_run_goes_on_from_its_checkpoint(bench: Path, tmp_path: Path) -> None:
    told = (bench / "training.yaml").read_text() + "checkpointing_steps: 1\n"
    (tmp_path / "training.yaml").write_text(told)
    stop = "(pathlib.Path(sys.argv[2]).parent / 'adapter' / 'checkpoint-1').mkdir(parents=True); sys.exit(130)"
    (tmp_path / "stop.py").write_text(f"import sys, pathlib; {stop}")
    see = "pathlib.Path(__file__).with_suffix('.seen').write_text(' '.join(sys.argv[3:])); sys.exit(1)"
    (tmp_path / "see.py").write_text(f"import sys, pathlib; {see}")
    common = (f"--output_dir={tmp_path / 'out'}", f"--train_config={tmp_path / 'training.yaml'}", "--only", "dog")
    assert run(bench, *common, f"--train_script={tmp_path / 'stop.py'}") == 130
    assert run(bench, *common, f"--train_script={tmp_path / 'see.py'}") == 1
    assert (tmp_path / "see.seen").read_text() == "--resume_from_checkpoint latest"


SLOW_TO_STOP = """
import pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[2]).parent / "adapter"
signals = []
signal.signal(signal.SIGINT, lambda number, frame: signals.append(number))
folder.with_name("ready").touch()
for _ in range(400):
    if signals:
        break
    time.sleep(0.05)
time.sleep(1.5)  # what is left of a step, and writing the checkpoint
(folder / f"checkpoint-{len(signals)}").mkdir(parents=True)
sys.exit(130)
"""


def test_ctrl_c_waits_for_the_checkpoint_of_the_training_run(bench: Path, tmp_path: Path) -> None:
    (tmp_path / "stop.py").write_text(SLOW_TO_STOP)
    ready = tmp_path / "out" / "dog" / "ready"

    def press() -> None:
        while not ready.exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    user = threading.Thread(target=press, daemon=True)
    user.start()
    script = f"--train_script={tmp_path / 'stop.py'}"
    try:
        code = run(bench, f"--output_dir={tmp_path / 'out'}", script, "--only", "dog")
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    user.join(10)
    assert code == 130 and (ready.parent / "adapter" / "checkpoint-1").is_dir(), "told once, and waited for"


def test_processes_share_the_images_and_say_the_same(bench: Path, tmp_path: Path) -> None:
    told = yaml.safe_load((bench / "bench.yaml").read_text())
    told.pop("device")  # that there is nothing but the CPU is found out
    (tmp_path / "bench.yaml").write_text(yaml.safe_dump(told))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = ["-m", "delora_diffusion.cli", "benchmark", f"--config={tmp_path / 'bench.yaml'}", "--strengths", "1",
               "--only", "cat", "--no-plot", f"--output_dir={tmp_path / 'out'}"]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    job = subprocess.run([*launch, *command], env=environment, capture_output=True, text=True, timeout=240)
    assert job.returncode == 0, job.stderr
    assert job.stderr.count("cat (1 of 1)") == 1, "one of the two speaks"
    alone, together = rows_of(bench), rows_of(tmp_path)
    for column, figure in together["cat", 1.0].figures.items():
        assert figure.value == pytest.approx(alone["cat", 1.0].figures[column].value, abs=2e-3)


def test_processes_share_the_subjects_each_trained_by_itself(
    bench: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = yaml.safe_load((bench / "bench.yaml").read_text())
    told["subjects"]["cat"].pop("adapter")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    tasks = plan_tasks(
        BenchmarkConfig(
            subjects=told["subjects"],
            train_config=told["train_config"],
            train_script=str(SCRIPT),
            output_dir=str(tmp_path),
        ),
        "sks",
    )
    seen = []
    monkeypatch.setattr(module, "_run", lambda command, environment: seen.append((command, environment)) or 0)
    for place, name in enumerate(("cat", "dog")):
        state = types.SimpleNamespace(
            process_index=place, num_processes=2, local_process_index=place, device=torch.device("cuda")
        )
        train_missing(tasks, SCRIPT, state)
        command, environment = seen[-1]
        assert len(seen) == place + 1 and str(tmp_path / name / "training.yaml") in command
        assert environment["CUDA_VISIBLE_DEVICES"] == "45"[place]
        assert "RANK" not in environment and "TORCHELASTIC_RUN_ID" not in environment


def test_the_plot_is_likeness_over_drift(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.axes import Axes

    drawn: list[tuple[list[float], list[float]]] = []
    original = Axes.plot

    def noted(self: Axes, x: list[float], y: list[float], *args: Any, **style: Any) -> Any:
        drawn.append((x, y))
        return original(self, x, y, *args, **style)

    monkeypatch.setattr(Axes, "plot", noted)

    def dial(*figures: tuple[float, float]) -> list[Row]:
        return [
            Row(
                name="x",
                strength=float(number),
                images=1,
                figures={
                    "drift": Figure(value=drift, low=0, high=1, count=1),
                    "dino": Figure(value=likeness, low=0, high=1, count=1),
                },
            )
            for number, (drift, likeness) in enumerate(figures)
        ]

    dial_plot(tmp_path / "plot.png", dial((0.0, 0.2), (0.1, 0.8)), {"dog": dial((0.0, 0.3), (0.2, 0.9))},
              column="dino", reference=0.95)  # fmt: skip
    assert drawn == [([0.0, 0.2], [0.3, 0.9]), ([0.0, 0.1], [0.2, 0.8])] and (tmp_path / "plot.png").is_file()


def test_the_mean_is_over_subjects() -> None:
    def rows(value: float, images: int) -> list[Row]:
        figure = {"dino": Figure(value=value, low=0, high=1, count=images)}
        return [
            Row(name="training photos", strength=None, images=5, figures=figure),
            Row(name="x", strength=1.0, images=images, figures=figure),
        ]

    found = table_of({"a": rows(0.2, 1000), "b": rows(0.6, 10)})
    assert [(row.name, row.figures["dino"].value) for row in found[:2]] == [
        ("mean, training photos", pytest.approx(0.4)), ("mean", pytest.approx(0.4)),
    ]  # fmt: skip


def test_a_subject_without_prompts_gets_dreambench_s(bench: Path) -> None:
    told = yaml.safe_load((bench / "bench.yaml").read_text())["subjects"]["dog"]
    told.pop("prompts_file")
    config = BenchmarkConfig(subjects={"dog": told | {"kind": "live"}}, train_config=str(bench / "training.yaml"),
                             train_script=str(SCRIPT))  # fmt: skip
    (task,) = plan_tasks(config, "v1")
    assert len(task.prompts) == 25 and "a v1 dog wearing a santa hat" in task.prompts
    assert yaml.safe_load(task.training or "")["instance_prompt"] == "a v1 dog"


def test_captions_of_the_held_out_photos_are_prompts(bench: Path) -> None:
    told = {"class_word": "dog", "photos": str(bench / "dog"), "kind": "captions", "adapter": "x"}
    (task,) = plan_tasks(BenchmarkConfig(subjects={"dog": told | {"holdout": str(bench / "dog_held_out")}}), "sks")
    assert task.prompts == ["a sks dog", "a sks dog!", "a sks dog!!"]
    for folder in ({}, {"holdout": str(bench / "cat")}):
        with pytest.raises(OptionError, match="the held-out photos have none"):
            plan_tasks(BenchmarkConfig(subjects={"dog": told | folder}), "sks")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda told: told.pop("subjects"), "no subjects; give a YAML file"),
        (lambda told: told.pop("train_config"), "dog have no adapter, and there is no train_config"),
        (lambda told: told["subjects"]["dog"].pop("photos"), "subjects[dog]: photos is missing"),
        (lambda told: told["subjects"]["dog"].update(prompt="x"), "subjects[dog]: unknown option 'prompt'"),
        (lambda told: told["subjects"]["dog"].update(kind="alive"), "choose one of object, live, captions"),
        (lambda told: told["subjects"].update(dog="x"), "subjects[dog] is 'x'; it must be a mapping"),
        (lambda told: told.update(only=["bird"]), "only names bird; the subjects are cat, dog"),
        (lambda told: told.update(instance_prompt="a dog"), "it needs {} for the subject"),
    ],
)
def test_refuses_options(
    change: Callable[[dict[str, Any]], Any], message: str, bench: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    told = yaml.safe_load((bench / "bench.yaml").read_text())
    change(told)
    (tmp_path / "bench.yaml").write_text(yaml.safe_dump(told))
    with pytest.raises(SystemExit, match="2"):
        run(tmp_path)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--train_script=none.py", "train_script none.py is not there"),
        ("--train_config=none.yaml", "cannot read train_config none.yaml"),
        ("--trigger_token=v1", "lacks the rare word 'v1'"),
    ],
)
def test_refuses_what_is_not_there(
    argument: str, message: str, bench: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(bench, f"--output_dir={tmp_path / 'out'}", argument) == 1
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_the_plot_is_an_extra(bench: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
                              capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    assert run(bench, f"--output_dir={tmp_path / 'out'}") == 1
    assert 'pip install "delora_diffusion[plots]"' in capsys.readouterr().err
    assert run(bench, "--no-plot") == 0


@pytest.mark.parametrize(
    "path",
    [POCKET / "benchmark.yaml", *(p for p in CONFIGS.glob("*.yaml") if "subjects:" in p.read_text(encoding="utf-8"))],
    ids=lambda path: path.stem,
)
def test_the_benchmarks_of_the_repository_are_valid(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    values = read_yaml(path, *GROUPS)
    config, measuring, _ = (build(group, values) for group in GROUPS)
    training = read_yaml(config.train_config, *TRAINING)
    filled = {"instance_data_dir": "photos"}  # for each subject
    if training.get("with_prior_preservation"):
        filled |= {"class_prompt": "a dog", "class_data_dir": "class"}
    for group in TRAINING:
        build(group, training | filled)
    if path.parent == POCKET:
        assert len(plan_tasks(config, measuring.trigger_token)) == 3
    else:
        with pytest.raises((OptionError, ValueError), match="photos"):  # they are not part of the repository
            plan_tasks(config, measuring.trigger_token)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dreambench", "flux2_klein"])
def test_the_benchmarks_that_need_real_weights_run_with_small_ones(
    name: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file as it is; its subjects' photos, the base and the encoders are others, and all is shorter."""
    monkeypatch.chdir(tmp_path)
    told = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    chosen = [subject for subject in told["subjects"] if subject in ("dog", "clock", "cat_plushy")]
    for number, subject in enumerate(chosen):
        for option in {"photos", "holdout"} & set(told["subjects"][subject]):
            tiny.photos(Path(told["subjects"][subject][option]), 2, seed=number)
            for photo in Path(told["subjects"][subject][option]).glob("*.png"):
                photo.with_suffix(".txt").write_text(f"a {photo.stem} for a sks {subject}")
    weights = base
    if name == "flux2_klein":
        weights = tmp_path / "weights"
        tiny_families.BUILDERS["flux.2-klein"](tmp_path / "parts").save_pretrained(weights)
        Path(told["unrelated_prompts_file"]).write_text("an astronaut riding a horse\n")
    training = yaml.safe_load((ROOT / told["train_config"]).read_text())
    training |= {"resolution": 64, "rank": 2, "max_train_steps": 1} | (
        {"num_class_images": 1} if name != "flux2_klein" else {}
    )
    training.pop("mixed_precision")
    Path("training.yaml").write_text(yaml.safe_dump(training))
    short = [f"--pretrained_model_name_or_path={weights}", "--train_config=training.yaml", f"--train_script={SCRIPT}",
             f"--dino={POCKET / 'vit'}", "--num_inference_steps=1", "--strengths=1", "--seeds", "0", "1",
             "--height=64", "--width=64", "--dtype=fp32"]  # fmt: skip
    clip = [f"--clip={POCKET / 'clip'}"] if "clip" in told else []
    config = ["benchmark", f"--config={CONFIGS / name}.yaml", "--only", *chosen]
    assert main([*config, *short, *clip]) == 0
    rows, protocol = read_report(Path(told["output_dir"]) / "benchmark.json")
    found = {row.name: row for row in rows if row.strength == 1}
    assert set(found) == {"mean", *chosen} and all("drift" in row.figures for row in found.values())
    if name == "dreambench":
        assert found["dog"].images == found["clock"].images == 50 and "clip_t" in found["dog"].figures
        assert "a sks dog wearing a santa hat" in protocol["subjects"]["dog"]["prompts"]
        assert "a sks clock on top of a dirt road" in protocol["subjects"]["clock"]["prompts"]
    else:
        assert found["cat_plushy"].figures["dino_paired"].count == 4
        adapted = read_adapter(str(Path(told["output_dir"]) / "cat_plushy" / "adapter"))
        assert any(
            "single_transformer_blocks.0.attn.to_qkv_mlp_proj" in layer for layer in adapted.tensors["transformer"]
        )


def test_the_dreambench_file_has_all_subjects_with_their_class_and_kind() -> None:
    told = yaml.safe_load((CONFIGS / "dreambench.yaml").read_text())["subjects"]
    assert {name: subject["class_word"] for name, subject in told.items()} == DREAMBENCH_CLASSES
    for subject in told.values():
        assert subject["kind"] == ("live" if subject["class_word"] in DREAMBENCH_LIVE else "object")
