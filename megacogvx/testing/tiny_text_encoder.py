"""A tiny T5 text encoder, made offline: the published files and their layout, with random weights.

What a run without downloads uses in place of t5-v1_1-xxl. Its embeddings tell captions apart but know no language.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from sentencepiece import SentencePieceTrainer

from megacogvx import draws

HEAD_WIDTH, BUCKETS = 8, 32  # of attention; of relative positions


def build_tiny_text_encoder(
    folder: Path, captions: Sequence[str], *, width: int = 64, layers: int = 2, vocabulary: int = 512, seed: int = 0
) -> Path:
    """Write `folder/tokenizer/spiece.model` and `folder/text_encoder/` (config.json, model.safetensors).

    Args:
        folder: made if it is not there.
        captions: texts that the sentencepiece model (unigram) is trained on.
        width: E, a multiple of 8.
        layers: encoder layers.
        vocabulary: at most this many pieces; few captions give fewer.
        seed: of the weights; the same seed and captions give the same bytes.

    Returns:
        `folder`, for `TextEncoder.from_folder`.
    """
    tokenizer, model = folder / "tokenizer", folder / "text_encoder"
    tokenizer.mkdir(parents=True, exist_ok=True)
    model.mkdir(parents=True, exist_ok=True)
    (tokenizer / "spiece.model").write_bytes(_train_tokenizer(captions, vocabulary))
    config = {
        "architectures": ["T5EncoderModel"], "model_type": "t5", "vocab_size": vocabulary, "d_model": width,
        "d_kv": HEAD_WIDTH, "d_ff": 2 * width, "num_layers": layers, "num_heads": width // HEAD_WIDTH,
        "relative_attention_num_buckets": BUCKETS, "feed_forward_proj": "gated-gelu", "layer_norm_epsilon": 1e-6,
        "dropout_rate": 0.0, "is_encoder_decoder": False, "tie_word_embeddings": False, "pad_token_id": 0,
        "eos_token_id": 1, "dtype": "float32",
    }  # fmt: skip
    (model / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    weights = {name: _draw(name, shape, seed) for name, shape in _shapes(width, layers, vocabulary).items()}
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    return folder


def _shapes(width: int, layers: int, vocabulary: int) -> dict[str, tuple[int, ...]]:
    """Return the weights of T5's encoder by their published names."""
    shapes: dict[str, tuple[int, ...]] = {"shared.weight": (vocabulary, width)}
    for layer in range(layers):
        attention, feed_forward = (f"encoder.block.{layer}.layer.{part}" for part in (0, 1))
        shapes |= {f"{attention}.SelfAttention.{name}.weight": (width, width) for name in "qkvo"}
        shapes |= {f"{feed_forward}.DenseReluDense.{name}.weight": (2 * width, width) for name in ("wi_0", "wi_1")}
        shapes[f"{feed_forward}.DenseReluDense.wo.weight"] = (width, 2 * width)
        shapes |= {f"{part}.layer_norm.weight": (width,) for part in (attention, feed_forward)}
    positions = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"  # all layers share it
    return shapes | {positions: (BUCKETS, width // HEAD_WIDTH), "encoder.final_layer_norm.weight": (width,)}


def _draw(name: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """T5's own rule: unit embeddings and norms, unit activations, and small queries, since T5 doesn't scale logits."""
    if "layer_norm" in name:
        return torch.ones(shape)
    deviation = 1.0 if name == "shared.weight" else shape[-1] ** -0.5
    if ".q." in name:
        deviation *= HEAD_WIDTH**-0.5
    return draws.normal(shape, seed, f"tiny text encoder {name}") * deviation


def _train_tokenizer(captions: Sequence[str], vocabulary: int) -> bytes:
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(captions), model_writer=model, model_type="unigram", vocab_size=vocabulary,
        hard_vocab_limit=False, pad_id=0, eos_id=1, unk_id=2, bos_id=-1, num_threads=1, minloglevel=2,
    )  # fmt: skip
    return model.getvalue()
