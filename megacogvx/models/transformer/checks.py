"""What a transformer refuses to read: packs that it isn't made for."""

from __future__ import annotations

import torch

from megacogvx.errors import DataError
from megacogvx.models.transformer.config import CogVideoXConfig
from megacogvx.pack_layout import PADDING_ID, PackLayout, PackSample, place_sample


def check_pack(config: CogVideoXConfig, layout: PackLayout) -> None:
    """Check that a pack holds samples, and that each fits the model; reads host integers only.

    Raises:
        DataError: naming the sample, its size, the setting that it exceeds, and what would work.
    """
    samples = [sample for sample in layout.samples if sample.sample_id != PADDING_ID]
    if not samples:
        raise DataError(f"a pack of {layout.num_tokens} tokens holds no sample; leave it out, or give it at least one")
    for sample in samples:
        if sample.text_length > config.max_text_seq_length:
            raise DataError(
                f"sample {sample.sample_id} has {sample.text_length} text tokens, more than "
                f"model.max_text_seq_length={config.max_text_seq_length}; shorten the caption, or raise the setting to "
                f"{sample.text_length} for a model that is trained anew"
            )
        if problem := _position_problem(config, sample):
            raise DataError(f"sample {sample.sample_id}: {problem}")


def rope_grid_problem(config: CogVideoXConfig, sample: PackSample) -> str:
    """Return why a sample is larger than the rope grid, and what would work, or "".

    With `rope_grid=slice` positions are a corner of one grid of the native size (300 x 300 latent cells in 1.5); a
    model that is to see larger videos, by extrapolation, says so, and so does one trained on portrait clips beside
    landscape ones (`portrait`; the square grid of 1.5 holds both). "crop" scales any size into the grid, and there is
    no limit in time, nor without rotation.
    """
    if config.rope_grid != "slice" or not config.use_rotary_positional_embeddings:
        return ""
    _, height, width = config.native_grid
    _, tokens_high, tokens_wide = sample.grid
    if tokens_high <= height and tokens_wide <= width:
        return ""
    fits_turned = tokens_high <= width and tokens_wide <= height
    if fits_turned and config.portrait:
        return ""
    or_turned = "model.portrait=true if it is trained on portrait clips too, or " if fits_turned else ""
    return (
        f"{tokens_high} x {tokens_wide} tokens (h, w) are more than the rope grid's {height} x {width} "
        f"(model.sample_height={config.sample_height}, model.sample_width={config.sample_width}, "
        f"model.patch_size={config.patch_size}); set {or_turned}model.sample_height to at least "
        f"{max(tokens_high, height) * config.patch_size} and model.sample_width to at least "
        f"{max(tokens_wide, width) * config.patch_size} to extrapolate, or model.rope_grid=crop, or make the video "
        "smaller"
    )


def table_problem(config: CogVideoXConfig, sample: PackSample) -> str:
    """Return why a sample doesn't fit the learned position table, and what would, or "".

    The table starts at the first frame, so a shorter video takes its front; another height or width can't.
    """
    frames, height, width = config.native_grid
    if not config.use_learned_positional_embeddings:
        return ""
    if sample.grid[0] <= frames and sample.grid[1:] == (height, width):
        return ""
    if sample.grid[1:] == (height, width):
        way_out = (
            f"shorten the video to at most {frames * config.patch_size_t} latent frames, or raise "
            f"model.sample_frames={config.sample_frames} (training.start_from resizes the table)"
        )
    else:
        way_out = f"resize the video to {config.sample_height} x {config.sample_width} latent cells"
    return (
        f"{sample.grid} tokens (t, h, w), but the learned position table of this model is made for at most {frames} x "
        f"{height} x {width}; {way_out}, or use a model without model.use_learned_positional_embeddings"
    )


def size_problem(config: CogVideoXConfig, frames: int, height: int, width: int) -> str:
    """Return why latents of this size, in latent cells, can't be positioned, and what would work, or ""."""
    return _position_problem(config, place_sample(0, frames, height, width, 0, config.patch))


def _position_problem(config: CogVideoXConfig, sample: PackSample) -> str:
    return rope_grid_problem(config, sample) or table_problem(config, sample)


def check_rows(config: CogVideoXConfig, video_VP: torch.Tensor, text_LE: torch.Tensor) -> None:
    """Check the width of what the model reads.

    Raises:
        DataError: rows of patches or text embeddings of another width, naming the settings that they should fit.
    """
    q, p, _ = config.patch
    if (width := video_VP.shape[-1]) != config.row_size_in:
        channels = width / (q * p * p)
        held = f"{channels:g} channels" if channels.is_integer() else "no whole number of channels"
        raise DataError(
            f"video rows of {width} values are patches of {q} x {p} x {p} latent cells with {held}, but "
            f"model.in_channels={config.in_channels} asks for {config.row_size_in} values; encode with the VAE that "
            "this model belongs to, or set model.in_channels to what the latents (and the image beside them) have"
        )
    if (width := text_LE.shape[-1]) != config.text_embed_dim:
        raise DataError(
            f"text embeddings of width {width}, but model.text_embed_dim={config.text_embed_dim}; encode captions with "
            "the text encoder of this model"
        )
