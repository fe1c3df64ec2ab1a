"""Kill a command, run it again, and compare what it leaves with what it leaves when nobody kills it.

    python -m tests.reliability.kills --seed 0 --count 300 --record kills.jsonl

Killed is with SIGKILL: at a random time; right before the n-th file is opened to write, made, renamed or removed;
right after the n-th rename. The same command then runs again (training with --resume_from_checkpoint latest), one time
in four to be killed once more, and everything it left is compared, byte for byte, but for times and paths of folders.
Commands run in forks of this process, which has read every library already; so POSIX only, and nothing here may
compute a gradient.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["SOURCE_DATE_EPOCH"] = "0"  # LoRA files name the day

import diffusers
import torch

from delora_diffusion import DeloraConfig, inject_delora, save_delora_weights
from delora_diffusion.atomic import ASIDE
from delora_diffusion.cli import main as delora

from .. import tiny
from ..runs import arguments, load_script

POCKET = Path(__file__).parents[2] / "samples" / "pocket"
#: Events of files, as Python's audit hooks name them, that change something.
EVENTS = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate")
PATIENCE = 300.0  # seconds until a command counts as hanging


@dataclass(frozen=True, kw_only=True)
class Area:
    """A command that is killed: its arguments in a folder of its own, the first time and again."""

    name: str
    main: Callable[[Sequence[str]], int]
    first: Callable[[Path], list[str]]
    again: Callable[[Path], list[str]]


@dataclass(kw_only=True)
class Whole:
    """What the command leaves when nobody kills it, in how many seconds and how many events of each kind."""

    left: dict[str, str]
    seconds: float
    events: Counter[str] = field(default_factory=Counter)


# ---- what is killed ------------------------------------------------------------------------------


def areas(base: Path, photos: Path, adapter: Path) -> list[Area]:
    """The commands, on a tiny base, three photos and an adapter."""
    script = load_script()

    def training(name: str, *options: str) -> Area:
        def first(here: Path) -> list[str]:
            made = [option.format(here=here) for option in options]
            return arguments(base, photos, here / "out", "--checkpoints_total_limit=2", *made)

        return Area(name=name, main=script.main, first=first,
                    again=lambda here: [*first(here), "--resume_from_checkpoint=latest"])  # fmt: skip

    def command(name: str, *options: str, encoders: bool = False) -> Area:
        measuring = [f"--dino={POCKET / 'vit'}", f"--clip={POCKET / 'clip'}"] if encoders else []

        def given(here: Path) -> list[str]:
            return [name.split()[0], *(option.format(here=here, base=base, adapter=adapter) for option in options),
                    *measuring]  # fmt: skip

        return Area(name=name, main=delora, first=given, again=given)

    previews = ("--validation_prompt=a sks dog", "--validation_steps=3", "--num_validation_images=1")
    return [
        training("training", "--checkpointing_steps=2", *previews),
        training("training, everything", "--checkpointing_steps=1", "--use_ema", "--train_text_encoder",
                 "--gradient_accumulation_steps=2", "--random_flip", "--lr_scheduler=cosine"),
        training("class images and cache", "--checkpointing_steps=3", "--with_prior_preservation",
                 "--class_prompt=a dog", "--class_data_dir={here}/class", "--num_class_images=5",
                 "--cache_dir={here}/cache"),
        training("best adapter", "--checkpointing_steps=2", *previews, f"--validation_dino={POCKET / 'vit'}",
                 "--validation_world_prompt=a house"),
        command("sample", "--adapter={adapter}", "--prompts", "a cat", "a dog", "--seeds", "1", "2", "--batch_size=1",
                "--num_inference_steps=2", "--output_dir={here}/out"),
        command("export comfyui", "--adapter={adapter}", "--format=comfyui", "--output={here}/lora.safetensors",
                "--overwrite"),
        command("export peft", "--adapter={adapter}", "--format=peft", "--output={here}/peft", "--overwrite"),
        command("merge", "--adapter={adapter}", "--base={base}", "--output={here}/merged"),
        command("evaluate", "--adapter={adapter}", "--prompts=a sks dog",
                f"--real={POCKET / 'subjects' / 'spotted_dog'}", "--num_inference_steps=2", "--output_dir={here}/out",
                "--batch_size=1", encoders=True),
    ]  # fmt: skip


def scene(folder: Path) -> list[Area]:
    """The areas, with all that they need in `folder`."""
    tiny.stable_diffusion(folder / "parts").save_pretrained(folder / "base")
    tiny.photos(folder / "photos")
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder / "base")
    config = DeloraConfig(r=2, delora_lambda=5.0, init_weights="kaiming")
    inject_delora(pipe.unet, config, generator=torch.Generator().manual_seed(0))
    save_delora_weights(folder / "adapter", pipe, provenance={"base_model": str(folder / "base")})
    return areas(folder / "base", folder / "photos", folder / "adapter")


# ---- running and killing -------------------------------------------------------------------------


def run(area: Area, here: Path, *, again: bool, before: Callable[[], None] = lambda: None, after: float = 0.0) -> int:
    """Run a command in a fork; its exit code, minus the signal that ended it.

    Args:
        before: is called in the fork first.
        after: seconds to SIGKILL, if it is still running then; 0 for never.

    Raises:
        TimeoutError: it hangs.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if not child:
        code = 99
        try:
            said = os.open(here / "said.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(said, 1)
            os.dup2(said, 2)
            before()
            code = area.main((area.again if again else area.first)(here))
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    deadline = time.monotonic() + (after or PATIENCE)
    while time.monotonic() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    if not after:
        raise TimeoutError(f"{area.name} was not done after {PATIENCE:.0f} s; see {here / 'said.txt'}")
    return -signal.SIGKILL


def watched(here: Path, kinds: Sequence[str], event: Callable[[str], None]) -> None:
    """Call `event` right before each event of these kinds below `here`; until the process ends."""

    def hook(name: str, args: tuple[Any, ...]) -> None:
        kind = "open" if name == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR) else name
        if kind in kinds and any(str(part).startswith(str(here)) for part in args[:2]):
            event(kind)

    sys.addaudithook(hook)


