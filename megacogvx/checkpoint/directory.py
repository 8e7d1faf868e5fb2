"""The folder of a run's checkpoints: which are complete, which is the latest, and that none is half there.

No ranks here: `distributed.py` decides which rank does what.
"""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

from megacogvx.checkpoint.manifest import MANIFEST, STEP_NAME, FileEntry, files_of, manifest_text, read_manifest
from megacogvx.errors import CheckpointError
from megacogvx.log import get_logger

TRACKER = "latest_checkpointed_iteration.txt"  # megatron-core's name and form, for scripts; nothing here reads it
# What a name may end with: a checkpoint that is being written, or was when the program ended; an older checkpoint of
# the same step, for the moment in which the new one takes its name; one that is being deleted.
PARTIAL, REPLACED, REMOVED = ".partial", ".replaced", ".removed"
WRITING = ".writing"  # a small file that is being written

logger = get_logger(__name__)


class CheckpointDirectory:
    """The checkpoints of one run.

    Args:
        folder: holds one folder per step; made on the first `begin`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self._begun: dict[int, Path] = {}

    def path(self, step: int) -> Path:
        """Return where the complete checkpoint of `step` lies, or will."""
        return self.folder / f"step-{step:08d}"

    def steps(self) -> list[int]:
        """Return the steps of all complete checkpoints, ascending; those that aren't are named in the log."""
        found = []
        for path in sorted(self.folder.iterdir()) if self.folder.is_dir() else []:
            named = STEP_NAME.fullmatch(path.name)
            problem = "it was never finished" if PARTIAL in path.suffix else None
            if named:
                problem = _incomplete(path)
            if problem:
                logger.warning("skipping checkpoint %s: %s", path, problem)
            elif named:
                found.append(int(named[1]))
        return sorted(found)

    def latest(self) -> Path | None:
        """Return the complete checkpoint of the highest step, or None."""
        steps = self.steps()
        return self.path(steps[-1]) if steps else None

    def recover(self) -> None:
        """Bring back what a killed run left between two names, and remove what it left unfinished.

        One process calls it, before the run starts. Only names that this class makes are touched.
        """
        (self.folder / (TRACKER + WRITING)).unlink(missing_ok=True)
        for path in sorted(self.folder.iterdir()) if self.folder.is_dir() else []:
            stem, suffix = path.stem, path.suffix
            if not STEP_NAME.fullmatch(stem) or not path.is_dir():
                continue
            if suffix == REPLACED and not (self.folder / stem).exists():
                logger.warning("bringing back %s, whose successor was never finished", self.folder / stem)
                os.replace(path, self.folder / stem)
            elif suffix in (REPLACED, REMOVED) or suffix.startswith(PARTIAL):
                logger.warning("removing %s, which a killed run left", path)
                shutil.rmtree(path, ignore_errors=True)

    def begin(self, step: int) -> Path:
        """Make an empty folder to write the checkpoint of `step` into.

        Its name is new each time: a writer that outlived a killed run can't write into the next run's folder.
        """
        partial = self.folder / f"{self.path(step).name}{PARTIAL}-{os.getpid():x}-{time.time_ns():x}"
        partial.mkdir(parents=True)
        self._begun[step] = partial
        return partial

    def commit(self, step: int, entries: dict[str, FileEntry]) -> Path:
        """Write the manifest and give the checkpoint of `step` its name; from now on it counts.

        Args:
            step: as in `begin`.
            entries: every file in the folder, hashed and on disk (`seal`).

        Raises:
            CheckpointError: `begin` wasn't called, or a file isn't among the entries.
        """
        final, partial = self.path(step), self._begun.get(step)
        if partial is None or not partial.is_dir() or set(files_of(partial)) != set(entries):
            raise CheckpointError(
                f"{partial or final} does not hold the {len(entries)} files that were written for step {step}"
            )
        write_durably(partial / MANIFEST, manifest_text(step, entries))
        sync_folder(partial)
        replaced = final.with_name(final.name + REPLACED)
        if final.exists():
            os.replace(final, replaced)
        os.replace(partial, final)
        del self._begun[step]
        sync_folder(self.folder)
        shutil.rmtree(replaced, ignore_errors=True)
        write_durably(self.folder / TRACKER, f"{step}\n")
        return final

    def drop(self, step: int) -> None:
        """Remove the folder that `begin` made for a save that failed."""
        if partial := self._begun.pop(step, None):
            shutil.rmtree(partial, ignore_errors=True)

    def prune(self, newest: int, keep_last: int | None, keep_every: int | None) -> list[int]:
        """Delete old checkpoints; return their steps.

        Args:
            newest: step of the one that was written last. Those of later steps stay and count for nothing: the run has
                gone back behind them, for they are damaged.
            keep_last: how many of the newest stay; None keeps all.
            keep_every: those whose step is a multiple stay for ever; None: none does.
        """
        if keep_last is None:
            return []
        old = [step for step in self.steps() if step <= newest][:-keep_last]
        gone = [step for step in old if not keep_every or step % keep_every]
        for step in gone:
            removed = self.path(step).with_name(self.path(step).name + REMOVED)
            os.replace(self.path(step), removed)  # first the name: what is half deleted must not look like damage
            shutil.rmtree(removed, ignore_errors=True)
        return gone


def sync_folder(path: Path) -> None:
    """Bring the names in a folder to disk, so that a rename outlives a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_durably(file: Path, text: str) -> None:
    """Write a text file beside, bring it to disk, give it its name: at any moment it is all there, or the old one."""
    temporary = file.with_name(file.name + WRITING)
    with temporary.open("w") as handle:
        handle.write(text)
        handle.flush()
        os.fsync(handle.fileno())
    os.replace(temporary, file)


def _incomplete(path: Path) -> str | None:
    """Return why a checkpoint doesn't count, by its manifest and the sizes of its files, or None."""
    try:
        _, entries = read_manifest(path)
    except CheckpointError as error:
        return str(error)
    for name, entry in entries.items():
        file = path / name
        if not file.is_file() or file.stat().st_size != entry.size:
            return f"{name} is missing or has not the {entry.size} bytes that {MANIFEST} says"
    return None
