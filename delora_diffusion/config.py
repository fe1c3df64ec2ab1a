"""Every option of the trainer, one frozen dataclass per concern.

Names are those of diffusers' DreamBooth scripts where the meaning is the same. `options.py` turns these into flags,
YAML keys and the README's table.
"""

from __future__ import annotations

from dataclasses import dataclass

from .buckets import bucket_sizes
from .objective import TIMESTEP_SAMPLINGS
from .options import OptionError, at_least, option
from .prompts import UNRELATED_PROMPTS, has_token
from .targets import BIAS_CHOICES, INIT_CHOICES

OPTIMIZERS = ("adamw", "adamw8bit", "prodigy")
LR_SCHEDULERS = ("constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial")
PRECISIONS = ("no", "fp16", "bf16")
#: Short names of samplers, as A1111 and ComfyUI users know them, and diffusers' classes.
SCHEDULERS = {
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler_a": "EulerAncestralDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "pndm": "PNDMScheduler",
    "unipc": "UniPCMultistepScheduler",
}
DTYPES = ("auto", "fp32", "bf16", "fp16")
#: What the option `single_file_config` is, wherever there is a base.
SINGLE_FILE_CONFIG = (
    "for a base in one .safetensors file: folder or Hub id of a base of its kind, in diffusers' layout, for all but "
    "the weights; unset: the Hub repository that diffusers knows"
)
#: How the best adapter of a run is chosen, see `watch.score_of`.
KEEP_BEST = ("none", "fidelity", "balanced")


@dataclass(frozen=True)
class ModelConfig:
    """The base model."""

    pretrained_model_name_or_path: str = option(
        "", "folder or Hub id of the base pipeline, in diffusers' layout, or one .safetensors file"
    )
    single_file_config: str | None = option(None, SINGLE_FILE_CONFIG)
    revision: str | None = option(None, "revision of the base on the Hub")
    variant: str | None = option(None, "variant of the base's weight files, e.g. fp16")
    base_dtype: str = option(
        "auto", "precision of the frozen weights; auto follows mixed_precision, fp32 without it", choices=DTYPES
    )

    def __post_init__(self) -> None:
        if not self.pretrained_model_name_or_path:
            raise OptionError("pretrained_model_name_or_path is missing; give the folder or Hub id of a base model")


@dataclass(frozen=True)
class AdapterConfig:
    """The adapter."""

    rank: int = option(16, "rank of the update in every layer")
    relative_lambda: float = option(
        0.05, "strength: |dW| / |W| with orthogonal components; lambda follows, as relative_lambda sqrt(rank inputs)"
    )
    delora_lambda: float | None = option(
        None, "strength as lambda itself, the same in every layer, instead: |dW| <= lambda * largest column norm of W"
    )
    init_weights: str = option("zero", "start of A and B", choices=INIT_CHOICES)
    lambda_warmup_steps: int | None = option(
        None, "ramp the strength linearly from 0 over this many steps; unset: half of max_train_steps"
    )
    module_dropout: float = option(0.0, "dropout on the adapters' inputs")
    target_modules: str | list[str] | None = option(
        None, "layers to adapt: attention, attention+ff, all-linear, names, or one regex; unset: attention"
    )
    exclude_modules: str | list[str] | None = option(None, "layers to leave out, in the same forms")
    rank_pattern: dict[str, int] = option({}, "ranks that differ, {name or regex: rank}")
    lambda_pattern: dict[str, float] = option({}, "lambdas that differ, {name or regex: lambda}")
    bias: str = option("none", "biases trained in full", choices=BIAS_CHOICES)
    train_text_encoder: bool = option(False, "adapt the text encoder as well")
    text_encoder_rank: int | None = option(None, "rank there; unset: rank")
    text_encoder_lambda: float | None = option(None, "lambda there; unset: as for the denoiser")


