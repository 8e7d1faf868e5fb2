"""The build order, once: config checked, data opened, process groups, model, optimizer, checkpoint, loader.

What can be wrong without a process group is found before there is one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from megacogvx.checkpoint.directory import CheckpointDirectory
from megacogvx.checkpoint.distributed import load, load_newest
from megacogvx.checkpoint.find import Checkpoint, find_checkpoint
from megacogvx.checkpoint.run_state import Kept
from megacogvx.checkpoint.whole import read_state
from megacogvx.config import Section, dump_config
from megacogvx.conversion.settings import Conventions
from megacogvx.data.clips import ClipLoader
from megacogvx.data.corpus import Corpus
from megacogvx.data.faults import FaultCounter
from megacogvx.data.loader import PackLoader
from megacogvx.data.pack import Pack
from megacogvx.data.planner import PackPlan
from megacogvx.diffusion.objective import sample_weights
from megacogvx.diffusion.schedule import NoiseSchedule
from megacogvx.diffusion.timesteps import step_timesteps
from megacogvx.errors import CheckpointError
from megacogvx.inference.denoise import SamplingSettings
from megacogvx.log import get_logger
from megacogvx.models.transformer.flops import cost_coefficients, training_flops
from megacogvx.models.transformer.initialize import initialize_weights
from megacogvx.models.transformer.model import CogVideoXTransformer, transformer_core
from megacogvx.models.transformer.rope import place_on_rope_grid
from megacogvx.models.vae.config import VAEConfig
from megacogvx.models.vae.discriminator import initialize_discriminator
from megacogvx.models.vae.initialize import initialize_weights as initialize_vae
from megacogvx.models.vae.losses import VAELoss
from megacogvx.models.vae.model import CogVideoXVAE
from megacogvx.models.weights import check_finite
from megacogvx.pack_layout import PackLayout
from megacogvx.parallel.data_parallel import DistributedDataParallel, max_over_ranks, unwrap, wrap
from megacogvx.parallel.groups import ParallelGroups, barrier, initialize, launch_environment
from megacogvx.parallel.megatron import plain_core_config
from megacogvx.parallel.optimizer import Optimizer, build_optimizer
from megacogvx.training import step as transformer_step
from megacogvx.training import vae_step
from megacogvx.training.adversary import Adversary, WeightsOnly
from megacogvx.training.agreement import agreed, read_together
from megacogvx.training.batch import BatchMaker
from megacogvx.training.config import OptimizerConfig, TrainConfig, TrainingConfig, VAETrainConfig
from megacogvx.training.corpus_checks import check_corpus
from megacogvx.training.ema import WeightAverage
from megacogvx.training.image_condition import ImageLatents, load_image_vae
from megacogvx.training.loop import Run, StepInput
from megacogvx.training.metrics import MetricsFile
from megacogvx.training.run_lock import RunLock
from megacogvx.training.start_from import find_start, start_from
from megacogvx.training.state import TrainState
from megacogvx.training.text_condition import text_rows
from megacogvx.training.validation import HeldOutClips
from megacogvx.training.validation_loss import ValidationLoss, held_out_packs
from megacogvx.training.validation_videos import ValidationVideos

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
    held_out = _held_out(config)
    checkpoints, resolved = _open_run(config, config.training, section="model")
    if config.training.start_from is not None and checkpoints.latest() is None:
        find_start(config.training.start_from, config.model)

    groups = initialize(config.parallel, config.training.seed)
    lock = _lock(config.training, groups)
    dtype = config.training.dtype(groups.device)
    core = transformer_core(config.model, config.parallel, groups, dtype)
    model = CogVideoXTransformer(config.model, core, groups)
    initialize_weights(model, config.training.seed)
    ddp = wrap(model, core, groups, overlap=config.parallel.overlap_grad_reduce)
    optimizer = _make_optimizer(ddp, config.optimizer, config.training.steps, groups)
    average = WeightAverage(model, config.ema.decay, groups) if config.ema.decay else None
    beside: dict[str, Kept] = {"ema": average} if average else {}
    state = _load_newest(config, ddp, optimizer, checkpoints, groups, beside)

    loader = PackLoader(
        corpus, plan, *groups.data, start_step=state.step, state=state.data or None,
        cut=(groups.tensor, groups.context), with_images=config.is_image_to_video and groups.is_first_stage,
    )  # fmt: skip
    maker = _batch_maker(config, corpus, groups, dtype)
    validate, make_videos = _validation(config, corpus, held_out, maker, ddp, average)
    return Run(
        config.training, groups, ddp, optimizer, state, _pack_inputs(loader, config, groups, state.bad_samples),
        transformer_step.TransformerStep(maker), transformer_step.read_log_sums,
        validate,
        checkpoints, MetricsFile(config.training.run_folder, state.step, groups.is_first),
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
    checkpoints, resolved = _open_run(config, config.training, section="vae")
    loss = VAELoss(config.loss, config.vae.in_channels)
    logger.info("loss terms: %s", ", ".join([*loss.term_names, *(["gan"] if config.has_gan else [])]))

    groups = initialize(config.parallel, config.training.seed)
    lock = _lock(config.training, groups)
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
    state = _load_newest(config, ddp, optimizer, checkpoints, groups, beside)

    (loader.data_rank, loader.data_size), loader.start_step = groups.data, state.step
    held_out = HeldOutClips(loader, model, config.training.run_folder, groups, average)
    step = vae_step.VAEStep(config.vae, loss.to(groups.device), config.training.seed, groups, dtype, adversary)
    return Run(
        config.training, groups, ddp, optimizer, state, _clip_inputs(loader, config, groups), step, step.read_log_sums,
        held_out.measure if loader.held_out else None,
        checkpoints, MetricsFile(config.training.run_folder, state.step, groups.is_first), resolved,
        checkpoint=config.checkpoint, guard=config.guard, tracking=config.tracking,
        before_pass=(adversary.forget,) if adversary else (), after_step=_followers(adversary, average), beside=beside,
        lock=lock,
    )  # fmt: skip


def _batch_maker(config: TrainConfig, corpus: Corpus, groups: ParallelGroups, dtype: torch.dtype) -> BatchMaker:
    """Make the batch maker; the frozen encoders that training needs are loaded where a stage reads rows."""
    reads, scaling_factor = groups.is_first_stage, config.diffusion.scaling_factor or 1.0
    texts = text_rows(config.text, corpus.encoder, config.diffusion.dropped_text, groups.device, dtype, reads)
    images = None
    if config.is_image_to_video and reads:
        assert config.image.vae is not None
        vae = load_image_vae(config.image.vae, corpus.encoder, groups.device, dtype)
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


def _held_out(config: TrainConfig) -> tuple[Corpus, PackPlan] | None:
    """Open the held-out datasets and plan their packs, the same at every start."""
    if not config.validation.paths:
        return None
    data = config.data.model_copy(update={"paths": config.validation.paths})
    corpus = Corpus(data)
    check_corpus(config, corpus)
    plan = PackPlan(corpus.columns, data, 0, config.model.patch, cost_coefficients(config.model))
    return corpus, plan


def _validation(
    config: TrainConfig, training: Corpus, held_out: tuple[Corpus, PackPlan] | None, maker: BatchMaker,
    ddp: DistributedDataParallel, average: WeightAverage | None,
) -> tuple[Callable[[int], dict[str, Any]] | None, Callable[[int], dict[str, torch.Tensor]] | None]:  # fmt: skip
    """Return what measures held-out samples, and what makes videos of their texts."""
    if held_out is None:
        return None, None
    settings, groups, texts = config.validation, maker.groups, maker.texts
    packs = held_out_packs(*held_out, settings.steps, groups, training, with_images=maker.images is not None)
    packs = [replace(pack, layout=place_on_rope_grid(pack.layout, config.model)) for pack in packs]
    if texts is not None and texts.ids:  # they are encoded once
        packs = [replace(pack, text=[texts.rows(text) for text in pack.text]) for pack in packs]
        texts = replace(texts, ids=False, encoder=None)
    images = maker.images
    if images is not None:
        images = replace(images, config=images.config.model_copy(update={"dropout": 0.0}))
    diffusion = config.diffusion.model_copy(update={"conditioning_dropout": 0.0})
    plain = replace(maker, diffusion=diffusion, texts=texts, images=images)
    loss = ValidationLoss(
        transformer_step.TransformerStep(plain), packs, settings.timesteps, ddp, groups,
        config.data.tokens_per_pack, transformer_step.read_log_sums, average,
    )  # fmt: skip
    if settings.vae is None or not settings.videos:
        return loss.measure, None
    sampling = SamplingSettings(settings.video_steps, guidance_scale=settings.guidance_scale, seed=maker.seed)
    videos = ValidationVideos(
        packs, settings.videos, ddp.module, maker.schedule, maker.scaling_factor, settings.vae, sampling,
        config.training.run_folder / "validation", groups, average, texts,
    )  # fmt: skip
    return loss.measure, videos.make


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
    mean = float(corpus.columns.lengths(config.model.patch).mean())
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


def _lock(training: TrainingConfig, groups: ParallelGroups) -> RunLock | None:
    """Take the run folder for this run, before anything in it is touched.

    Raises:
        AgreedError: another run holds it; on all ranks.
    """
    lock = None
    with agreed(groups, f"taking {training.run_folder}"):
        if groups.is_first:
            lock = RunLock(training.run_folder)
    return lock


def _open_run(config: Section, training: TrainingConfig, section: str) -> tuple[CheckpointDirectory, dict[str, Any]]:
    """Return the run's checkpoint directory and the resolved config; a checkpoint of another model is an error."""
    checkpoints, resolved = CheckpointDirectory(training.run_folder / "checkpoints"), dump_config(config)
    latest = checkpoints.latest()
    if latest is not None:
        try:
            before = read_state(latest)["config"].get(section, {})
            before = {**dump_config(type(getattr(config, section))()), **before}  # keys of later versions
        except CheckpointError:  # damaged: loading says so, and goes back or stops
            return checkpoints, resolved
        changed = [f"{section}.{key}" for key, value in resolved[section].items() if before.get(key) != value]
        if changed:
            raise CheckpointError(
                f"{latest} holds another model: {', '.join(changed)} differ from this config; use another "
                f"training.run_folder, or the config that wrote it"
            )
    elif training.start_from is not None:
        start = find_checkpoint(training.start_from)
        if section not in start.resolved:
            raise CheckpointError(
                f"training.start_from={training.start_from} has no section {section!r} (it has "
                f"{', '.join(start.resolved)}); is it a checkpoint of another kind of model?"
            )
        if section == "vae":
            _check_same_vae(start, resolved[section])
    return checkpoints, resolved


