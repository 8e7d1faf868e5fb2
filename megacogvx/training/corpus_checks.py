"""What a model and a training ask of their dataset, from its index alone: said before any process group exists."""

from __future__ import annotations

import numpy as np

from megacogvx.data.corpus import Corpus
from megacogvx.errors import ConfigError
from megacogvx.models.transformer.checks import size_problem
from megacogvx.models.transformer.config import CogVideoXConfig
from megacogvx.parallel.config import divisors
from megacogvx.training.config import TrainConfig
from megacogvx.training.image_condition import check_vae


def check_corpus(config: TrainConfig, corpus: Corpus) -> None:
    """Check that the model can read what the corpus holds.

    Raises:
        ConfigError: latent channels or text width differ, its captions are longer than the model's limit, its videos
            don't divide into patches, are larger than the rope grid or not what the learned position table is made
            for, or its texts or first frames are not what this training needs.
        CheckpointError: `image.vae` is no VAE's checkpoint.
    """
    encoder, model = corpus.encoder, config.model
    wanted = {
        "model.out_channels": (model.out_channels, encoder.latent_channels),
        "model.text_embed_dim": (model.text_embed_dim, encoder.text_width),
    }
    for key, (ours, theirs) in wanted.items():
        if ours != theirs:
            raise ConfigError(f"{key}={ours}, but the dataset was encoded with {theirs}; set {key}={theirs}")
    longest = int(corpus.columns.text_length.max())
    if longest > model.max_text_seq_length:
        raise ConfigError(
            f"model.max_text_seq_length={model.max_text_seq_length}, but the dataset has a text of {longest} tokens; "
            f"set it to at least {longest}, or encode again with shorter captions"
        )
    _check_sizes(model, corpus)
    _check_text(config, corpus)
    if config.is_image_to_video:
        assert config.image.vae is not None
        vae = check_vae("image.vae", config.image.vae, encoder)
        _check_first_frames(corpus, vae.config.spatial_compression_ratio)


def _check_sizes(model: CogVideoXConfig, corpus: Corpus) -> None:
    columns = corpus.columns
    sizes = np.unique(np.stack([columns.frames, columns.height, columns.width]), axis=1)
    common = int(np.gcd.reduce(sizes[1:], axis=None))
    for frames, height, width in sizes.T.tolist():
        held = f"the dataset has videos of {frames} x {height} x {width} latent cells (t, h, w)"
        if height % model.patch_size or width % model.patch_size:
            raise ConfigError(
                f"{held}, whose height and width model.patch_size={model.patch_size} must divide; sizes that work for "
                f"all its videos: {divisors(common)}; or filter out those of other sizes"
            )
        if problem := size_problem(model, frames, height, width):
            raise ConfigError(f"{held}: {problem}")


def _check_text(config: TrainConfig, corpus: Corpus) -> None:
    encoder = corpus.encoder
    if encoder.text_kind == "token_ids" and config.text.encoder is None:
        raise ConfigError(
            f"{corpus.datasets[0].folder} holds token ids, which are encoded while training: set text.encoder to the "
            "folder of its T5, or encode the dataset with --text-kind padded"
        )
    if config.diffusion.dropped_text == "empty" and not encoder.pads_text:
        raise ConfigError(
            f"diffusion.dropped_text=empty with a dataset of encoder.text_kind={encoder.text_kind}: the empty prompt "
            "stands for texts of one length only; set dropped_text=zeros, or encode with --text-kind padded"
        )


def _check_first_frames(corpus: Corpus, ratio: int) -> None:
    for dataset in corpus.datasets:
        without = np.flatnonzero(~dataset.has_first_frame())
        if len(without):
            raise ConfigError(
                f"{dataset.folder} lacks the first frame of {len(without)} of {len(dataset)} samples (the first is "
                f"{int(dataset.sample_id[without[0]])}), which image to video needs as pixels: encode it with "
                "--first-frame, filter those samples out, or set model.in_channels for text to video"
            )
        wanted = np.stack([dataset.height, dataset.width]) * ratio
        wrong = np.flatnonzero((dataset.first_frame_sizes() != wanted).any(axis=0))
        if len(wrong):
            theirs, ours = (" x ".join(map(str, sizes[:, wrong[0]])) for sizes in (dataset.first_frame_sizes(), wanted))
            raise ConfigError(
                f"{dataset.folder}: the first frame of {len(wrong)} of {len(dataset)} samples is not of the video's "
                f"size; that of sample {int(dataset.sample_id[wrong[0]])} is {theirs} pixels (h, w), its latents stand "
                f"for {ours}; encode them again with --first-frame"
            )
