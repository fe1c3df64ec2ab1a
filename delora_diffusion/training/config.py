"""Every option of the trainer, one frozen dataclass per concern.

Names are those of diffusers' DreamBooth scripts where the meaning is the same. `options.py` turns these into flags,
YAML keys and the table of options.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from ..base.config import PRECISIONS, ModelConfig
from ..base.objective import TIMESTEP_SAMPLINGS
from ..base.speed import COMPILE
from ..base.swap import PLACES
from ..data.config import DataConfig
from ..data.prompts import UNRELATED_PROMPTS, has_token
from ..method.config import BIAS_CHOICES, INIT_CHOICES
from ..option_checks import check_ranges, refuse_repeats, refuse_unused, unused
from ..options import OptionError, option, to_yaml

OPTIMIZERS = ("adamw", "adamw8bit", "prodigy")
LR_SCHEDULERS = ("constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial")
#: How the best adapter of a run is chosen, see `evaluation.choose.score_of`.
KEEP_BEST = ("none", "fidelity", "balanced")


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """The adapter."""

    initial_adapter: str | None = option(
        None,
        "go on from this adapter (a file, a folder, also PEFT's, or a Hub id) in place of a new one, with its rank, "
        "layers and strength",
        path=True,
    )
    rank: int = option(16, "rank of the update in every layer", within="[1, inf)")
    relative_lambda: float = option(
        0.05,
        "strength: |dW| / |W| with orthogonal components; lambda follows, as relative_lambda sqrt(rank inputs)",
        within="(0, 10]",
    )
    delora_lambda: float | None = option(
        None,
        "strength as lambda itself, the same in every layer, instead: |dW| <= lambda * largest column norm of W",
        within="(0, inf)",
    )
    init_weights: str = option("zero", "start of A and B", choices=INIT_CHOICES)
    lambda_warmup_steps: int | None = option(
        None,
        "ramp the strength linearly from 0 over this many steps; unset: a tenth of max_train_steps",
        within="[0, inf)",
        resume="free",
    )
    module_dropout: float = option(0.0, "dropout on the adapters' inputs", within="[0, 1)")
    target_modules: str | list[str] | None = option(
        None, "attention (if unset), attention+ff, attention+ff+conv, all-linear, names of layers, or one regex"
    )
    exclude_modules: str | list[str] | None = option(None, "layers to leave out, in the same forms")
    rank_pattern: dict[str, int] = option({}, "ranks that differ, {name or regex: rank}", within="[1, inf)")
    lambda_pattern: dict[str, float] = option({}, "lambdas that differ, {name or regex: lambda}", within="[0, inf)")
    bias: str = option("none", "biases trained in full", choices=BIAS_CHOICES)
    train_text_encoder: bool = option(False, "adapt the text encoder as well")
    text_encoder_rank: int | None = option(None, "rank there; unset: rank", within="[1, inf)")
    text_encoder_lambda: float | None = option(None, "lambda there; unset: as for the denoiser", within="[0, inf)")

    def __post_init__(self) -> None:
        check_ranges(self)
        refuse_unused(self, "train_text_encoder", "text_encoder_rank", "text_encoder_lambda")
        if self.delora_lambda is not None:  # None is what relative_lambda acts with
            refuse_unused(self, "delora_lambda", "relative_lambda", at="unset")


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Training."""

    output_dir: str = option("delora-model", "folder for everything the run writes", path=True, resume="free")
    overwrite_output_dir: bool = option(False, "start afresh in a folder that holds another run", resume="free")
    seed: int = option(0, "seed of everything random", within="[0, 9223372036854775808)")
    max_train_steps: int = option(500, "optimiser steps", within="[1, inf)", resume="free")
    num_train_epochs: int | None = option(
        None,
        "passes over the photos, where steps are not counted by max_train_steps",
        within="[1, inf)",
        resume="free",
    )
    train_batch_size: int = option(
        1, "photos per step and process (class images come on top)", within="[1, inf)", resume="free"
    )
    gradient_accumulation_steps: int = option(1, "batches per optimiser step", within="[1, inf)", resume="free")
    gradient_checkpointing: bool = option(False, "less memory for a fifth more time", resume="free")
    compile: bool = option(False, COMPILE, resume="free")
    channels_last: bool = option(False, "a UNet's convolutions in the layout that GPUs are fast in", resume="free")
    blocks_to_swap: int = option(
        0,
        "blocks of the denoiser that live in the CPU's memory and come to the GPU for their turn, two at a time; "
        "needs gradient_checkpointing",
        within="[0, inf)",
        resume="free",
    )
    shard_base: bool = option(
        False,
        "share the frozen denoiser out over all processes: each holds a part, and the whole of one block at a time",
        resume="free",
    )
    estimate_memory: bool | None = option(
        None, "say first what every phase will take of the device's memory; unset: where there is a GPU", resume="free"
    )
    mixed_precision: str | None = option(None, "autocast; unset: as accelerate is set up", choices=PRECISIONS)
    optimizer: str = option("adamw", "optimiser", choices=OPTIMIZERS)
    learning_rate: float = option(
        1e-3, "of A and B; without effect there unless direction_turn is 0 (prodigy: use 1)", within="[0, 10]"
    )
    scale_lr: bool = option(False, "multiply learning_rate by the number of photos in a step", resume="free")
    direction_turn: float = option(
        0.1,
        "radians by which noise turns A and B in 100 steps; 0: learning_rate decides, from Kaiming lengths",
        within="[0, 10]",
    )
    lambda_learning_rate: float = option(
        0.0, "learning rate of the strengths lambda; 0 keeps them fixed", within="[0, 10]"
    )
    text_encoder_lr: float | None = option(
        None, "learning rate of A and B in the text encoder; unset: learning_rate", within="[0, 10]"
    )
    adam_beta1: float = option(0.9, "decay of the first moment", within="[0, 1)")
    adam_beta2: float = option(0.999, "decay of the second moment", within="[0, 1)")
    adam_epsilon: float = option(1e-8, "epsilon of the optimiser", within="(0, 1]")
    prodigy_beta3: float | None = option(
        None, "decay of prodigy's estimate of the rate; unset: by adam_beta2", within="[0, 1)"
    )
    prodigy_use_bias_correction: bool = option(False, "bias correction in prodigy, as in Adam")
    prodigy_safeguard_warmup: bool = option(False, "leave warm-up steps out of prodigy's estimate of the rate")
    max_grad_norm: float = option(1.0, "clip the gradient to this norm; 0: do not", within="[0, inf)")
    lr_scheduler: str = option("constant", "schedule of the learning rates, in optimiser steps", choices=LR_SCHEDULERS)
    lr_warmup_steps: int = option(0, "steps of learning-rate warm-up", within="[0, inf)")
    lr_num_cycles: int = option(1, "restarts of cosine_with_restarts", within="[1, inf)")
    lr_power: float = option(1.0, "power of polynomial", within="(0, inf)")
    snr_gamma: float | None = option(
        None, "min-SNR weighting of the loss with this gamma (5 is usual)", within="(0, inf)"
    )
    timestep_sampling: str | None = option(
        None,
        "how noise levels are drawn; unset: logit_normal for flow matching, else uniform",
        choices=TIMESTEP_SAMPLINGS,
    )
    logit_mean: float = option(0.0, "mean of logit_normal; above 0 is more noise, as in the SD3 paper")
    logit_std: float = option(1.0, "standard deviation of logit_normal", within="(0, inf)")
    mode_scale: float = option(1.29, "how much more often mode draws middle noise levels", within="[-1, 1.75]")
    timestep_shift: float | None = option(
        None,
        "shift of the noise levels in flow matching, above 1 is more noise; unset: the scheduler's own",
        within="(0, inf)",
    )
    guidance_scale: float = option(
        3.5, "guidance that a guidance-distilled base (FLUX dev) is told in training", within="[0, inf)"
    )
    use_ema: bool = option(False, "save an exponential moving average of the adapter")
    ema_decay: float = option(0.99, "its decay", within="[0, 1)")
    checkpointing_steps: int = option(
        500, "steps between checkpoints; 0: only when interrupted", within="[0, inf)", resume="free"
    )
    checkpoints_total_limit: int | None = option(
        None, "keep only the newest checkpoints", within="[1, inf)", resume="free"
    )
    resume_from_checkpoint: str | None = option(
        None, 'a checkpoint folder, or "latest" of output_dir', path=True, resume="free"
    )
    report_to: str | None = option(None, "tracker: tensorboard, wandb, ... (accelerate's names)", resume="free")
    logging_dir: str | None = option(
        None, "folder of a tracker's files inside output_dir; unset: output_dir", path=True, resume="free"
    )
    allow_tf32: bool = option(False, "faster and coarser products in fp32 on GPUs that have TF32")
    push_to_hub: bool = option(False, "upload the result to the Hub", resume="free")
    hub_model_id: str | None = option(
        None, "name of the repository there; unset: the name of output_dir", resume="free"
    )
    portable_lora: bool = option(
        True, "also write the result as a LoRA, so that pipe.load_lora_weights(output_dir) works", resume="free"
    )

    def __post_init__(self) -> None:
        check_ranges(self)
        refuse_unused(self, "lr_scheduler", "lr_num_cycles", at="cosine_with_restarts")
        refuse_unused(self, "lr_scheduler", "lr_power", at="polynomial")
        of_prodigy = ("prodigy_beta3", "prodigy_use_bias_correction", "prodigy_safeguard_warmup")
        refuse_unused(self, "optimizer", *of_prodigy, at="prodigy")
        if self.timestep_sampling is not None:
            refuse_unused(self, "timestep_sampling", "logit_mean", "logit_std", at="logit_normal")
        refuse_unused(self, "use_ema", "ema_decay")
        self._check_swapping()

    def _check_swapping(self) -> None:
        """What swapped blocks need, and what they do not go with."""
        if self.blocks_to_swap and not self.gradient_checkpointing:
            raise OptionError(
                "blocks_to_swap is for gradient_checkpointing, which calls a block again when its weights are needed "
                "again; give both, or neither"
            )
        if self.shard_base and (self.blocks_to_swap or self.compile):
            raise OptionError(
                "shard_base does not go with blocks_to_swap or compile: blocks come from other processes, where they "
                "are neither in the host's memory nor compiled with their weights; leave these out"
            )
        if self.blocks_to_swap and self.compile:
            raise OptionError(
                "blocks_to_swap and compile do not go together: compiled blocks keep their weights where they are; "
                "leave one of them out"
            )
        if 0 < self.blocks_to_swap <= PLACES:
            raise OptionError(
                f"blocks_to_swap is {self.blocks_to_swap}, which saves nothing: {PLACES} of the blocks have a place "
                f"on the GPU at any time; give more, or 0"
            )