def killed_before(here: Path, kind: str, count: int) -> Callable[[], None]:
    """What has a process killed right before its event number `count` (from 1) of a kind."""

    def start() -> None:
        left = [count]

        def event(_: str) -> None:
            left[0] -= 1
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)

        watched(here, [kind], event)

    return start


def killed_after_rename(here: Path, count: int) -> Callable[[], None]:
    """The same, right after a rename is done."""

    def start() -> None:
        replace, left = os.replace, [count]

        def replaced(source: Any, target: Any) -> None:
            replace(source, target)
            left[0] -= str(target).startswith(str(here))
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)

        os.replace = replaced

    return start


# ---- what is left --------------------------------------------------------------------------------


def left_in(here: Path) -> dict[str, str]:
    """Everything in a folder, as hashes by name, without what times and paths of folders are in."""
    found = {}
    for path in sorted(here.rglob("*")):
        name = path.relative_to(here).as_posix()
        if path.is_dir() or name == "said.txt" or path.name in ("config.yaml", "training.png"):
            continue
        content = path.read_bytes()
        if path.name == "log.jsonl":
            lines = [json.loads(line) for line in content.decode().splitlines()]
            content = json.dumps([{k: v for k, v in x.items() if k != "seconds_per_step"} for x in lines]).encode()
        if path.name == "state.json":
            content = json.dumps({**json.loads(content), "written": 0, "options": 0}).encode()
        found[name] = hashlib.sha256(content.replace(str(here).encode(), b"HERE")).hexdigest()
    return found


