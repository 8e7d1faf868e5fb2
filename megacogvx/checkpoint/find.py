"""Which checkpoint a path names, and with what config it was written; no weights are read.

A path is a run folder, whose newest complete checkpoint is taken, or one of its checkpoints. The resolved config inside
says which model it is.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from megacogvx.checkpoint.directory import CheckpointDirectory
from megacogvx.checkpoint.whole import read_state
from megacogvx.config import Section, build_config
from megacogvx.errors import CheckpointError, ConfigError

STEP_FOLDER = re.compile(r"step-(\d{8})")
AnySection = TypeVar("AnySection", bound=Section)


@dataclass(frozen=True)
class Checkpoint:
    """One complete checkpoint of a run.

    Attributes:
        directory: the run's checkpoints.
        step: which of them.
        resolved: the run's resolved config, by section.
    """

    directory: CheckpointDirectory
    step: int
    resolved: Mapping[str, Any]

    @property
    def path(self) -> Path:
        """The checkpoint's folder."""
        return self.directory.path(self.step)

    def section(self, name: str, kind: type[AnySection]) -> AnySection:
        """Return one section of the run's config; see `read_section`."""
        return read_section(self.resolved, name, kind, str(self.path))


def find_checkpoint(path: Path) -> Checkpoint:
    """Find the checkpoint that `path` names.

    Args:
        path: a run folder (`checkpoints/` in it) or one of its checkpoints, `.../step-00000100`.

    Raises:
        CheckpointError: there is no such folder, no complete checkpoint in it, or the one named is half written.
    """
    path = Path(path)
    named = STEP_FOLDER.fullmatch(path.resolve().name)
    folder = path.resolve().parent if named else path / "checkpoints"
    if not (path.is_dir() if named else folder.is_dir()):
        raise CheckpointError(
            f"{path} is neither a run folder (it would hold checkpoints/) nor a checkpoint (.../step-00000100)"
        )
    directory = CheckpointDirectory(folder)
    complete = directory.steps()
    if not complete:
        raise CheckpointError(f"{folder} holds no complete checkpoint; let the run reach training.save_every steps")
    step = int(named[1]) if named else complete[-1]
    if step not in complete:
        raise CheckpointError(
            f"{path} was not written to its end; complete checkpoints beside it: {', '.join(map(str, complete))}"
        )
    resolved = read_state(directory.path(step)).get("config")
    if not isinstance(resolved, dict):
        raise CheckpointError(f"{directory.path(step)} doesn't say which config it was trained with")
    return Checkpoint(directory, step, resolved)


def read_section(sections: Mapping[str, Any], name: str, kind: type[AnySection], source: str) -> AnySection:
    """Build one section of a resolved config.

    Raises:
        CheckpointError: it isn't there, so this is a checkpoint of another kind of model, or it doesn't fit this
            version.
    """
    if not isinstance(sections.get(name), Mapping):
        raise CheckpointError(
            f"{source} has no section {name!r} (it has {', '.join(sections) or 'none'}); is it a "
            "checkpoint of another kind of model?"
        )
    try:
        return build_config(kind, dict(sections[name]), source=f"{source}, section {name}")
    except ConfigError as error:
        raise CheckpointError(f"{error}; was it written by another version?") from None