@dataclass(frozen=True)
class DataConfig:
    """The photos."""

    instance_data_dir: str = option("", "folder with the photos of the subject")
    instance_prompt: str | None = option(
        None, 'caption of photos that have none beside them (PHOTO.txt, metadata.jsonl), e.g. "a photo of sks dog"'
    )
    with_prior_preservation: bool = option(False, "also train on images of the class, so that it keeps its looks")
    class_data_dir: str | None = option(None, "folder with those; missing ones are generated there by the base model")
    class_prompt: str | None = option(
        None, 'caption of class images, and what the base is to be kept for, e.g. "a photo of a dog"'
    )
    num_class_images: int = option(100, "how many of them")
    prior_loss_weight: float = option(1.0, "weight of a class image in the loss")
    with_base_preservation: bool = option(
        False, "keep the base's own predictions for class_prompt; needs no images, doubles the time of a step"
    )
    base_preservation_weight: float = option(1.0, "weight of such a prediction in the loss")
    resolution: int = option(
        512, "side of the training pictures in pixels; photos are resized to cover it and cropped"
    )
    aspect_ratio_buckets: str | None = option(
        None,
        'train on photos in their own shapes: auto (about resolution^2 pixels each), or sizes "height,width;..."; '
        "unset: squares",
    )
    center_crop: bool = option(True, "crop the middle; --no-center_crop cuts `num_crops` places at random instead")
    num_crops: int = option(4, "crops of each photo with --no-center_crop")
    random_flip: bool = option(False, "mirror photos at random (not for text, logos or asymmetric subjects)")
    cache_dir: str | None = option(None, "keep encoded photos and captions here between runs; unset: in memory")

    def __post_init__(self) -> None:
        if not self.instance_data_dir:
            raise OptionError("instance_data_dir is missing; give the folder with the photos of the subject")
        if self.with_prior_preservation and not (self.class_data_dir and self.class_prompt):
            raise OptionError(
                "with_prior_preservation needs class_data_dir (an empty folder will do: missing images are generated) "
                'and class_prompt, e.g. "a photo of a dog"'
            )
        if self.with_base_preservation and not self.class_prompt:
            raise OptionError('with_base_preservation needs class_prompt, e.g. "a photo of a dog"')
        if not self.with_prior_preservation and self.class_data_dir:
            raise OptionError("class_data_dir does nothing without with_prior_preservation; add it, or drop this")
        if not (self.with_prior_preservation or self.with_base_preservation) and self.class_prompt:
            raise OptionError(
                "class_prompt does nothing without with_prior_preservation or with_base_preservation; add one of them"
            )
        at_least(self, 1, "num_class_images", "num_crops")
        at_least(self, 0, "prior_loss_weight", "base_preservation_weight")
        if self.resolution < 8 or self.resolution % 8:
            near = max(8, round(self.resolution / 8) * 8)
            raise OptionError(f"resolution is {self.resolution}; it must be a multiple of 8, e.g. {near}")
        bucket_sizes(self.resolution, self.aspect_ratio_buckets)


@dataclass(frozen=True)
class TrainingConfig:
    """Training."""

    output_dir: str = option("delora-model", "folder for everything the run writes")
    overwrite_output_dir: bool = option(False, "start afresh in a folder that holds another run")
    seed: int = option(0, "seed of everything random")
    max_train_steps: int = option(500, "optimiser steps")
    train_batch_size: int = option(1, "photos per step and process (class images come on top)")
    gradient_accumulation_steps: int = option(1, "batches per optimiser step")
    gradient_checkpointing: bool = option(False, "less memory for a fifth more time")
    estimate_memory: bool | None = option(
        None, "say first what every phase will take of the device's memory; unset: where there is a GPU"
    )
    mixed_precision: str | None = option(None, "autocast; unset: as accelerate is set up", choices=PRECISIONS)
    optimizer: str = option("adamw", "optimiser", choices=OPTIMIZERS)
    learning_rate: float = option(1e-3, "of A and B; without effect there unless direction_turn is 0 (prodigy: use 1)")
    direction_turn: float = option(
        0.1, "radians by which noise turns A and B in 100 steps; 0: learning_rate decides, from Kaiming lengths"
    )
    lambda_learning_rate: float = option(0.0, "learning rate of the strengths lambda; 0 keeps them fixed")
    text_encoder_lr: float | None = option(None, "learning rate of A and B in the text encoder; unset: learning_rate")
    adam_beta1: float = option(0.9, "decay of the first moment")
    adam_beta2: float = option(0.999, "decay of the second moment")
    adam_epsilon: float = option(1e-8, "epsilon of the optimiser")
    max_grad_norm: float = option(1.0, "clip the gradient to this norm; 0: do not")
    lr_scheduler: str = option("constant", "schedule of the learning rates, in optimiser steps", choices=LR_SCHEDULERS)
    lr_warmup_steps: int = option(0, "steps of learning-rate warm-up")
    snr_gamma: float | None = option(None, "min-SNR weighting of the loss with this gamma (5 is usual)")
    timestep_sampling: str | None = option(
        None, "how noise levels are drawn; unset: logit_normal for flow matching, else uniform",
        choices=TIMESTEP_SAMPLINGS,
    )  # fmt: skip
    logit_mean: float = option(0.0, "mean of logit_normal; above 0 is more noise, as in the SD3 paper")
    logit_std: float = option(1.0, "standard deviation of logit_normal")
    mode_scale: float = option(1.29, "how much more often mode draws middle noise levels")
    timestep_shift: float | None = option(
        None, "shift of the noise levels in flow matching, above 1 is more noise; unset: the scheduler's own"
    )
    guidance_scale: float = option(3.5, "guidance that a guidance-distilled base (FLUX dev) is told in training")
    use_ema: bool = option(False, "save an exponential moving average of the adapter")
    ema_decay: float = option(0.99, "its decay")
    checkpointing_steps: int = option(500, "steps between checkpoints; 0: only when interrupted")
    checkpoints_total_limit: int | None = option(None, "keep only the newest checkpoints")
    resume_from_checkpoint: str | None = option(None, 'a checkpoint folder, or "latest" of output_dir')
    report_to: str | None = option(None, "tracker: tensorboard, wandb, ... (accelerate's names)")
    push_to_hub: bool = option(False, "upload the result to the Hub")
    hub_model_id: str | None = option(None, "name of the repository there; unset: the name of output_dir")
    portable_lora: bool = option(
        True, "also write the result as a LoRA, so that pipe.load_lora_weights(output_dir) works"
    )

    def __post_init__(self) -> None:
        at_least(self, 1, "max_train_steps", "train_batch_size", "gradient_accumulation_steps")
        at_least(
            self, 0, "direction_turn", "learning_rate", "lambda_learning_rate", "max_grad_norm", "lr_warmup_steps"
        )
        at_least(self, 0, "checkpointing_steps")
        if self.checkpoints_total_limit is not None:
            at_least(self, 1, "checkpoints_total_limit")
        if not 0 <= self.ema_decay < 1:
            raise OptionError(f"ema_decay is {self.ema_decay}; it must be at least 0 and below 1")
        if self.snr_gamma is not None and self.snr_gamma <= 0:
            raise OptionError(f"snr_gamma is {self.snr_gamma}; it must be positive (5 is usual), or left out")
        if self.timestep_shift is not None and self.timestep_shift <= 0:
            raise OptionError(
                f"timestep_shift is {self.timestep_shift}; it must be positive (3 is SD3's), or left out"
            )
        if self.logit_std <= 0:
            raise OptionError(f"logit_std is {self.logit_std}; it must be positive (1 is usual)")


