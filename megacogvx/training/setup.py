"""The build order, once: config checked, data opened, process groups, model, optimizer, checkpoint, loader.

What can be wrong without a process group is found before there is one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from megacogvx.checkpoint.run_state import Kept
from megacogvx.config import dump_config
from megacogvx.conversion.settings import Conventions
from megacogvx.data.clip_loader import ClipLoader
from megacogvx.data.corpus import Corpus
from megacogvx.data.loader import PackLoader
from megacogvx.data.planner import PackPlan
from megacogvx.diffusion.schedule import NoiseSchedule
from megacogvx.log import get_logger
from megacogvx.models.transformer.flops import cost_coefficients
from megacogvx.models.transformer.initialize import initialize_weights
from megacogvx.models.transformer.model import CogVideoXTransformer, transformer_core
from megacogvx.models.vae.discriminator import initialize_discriminator
from megacogvx.models.vae.initialize import initialize_weights as initialize_vae
from megacogvx.models.vae.losses import VAELoss
from megacogvx.models.vae.model import CogVideoXVAE
from megacogvx.parallel.data_parallel import DistributedDataParallel, wrap
from megacogvx.parallel.groups import ParallelGroups, initialize
from megacogvx.parallel.launch import launch_environment
from megacogvx.parallel.megatron import plain_core_config
from megacogvx.parallel.optimizer import Optimizer, build_optimizer
from megacogvx.training import step as transformer_step
from megacogvx.training import vae_step
from megacogvx.training.adversary import Adversary
from megacogvx.training.agreement import agreed
from megacogvx.training.batch import BatchMaker
from megacogvx.training.config import OptimizerConfig, TrainConfig
from megacogvx.training.corpus_checks import check_corpus
from megacogvx.training.ema import WeightAverage
from megacogvx.training.held_out import held_out_measures, plan_held_out
from megacogvx.training.image_condition import ImageLatents, load_image_vae
from megacogvx.training.inputs import clip_inputs, pack_inputs
from megacogvx.training.loop import Run
from megacogvx.training.resume import load_newest_or_start, lock_run, open_metrics, open_run
from megacogvx.training.start_from import find_start
from megacogvx.training.text_condition import text_rows
from megacogvx.training.vae_config import VAETrainConfig
from megacogvx.training.validation import HeldOutClips

logger = get_logger(__name__)


def build_transformer_run(config: TrainConfig) -> Run:
    """Build the pretraining of a transformer; resumes from the newest complete checkpoint of the run folder.

    Raises:
        ConfigError, DataError, LaunchError: before any process group exists, naming keys, values and a way out.
        CheckpointError: the run folder holds a checkpoint of another model.
    """
    world_size = launch_environment().world_size
    config.validate_layout(world_size)
    corpus = Corpus(config.data)
    check_corpus(config, corpus)
    config = _with_packs_per_step(config, corpus)
    config.validate_layout(world_size)
    plan = PackPlan(
        corpus.columns, config.data, config.training.seed, config.model.patch, cost_coefficients(config.model)
    )
    config = _with_scaling_factor(config, corpus)
    held_out = plan_held_out(config)
    checkpoints, resolved = open_run(config, config.training, section="model")
    if config.training.start_from is not None and checkpoints.latest() is None:
        find_start(config.training.start_from, config.model)

    groups = initialize(config.parallel, config.training.seed)
    lock = lock_run(config.training, groups)
    dtype = config.training.dtype(groups.device)
    # Before the model: a T5 for the empty prompt alone is dropped again, and its memory is free for the model.
    with agreed(groups, "loading the frozen encoders"):
        maker = _batch_maker(config, corpus, groups, dtype)
    core = transformer_core(config.model, config.parallel, groups, dtype)
    model = CogVideoXTransformer(config.model, core, groups)
    initialize_weights(model, config.training.seed)
    ddp = wrap(model, core, groups, overlap=config.parallel.overlap_grad_reduce)
    optimizer = _make_optimizer(ddp, config.optimizer, config.training.steps, groups)
    average = WeightAverage(model, config.ema.decay, groups) if config.ema.decay else None
    beside: dict[str, Kept] = {"ema": average} if average else {}
    state = load_newest_or_start(config, ddp, optimizer, checkpoints, groups, beside)

    loader = PackLoader(
        corpus, plan, *groups.data, start_step=state.step, state=state.data or None,
        cut=(groups.tensor, groups.context), with_images=config.is_image_to_video and groups.is_first_stage,
        vocabulary=maker.texts.vocabulary if maker.texts is not None else None,
    )  # fmt: skip
    validate, make_videos = held_out_measures(config, corpus, held_out, maker, ddp, average)
    return Run(
        config.training, groups, ddp, optimizer, state,
        pack_inputs(loader, config, groups, state.bad_samples),
        transformer_step.TransformerStep(maker), transformer_step.read_log_sums,
        validate,
        checkpoints, open_metrics(config.training, state, groups),
        resolved | _facts_for_sampling(config, corpus), config.data.tokens_per_pack,
        config.checkpoint, config.guard, config.tracking, make_videos,
        after_step=(average.update,) if average else (), beside=beside, lock=lock,
    )  # fmt: skip


def build_vae_run(config: VAETrainConfig) -> Run:
    """Build the training of a VAE; resumes from the newest complete checkpoint of the run folder.

    Raises:
        ConfigError, DataError, LaunchError: before any process group exists, naming keys, values and a way out.
        CheckpointError: the run folder holds a checkpoint of another model.
    """
    config.validate_layout(launch_environment().world_size)
    config.vae.check_clip((1, config.vae.in_channels, config.clips.frames, config.clips.height, config.clips.width))
    loader = ClipLoader(config.clips, config.training.seed)
    checkpoints, resolved = open_run(config, config.training, section="vae")
    loss = VAELoss(config.loss, config.vae.in_channels)
    logger.info("loss terms: %s", ", ".join([*loss.term_names, *(["gan"] if config.has_gan else [])]))

    groups = initialize(config.parallel, config.training.seed)
    lock = lock_run(config.training, groups)
    dtype = config.training.dtype(groups.device)
    model = CogVideoXVAE(config.vae).to(dtype)
    initialize_vae(model, config.training.seed)
    core = plain_core_config(config.parallel, groups, dtype)
    ddp = wrap(model, core, groups)
    optimizer = _make_optimizer(ddp, config.optimizer, config.training.steps, groups)
    adversary = _make_adversary(config, groups, dtype) if config.has_gan else None
    average = WeightAverage(model, config.ema.decay, groups) if config.ema.decay else None
    beside: dict[str, Kept] = {"discriminator": adversary} if adversary else {}
    if average:
        beside["ema"] = average
    state = load_newest_or_start(config, ddp, optimizer, checkpoints, groups, beside)

    with agreed(groups, "going on with the clips"):  # each node reads lists of its own
        loader.check_state(state.data)
    (loader.data_rank, loader.data_size), loader.start_step = groups.data, state.step
    held_out = HeldOutClips(loader, model, config.training.run_folder, groups, average)
    step = vae_step.VAEStep(config.vae, loss.to(groups.device), config.training.seed, groups, dtype, adversary)
    return Run(
        config.training, groups, ddp, optimizer, state, clip_inputs(loader, config, groups), step, step.read_log_sums,
        held_out.measure if loader.held_out else None,
        checkpoints, open_metrics(config.training, state, groups), resolved,
        checkpoint=config.checkpoint, guard=config.guard, tracking=config.tracking,
        before_pass=(adversary.forget,) if adversary else (), after_step=_followers(adversary, average), beside=beside,
        lock=lock,
    )  # fmt: skip


def _batch_maker(config: TrainConfig, corpus: Corpus, groups: ParallelGroups, dtype: torch.dtype) -> BatchMaker:
    """Make the batch maker; the frozen encoders that training needs are loaded where a stage reads rows."""
    reads, scaling_factor = groups.is_first_stage, config.diffusion.scaling_factor or 1.0
    frozen = torch.float32 if dtype == torch.float16 else dtype  # T5 and the VAE overflow in fp16
    texts = text_rows(config.text, corpus.encoder, config.diffusion.dropped_text, groups.device, frozen, reads)
    images = None
    if config.is_image_to_video and reads:
        assert config.image.vae is not None
        vae = load_image_vae(config.image.vae, corpus.encoder, groups.device, frozen)
        scale = config.image.scale_for(config.model.preset)
        images = ImageLatents(vae, config.image, scaling_factor, scale, config.training.seed)
    return BatchMaker(
        config.diffusion, NoiseSchedule(config.diffusion), scaling_factor, config.training.seed, groups, dtype,
        texts, images,
    )  # fmt: skip


def _facts_for_sampling(config: TrainConfig, corpus: Corpus) -> dict[str, Any]:
    """Return the sections that say how the weights want to be used, beside those of the config."""
    conventions = Conventions(
        unconditional_text=config.diffusion.dropped_text,
        image_latent_scale=config.image.scale_for(config.model.preset),
    )
    return {"encoder": corpus.encoder.model_dump(mode="json"), "conventions": dump_config(conventions)}


def _make_adversary(config: VAETrainConfig, groups: ParallelGroups, dtype: torch.dtype) -> Adversary:
    """Make the discriminator and its optimizer, whose schedule begins with its training."""
    model = config.make_discriminator().to(dtype)
    initialize_discriminator(model, config.training.seed)
    ddp = wrap(model, plain_core_config(config.parallel, groups, dtype), groups)
    steps = config.training.steps - config.loss.gan_start_step
    optimizer = _make_optimizer(ddp, config.discriminator_optimizer, steps, groups)
    return Adversary(config.loss, ddp, optimizer, groups)


def _followers(
    adversary: Adversary | None, average: WeightAverage | None
) -> tuple[Callable[[int], dict[str, Any]], ...]:
    """Return what follows each optimizer step of a VAE."""
    followers: list[Callable[[int], dict[str, Any]]] = [adversary.step] if adversary else []
    return (*followers, average.update) if average else tuple(followers)


def _with_packs_per_step(config: TrainConfig, corpus: Corpus) -> TrainConfig:
    """Return `config` with the step's size in packs, and say what it is in samples and tokens."""
    mean = corpus.columns.mean_length(config.model.patch)
    data = config.data.in_packs(mean)
    tokens = data.packs_per_step * data.tokens_per_pack
    logger.info(
        "a step: %d packs x %s tokens = %s tokens, about %.0f samples of %.0f tokens",
        data.packs_per_step, f"{data.tokens_per_pack:,}", f"{tokens:,}", tokens / mean, mean,
    )  # fmt: skip
    return config.model_copy(update={"data": data})


