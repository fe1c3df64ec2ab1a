"""Mutated adapter files: each loads what was written or is a file error, in bounded time and memory.

    python -m tests.reliability.mutate --seed 0 --count 2000 [--kinds native older peft lora kohya]

prints how many had which outcome, and every fault with the number by which it can be repeated; exit code 1 if any.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import copy
import faulthandler
import json
import random
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from delora_diffusion import (
    Adapter,
    AdapterFileError,
    DeloraConfig,
    export_lora,
    export_peft,
    inject_delora,
    load_delora_weights,
    read_adapter,
    unload_delora_weights,
    verify_lora,
    write_adapter,
)
from delora_diffusion.adapters.peft import CONFIG_NAME, WEIGHTS_NAME
from delora_diffusion.adapters.sources import collect
from delora_diffusion.errors import DeloraError
from delora_diffusion.reports.inspect import as_table, inspect_adapter

from .. import tiny

KINDS = ("native", "older", "peft", "lora", "kohya")
SECONDS, BYTES, STUCK = (
    1.0,
    1 << 30,
    120.0,
)  # of processor time and of memory for one mutant; of a clock until it is given up
Header = dict[str, Any]

# ---- what can happen to a file --------------------------------------------------------------------


def flip(data: bytearray, source: random.Random) -> None:
    for _ in range(source.choice((1, 1, 2, 9))):
        data[source.randrange(len(data))] ^= 1 << source.randrange(8)


def overwrite(data: bytearray, source: random.Random) -> None:
    start, size = source.randrange(len(data)), source.choice((1, 4, 8, 64, 512))
    data[start : start + size] = source.randbytes(len(data[start : start + size]))


def zero_sector(data: bytearray, source: random.Random) -> None:
    start = source.randrange(len(data)) // 512 * 512
    data[start : start + 512] = bytes(len(data[start : start + 512]))


def cut(data: bytearray, source: random.Random) -> None:
    del data[source.randrange(len(data)) :]


def grow(data: bytearray, source: random.Random) -> None:
    data += source.randbytes(source.choice((1, 8, 512)))


def swap_blocks(data: bytearray, source: random.Random) -> None:
    size = source.choice((1, 8, 64, 512))
    one, other = (source.randrange(len(data) - size) for _ in range(2))
    data[one : one + size], data[other : other + size] = data[other : other + size], data[one : one + size]


def length(data: bytearray, source: random.Random) -> None:
    data[:8] = source.choice((0, 1, 2, 100_000_000, 100_000_001, 2**63, source.randrange(len(data)))).to_bytes(
        8, "little"
    )


def tensor_entry(header: Header, source: random.Random) -> None:
    """Let a tensor be of another kind, shape or place, or have another name."""
    name = source.choice([key for key in header if key != "__metadata__"])
    entry = header[name]
    what = source.randrange(6)
    if what == 0:
        entry["dtype"] = source.choice(
            ["F64", "F16", "BF16", "I64", "I32", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F4", "C64", "X"]
        )
    elif what == 1:
        entry["shape"] = source.choice(
            [[], [0], [-1], [1] * 70, [2**62, 4], entry["shape"][::-1], [*entry["shape"], 1], "x", None]
        )
    elif what == 2:
        entry["data_offsets"] = source.choice(
            [[0, 0], [0, 4], [8, 4], [-4, 0], [0, 2**63], [1], entry["data_offsets"][::-1]]
        )
    elif what == 3:
        other = source.choice([key for key in header if key != "__metadata__"])
        header[name], header[other] = header[other], header[name]
    elif what == 4:
        del header[name]
    else:
        header[source.choice([*NAMES, name.upper(), f"{name}.x", f"x.{name}"])] = header.pop(name)


def text_entry(header: Header, source: random.Random) -> None:
    """Change, drop or add a text."""
    text = header.get("__metadata__") or {}
    name = source.choice([*text, "component", "format", "base_model"])
    if source.random() < 0.2:
        text.pop(name, None)
    else:
        text[name] = source.choice([*NAMES, *HOSTILE_JSON, 3, None, {}, "x" * 100_000])
    header["__metadata__"] = text


def config_entry(header: Header, source: random.Random) -> None:
    """Give a field of the configuration a value that harms."""
    text = header["__metadata__"]
    configs = json.loads(text["delora_config"])
    spoil(configs[source.choice(list(configs))], source)
    if source.random() < 0.1:
        configs[source.choice(NAMES)] = configs.pop(source.choice(list(configs)))
    text["delora_config"] = json.dumps(configs)


def spoil(config: dict[str, Any], source: random.Random) -> None:
    name = source.choice([*config, "unheard_of"])
    if name in ("rank_pattern", "lambda_pattern") and source.random() < 0.8:
        config[name] = {source.choice(PATTERNS): source.choice([2, 50_000, 10**400, -1, True, "2", [2], 1.5])}
    elif name in ("target_modules", "exclude_modules") and source.random() < 0.6:
        config[name] = source.choice(PATTERNS)
    elif source.random() < 0.5:
        config[name] = source.choice([0, -1, 50_000, 10**9, 10**400, 1e308, float("nan"), float("inf"), True, 2.5])
    else:
        config[name] = source.choice([None, "", "x", [], ["x"], [[]], [3], {}, {"a": {}}, PATTERNS[:3], "all-linear"])


NAMES = [
    "",
    ".",
    "..",
    "../../x",
    "/etc/x",
    "unet",
    "unet.",
    ".delora_A",
    "unet..delora_A",
    "a\0b",
    "\u2028",
    "é",
    "x" * 5000,
]
NAMES += [
    "unet.conv_in.delora_A",
    "base_model.model.x.delora_B",
    "lora_unet_x.lora_down.weight",
    "unet.x.lora_A.weight",
    "²",
]
PATTERNS = [
    "(a+)+$",
    "(.*)*x",
    "(.*.*)*=",
    "(x+x+)+y",
    "a?" * 30 + "a" * 30,
    "(" * 3000,
    "a{99999999999999999999}",
    "(?:.?){60}x",
]
PATTERNS += [
    ".*.*.*.*.*.*.*x",
    r"((\w+\.)+)+x",
    "(?i)(.*)*x",
    r"(.*)*\1",
    "|".join("ab" * 5000),
    "to_q|(to_k)*",
    "*",
    "[",
    "(?P<",
]
HOSTILE_JSON = [
    "[" * 100_000,
    '{"unet": ' * 5000,
    '{"unet": {"r": 1' + "0" * 5000 + "}}",
    "{}",
    "[]",
    "null",
    '{"unet": null}',
    '{"": {"r": 2}}',
]
OF_BYTES: Sequence[Callable[[bytearray, random.Random], None]] = (
    flip,
    overwrite,
    zero_sector,
    cut,
    grow,
    swap_blocks,
    length,
)
OF_HEADERS: Sequence[Callable[[Header, random.Random], None]] = (tensor_entry, text_entry)


def with_header(data: bytes, change: Callable[[Header], None]) -> bytes:
    """A safetensors file with another header."""
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + size :]


def mutate(data: bytes, kind: str, source: random.Random) -> tuple[str, bytes]:
    """One thing that happens to a file of one kind: what it is, and the file afterwards."""
    configs = (config_entry,) if kind in ("native", "older") else ()
    change = source.choice([*OF_BYTES, *OF_HEADERS * 2, *configs * 4])
    if change in OF_BYTES:
        changed = bytearray(data)
        change(changed, source)  # type: ignore[arg-type]
        return change.__name__, bytes(changed)
    return change.__name__, with_header(data, lambda header: change(header, source))  # type: ignore[arg-type]


# ---- what is then done with it --------------------------------------------------------------------


@dataclass
class Originals:
    """Whole files of each kind, the adapter in them, and a pipeline that it fits."""

    folder: Path
    pipe: Any = None
    adapter: Adapter = None  # type: ignore[assignment]
    files: dict[str, bytes] = field(default_factory=dict)
    peft_config: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.pipe = tiny.stable_diffusion(self.folder / "parts")
        parts = {name: copy.deepcopy(getattr(self.pipe, name)) for name in ("unet", "text_encoder")}
        targets: dict[str, Any] = {"unet": ["to_q", "to_k"], "text_encoder": r".*\.(q|k)_proj"}
        for name, part in parts.items():
            config = DeloraConfig(
                r=2, init_weights="kaiming", target_modules=targets[name], rank_pattern={".*q(_proj)?": 3}
            )
            inject_delora(part, config, generator=torch.Generator().manual_seed(0))
        self.adapter = collect(parts, "default", provenance={"base_model": "some/base", "seed": "0", "steps": "9"})
        self.files["native"] = write_adapter(self.folder / "whole.safetensors", self.adapter).read_bytes()
        peft = export_peft(self.adapter, self.folder / "peft")["unet"]
        self.files["peft"] = with_header((peft / WEIGHTS_NAME).read_bytes(), without_checksum)
        self.peft_config = json.loads((peft / CONFIG_NAME).read_text())
        self.files["older"] = with_header(self.files["native"], without_checksum)
        for kind, style in (("lora", "diffusers"), ("kohya", "kohya")):
            path = export_lora(self.adapter, self.folder / f"{kind}.safetensors", format=style).path
            self.files[kind] = path.read_bytes()


def without_checksum(header: Header) -> None:
    """Make a native file one of the time when there were no checksums, and PEFT's one that PEFT wrote."""
    text = header["__metadata__"]
    del text["checksum"]
    if text["format"].startswith("delora-"):
        text["format"] = "delora-1"