def _check_same_vae(start: Checkpoint, vae: dict[str, Any]) -> None:
    """Raise `CheckpointError` where a VAE would start from another variant; the scale of its latents may differ."""
    before = dump_config(start.section("vae", VAEConfig))
    changed = [
        f"vae.{key}: {before.get(key)} there, {value} here"
        for key, value in vae.items()
        if key not in ("preset", "scaling_factor") and before.get(key) != value
    ]
    if changed:
        raise CheckpointError(
            f"training.start_from={start.path} holds another variant of the VAE: {'; '.join(changed)}; set these keys "
            "as there"
        )


def _make_optimizer(
    ddp: DistributedDataParallel, settings: OptimizerConfig, total_steps: int, groups: ParallelGroups
) -> Optimizer:
    steps = settings.decay_steps or total_steps
    return build_optimizer(
        ddp, groups,
        lr=settings.learning_rate, min_lr=settings.min_learning_rate, total_steps=steps,
        warmup_steps=min(settings.warmup_steps, steps - 1), decay=settings.decay,
        betas=(settings.beta1, settings.beta2), eps=settings.eps, weight_decay=settings.weight_decay,
        clip_grad=settings.clip_gradient,
        initial_loss_scale=settings.initial_loss_scale, loss_scale_window=settings.loss_scale_window,
    )  # fmt: skip


