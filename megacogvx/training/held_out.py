"""What is asked of held-out samples while a transformer trains: their loss, and videos of their texts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from megacogvx.data.corpus import Corpus
from megacogvx.data.pack import Pack
from megacogvx.data.planner import PackPlan
from megacogvx.inference.conditions import ConditionEncoder
from megacogvx.inference.denoise import SamplingSettings
from megacogvx.models.transformer.flops import cost_coefficients
from megacogvx.models.transformer.rope import place_on_rope_grid
from megacogvx.models.vae.tiling import Coding
from megacogvx.parallel.data_parallel import DistributedDataParallel
from megacogvx.training.agreement import agreed
from megacogvx.training.batch import BatchMaker
from megacogvx.training.config import TrainConfig
from megacogvx.training.corpus_checks import check_corpus
from megacogvx.training.ema import WeightAverage
from megacogvx.training.image_condition import check_vae
from megacogvx.training.step import TransformerStep, read_log_sums
from megacogvx.training.text_condition import TextRows
from megacogvx.training.validation_loss import ValidationLoss, held_out_packs
from megacogvx.training.validation_videos import ValidationVideos

Measure = Callable[[int, Callable[[], object]], dict[str, Any]]
MakeVideos = Callable[[int, Callable[[], object]], dict[str, torch.Tensor]]


def plan_held_out(config: TrainConfig) -> tuple[Corpus, PackPlan] | None:
    """Open the held-out datasets and plan their packs, the same at every start; None: nothing is held out.

    Raises:
        ConfigError, DataError: they can't be read, or don't fit the model, or `validation.vae` doesn't fit them.
        CheckpointError: `validation.vae` is no VAE's checkpoint.
    """
    if not config.validation.paths:
        return None
    data = config.data.model_copy(update={"paths": config.validation.paths})
    corpus = Corpus(data)
    check_corpus(config, corpus)
    if config.validation.videos and config.validation.vae is not None:
        check_vae("validation.vae", config.validation.vae, corpus.encoder)
    plan = PackPlan(corpus.columns, data, 0, config.model.patch, cost_coefficients(config.model))
    return corpus, plan


def held_out_measures(
    config: TrainConfig, training: Corpus, held_out: tuple[Corpus, PackPlan] | None, maker: BatchMaker,
    ddp: DistributedDataParallel, average: WeightAverage | None,
) -> tuple[Measure | None, MakeVideos | None]:  # fmt: skip
    """Return what measures held-out samples, and what makes videos of their texts; every rank calls it.

    Args:
        config: of the training.
        training: the corpus that is trained on.
        held_out: of `plan_held_out`.
        maker: the training's; neither text nor image is dropped here.
        ddp, average: the model, and its averaged weights if there are any.

    Raises:
        AgreedError: a held-out sample is trained on as well, or can't be read.
    """
    if held_out is None:
        return None, None
    settings, groups = config.validation, maker.groups
    with agreed(groups, "reading the held-out samples"):
        vocabulary = maker.texts.vocabulary if maker.texts is not None else None
        packs = held_out_packs(*held_out, settings.steps, groups, training, maker.images is not None, vocabulary)
        packs = [replace(pack, layout=place_on_rope_grid(pack.layout, config.model)) for pack in packs]
        packs, texts = _encoded_once(packs, maker.texts)
    images = maker.images
    if images is not None:
        images = replace(images, config=images.config.model_copy(update={"dropout": 0.0}))
    diffusion = config.diffusion.model_copy(update={"conditioning_dropout": 0.0})
    plain = replace(maker, diffusion=diffusion, texts=texts, images=images)
    loss = ValidationLoss(
        TransformerStep(plain), packs, settings.timesteps, ddp, groups, config.data.tokens_per_pack, read_log_sums,
        average,
    )  # fmt: skip
    if settings.vae is None or not settings.videos:
        return loss.measure, None
    sampling = SamplingSettings(settings.video_steps, guidance_scale=settings.guidance_scale, seed=maker.seed)
    clean = None if images is None else ConditionEncoder(images.vae, images.scaling_factor, images.scale)
    videos = ValidationVideos(
        packs, settings.videos, ddp.module, maker.schedule, maker.scaling_factor, settings.vae, sampling,
        config.training.run_folder / "validation", groups, average, texts, clean, Coding.of(settings.vae_mode),
    )  # fmt: skip
    return loss.measure, videos.make


def _encoded_once(packs: list[Pack], texts: TextRows | None) -> tuple[list[Pack], TextRows | None]:
    """Return the packs with embeddings in place of token ids."""
    if texts is None or not texts.ids:
        return packs, texts
    return [replace(pack, text=[texts.rows(text) for text in pack.text]) for pack in packs], replace(
        texts, ids=False, encoder=None
    )
