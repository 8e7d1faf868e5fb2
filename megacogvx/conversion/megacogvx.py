"""Our own checkpoints, from any layout to any layout: `OUT/transformer/checkpoints/step-00000000/`, `OUT/vae/...`.

What is written here is a run folder as training writes it, without an optimizer: `generate` and a new training start
from it on any number of ranks.
"""

from __future__ import annotations

from pathlib import Path

import torch
import yaml

from megacogvx.checkpoint.directory import CheckpointDirectory
from megacogvx.checkpoint.find import find_checkpoint
from megacogvx.checkpoint.manifest import MANIFEST
from megacogvx.checkpoint.streamed import StreamedCheckpoint, write_streamed
from megacogvx.conversion.ours import Shapes, transformer_shapes, vae_shapes
from megacogvx.conversion.part import LIVE, Kind, Part, ReadOptions
from megacogvx.conversion.settings import Settings, TransformerSettings, VAESettings, dump_settings
from megacogvx.conversion.tensors import Table, TensorInfo, check_complete, renamed

NAME = "megacogvx"
CHECKPOINTS, FIRST_STEP = "checkpoints", 0
LIVE_SET = "model"  # how the checkpoint calls the weights that the optimizer steps


class CheckpointTensors:
    """A checkpoint's weights as a source of tensors."""

    def __init__(self, path: Path, weights: str) -> None:
        self.path = path
        self._checkpoint = StreamedCheckpoint(path, LIVE_SET if weights == LIVE else weights)
        self.infos = {name: TensorInfo(*entry) for name, entry in self._checkpoint.tensors.items()}

    def read(self, name: str) -> torch.Tensor:
        """Return one tensor."""
        return self._checkpoint.read(name)


def find(path: Path) -> dict[Kind, Path]:
    """Return the run folders of the models that `path` holds: what `write_part` wrote, a run, or a checkpoint."""
    if (path / CHECKPOINTS).is_dir() or (path / MANIFEST).is_file() or path.name.startswith("step-"):
        sections = find_checkpoint(path).resolved
        return {"vae": path} if "vae" in sections and "model" not in sections else {"transformer": path}
    kinds: tuple[Kind, ...] = ("transformer", "vae")
    return {kind: path / kind for kind in kinds if (path / kind / CHECKPOINTS).is_dir()}


def open_part(kind: Kind, path: Path, options: ReadOptions) -> Part:
    """Check the newest checkpoint (or the one that is named) and read its settings and names.

    Raises:
        CheckpointError: it is incomplete, damaged, of another kind, or has no such weights.
    """
    found = find_checkpoint(path)
    source = CheckpointTensors(found.path, options.weights)
    settings: Settings
    if kind == "vae":
        settings = VAESettings.from_sections(found.resolved, str(found.path))
    else:
        settings = TransformerSettings.from_sections(found.resolved, str(found.path))
    check_complete(source, identity(shapes_of(settings)), f"the {kind} that its config describes")
    return Part(kind, NAME, settings, source)


def write_part(part: Part, root: Path, max_shard_bytes: int) -> Path:
    """Write one model as the first checkpoint of a run folder, and return that; its size per file is not limited."""
    folder = root / part.kind
    sections = dump_settings(part.settings)
    write_streamed(
        CheckpointDirectory(folder / CHECKPOINTS),
        FIRST_STEP,
        {name: (info.shape, info.dtype) for name, info in part.tensors.infos.items()},
        part.tensors.read,
        {"state": {"step": FIRST_STEP, "samples": 0, "tokens": 0, "data": {}}, "config": sections},
        {"config.yaml": yaml.safe_dump(sections, sort_keys=False)},
    )
    return folder


def shapes_of(settings: Settings) -> Shapes:
    """Return our names and shapes."""
    return vae_shapes(settings.vae) if isinstance(settings, VAESettings) else transformer_shapes(settings.model)


def identity(shapes: Shapes) -> Table:
    """Return the table of our own names."""
    return [renamed(name, name, shape) for name, shape in shapes.items()]
