"""Faults that the tests of training emulate, for real: a small disk, two processes in one folder, a late process."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from delora_diffusion import read_adapter
from delora_diffusion.run_folder import ADAPTER_NAME

from ..runs import SCRIPT, arguments, same, tensors

pytestmark = pytest.mark.slow
ALONE = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 1 MB, where one may be mounted."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)]
    if sys.platform != "linux" or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no disk may be mounted here")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def start(command: list[str], **environment: str) -> subprocess.Popen[str]:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([sys.executable, *command], env={**ALONE, **environment}, **pipes)  # type: ignore[call-overload]


def train(base: Path, photos: Path, out: Path, *extra: str, **environment: str) -> tuple[int, str]:
    job = start([str(SCRIPT), *arguments(base, photos, out, *extra)], **environment)
    said, _ = job.communicate(timeout=900)
    assert "Traceback" not in said
    return job.returncode, said


def test_a_full_disk_costs_neither_the_run_nor_the_adapter(
    base: Path, photos: Path, disk: Path, tmp_path: Path
) -> None:
    """Room for the first checkpoint and not for more; the adapter comes to lie where there is room."""
    straight, elsewhere = tmp_path / "straight", tmp_path / "elsewhere"
    elsewhere.mkdir()
    assert train(base, photos, straight)[0] == 0
    (disk / "filler").write_bytes(bytes(700_000))
    code, said = train(base, photos, disk / "out", "--checkpointing_steps=1", TMPDIR=str(elsewhere))
    assert code == 1 and "no checkpoint at step" in said and "No space left on device" in said
    (saved,) = elsewhere.rglob(ADAPTER_NAME)
    assert f"it is in {saved}; move it from there" in said
    assert same(tensors(straight), tensors(saved.parent)) and read_adapter(saved).provenance["steps"] == "6"
    (disk / "filler").unlink()
    code, _ = train(base, photos, disk / "out", "--resume_from_checkpoint=latest", "--no-portable_lora")
    assert code == 0 and same(tensors(straight), tensors(disk / "out"))


def test_a_disk_that_is_read_only_is_refused_first(base: Path, photos: Path, disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    code, said = train(base, photos, disk / "out")
    assert code == 1 and f"output_dir {disk / 'out'} cannot be written to: Read-only file system" in said


def test_of_two_trainings_in_one_folder_one_trains(base: Path, photos: Path, tmp_path: Path) -> None:
    command = [str(SCRIPT), *arguments(base, photos, tmp_path / "out", "--max_train_steps=60")]
    jobs = [start(command) for _ in range(2)]
    said = [job.communicate(timeout=900)[0] for job in jobs]
    assert sorted(job.returncode for job in jobs) == [0, 1]
    refused = said[[job.returncode for job in jobs].index(1)]
    assert "is in use by another run" in refused or "holds another run" in refused
    assert len((tmp_path / "out" / "log.jsonl").read_text().splitlines()) == 7


LATE = """
import os, sys, time
from delora_diffusion.training import prepare
listed = prepare.missing_batches

def late(*args):
    if os.environ["RANK"] == "1":
        time.sleep(4)
    return listed(*args)

prepare.missing_batches = late
sys.argv = sys.argv[1:]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
import train_dreambooth_delora
sys.exit(train_dreambooth_delora.main())
"""


def test_a_late_process_trains_on_all_class_images(base: Path, photos: Path, tmp_path: Path) -> None:
    """Without a GPU, and without being told so: the processes are one run."""
    (tmp_path / "late.py").write_text(LATE)
    prior = ("--with_prior_preservation", "--class_prompt=a dog", f"--class_data_dir={tmp_path / 'class'}",
             "--num_class_images=8", "--sample_batch_size=1", "--train_batch_size=1")  # fmt: skip
    launch = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        str(tmp_path / "late.py"),
        str(SCRIPT),
    ]
    job = start([*launch, *arguments(base, photos, tmp_path / "out", *prior)], PYTHONPATH=os.pathsep.join(sys.path))
    said, _ = job.communicate(timeout=900)
    assert job.returncode == 0, said
    assert "3 photos, 8 class images" in said and "(2 processes" in said
    assert len(list((tmp_path / "class").iterdir())) == 8
