"""A base model read in stages, so that no more of it is in memory than the stage needs.

First the VAE and the photos, then the text encoders and the prompts, and only when these are encoded and their
encoders gone, the denoiser. Class images are drawn last, from what the prompts were encoded to. A base that is one
file is read at once.
"""

from __future__ import annotations

import logging
from collections import ChainMap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from accelerate.utils.memory import clear_device_cache
from torch import nn
from tqdm import tqdm

from ..base.config import ModelConfig
from ..base.load import load_base
from ..base.quantise import quantise
from ..base.shard import shard
from ..base.single_file import is_single_file
from ..base.speed import to_channels_last
from ..base.swap import swap_blocks, swapped_blocks
from ..data.buckets import bucket_sizes
from ..data.encode import Cache, Encoded, cache_latents, cache_negative, cache_prompts, fingerprint
from ..data.photos import Example, class_captions, class_examples
from ..families import Conditioning, check_sizes, family_of
from ..sampling.generate import Prompts
from ..sampling.offload import components_on
from .check import Checked
from .class_images import draw_class_images, missing_batches
from .config import Options
from .initial import lineage
from .loss import Examples
from .processes import by_main, from_main, spread

if TYPE_CHECKING:
    from accelerate import Accelerator
    from diffusers import DiffusionPipeline

log = logging.getLogger(__name__)
_Value = TypeVar("_Value")


@dataclass(frozen=True, kw_only=True)
class Texts:
    """Prompts, encoded.

    Attributes:
        identity: names the text encoders by their content.
        conditioning: of every caption; None while text encoders are trained.
        preserved: of the prompts that the base is to be kept for.
        shown: prompts of the previews.
        unrelated: prompts that have nothing to do with the subject.
        of_class: the prompts of class images that are drawn.
    """

    identity: str
    conditioning: Mapping[str, Conditioning] | None
    preserved: Mapping[str, Conditioning]
    shown: Prompts
    unrelated: Prompts
    of_class: Prompts


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """The base model as training needs it, and everything that was encoded with it.

    Attributes:
        pipe: with the denoiser on the device, but for blocks that are swapped; text encoders there too if they are
            trained, else gone; the VAE in the CPU's memory if there are previews, else gone.
        identity: names the base by its content.
        classes: images of the class.
        latents: of every view of photos and class images.
        texts: prompts.
    """

    pipe: DiffusionPipeline
    identity: str
    classes: list[Example]
    latents: Mapping[str, Encoded]
    texts: Texts


def prepare(checked: Checked, accelerator: Accelerator) -> Prepared:
    """Read the base in stages; encode photos and prompts, and draw the class images that are missing.

    Raises:
        BaseModelError, FamilyError, DataError: the base cannot be read, or not with these photos or this resolution.
        OptionError: channels_last where it cannot be.
    """
    options, family, seed = checked.options, checked.family, checked.options.training.seed
    data, precision = options.data, accelerator.mixed_precision
    cache = Cache(Path(data.cache_dir) if data.cache_dir else None)

    # ---- the VAE: photos
    pipe = _with(checked.pipe, options.model, precision, read=["vae"])
    check_sizes(pipe, [(data.resolution, data.resolution)], option="resolution")
    check_sizes(pipe, bucket_sizes(data.resolution, data.aspect_ratio_buckets), option="aspect_ratio_buckets")
    vae = fingerprint(pipe.vae)
    latents = _encode_photos(cache, pipe.vae, checked.instances, vae, accelerator)

    # ---- the text encoders: prompts
    captions = [caption for e in checked.instances for caption in e.captions]
    captions += class_captions(data) + ([""] if data.caption_dropout else [])
    if accelerator.is_main_process or options.adapter.train_text_encoder:
        pipe = _with(pipe, options.model, precision, read=family.text_encoders)
    names = from_main(accelerator, lambda: _names_of_encoders(pipe, checked))
    for first in (True, False):  # the main process encodes, and the others find it in their caches
        if accelerator.is_main_process == first:
            texts = _encode_prompts(cache, pipe, checked, captions, names, accelerator)
        spread(accelerator, cache)
    for name in _encoders(pipe, checked) if texts.conditioning is not None else ():
        setattr(pipe, name, None)
    clear_device_cache(garbage_collection=True)

    # ---- the denoiser: class images
    pipe = _with(pipe, options.model, precision, read=[family.denoiser])
    denoiser = getattr(pipe, family.denoiser)
    identity = fingerprint(fingerprint(denoiser), vae, texts.identity)
    if options.training.channels_last:
        to_channels_last(denoiser)
    home = torch.device("cpu") if options.training.blocks_to_swap else accelerator.device
    quantise(denoiser, options.model.base_quantization, accelerator.device, home)
    if blocks := swapped_blocks(denoiser, family, options.training.blocks_to_swap):
        swap_blocks(denoiser, list(blocks.values()), accelerator.device)
    if options.training.shard_base:
        shard(denoiser, family, accelerator)
    settled = bool(blocks) or options.training.shard_base
    if data.class_prompts:
        _draw_classes(pipe, texts, options, accelerator, staying=[denoiser] if settled else [])
    classes = class_examples(data, seed=seed)
    latents = _both(latents, _encode_photos(cache, pipe.vae, classes, vae, accelerator))
    if not options.validation.validation_prompt:
        pipe.vae = None
    if not settled:
        denoiser.to(accelerator.device)
    return Prepared(pipe=pipe, identity=identity, classes=classes, latents=latents, texts=texts)