@dataclass(frozen=True, kw_only=True)
class ValidationConfig:
    """Previews, and what is measured on them."""

    validation_prompt: list[str] = option(
        [], "prompts of the previews; none: no previews; a .txt file stands for its lines", resume="free"
    )
    validation_steps: int = option(
        100,
        "steps between previews; there is always one before the first step and one at the end",
        within="[1, inf)",
        resume="free",
        figures="free",
    )
    validation_epochs: int | None = option(
        None,
        "passes over the photos between previews, in place of validation_steps",
        within="[1, inf)",
        resume="free",
        figures="free",
    )
    num_validation_images: int = option(4, "images per prompt, with fixed seeds", within="[1, inf)", resume="free")
    validation_guidance_scale: float | None = option(
        None, "guidance of the previews; unset: usual for the base", within="[0, inf)", resume="free"
    )
    validation_num_inference_steps: int | None = option(
        None, "sampling steps of the previews; unset: usual for the base", within="[1, 1000]", resume="free"
    )
    validation_negative_prompt: str | None = option(None, "negative prompt of the previews", resume="free")
    validation_dino: str | None = option(
        None,
        "folder or Hub id of a DINO, DINOv2, DINOv3 or ViT: measure on every preview likeness and drift",
        path=True,
        resume="free",
        figures="free",
    )
    validation_clip: str | None = option(
        None,
        "folder or Hub id of a CLIP: measure on every preview prompt following, and likeness as CLIP-I",
        path=True,
        resume="free",
        figures="free",
    )
    validation_holdout_dir: str | None = option(
        None,
        "folder with photos of the subject that training does not see: likeness to these as well",
        path=True,
        resume="free",
        figures="free",
    )
    validation_world_prompt: list[str] = option(
        list(UNRELATED_PROMPTS[:4]),
        "prompts that have nothing to do with the subject, for drift; a .txt file stands for its lines",
        resume="free",
    )
    trigger_token: str = option(
        "sks", "the subject's rare word; prompt following is measured without it", resume="free"
    )
    keep_best: str | None = option(
        None,
        "keep in best/ the adapter of the preview with the highest fidelity, or (balanced) fidelity - 2 drift; "
        "unset: balanced with an encoder, none without",
        choices=KEEP_BEST,
        resume="free",
        figures="free",
    )
    patience: int | None = option(
        None,
        "end training after this many previews in a row that are not the best yet",
        within="[1, inf)",
        resume="free",
        figures="free",
    )
    strength_sheet: list[float] = option(
        [],
        "at the end draw the previews at these strengths, e.g. 0.5,0.75,...,1.5, and recommend one in the card",
        within="(0, inf)",
        resume="free",
        figures="free",
    )
    enable_model_cpu_offload: bool = option(
        False,
        "previews and class images with less memory: what waits for its turn is in the CPU's, one picture is "
        "decoded at a time",
        resume="free",
        figures="free",
    )

    def __post_init__(self) -> None:
        check_ranges(self)
        refuse_repeats(self, "strength_sheet")
        refuse_unused(self, "validation_prompt", "validation_negative_prompt")
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
        if self.patience is not None and self.keep_best == "none":
            raise OptionError("patience waits for a better adapter; give keep_best fidelity or balanced with it")
        if encoders and self.keep_best != "fidelity" and self.keep_best != "none" and not self.validation_world_prompt:
            raise OptionError("keep_best balanced weighs drift; give validation_world_prompt, or keep_best fidelity")

    def _check_token(self) -> None:
        """The rare word tells prompts of the subject, whose pictures are measured, from the others."""
        if not self.trigger_token:
            raise OptionError('trigger_token is empty; give the rare word of the prompts, e.g. "sks"')
        # a file's prompts, and words in brackets, are checked once they are read
        later = any(p.endswith(".txt") or "[" in p for p in self.validation_prompt)
        if not later and not any(has_token(p, self.trigger_token) for p in self.validation_prompt):
            raise OptionError(
                f"no validation_prompt has the rare word {self.trigger_token!r} ({self.validation_prompt[0]!r}, ...), "
                f"so there is no picture of the subject to measure; give the right trigger_token"
            )
        if named := [prompt for prompt in self.validation_world_prompt if has_token(prompt, self.trigger_token)]:
            raise OptionError(
                f"the validation_world_prompt {named[0]!r} has the rare word {self.trigger_token!r}; take it out: "
                f"drift is measured on what has nothing to do with the subject"
            )


