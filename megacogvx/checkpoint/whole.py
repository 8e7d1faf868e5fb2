"""Loading a checkpoint's weights into a whole model in one process, without process groups.

For models that every process holds entirely, such as the VAE that encodes and decodes; the layout that saved them
doesn't matter. Nothing is read before the manifest's checksums have been found right, and then as `reading.py` allows.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint import load
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megacogvx.checkpoint.distributed import STATE
from megacogvx.checkpoint.manifest import read_manifest, verify
from megacogvx.checkpoint.reading import SafeReader
from megacogvx.errors import CheckpointError

PREFIX = "model."  # of the model's tensors among those of a checkpoint


def load_whole(path: Path, model: nn.Module, prefix: str = PREFIX) -> None:
    """Load the weights of a checkpoint into `model`, which holds all of every tensor.

    Args:
        path: the checkpoint's folder.
        model: its weights are overwritten, in their own dtype and on their own device.
        prefix: of the names of the weights that are taken; a run may keep others beside the model's, such as averages.

    Raises:
        CheckpointError: the checkpoint is missing, incomplete, damaged, or of another model.
    """
    verify(path)
    reader = SafeReader(path)
    there = {
        name.removeprefix(prefix): tuple(entry.size)
        for name, entry in reader.read_metadata().state_dict_metadata.items()
        if name.startswith(prefix) and isinstance(entry, TensorStorageMetadata)
    }
    asked = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    differing = sorted(name for name in there.keys() | asked.keys() if there.get(name) != asked.get(name))
    if differing:
        name = differing[0]
        raise CheckpointError(
            f"{path} is of another model: {name} is {there.get(name, 'not there')} in the checkpoint and "
            f"{asked.get(name, 'not there')} in the model ({len(differing)} tensors differ)"
        )
    state = {prefix + name: torch.empty_like(tensor, device="cpu") for name, tensor in model.state_dict().items()}
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # which is the point
            load(state, storage_reader=reader, no_dist=True)
    except (CheckpointException, OSError, RuntimeError) as error:
        raise CheckpointError(f"{path} can't be read: {error}") from None
    model.load_state_dict({name.removeprefix(prefix): tensor for name, tensor in state.items()})


def read_state(path: Path) -> dict[str, Any]:
    """Return what `save` got as `extra`, without the weights; the file's checksum is checked.

    Raises:
        CheckpointError: `path` is no complete checkpoint, or the file is damaged.
    """
    _, entries = read_manifest(path)
    if STATE not in entries:
        raise CheckpointError(f"{path} has no {STATE}; it was not written by a training run")
    verify(path, [STATE])
    state: dict[str, Any] = json.loads((path / STATE).read_text())
    return state