def examples_of(checked: Checked, base: Prepared) -> Examples:
    """What is trained on."""
    return Examples(
        instances=checked.instances,
        classes=base.classes,
        latents=base.latents,
        conditioning=base.texts.conditioning,
        encode=lambda captions: checked.family.encode_prompt(base.pipe, captions),
        preserved=base.texts.preserved,
        preservation_weight=checked.options.data.base_preservation_weight,
        caption_dropout=checked.options.data.caption_dropout,
        unmasked_weight=checked.options.data.unmasked_weight,
        guidance=checked.options.training.guidance_scale,
    )


def content_of(checked: Checked, base: Prepared) -> dict[str, str]:
    """What the run is trained on, by content: compared when it is continued."""
    photos = sorted(_of_example(e) for e in [*checked.instances, *base.classes])
    return {"base model": base.identity, "photos and captions": fingerprint(photos)}


def _of_example(example: Example) -> tuple[str, ...]:
    """What of an example changes what is computed, as far as it is not usual."""
    more = (example.orders, example.repeats, example.mask.content if example.mask else None)
    return (example.content, example.caption, *([repr(more)] if more != ((), 1, None) else []))


def _both(first: Mapping[str, _Value], second: Mapping[str, _Value]) -> Mapping[str, _Value]:
    """Two mappings as one, without reading what they hold."""
    return ChainMap(first, second)  # type: ignore[arg-type]


def provenance_of(checked: Checked, base: Prepared) -> dict[str, str]:
    """What an adapter's file says of where it comes from."""
    options, scheduler = checked.options, base.pipe.scheduler
    return {
        "base_model": _recorded(options.model.pretrained_model_name_or_path),
        "base_fingerprint": base.identity,
        "family": checked.family.name,
        "seed": str(options.training.seed),
        "instance_prompt": options.data.instance_prompt or "",
        "resolution": str(options.data.resolution),
        "pipeline": type(base.pipe).__name__,
        "prediction_type": str(scheduler.config.get("prediction_type", "")),
        "rescale_betas_zero_snr": str(bool(scheduler.config.get("rescale_betas_zero_snr"))).lower(),
        **lineage(checked.initial, options.adapter.initial_adapter),
    }


def _recorded(base: str) -> str:
    """The base's name for a file: a relative path is known by its dot from a Hub id, which looks the same."""
    path = Path(base)
    return f"./{base}" if path.exists() and not path.is_absolute() and not base.startswith(".") else base


def _with(pipe: DiffusionPipeline, model: ModelConfig, precision: str, *, read: Sequence[str]) -> Any:
    """The pipeline with further components read, and all others as they are."""
    if is_single_file(model.pretrained_model_name_or_path):
        return pipe
    given = {name: part for name, part in pipe.components.items() if name not in read}
    return load_base(model, precision=precision, given=given)


def _encode_photos(
    cache: Cache, vae: Any, examples: Sequence[Example], identity: str, accelerator: Accelerator
) -> Mapping[str, Encoded]:
    """The latents of photos, each encoded on one device; afterwards the VAE is in the CPU's memory."""
    if not examples:
        return {}
    vae.to(accelerator.device)

    own = examples[accelerator.process_index :: accelerator.num_processes]
    latents = cache_latents(
        cache,
        vae,
        own,
        identity=identity,
        progress=lambda views: tqdm(views, desc="encode", disable=not accelerator.is_main_process),
    )
    if len(own) < len(examples):
        spread(accelerator, cache)
        latents = cache_latents(cache, vae, examples, identity=identity)
    vae.to("cpu")
    return latents


