"""Whether weights are numbers, and which ones they are."""

from __future__ import annotations

import torch
import xxhash
from torch import nn

from megacogvx.errors import DataError
from megacogvx.parallel.groups import ParallelGroups, gather_json

SHOWN = 3  # names in the message


def check_finite(model: nn.Module, source: str) -> None:
    """Check that no weight of `model` is NaN or infinite; waits for the device once.

    Args:
        model: its parameters and buffers (such as a learned table of positions) are read.
        source: where the weights came from, for the message.

    Raises:
        DataError: naming the first weights that aren't finite, and how many values of each.
    """
    named = [*model.named_parameters(), *model.named_buffers()]
    finite = torch.stack([tensor.detach().isfinite().all() for _, tensor in named]).tolist()
    bad = [entry for entry, fine in zip(named, finite, strict=True) if not fine]
    if not bad:
        return
    shown = [f"{name} ({int((~p.detach().isfinite()).sum())} of {p.numel()} values)" for name, p in bad[:SHOWN]]
    more = f" and {len(bad) - SHOWN} more" if len(bad) > SHOWN else ""
    narrow = " fp16 holds nothing above 65504: try bf16 or fp32." if bad[0][1].dtype == torch.float16 else ""
    raise DataError(
        f"weights of {source} are NaN or infinite: {', '.join(shown)}{more};{narrow} take an earlier checkpoint, or "
        "convert or download this one again"
    )


def check_finite_on_every_rank(model: nn.Module, source: str, groups: ParallelGroups) -> None:
    """As `check_finite`, of a model that is cut over ranks: what one of them finds is the error of all.

    None is left waiting for a rank that has found its part of the weights bad.
    """
    problem = None
    try:
        check_finite(model, source)
    except DataError as error:
        problem = str(error)
    for found in filter(None, gather_json(problem, groups)):
        raise DataError(found)


def weights_fingerprint(model: nn.Module) -> str:
    """Return the xxh3 (hex) of all weights of a model, names, dtypes and shapes included."""
    digest = xxhash.xxh3_128()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\0".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return str(digest.hexdigest())