def _load_newest(
    config: TrainConfig | VAETrainConfig, ddp: DistributedDataParallel, optimizer: Optimizer,
    checkpoints: CheckpointDirectory, groups: ParallelGroups, beside: Mapping[str, Kept],
) -> TrainState:  # fmt: skip
    """Load the run's newest complete checkpoint, or else the weights of `training.start_from`; say where it stands."""
    model = unwrap(ddp)
    count = sum(parameter.numel() for parameter in model.parameters())
    logger.info("model: %s parameters on this rank, %s", f"{count:,}", next(model.parameters()).dtype)
    if groups.is_first:
        checkpoints.recover()
    barrier(groups)
    go_back = config.checkpoint.on_damaged == "go_back"
    found = load_newest(checkpoints, ddp, optimizer, groups, go_back=go_back, beside=beside)
    if found is not None:
        path, extra = found
        check_finite(model, str(path))
        logger.info("resumed from %s", path)
        return TrainState.from_json(extra["state"])
    if config.training.start_from is not None:
        _start_from(config, find_checkpoint(config.training.start_from), ddp, optimizer, groups, beside)
    return TrainState()


def _start_from(
    config: TrainConfig | VAETrainConfig, start: Checkpoint, ddp: DistributedDataParallel, optimizer: Optimizer,
    groups: ParallelGroups, beside: Mapping[str, Kept],
) -> None:  # fmt: skip
    """Take the weights of another run, and those of its discriminator if both runs have one; an average starts anew.

    A transformer's are grown to what this stage's model needs.
    """
    adversary = beside.get("discriminator")
    others: dict[str, Kept] = {}
    if isinstance(adversary, Adversary) and start.resolved.get("loss", {}).get("gan_weight", 0) > 0:
        others["discriminator"] = WeightsOnly(adversary)
    if isinstance(config, TrainConfig):
        model = unwrap(ddp)
        assert isinstance(model, CogVideoXTransformer), type(model).__name__
        start_from(model, start, config.parallel, groups)
    else:
        load(start.path, ddp, None, groups, beside=others)
    optimizer.reload_weights()
    average = beside.get("ema")
    if isinstance(average, WeightAverage):
        average.restart()
    logger.info("starting with the weights of %s%s", start.path, " and its discriminator's" if others else "")