@dataclass(frozen=True)
class ValidationConfig:
    """Previews, and what is measured on them."""

    validation_prompt: list[str] = option(
        [], "prompts of the previews; none: no previews; a .txt file stands for its lines"
    )
    validation_steps: int = option(
        100, "steps between previews; there is always one before the first step and one at the end"
    )
    num_validation_images: int = option(4, "images per prompt, with fixed seeds")
    validation_guidance_scale: float | None = option(None, "guidance of the previews; unset: usual for the base")
    validation_num_inference_steps: int | None = option(
        None, "sampling steps of the previews; unset: usual for the base"
    )
    validation_negative_prompt: str | None = option(None, "negative prompt of the previews")
    validation_dino: str | None = option(
        None, "folder or Hub id of a DINO, DINOv2, DINOv3 or ViT: measure on every preview likeness and drift"
    )
    validation_clip: str | None = option(
        None, "folder or Hub id of a CLIP: measure on every preview prompt following, and likeness as CLIP-I"
    )
    validation_holdout_dir: str | None = option(
        None, "folder with photos of the subject that training does not see: likeness to these as well"
    )
    validation_world_prompt: list[str] = option(
        list(UNRELATED_PROMPTS[:4]),
        "prompts that have nothing to do with the subject, for drift; a .txt file stands for its lines",
    )
    trigger_token: str = option("sks", "the subject's rare word; prompt following is measured without it")
    keep_best: str | None = option(
        None,
        "keep in best/ the adapter of the preview with the highest fidelity, or (balanced) fidelity - 2 drift; "
        "unset: balanced with an encoder, none without",
        choices=KEEP_BEST,
    )
    patience: int | None = option(None, "end training after this many previews in a row that are not the best yet")
    strength_sheet: list[float] = option(
        [], "at the end draw the previews at these strengths, e.g. 0.5,0.75,...,1.5, and recommend one in the card"
    )
    enable_model_cpu_offload: bool = option(
        False, "previews and class images with less memory: what waits for its turn is in the CPU's, one picture is "
        "decoded at a time",
    )  # fmt: skip

    def __post_init__(self) -> None:
        at_least(self, 1, "validation_steps", "num_validation_images", "validation_num_inference_steps")
        encoders = [name for name in ("validation_dino", "validation_clip") if getattr(self, name)]
        measuring = [name for name in ("validation_holdout_dir", "patience") if getattr(self, name) is not None]
        measuring += ["keep_best"] if self.keep_best in ("fidelity", "balanced") else []
        if measuring and not encoders:
            raise OptionError(
                f"{' and '.join(measuring)} need figures to go by; give an encoder: validation_dino "
                f"(e.g. facebook/dinov2-base), validation_clip (e.g. openai/clip-vit-base-patch32), or better both"
            )
        needing = [*encoders, *(["strength_sheet"] if self.strength_sheet else [])]
        if needing and not self.validation_prompt:
            raise OptionError(f"{' and '.join(needing)} look at the previews; give validation_prompt, a few prompts")
        if encoders:
            self._check_token()
        if self.patience is not None:
            at_least(self, 1, "patience")
            if self.keep_best == "none":
                raise OptionError("patience waits for a better adapter; give keep_best fidelity or balanced with it")
        if encoders and self.keep_best != "fidelity" and self.keep_best != "none" and not self.validation_world_prompt:
            raise OptionError("keep_best balanced weighs drift; give validation_world_prompt, or keep_best fidelity")
        if any(strength <= 0 for strength in self.strength_sheet):
            raise OptionError("strength_sheet holds a strength that is not positive; 0 is the base, 1 as trained")

    def _check_token(self) -> None:
        """The rare word tells prompts of the subject, whose pictures are measured, from the others."""
        if not self.trigger_token:
            raise OptionError('trigger_token is empty; give the rare word of the prompts, e.g. "sks"')
        # a file's prompts are checked once it is read
        if not any(has_token(p, self.trigger_token) or p.endswith(".txt") for p in self.validation_prompt):
            raise OptionError(
                f"no validation_prompt has the rare word {self.trigger_token!r} ({self.validation_prompt[0]!r}, ...), "
                f"so there is no picture of the subject to measure; give the right trigger_token"
            )
        if named := [prompt for prompt in self.validation_world_prompt if has_token(prompt, self.trigger_token)]:
            raise OptionError(
                f"the validation_world_prompt {named[0]!r} has the rare word {self.trigger_token!r}; take it out: "
                f"drift is measured on what has nothing to do with the subject"
            )