def _with_scaling_factor(config: TrainConfig, corpus: Corpus) -> TrainConfig:
    """Return `config` with the latents' scale resolved: the config's own, or what encoding measured."""
    if config.diffusion.scaling_factor is not None:
        return config
    diffusion = config.diffusion.model_copy(update={"scaling_factor": corpus.encoder.latent_scale_factor})
    return config.model_copy(update={"diffusion": diffusion})


def _make_optimizer(
    ddp: DistributedDataParallel, settings: OptimizerConfig, total_steps: int, groups: ParallelGroups
) -> Optimizer:
    steps = settings.decay_steps or total_steps
    if settings.warmup_steps >= steps:
        logger.warning("warmup_steps=%d is cut to %d: the rate has %d steps", settings.warmup_steps, steps - 1, steps)
    return build_optimizer(
        ddp, groups,
        lr=settings.learning_rate, min_lr=settings.min_learning_rate, total_steps=steps,
        warmup_steps=min(settings.warmup_steps, steps - 1), decay=settings.decay,
        betas=(settings.beta1, settings.beta2), eps=settings.eps, weight_decay=settings.weight_decay,
        clip_grad=settings.clip_gradient,
        initial_loss_scale=settings.initial_loss_scale, loss_scale_window=settings.loss_scale_window,
    )  # fmt: skip
