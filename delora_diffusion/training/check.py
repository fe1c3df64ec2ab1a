"""What can be refused is refused here, before anything large is read."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..adapters.adapter import Adapter
from ..base.config import ModelConfig
from ..base.load import listed_in, load_base, outline
from ..base.objective import Objective, TimestepSampling, objective_of
from ..base.quantise import check_installed
from ..base.single_file import is_single_file
from ..base.swap import swapped_blocks
from ..data.concepts import expanded_prompts
from ..data.photos import Example, describe_sizes, instance_examples
from ..data.prompts import has_token, read_prompts
from ..families import Family, check_trainable
from ..method.config import DeloraConfig
from ..method.targets import target_layers
from ..option_checks import refuse_same_folder
from ..options import OptionError
from ..reports.card import check_login
from .adapt import check_ranks, denoiser_config, text_encoder_config
from .config import Options
from .initial import check_parts, part_of, read_initial
from .output import check_folders, check_output

if TYPE_CHECKING:
    from accelerate import Accelerator
    from diffusers import DiffusionPipeline

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Checked:
    """A run that nothing more speaks against; of its base only outlines are read.

    Attributes:
        options: with the prompts that files hold.
        instances: the photos.
        pipe: tokenizers, scheduler, and the denoiser's outline; the whole base where it is one file.
        config: of the denoiser's adapter.
        initial: the adapter to go on from.
    """

    options: Options
    instances: list[Example]
    family: Family
    pipe: DiffusionPipeline
    objective: Objective
    config: DeloraConfig
    initial: Adapter | None = None

    @property
    def measured(self) -> list[Example]:
        """The photos that previews are held against: of the concept whose rare word is trigger_token, or all."""
        token = self.options.validation.trigger_token
        names = [concept.name for concept in self.options.data.subjects if concept.trigger == token]
        return [example for example in self.instances if example.concept in names] or self.instances


def check(options: Options, accelerator: Accelerator) -> Checked:
    """Refuse what can be refused now.

    Raises:
        DataError, OptionError, BaseModelError, FamilyError, ObjectiveError, DeloraConfigError, ImportError: what is
            wrong first.
    """
    token = options.validation.trigger_token
    instances = instance_examples(options.data, seed=options.training.seed, trigger=token)
    log.info("%s", describe_sizes(instances, options.data))
    options = in_steps(options, sum(e.repeats for e in instances), accelerator.num_processes)
    for message in options.doubts():
        log.warning("%s", message)
    training, validation = options.training, options.validation
    check_output(training)
    check_installed(options.model)
    check_folders(options.data)
    check_apart(options)
    check_precisions(options.model.base_dtype, accelerator.mixed_precision)
    if training.push_to_hub:
        check_login(training.hub_model_id)
    measuring = validation.validation_dino or validation.validation_clip
    world = read_prompts(validation.validation_world_prompt, option="validation_world_prompt") if measuring else []
    prompts = read_prompts(validation.validation_prompt, option="validation_prompt")
    prompts = expanded_prompts(prompts, options.data, trigger=token, option="validation_prompt")
    if measuring and not any(has_token(prompt, token) for prompt in prompts):
        raise OptionError(
            f"no validation_prompt has the rare word {token!r}, so there is nothing to measure; give trigger_token, "
            f"of several concepts the one to be measured"
        )
    validation = replace(validation, validation_prompt=prompts, validation_world_prompt=world)
    family = check_trainable(listed_in(options.model), train_text_encoder=options.adapter.train_text_encoder)
    pipe = begin(options.model, family, precision=accelerator.mixed_precision)
    denoiser = getattr(pipe, family.denoiser)
    options, initial = read_initial(options)
    config = denoiser_config(options.adapter, family.dead_layers(family.denoiser, denoiser))
    if initial is not None:
        check_parts(initial, absent=() if options.adapter.train_text_encoder else family.text_encoders)
        config = part_of(initial, family.denoiser, denoiser)[0]
    layers = target_layers(denoiser, config)
    if initial is None:
        check_ranks(layers, config)
    if options.adapter.train_text_encoder:
        text_encoder_config(options.adapter, ())  # its layers are not there yet, what is wrong in itself is
    if training.shard_base:
        _check_sharding(options, accelerator.num_processes)
    swapped_blocks(denoiser, family, training.blocks_to_swap)
    sampling = TimestepSampling(
        kind=training.timestep_sampling,
        logit_mean=training.logit_mean,
        logit_std=training.logit_std,
        mode_scale=training.mode_scale,
        shift=training.timestep_shift,
    )
    return Checked(
        options=replace(options, validation=validation),
        instances=instances,
        family=family,
        pipe=pipe,
        objective=objective_of(pipe.scheduler, sampling),
        config=config,
        initial=initial,
    )


def check_apart(options: Options) -> None:
    """Refuse photos, images of the class, held-out photos and what is written in one folder.

    Raises:
        OptionError: class images among the photos, sheets that would be trained on, ...
    """
    folders = {
        "class_data_dir": options.data.class_data_dir,
        "validation_holdout_dir": options.validation.validation_holdout_dir,
        "output_dir": options.training.output_dir,
        "cache_dir": options.data.cache_dir,
    }
    refuse_same_folder(folders)
    for concept in options.data.subjects:
        # what is taught may well be in one folder; images of a class lie in a folder of their own, and may be added to
        others = folders if concept.role != "class" else folders | {"class_data_dir": None}
        refuse_same_folder(
            {"instance_data_dir" if not concept.name else f"concepts[{concept.name}]": concept.folder} | others
        )


def check_precisions(base: str, mixed: str) -> None:
    """Refuse frozen weights in one half precision under autocast to the other, which meet in layers that it leaves.

    Raises:
        OptionError: bf16 with fp16, or fp16 with bf16.
    """
    if {base, mixed} == {"bf16", "fp16"}:
        raise OptionError(
            f"base_dtype {base} does not go with mixed_precision {mixed}; give both the same, or base_dtype auto"
        )


def in_steps(options: Options, photos: int, processes: int) -> Options:
    """The options with what is counted in passes over the photos counted in steps, and the learning rate scaled."""
    training, validation = options.training, options.validation
    at_once = training.train_batch_size * training.gradient_accumulation_steps * processes
    one_pass = math.ceil(photos / at_once)
    if training.num_train_epochs is not None:
        steps = training.num_train_epochs * one_pass
        log.info("%d passes over %d photos are %d steps", training.num_train_epochs, photos, steps)
        training = replace(training, max_train_steps=steps, num_train_epochs=None)
    if training.scale_lr:
        training = replace(training, learning_rate=training.learning_rate * at_once, scale_lr=False)
        log.info("learning_rate is scaled by %d photos in a step to %g", at_once, training.learning_rate)
    if validation.validation_epochs is not None:
        validation = replace(
            validation, validation_steps=validation.validation_epochs * one_pass, validation_epochs=None
        )
    return replace(options, training=training, validation=validation)


def begin(model: ModelConfig, family: Family, *, precision: str) -> Any:
    """The base pipeline without weights: tokenizers, scheduler, and the denoiser's outline. One file is whole already.

    Raises:
        BaseModelError: nothing there, or not a pipeline.
    """
    if is_single_file(model.pretrained_model_name_or_path):
        return load_base(model, precision=precision)
    absent = dict.fromkeys(("vae", *family.text_encoders))
    return load_base(model, precision=precision, given=absent | {family.denoiser: outline(model, family.denoiser)})


def _check_sharding(options: Options, processes: int) -> None:
    """Refuse what does not go with a base that is shared out.

    Raises:
        OptionError: what, and why.
    """
    adapter = options.adapter
    if processes == 1:
        raise OptionError(
            "shard_base shares the base out over processes, and this is one; start several, e.g. with "
            "torchrun --nproc_per_node 2, or leave it out"
        )
    reasons = {
        "base_quantization": (options.model.base_quantization != "none", "quantised weights cannot be cut into parts"),
        "train_text_encoder": (adapter.train_text_encoder, "text encoders are whole on every process"),
        "bias": (adapter.bias != "none", "biases that are trained would be in parts"),
    }
    for name, (given, reason) in reasons.items():
        if given:
            raise OptionError(f"shard_base does not go with {name}: {reason}; leave one of them out")