@dataclass(frozen=True)
class DrawingConfig:
    """How images are drawn."""

    single_file_config: str | None = option(None, SINGLE_FILE_CONFIG)
    seeds: list[int] = option(
        [0], "seeds; the same seed gives the same image in any batch, on any number of processes"
    )
    strengths: list[float] = option([1.0], "adapter strengths: 0 is the base, 1 as trained")
    negative_prompt: str | None = option(None, "negative prompt of all images")
    scheduler: str | None = option(None, "sampler; unset: the base's own", choices=tuple(SCHEDULERS))
    num_inference_steps: int | None = option(None, "sampling steps; unset: usual for the base")
    guidance_scale: float | None = option(None, "classifier-free guidance; unset: usual for the base")
    height: int | None = option(None, "height in pixels; unset: the base's own size")
    width: int | None = option(None, "width in pixels; unset: the base's own size")
    batch_size: int = option(4, "images drawn at once")
    dtype: str = option(
        "auto", "precision; auto: the family's half precision on a GPU, fp32 on the CPU", choices=DTYPES
    )
    device: str | None = option(None, "cuda, mps or cpu; unset: the best there is")
    enable_model_cpu_offload: bool = option(
        False, "less memory, slower: components wait in the CPU's for their turn, one picture is decoded at a time"
    )

    def __post_init__(self) -> None:
        if not self.seeds or not self.strengths:
            raise OptionError("seeds and strengths need at least one value each")
        at_least(self, 1, "num_inference_steps", "batch_size")


@dataclass(frozen=True)
class SamplingConfig:
    """Batch sampling."""

    adapter: list[str] = option([], "adapters to draw with, each by itself: files, folders or Hub ids; none: the base")
    pretrained_model_name_or_path: str | None = option(
        None, "folder or Hub id of the base pipeline; unset: the one the adapter was trained on"
    )
    output_dir: str = option("delora-samples", "folder for images, manifest.jsonl and contact_sheet.png")
    prompts: list[str] = option([], "prompts")
    prompts_file: str | None = option(
        None, "file with a prompt a line; empty lines and lines that start with # are skipped"
    )
    images_per_prompt: int = option(1, "images per prompt and seed")

    def __post_init__(self) -> None:
        if not self.prompts and not self.prompts_file:
            raise OptionError("no prompts; give --prompts, or --prompts_file with one a line")
        if not self.adapter and not self.pretrained_model_name_or_path:
            raise OptionError(
                "nothing to draw with; give --adapter, or --pretrained_model_name_or_path for the base alone"
            )
        at_least(self, 1, "images_per_prompt")