#: The groups of options of the trainer, as the command line takes them.
GROUPS = (ModelConfig, AdapterConfig, DataConfig, TrainingConfig, ValidationConfig)


@dataclass(frozen=True, kw_only=True)
class Options:
    """Everything a training run was asked for."""

    model: ModelConfig
    adapter: AdapterConfig
    data: DataConfig
    training: TrainingConfig
    validation: ValidationConfig

    def __post_init__(self) -> None:
        training = self.training
        if training.text_encoder_lr is not None and not self.adapter.train_text_encoder:
            raise OptionError("text_encoder_lr does nothing without train_text_encoder; add it, or leave this out")
        if not (training.learning_rate or training.lambda_learning_rate or training.text_encoder_lr):
            raise OptionError("learning_rate and lambda_learning_rate are 0, so nothing is trained; give one of them")

    def doubts(self) -> list[str]:
        """What was given and is hardly meant, as commands of diffusers' scripts have it: told, and not refused."""
        training, most = self.training, self.training.max_train_steps
        warmups = {
            "lambda_warmup_steps": self.adapter.lambda_warmup_steps or 0,
            "lr_warmup_steps": training.lr_warmup_steps if training.lr_scheduler != "constant" else 0,
        }
        warmup = unused(training, "lr_scheduler", "lr_warmup_steps", at="constant_with_warmup")
        return [
            *unused(
                self.data, "with_prior_preservation", "num_class_images", "sample_batch_size", "prior_loss_weight"
            ),
            *unused(training, "timestep_sampling", "mode_scale", at="mode"),
            *(warmup if training.lr_scheduler == "constant" else ()),
            *unused(training, "push_to_hub", "hub_model_id"),
            *unused(training, "report_to", "logging_dir"),
            *unused(self.validation, "validation_prompt", "num_validation_images"),
            *(
                f"{name} is {steps}, and the run ends at max_train_steps {most}, before what it leads up to"
                for name, steps in warmups.items()
                if steps > most
            ),
        ]

    def flat(self) -> dict[str, Any]:
        """Every option by its name."""
        groups = (self.model, self.adapter, self.data, self.training, self.validation)
        return {name: value for group in groups for name, value in asdict(group).items()}

    def to_yaml(self) -> str:
        """A file that repeats the run from its start."""
        again = replace(self.training, resume_from_checkpoint=None, overwrite_output_dir=False)
        return to_yaml(self.model, self.adapter, self.data, again, self.validation)
