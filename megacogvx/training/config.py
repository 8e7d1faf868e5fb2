"""The root config of a transformer's training, and every rule that ties two of its sections together.

A section stands beside the component that it configures; this module only joins them and checks what they have to
agree on, before any process group exists. The VAE's training has `vae_config.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field, model_validator

from megacogvx.checkpoint.config import CheckpointConfig
from megacogvx.config import Section
from megacogvx.data.config import DataConfig
from megacogvx.diffusion.config import DiffusionConfig
from megacogvx.errors import ConfigError
from megacogvx.models.transformer.config import CogVideoXConfig
from megacogvx.parallel.config import ParallelConfig
from megacogvx.parallel.launch import check_world_size
from megacogvx.parallel.pipeline_parallel import split_layers
from megacogvx.parallel.software import software_problems
from megacogvx.training.ema import EMAConfig
from megacogvx.training.guard import GuardConfig
from megacogvx.training.image_condition import ImageConfig
from megacogvx.training.text_condition import TextConfig
from megacogvx.training.tracking import TrackingConfig
from megacogvx.training.validation_loss import ValidationConfig

FP8_BLOCK = 32  # rows and columns of a matrix that Transformer Engine takes as FP8 come in these


class TrainingConfig(Section):
    """Section `training`: how long, where to, how often."""

    steps: int = Field(1000, ge=1, description="optimizer steps of the whole run")
    seed: int = 0
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field("auto", description="of the weights; sums stay fp32")
    run_folder: Path = Path("runs/default")
    start_from: Path | None = Field(
        None, description="run folder or checkpoint whose weights a new run starts with; optimizer and steps start anew"
    )
    save_every: int = Field(500, ge=1, description="steps between two checkpoints; the last step always saves one")
    log_every: int = Field(10, ge=1, description="steps between two lines of the log; metrics.jsonl has every step")
    validate_every: int = Field(100, ge=1, description="steps between two measurements on held-out data")

    def dtype(self, device: torch.device) -> torch.dtype:
        """Return the parameters' dtype: `auto` is bf16 on a GPU and fp32 on a CPU."""
        if self.precision == "auto":
            return torch.bfloat16 if device.type == "cuda" else torch.float32
        return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[self.precision]


class OptimizerConfig(Section):
    """Section `optimizer`: AdamW as in the paper's table 6; biases and norms carry no weight decay.

    The paper doesn't give the learning rate; the default is a common choice for diffusion transformers of this size.
    """

    learning_rate: float = Field(1e-4, gt=0)
    min_learning_rate: float = Field(0.0, ge=0, description="what the decay ends at, after the last step")
    decay: Literal["cosine", "constant"] = "cosine"
    warmup_steps: int = Field(100, ge=0, description="steps of linear growth; the first has a 1/warmup_steps")
    decay_steps: int | None = Field(None, ge=1, description="steps until the decay ends; None: training.steps")
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.95, ge=0, lt=1)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(1e-4, ge=0)
    clip_gradient: float = Field(1.0, ge=0, description="largest norm of the whole gradient; 0 is off")
    initial_loss_scale: float = Field(2.0**16, ge=1, description="fp16 alone: what the loss is first multiplied by")
    loss_scale_window: int = Field(1000, ge=1, description="fp16 alone: steps without overflow until the scale doubles")

    @model_validator(mode="after")
    def _falls(self) -> OptimizerConfig:
        """Check what the decay goes from and to."""
        if self.min_learning_rate > self.learning_rate:
            raise ValueError(
                f"min_learning_rate={self.min_learning_rate} is above learning_rate={self.learning_rate}, from which "
                "the rate falls to it; lower it"
            )
        return self

    def problems(self, section: str, steps: int) -> Iterator[str]:
        """Yield what is wrong with this section, called `section`, in a run that takes `steps` optimizer steps."""
        end = self.decay_steps
        if end is not None and end < steps and self.decay != "constant" and self.min_learning_rate == 0:
            yield (
                f"{section}.decay_steps={end} with {section}.min_learning_rate=0.0: steps {end} to {steps} would train "
                f"with learning rate 0; set decay_steps to {steps} or more (or null), or a min_learning_rate above 0"
            )