def _names_of_encoders(pipe: DiffusionPipeline, checked: Checked) -> tuple[str, str]:
    """What names the text encoders by their content: with their tokenizers and precision, and alone."""
    encoders = _encoders(pipe, checked)
    tokenizers = [getattr(pipe, name.replace("text_encoder", "tokenizer")) for name in encoders]
    identity = fingerprint(*encoders.values(), *map(_vocabulary, tokenizers))
    kind = checked.options.model.text_encoder_quantization
    return identity if kind == "none" else f"{identity}:{kind}", fingerprint(*map(fingerprint, encoders.values()))


def _encoders(pipe: DiffusionPipeline, checked: Checked) -> dict[str, nn.Module]:
    """The text encoders that the pipeline has."""
    found = {name: getattr(pipe, name, None) for name in checked.family.text_encoders}
    return {name: module for name, module in found.items() if module is not None}


def _encode_prompts(
    cache: Cache,
    pipe: DiffusionPipeline,
    checked: Checked,
    captions: Sequence[str],
    names: tuple[str, str],
    accelerator: Accelerator,
) -> Texts:
    """Encode every prompt on the device, unless the encoders are trained.

    Args:
        names: `_names_of_encoders`.
    """
    family, data, validation = checked.family, checked.options.data, checked.options.validation
    identity, weights = names
    for module in _encoders(pipe, checked).values():
        quantise(module, checked.options.model.text_encoder_quantization, accelerator.device)
        module.to(accelerator.device)
    kept = [concept.class_prompt for concept in data.subjects if concept.class_prompt]
    kept = kept if data.with_base_preservation else []
    preserved = cache_prompts(cache, pipe, family, kept, identity=identity)
    shown, world = validation.validation_prompt, validation.validation_world_prompt
    negative = validation.validation_negative_prompt
    of_class = Prompts(texts=list(dict.fromkeys(data.class_prompts.values())))
    texts = Texts(
        identity=weights,
        conditioning=None,
        preserved=preserved,
        shown=Prompts(texts=shown, negative=negative),
        unrelated=Prompts(texts=world, negative=negative),
        of_class=of_class,
    )
    if checked.options.adapter.train_text_encoder:
        return texts
    found = _both(cache_prompts(cache, pipe, family, [*captions, *shown, *world], identity=identity), preserved)
    against = cache_negative(cache, pipe, family, negative, identity=identity) if shown else None
    if of_class.texts:
        usual = cache_negative(cache, pipe, family, None, identity=identity)
        of_class = replace(of_class, encoded=[found[text] for text in of_class.texts], against=usual)
    previews, elsewhere = (
        replace(some, encoded=[found[text] for text in some.texts], against=against)
        for some in (texts.shown, texts.unrelated)
    )
    return replace(texts, conditioning=found, shown=previews, unrelated=elsewhere, of_class=of_class)


def _draw_classes(
    pipe: DiffusionPipeline,
    texts: Texts,
    options: Options,
    accelerator: Accelerator,
    *,
    staying: Sequence[nn.Module] = (),
) -> None:
    """Draw the class images that are missing, with the base; `staying` is on the device and is not moved."""
    data, validation = options.data, options.validation
    main = accelerator.is_main_process
    settings = {
        "height": data.resolution,
        "width": data.resolution,
        "guidance_scale": validation.validation_guidance_scale,
        "num_inference_steps": validation.validation_num_inference_steps,
    }
    count, size = data.num_class_images, data.sample_batch_size
    missing = {folder: missing_batches(Path(folder), count, size) for folder in data.class_prompts}
    accelerator.wait_for_everyone()  # every process has seen the same files
    with components_on(pipe, accelerator.device, offload=validation.enable_model_cpu_offload, staying=staying):
        for folder, prompt in data.class_prompts.items():
            mine = missing[folder][accelerator.process_index :: accelerator.num_processes]
            draw = partial(
                draw_class_images,
                pipe,
                Path(folder),
                texts.of_class.at([texts.of_class.texts.index(prompt)]),
                seed=options.training.seed,
                settings=settings,
                progress=lambda batches: tqdm(batches, desc="class images", disable=not main or not len(batches)),
            )
            if options.training.shard_base:
                by_main(accelerator, getattr(pipe, family_of(pipe).denoiser), partial(draw, missing[folder]))
            else:
                draw(mine)
            log.info("drew %d batches of class images into %s", len(missing[folder]), folder)
    accelerator.wait_for_everyone()


def _vocabulary(tokenizer: Any) -> dict[str, int]:
    """Of a tokenizer, or of the processor around one."""
    vocabulary: dict[str, int] = getattr(tokenizer, "tokenizer", tokenizer).get_vocab()
    return vocabulary