def whole(area: Area, folder: Path) -> Whole:
    """Run a command twice, unkilled: what it leaves, and its seconds; its events."""
    (folder / "timed").mkdir(parents=True)
    started = time.monotonic()
    if code := run(area, folder / "timed", again=False):
        raise RuntimeError(f"{area.name} ended with {code}: {(folder / 'timed' / 'said.txt').read_text()[-2000:]}")
    result = Whole(left=left_in(folder / "timed"), seconds=time.monotonic() - started)
    here = folder / "counted"
    here.mkdir()
    notes = os.open(folder / "events", os.O_WRONLY | os.O_CREAT)
    kinds = [*EVENTS, "open"]
    run(
        area,
        here,
        again=False,
        before=lambda: watched(here, kinds, lambda kind: os.write(notes, f"{kind}\n".encode())),
    )
    os.close(notes)
    result.events.update((folder / "events").read_text().split())
    again = left_in(here)
    differing = sorted(name for name in again.keys() | result.left if again.get(name) != result.left.get(name))
    assert not differing, f"{area.name} does not repeat itself: {differing[:6]}"
    return result


def trial(area: Area, unkilled: Whole, here: Path, chance: random.Random) -> dict[str, Any]:
    """Kill a command once or twice, run it to its end, compare; what was done and what came of it."""
    here.mkdir(parents=True)
    kills: list[str] = []
    for _ in range(1 + (chance.random() < 0.25)):
        way = chance.choice(["time", "time", "before", "before", "before", "after a rename"])
        again, renames = bool(kills), unkilled.events["os.rename"]
        if way == "time":
            seconds = chance.uniform(0.0, unkilled.seconds) + 0.001
            code = run(area, here, again=again, after=seconds)
            kills.append(f"after {seconds:.3f} s" if code == -signal.SIGKILL else "too late")
        else:
            kind = chance.choice(sorted(unkilled.events)) if way == "before" else "os.rename"
            count = chance.randint(1, unkilled.events[kind] if way == "before" else renames)
            before = killed_before(here, kind, count) if way == "before" else killed_after_rename(here, count)
            code = run(area, here, again=again, before=before)
            kills.append(f"{way} {kind} {count}" if code == -signal.SIGKILL else "too late")
        if code not in (0, -signal.SIGKILL):
            return {"area": area.name, "kills": kills, "resumed": False, "identical": False, "code": code}
    code = run(area, here, again=True)
    left = left_in(here) if code == 0 else {}
    scraps = [path.as_posix() for path in here.rglob("*") if path.name in (ASIDE, ".lock")]
    differ = sorted(name for name in {*left, *unkilled.left} if left.get(name) != unkilled.left.get(name))
    return {"area": area.name, "kills": kills, "resumed": code == 0, "identical": not differ and not scraps,
            "differ": differ[:8], "scraps": scraps[:4], "code": code}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=300, help="trials over all areas")
    parser.add_argument("--areas", nargs="+", help="names of areas; all, without")
    parser.add_argument("--record", type=Path, help="file that gets a JSON line for each trial")
    parser.add_argument("--minutes", type=float, default=1e9, help="begin no trial after so long")
    asked = parser.parse_args(argv)
    bad, counts, kept, began = [], Counter[str](), [], time.monotonic()
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kills-", ignore_cleanup_errors=True)))
        chosen = [area for area in scene(folder / "scene") if not asked.areas or area.name in asked.areas]
        unkilled = {area.name: whole(area, folder / f"whole-{place}") for place, area in enumerate(chosen)}
        for number in range(asked.count):
            if time.monotonic() - began > 60 * asked.minutes:
                break
            area, here = chosen[number % len(chosen)], folder / f"{number}"
            result = {"seed": asked.seed, "number": number}
            result |= trial(area, unkilled[area.name], here, random.Random(f"{asked.seed} {number}"))
            counts[area.name] += sum(kill != "too late" for kill in result["kills"])
            if not (result["resumed"] and result["identical"]):
                result["said"] = (here / "said.txt").read_text(errors="replace")[-1500:]
                bad.append(result)
                print("NOT THE SAME", json.dumps(result), flush=True)
            kept.append(result)
            if asked.record:
                with asked.record.open("a") as file:
                    file.write(json.dumps(result) + "\n")
            shutil.rmtree(here)
    for name, count in counts.items():
        print(f"{name}: {count} kills, {sum(one['area'] == name for one in bad)} not resumed to the same")
    print(f"{sum(counts.values())} kills in {len(kept)} trials, {len(bad)} not resumed to the same")
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