class TrainConfig(Section):
    """The pretraining of a transformer on an indexed dataset."""

    model: CogVideoXConfig = CogVideoXConfig()
    diffusion: DiffusionConfig = DiffusionConfig()
    data: DataConfig
    image: ImageConfig = ImageConfig()
    text: TextConfig = TextConfig()
    parallel: ParallelConfig = ParallelConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    ema: EMAConfig = EMAConfig()
    training: TrainingConfig = TrainingConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    guard: GuardConfig = GuardConfig()
    tracking: TrackingConfig = TrackingConfig()
    validation: ValidationConfig = ValidationConfig()

    @property
    def is_image_to_video(self) -> bool:
        """Whether the model reads an image's latents beside the noisy ones."""
        return self.model.in_channels == 2 * self.model.out_channels

    def validate_layout(self, world_size: int) -> None:
        """Check all rules between sections for `world_size` processes.

        Whether the packs of a step divide is asked once `data.samples_per_step` is turned into packs.

        Raises:
            LaunchError: the processes don't hold a whole number of replicas.
            ConfigError: naming every broken rule, the values and the sizes that would work.
        """
        check_world_size(self.parallel, world_size)
        rules = [
            self._head_rules(),
            self._stage_rules(world_size),
            self._pack_rules(world_size),
            self._fp8_rules(),
            self._condition_rules(),
            self._validation_rules(),
            self.optimizer.problems("optimizer", self.training.steps),
        ]
        raise_broken([*software_problems(self.parallel), *(problem for rule in rules for problem in rule)])

    def _condition_rules(self) -> Iterator[str]:
        ours, latents, vae = self.model.in_channels, self.model.out_channels, self.image.vae
        if ours not in (latents, 2 * latents):
            yield (
                f"model.in_channels={ours} must be model.out_channels={latents} (text to video) or {2 * latents} "
                "(image to video: the image's latents stand beside the noisy ones)"
            )
        elif self.is_image_to_video and vae is None:
            yield (
                f"model.in_channels={ours} is image to video, whose first frames are encoded while training: set "
                f"image.vae to the VAE that encoded the dataset, or model.in_channels={latents} for text to video"
            )
        elif vae is not None and not self.is_image_to_video:
            yield (
                f"image.vae={vae}, but model.in_channels={ours} has no channels for an image; set model.in_channels="
                f"{2 * latents} (training.start_from grows them), or leave image.vae out"
            )
        if self.diffusion.dropped_text == "empty" and self.text.encoder is None:
            yield (
                "diffusion.dropped_text=empty needs the embedding of the empty prompt: set text.encoder to the folder "
                "of the dataset's T5, or dropped_text=zeros"
            )

    def _validation_rules(self) -> Iterator[str]:
        largest, limit = max(self.validation.timesteps), self.diffusion.num_train_timesteps
        if largest >= limit:
            yield (
                f"validation.timesteps has {largest}, but diffusion.num_train_timesteps={limit}; "
                f"those that work: 0 to {limit - 1}"
            )
        if self.validation.videos and not (self.validation.paths and self.validation.vae):
            yield (
                f"validation.videos={self.validation.videos} needs texts and a decoder: validation.paths (now "
                f"{list(self.validation.paths)}) and validation.vae (now {self.validation.vae}); or set it to 0"
            )
        if self.validation.videos and self.parallel.pipeline_parallel_size > 1:
            yield (
                f"validation.videos={self.validation.videos} with parallel.pipeline_parallel_size="
                f"{self.parallel.pipeline_parallel_size}: videos are sampled by models of one stage; set either to 0 "
                "or 1, or run `megacogvx generate` on the checkpoints"
            )

    def _head_rules(self) -> Iterator[str]:
        tensor, ring = self.parallel.tensor_parallel_size, self.parallel.ring_size
        problems = (
            self.model.layout_problem(tensor, ring, self.parallel.recompute),
            self.parallel.head_problem(self.model.num_attention_heads),
        )
        yield from filter(None, problems)

    def _stage_rules(self, world_size: int) -> Iterator[str]:
        parallel, packs = self.parallel, self.data.packs_per_step
        stages = parallel.pipeline_parallel_size
        try:
            split_layers(self.model.num_layers, stages, parallel.pipeline_layers)
        except ConfigError as error:
            yield str(error)
        replicas = max(1, world_size // parallel.replica_size)
        if stages > 1 and packs < stages * replicas and self.data.samples_per_step is None:
            yield (
                f"data.packs_per_step={packs} over {replicas} data-parallel replicas is less than one pack for each of "
                f"the parallel.pipeline_parallel_size={stages} stages, some of which would never work at the same "
                f"time; packs that work: {stages * replicas} and more; stages that work: 1 to "
                f"{max(1, packs // replicas)}"
            )

    def _pack_rules(self, world_size: int) -> Iterator[str]:
        ranks = self.parallel.stage_size
        tokens, packs = self.data.tokens_per_pack, self.data.packs_per_step
        if tokens % ranks:
            yield (
                f"data.tokens_per_pack={tokens} doesn't divide by tensor x context parallel size {ranks}; "
                f"nearest that work: {tokens // ranks * ranks}, {(tokens // ranks + 1) * ranks}"
            )
        replicas = max(1, world_size // self.parallel.replica_size)
        if packs % replicas and self.data.samples_per_step is None:
            near = [count * replicas for count in (packs // replicas, packs // replicas + 1) if count]
            yield (
                f"data.packs_per_step={packs} doesn't divide over {replicas} data-parallel replicas; "
                f"nearest that work: {', '.join(map(str, near))}"
            )

    def _fp8_rules(self) -> Iterator[str]:
        if self.parallel.fp8_recipe == "none":
            return
        for key, number, ranks in (
            ("data.tokens_per_pack", self.data.tokens_per_pack, self.parallel.stage_size),
            ("model's hidden size", self.model.hidden_size, self.parallel.tensor_parallel_size),
        ):
            whole = FP8_BLOCK * ranks
            if number % whole:
                yield (
                    f"parallel.fp8_recipe={self.parallel.fp8_recipe}: {key}={number} must divide into blocks of "
                    f"{FP8_BLOCK} on each of {ranks} ranks; nearest that work: {max(1, number // whole) * whole}, "
                    f"{(number // whole + 1) * whole}"
                )


def raise_broken(rules: list[str]) -> None:
    """Raise one `ConfigError` with all broken rules, if there are any."""
    if rules:
        raise ConfigError("\n".join(rules))
