"""Images to latents, prompts to conditioning, and the cache of both, keyed by content."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ..adapters.safetensors_file import write_tensors
from ..atomic import clear_scraps, complete_file
from ..base.latents import posterior
from ..console import one_line
from ..families import Conditioning, Family, from_tensors, to_tensors
from .image_files import DataError
from .photos import Example, View

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

log = logging.getLogger(__name__)
Encoded = dict[str, Tensor]
_Value = TypeVar("_Value")


class Cache:
    """Encoded examples and prompts by content key: in memory, or one safetensors file each in `folder`, and then not
    in memory.

    A file that cannot be read is made again; what the disk has no room for is in memory only.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self.memory: dict[str, Encoded] = {}
        self.known: dict[str, None] = {}  # keys that were asked for
        self.takes_more = True
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            clear_scraps(folder)

    def get(self, key: str, make: Callable[[], Encoded]) -> Encoded:
        """The tensors stored under `key`, or those of `make()`, which are then stored; on the CPU."""
        found = self.memory.get(key) or self._read(key) or self._write(key, make())
        if self.folder is None or not self.takes_more:
            self.memory[key] = found
        self.known[key] = None
        return found

    def holds(self, key: str) -> bool:
        """Whether something is stored under `key`."""
        path = self._path(key)
        return key in self.memory or (path is not None and path.is_file())

    def _path(self, key: str) -> Path | None:
        return self.folder / f"{hashlib.sha256(key.encode()).hexdigest()[:40]}.safetensors" if self.folder else None

    def _read(self, key: str) -> Encoded | None:
        path = self._path(key)
        if path is None or not path.is_file():
            return None
        try:
            tensors: Encoded = load_file(path)
            return tensors
        except (SafetensorError, OSError):
            return None

    def _write(self, key: str, tensors: Encoded) -> Encoded:
        tensors = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
        if self.takes_more and (path := self._path(key)) is not None:
            try:
                with complete_file(path) as aside:
                    write_tensors(aside, tensors)
            except OSError as error:
                log.warning("what is encoded is not kept in the cache %s: %s", self.folder, one_line(error))
                self.takes_more = False
        return tensors


class Kept(Mapping[str, _Value]):
    """What a cache holds, by other names. Where the cache is on disk, it is read again whenever it is asked for."""

    def __init__(self, cache: Cache, keys: Mapping[str, str], read: Callable[[Encoded], _Value]) -> None:
        """Args: keys: name -> the key in the cache. read: what becomes of the tensors."""
        self.cache, self.keys_of, self.read = cache, dict(keys), read

    def __getitem__(self, name: str) -> _Value:
        return self.read(self.cache.get(self.keys_of[name], self._gone))

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys_of)

    def __len__(self) -> int:
        return len(self.keys_of)

    def _gone(self) -> Encoded:
        raise DataError(f"a file in cache_dir {self.cache.folder} is gone or damaged; start again to make it anew")


def fingerprint(*parts: Any) -> str:
    """Names the identity of modules (config, and a sample of every tensor) and of anything else (its repr).

    The order of a dict does not matter: a tokenizer gives its vocabulary in another one on every call.
    """
    digest = hashlib.sha256()
    for part in parts:
        if not isinstance(part, nn.Module):
            digest.update(repr(sorted(part.items()) if isinstance(part, dict) else part).encode())
            continue
        digest.update(json.dumps(_settings(part), sort_keys=True, default=str).encode())
        for name, tensor in part.state_dict().items():
            flat = tensor.detach().flatten()
            sample = flat[:: max(1, flat.numel() // 64)][:64].float().cpu()
            digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}{sample.tolist()}".encode())
    return digest.hexdigest()[:32]


def _settings(module: nn.Module) -> dict[str, Any]:
    config: Any = getattr(module, "config", {})
    settings = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    return {key: value for key, value in settings.items() if not key.startswith("_")}


def cache_latents(
    cache: Cache, vae: Any, examples: Iterable[Example], *, identity: str, progress: Callable[[Any], Any] = iter
) -> Mapping[str, Encoded]:
    """The posterior of every view of every example: {view key: {"mean", "std"} of (1, C, h, w)}, normalised; with a
    mask {"mask"} (1, 1, h, w), what each place weighs.

    The VAE runs in the precision it has, which must not be fp16.

    Args:
        identity: `fingerprint` of the VAE.
        progress: wraps the list of views, e.g. in a progress bar.

    Raises:
        DataError: a photo that the VAE turns into values that are not finite (named).
    """
    keys = {}
    for example, view in progress([(e, v) for e in examples for v in e.views]):
        key = example.key(view)
        keys[key] = f"latents:{key}:{identity}"
        cache.get(keys[key], lambda e=example, v=view: _posterior(vae, e, v))  # type: ignore[misc]
    return Kept(cache, keys, lambda tensors: tensors)


def _posterior(vae: Any, example: Example, view: View) -> Encoded:
    mean, std = posterior(vae, example.pixels(view)[None])
    if not (mean.isfinite().all() and std.isfinite().all()):
        raise DataError(
            f"the VAE gives values that are not finite for {example.path}; run it in fp32, or take the photo out"
        )
    if example.mask is None:
        return {"mean": mean, "std": std}
    height, width = mean.shape[-2:]
    return {"mean": mean, "std": std, "mask": example.mask.part(view.box, flip=view.flip, height=height, width=width)}


@torch.no_grad()
def cache_prompts(
    cache: Cache, pipe: DiffusionPipeline, family: Family, prompts: Sequence[str], *, identity: str
) -> Mapping[str, Conditioning]:
    """The conditioning of each distinct prompt, first dimension 1.

    Args:
        identity: `fingerprint` of the text encoders and tokenizers.
    """
    keys = {prompt: f"prompt:{prompt}:{family.name}:{identity}" for prompt in prompts}
    for prompt, key in keys.items():
        cache.get(key, lambda p=prompt: to_tensors(family.encode_prompt(pipe, [p])))  # type: ignore[misc]
    return Kept(cache, keys, from_tensors)


@torch.no_grad()
def cache_negative(
    cache: Cache, pipe: DiffusionPipeline, family: Family, prompt: str | None, *, identity: str
) -> Conditioning | None:
    """The conditioning of a negative prompt; of None, what the pipeline guides against then, if anything.

    Args:
        identity: as for `cache_prompts`.
    """
    key = f"negative:{prompt!r}:{family.name}:{identity}"
    return from_tensors(cache.get(key, lambda: to_tensors(family.encode_negative(pipe, prompt) or {}))) or None