def use(path: Path, kind: str, originals: Originals, place: Path) -> Iterator[tuple[str, Callable[[], Any]]]:
    """What is done with a file of one kind, step by step; each may raise a file error, and nothing else."""
    if kind in ("lora", "kohya"):
        yield "verify", lambda: verify_lora(path, originals.adapter)
        return
    read: list[Adapter] = []
    yield "read", lambda: read.append(read_adapter(path if kind != "peft" else path.parent))
    if kind == "native":
        yield "compare", lambda: compare(read[0], originals.adapter)
        return
    yield "inspect", lambda: as_table([inspect_adapter(read[0], "x")])
    yield "export", lambda: export_lora(read[0], place / "lora.safetensors", component="unet", overwrite=True)
    yield "export to peft", lambda: export_peft(read[0], place / "out" / "peft", overwrite=True)
    yield "load", lambda: load(originals.pipe, read[0])


def load(pipe: Any, adapter: Adapter) -> None:
    try:
        load_delora_weights(pipe, adapter)
    finally:
        unload_delora_weights(pipe)


def compare(found: Adapter, expected: Adapter) -> None:
    """Refuse an adapter that is not equal to another in everything."""
    assert (found.configs, found.provenance) == (expected.configs, expected.provenance), "other text was loaded"
    for component, part in expected.tensors.items():
        assert found.tensors[component].keys() == part.keys(), "other tensors were loaded"
        assert all(torch.equal(tensor, found.tensors[component][n]) for n, tensor in part.items()), "other values"


