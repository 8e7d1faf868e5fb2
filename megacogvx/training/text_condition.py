"""Text in training: stored embeddings as they are, token ids encoded by the frozen T5, and what stands for no text.

Each caption is encoded by itself and rounded to bf16, as `megacogvx encode` stores it, so that a run on ids sees what a
run on stored embeddings does, and every rank of every layout sees the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from megacogvx.config import Section
from megacogvx.data.indexed.encoder_info import EncoderInfo
from megacogvx.errors import ConfigError

if TYPE_CHECKING:
    from megacogvx.models.text_encoder import TextEncoder

UNKNOWN = "unknown"  # fingerprint of an encoder that wasn't at hand


class TextConfig(Section):
    """Section `text`: the frozen text encoder that takes part in training.

    Attributes:
        encoder: folder with tokenizer/ and text_encoder/ (T5), the one that the dataset names; needed where the dataset
            holds token ids, and for `diffusion.dropped_text=empty`.
    """

    encoder: Path | None = None


@dataclass(frozen=True)
class TextRows:
    """Gives the text rows of samples.

    Attributes:
        width: E.
        ids: whether texts are token ids.
        encoder: encodes ids; None on ranks whose pipeline stage reads no text.
        empty_LE: the encoded empty prompt, bf16 on the CPU, which stands for a dropped text; None: zeros do.
    """

    width: int
    ids: bool = False
    encoder: TextEncoder | None = None
    empty_LE: torch.Tensor | None = None

    @property
    def vocabulary(self) -> int | None:
        """Token ids of samples have to be below this; None where no ids are encoded."""
        return self.encoder.vocabulary if self.ids and self.encoder is not None else None

    def rows(self, text: torch.Tensor) -> torch.Tensor:
        """Return the embedding `[L, E]` on the CPU of a stored text, `[L, E]` or checked ids `[L]`."""
        if not self.ids:
            return text
        if self.encoder is None:
            return torch.zeros(len(text), self.width, dtype=torch.bfloat16)
        return self.encoder.encode_ids(text[None].long())[0].to("cpu", torch.bfloat16)

    def dropped(self, length: int) -> torch.Tensor:
        """Return what stands for a dropped text of `length` tokens: `[length, E]` bf16 on the CPU."""
        if self.empty_LE is None:
            return torch.zeros(length, self.width, dtype=torch.bfloat16)
        assert length == len(self.empty_LE), f"{length} tokens, padded texts have {len(self.empty_LE)}"
        return self.empty_LE


def text_rows(
    config: TextConfig, info: EncoderInfo, dropped_text: str, device: torch.device, dtype: torch.dtype, reads: bool
) -> TextRows:
    """Load what this run needs of the text encoder.

    Args:
        config: section `text`.
        info: what made the dataset.
        dropped_text: `diffusion.dropped_text`.
        device, dtype: of the encoder.
        reads: whether this rank's pipeline stage reads text; others load nothing.

    Raises:
        DataError: the folder holds no T5.
        ConfigError: it isn't the encoder that the dataset names.
    """
    ids = info.text_kind == "token_ids"
    if not reads or not (ids or dropped_text == "empty"):
        return TextRows(info.text_width, ids)
    assert config.encoder is not None
    from megacogvx.models.text_encoder import TextEncoder  # transformers takes seconds, and few runs need it

    encoder = TextEncoder.from_folder(config.encoder, info.text_length, device, dtype)
    if info.text_encoder_fingerprint not in (encoder.fingerprint, UNKNOWN):
        raise ConfigError(
            f"text.encoder={config.encoder} is not the encoder of the dataset (fingerprint "
            f"{info.text_encoder_fingerprint}); name that one"
        )
    empty_LE = encoder.encode([""])[0][0].to("cpu", torch.bfloat16) if dropped_text == "empty" else None
    return TextRows(info.text_width, ids, encoder if ids else None, empty_LE)