def _pack_inputs(
    loader: PackLoader, config: TrainConfig, groups: ParallelGroups, bad_samples: Mapping[str, Any]
) -> Iterator[StepInput]:
    """Yield the packs of this rank with the timesteps of their samples, step after step."""
    sizes = f"tp{groups.tensor[1]} cp{groups.context[1]} pp{groups.pipeline[1]} dp{groups.data[1]}"
    counter = FaultCounter(config.data.max_bad_in_a_row, bad_samples)
    for packs in read_together(loader, groups):
        weights = [sample_weights(layout, config.diffusion.loss_mean) for layout in loader.layouts]
        timesteps = step_timesteps(config.diffusion, config.training.seed, packs[0].step, weights)
        bad = agree_on_faults(packs, loader.layouts, groups, counter)
        facts = {**step_facts(config, loader.layouts), "layout": sizes, "bad_samples": dict(counter.counts)}
        packs = [pack.without(bad[pack.place]) for pack in packs]
        placed = [replace(pack, layout=place_on_rope_grid(pack.layout, config.model)) for pack in packs]
        ids = [[sample.sample_id for sample in pack.layout.samples[:-1]] for pack in packs]
        microbatches = [(pack, timesteps[pack.place]) for pack in placed]
        yield StepInput(microbatches, facts, loader.state(), ids, counter.state())


def agree_on_faults(
    packs: list[Pack], layouts: list[PackLayout], groups: ParallelGroups, counter: FaultCounter
) -> list[set[int]]:
    """Return the places of the bad samples in each pack of the step, equal on all ranks.

    Each rank read other frames of a pack, so what one of them couldn't read is bad for all.

    Raises:
        AgreedError: too many samples in a row are bad.
    """
    starts = np.cumsum([0, *(layout.num_samples - 1 for layout in layouts)]).tolist()
    faults = torch.zeros(starts[-1], dtype=torch.int32)
    for pack in packs:
        for place, fault in pack.faults.items():
            faults[starts[pack.place] + place] = int(fault)
    agreed = max_over_ranks(faults, groups).tolist()
    counter.add(agreed, [sample.sample_id for layout in layouts for sample in layout.samples[:-1]])
    return [{m for m in range(end - start) if agreed[start + m]} for start, end in pairwise(starts)]


def step_facts(config: TrainConfig, layouts: list[PackLayout]) -> dict[str, float]:
    """Return what the packs of one step are, for the log.

    `pack_fill` is the share of the token budget that samples use; `balance` the costliest pack's FLOPs over the mean
    (1 is perfect).
    """
    tokens = sum(layout.used_tokens for layout in layouts)
    flops = [training_flops(config.model, layout) for layout in layouts]
    return {
        "samples": sum(layout.num_samples - 1 for layout in layouts),
        "tokens": tokens,
        "pack_fill": round(tokens / sum(layout.num_tokens for layout in layouts), 5),
        "balance": round(max(flops) * len(flops) / sum(flops), 5),
        "flops": sum(flops),
    }


def _clip_inputs(loader: ClipLoader, config: VAETrainConfig, groups: ParallelGroups) -> Iterator[StepInput]:
    for batch in read_together(loader, groups):
        facts = {"samples": config.clips.clips_per_step, "frames": batch.video_BCTHW.shape[2]}
        yield StepInput([batch], facts, {})