def judge(path: Path, kind: str, originals: Originals) -> tuple[str, str]:
    """What became of a mutant: an outcome, and what is wrong about it ("" if nothing)."""
    place = path.parent / "place"
    place.mkdir()
    before = memory()
    for step, action in use(path, kind, originals, place):
        start = time.process_time()
        try:
            action()
        except AdapterFileError as error:
            return f"refused ({step})", "" if len(str(error)) < 2000 else f"a message of {len(str(error))} characters"
        except DeloraError:
            return f"refused ({step})", "" if step != "read" else "no file error"
        except Exception as error:
            return "raised", f"{step}: {type(error).__name__}: {str(error)[:200]}"
        finally:
            taken = time.process_time() - start
            outside = [p for p in path.parent.parent.iterdir() if p.name not in ("mutant", "originals")]
        if taken > SECONDS:
            return "slow", f"{step} took {taken:.1f} s"
        if memory() - before > BYTES:
            return "large", f"{step} took {(memory() - before) >> 20} MB"
        if outside:
            return "outside", f"{step} wrote {outside[0]}"
    return "loaded", ""


def memory() -> int:
    """The most memory that the process has had, in bytes; 0 where it cannot be told."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) << 10
    return 0


def run(
    folder: Path, *, seed: int, count: int, first: int = 0, kinds: Sequence[str] = KINDS
) -> tuple[collections.Counter[str], list[str]]:
    """Judge `count` mutants, of each kind in turn: how many had which outcome, and the faults."""
    (folder / "originals").mkdir(parents=True)
    originals = Originals(folder / "originals")
    outcomes: collections.Counter[str] = collections.Counter()
    faults = []
    for number in [*range(-len(kinds), 0), *range(first, first + count)]:  # whole files come first: imports take time
        kind, source = kinds[number % len(kinds)], random.Random(f"{seed}-{number}")
        faulthandler.dump_traceback_later(STUCK, exit=True)
        shutil.rmtree(folder / "mutant", ignore_errors=True)
        (folder / "mutant").mkdir()
        config, data, what = copy.deepcopy(originals.peft_config), originals.files[kind], "whole"
        if number >= 0 and kind == "peft" and source.random() < 0.5:
            what = "spoil"
            spoil(config, source)
        elif number >= 0:
            what, data = mutate(data, kind, source)
        path = folder / "mutant" / (WEIGHTS_NAME if kind == "peft" else "x.safetensors")
        path.write_bytes(data)
        if kind == "peft":
            (path.parent / CONFIG_NAME).write_text(json.dumps(config))
        outcome, fault = judge(path, kind, originals)
        if number >= 0:
            outcomes[f"{kind}: {outcome}"] += 1
        if fault or (number < 0 and outcome != "loaded"):
            faults.append(f"seed {seed}, number {number}, {kind}, {what}: {outcome}, {fault}")
    faulthandler.cancel_dump_traceback_later()
    return outcomes, faults


def main(argv: Sequence[str] | None = None) -> int:
    """Run, and say what was seen."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--first", type=int, default=0, help="number of the first mutant, to repeat one")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    given = parser.parse_args(argv)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        outcomes, faults = run(Path(folder), seed=given.seed, count=given.count, first=given.first, kinds=given.kinds)
    for outcome, number in sorted(outcomes.items()):
        print(f"{number:6}  {outcome}")
    print(*(faults or ["no faults"]), sep="\n")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
