"""A tiny image-to-video training: a dataset with first frames and token ids, the VAE and the T5 that it names.

Offline, with random weights; for tests of everything that runs frozen encoders beside a transformer.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from megacogvx.conversion.megacogvx import write_part
from megacogvx.conversion.settings import VAESettings
from megacogvx.data.indexed.encoder_info import TextKind
from megacogvx.inference.load import load_vae
from megacogvx.models.text_encoder import TextEncoder
from megacogvx.models.weights import weights_fingerprint
from megacogvx.testing.drawn_checkpoint import SMALL_VAE, drawn_part
from megacogvx.testing.tiny_dataset import Size, tiny_encoder, write_tiny_dataset
from megacogvx.testing.tiny_text_encoder import build_tiny_text_encoder

TEXT_LENGTH, TEXT_WIDTH = 6, 16
SIZES: tuple[Size, ...] = ((3, 4, 6), (1, 4, 4), (2, 4, 6))
CAPTIONS = ("A red square moves left.", "A blue disc moves right over a white background.")
MODEL: dict[str, Any] = {
    "num_layers": 2, "num_attention_heads": 4, "attention_head_dim": 16, "text_embed_dim": TEXT_WIDTH,
    "time_embed_dim": 32, "max_text_seq_length": TEXT_LENGTH, "sample_height": 4, "sample_width": 6, "in_channels": 8,
    "out_channels": 4, "use_rotary_positional_embeddings": True,
}  # fmt: skip


def write_vae(folder: Path) -> Path:
    """Write FOLDER/vae, a run folder of a tiny VAE of 4 latent channels; returns it."""
    settings = VAESettings(SMALL_VAE)
    return write_part(drawn_part(settings), folder, 2**30)


def write_text_encoder(folder: Path) -> TextEncoder:
    """Write FOLDER/text, a tiny T5, and load it."""
    build_tiny_text_encoder(folder / "text", CAPTIONS, width=TEXT_WIDTH, layers=1, vocabulary=64)
    return TextEncoder.from_folder(folder / "text", TEXT_LENGTH)


def write_conditions(
    folder: Path, text_kind: TextKind = "token_ids", samples: int = 12, sizes: Sequence[Size] = SIZES
) -> dict[str, Any]:
    """Write FOLDER/dataset, FOLDER/vae and FOLDER/text; returns the sections of a `TrainConfig` that use them."""
    vae, text = write_vae(folder), write_text_encoder(folder)
    encoder = tiny_encoder(
        text_kind, text_length=TEXT_LENGTH, text_width=TEXT_WIDTH, first_frame=True,
        vae_fingerprint=weights_fingerprint(load_vae(vae, torch.device("cpu"), torch.float32)),
        text_encoder_fingerprint=text.fingerprint,
    )  # fmt: skip
    write_tiny_dataset(folder / "dataset", samples, encoder=encoder, sizes=sizes)
    return {
        "model": MODEL,
        "data": {"paths": [str(folder / "dataset")], "tokens_per_pack": 64, "packs_per_step": 2},
        "image": {"vae": str(vae)},
        "text": {"encoder": str(folder / "text")},
        "optimizer": {"learning_rate": 1e-2, "warmup_steps": 0, "decay_steps": 100},
        "training": {"steps": 3, "seed": 3, "run_folder": str(folder / "run"), "save_every": 100},
        "tracking": {"tensorboard": False},
    }
