"""The values of a record's fields in torch: which dtype a name of `FIELD_DTYPES` is, and how values get there."""

from __future__ import annotations

import torch

from megacogvx.data.indexed.encoder_info import FIELD_DTYPES


def field_dtype(name: str) -> torch.dtype:
    """Return torch's dtype of a field dtype such as "bf16"."""
    dtype: torch.dtype = getattr(torch, FIELD_DTYPES[name][2])
    return dtype


def to_field(values: torch.Tensor, name: str) -> torch.Tensor:
    """Return `values` as they are stored, contiguous on the CPU, in memory of their own.

    What an 8-bit float can't reach becomes its largest value; the cast alone would make NaN or infinity of it.

    Args:
        values: floats, or integers for an integer field.
        name: a key of `layout.FIELD_DTYPES`.
    """
    dtype = field_dtype(name)
    if name.startswith("fp8"):
        limit = torch.finfo(dtype).max
        values = values.float().clamp(-limit, limit)
    return values.detach().to("cpu", dtype, copy=True).contiguous()
