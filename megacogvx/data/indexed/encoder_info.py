"""EncoderInfo: what made the records of a dataset, and what the values of their fields are."""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from megacogvx.config import Section
from megacogvx.errors import DataError

# What fields may hold: (dtype code, bytes, torch's name).
FIELD_DTYPES = {
    "bf16": (10, 2, "bfloat16"), "fp8_e4m3": (11, 1, "float8_e4m3fn"), "fp8_e5m2": (12, 1, "float8_e5m2"),
    "int16": (3, 2, "int16"), "int32": (4, 4, "int32"), "int64": (5, 8, "int64"),
}  # fmt: skip
FloatDtype = Literal["bf16", "fp8_e4m3", "fp8_e5m2"]
TextDtype = Literal["bf16", "fp8_e4m3", "fp8_e5m2", "int16", "int32", "int64"]
TextKind = Literal["padded", "real", "token_ids"]


class EncoderInfo(Section):
    """What made the records; one dataset, and one corpus, holds records of a single encoder.

    Attributes:
        text_kind: "padded": every text has `text_length` tokens, as released weights need; "real": only its own;
            "token_ids": the tokenizer's ids of the padded text, which a training run encodes itself.
        text_length: limit of the text tokens.
        text_width: E, width of a text embedding.
        latent_channels: C; the stored moments have 2C, mean then log-variance.
        latent_scale_factor: what a posterior draw is multiplied with before diffusion.
        vae_fingerprint, text_encoder_fingerprint: checksums of the encoders' weights.
        latent_dtype, text_dtype: of the stored values; an integer for ids, and for nothing else.
        first_frame: whether records may hold their first frame as pixels (image to video noises it before the VAE).
    """

    text_kind: TextKind
    text_length: int = Field(ge=1, le=2**20)
    text_width: int = Field(ge=1, le=2**20)
    latent_channels: int = Field(ge=1, le=2**12)
    latent_scale_factor: float = Field(gt=0, allow_inf_nan=False)
    vae_fingerprint: str = Field(max_length=256)
    text_encoder_fingerprint: str = Field(max_length=256)
    latent_dtype: FloatDtype = "bf16"
    text_dtype: TextDtype = "bf16"
    first_frame: bool = False

    @model_validator(mode="after")
    def _ids_are_integers(self) -> EncoderInfo:
        if (self.text_kind == "token_ids") != self.text_dtype.startswith("int"):
            raise ValueError(
                f"text_kind={self.text_kind} and text_dtype={self.text_dtype} don't go together: token_ids are int16, "
                "int32 or int64, embeddings are not"
            )
        return self

    @property
    def pads_text(self) -> bool:
        """Whether every text has `text_length` tokens."""
        return self.text_kind != "real"

    @property
    def frame_cell_bytes(self) -> int:
        """Bytes of one latent cell."""
        return 2 * self.latent_channels * FIELD_DTYPES[self.latent_dtype][1]

    @property
    def text_shape(self) -> tuple[int, ...]:
        """Axes of a stored text after its tokens: (E,) of embeddings, () of ids."""
        return () if self.text_kind == "token_ids" else (self.text_width,)

    @property
    def text_token_bytes(self) -> int:
        """Bytes of one stored text token."""
        return math.prod(self.text_shape) * FIELD_DTYPES[self.text_dtype][1]

    @property
    def bin_header_values(self) -> tuple[int, int, int, int]:
        """What the .bin's header says of the fields: channels, text width, the two dtype codes (0: bf16)."""
        codes = [0 if name == "bf16" else FIELD_DTYPES[name][0] for name in (self.latent_dtype, self.text_dtype)]
        return 2 * self.latent_channels, self.text_width, codes[0], codes[1]


def parse_encoder(values: Any, where: str) -> EncoderInfo:
    """Return the checked `EncoderInfo`.

    Raises:
        DataError: a key is missing, unknown or out of range.
    """
    try:
        return EncoderInfo.model_validate(values)
    except ValidationError as error:
        problem = error.errors()[0]
        raise DataError(f"{where}: encoder.{'.'.join(map(str, problem['loc']))}: {problem['msg']}") from None
