"""The folder of a run's checkpoints: which are complete, which is the latest, and that none is half there.

No ranks here: `distributed.py` decides which rank does what.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import xxhash

from megacogvx.errors import CheckpointError
from megacogvx.log import get_logger

MANIFEST = "manifest.json"
FORMAT = "megacogvx-checkpoint"
VERSION = 2  # 1 had no checksum of the manifest itself
TRACKER = "latest_checkpointed_iteration.txt"  # megatron-core's name and form, for scripts; nothing here reads it
STEP_NAME = re.compile(r"step-(\d{8,})")
# What a name may end with: a checkpoint that is being written, or was when the program ended; an older checkpoint of
# the same step, for the moment in which the new one takes its name; one that is being deleted.
PARTIAL, REPLACED, REMOVED = ".partial", ".replaced", ".removed"
WRITING = ".writing"  # a small file that is being written
READ_BYTES = 1 << 22  # per read while hashing

logger = get_logger(__name__)


@dataclass(frozen=True)
class FileEntry:
    """One file of a checkpoint: its size in bytes and the hex digest of its XXH3 (64 bits)."""

    size: int
    xxh3: str


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
        write_durably(partial / MANIFEST, _render(step, entries))
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


def read_manifest(path: Path) -> tuple[int, dict[str, FileEntry]]:
    """Return (step, files) of the checkpoint `path`.

    Raises:
        CheckpointError: there is no such folder, it isn't a checkpoint, or its manifest can't be read.
    """
    if not path.is_dir():
        raise CheckpointError(f"checkpoint {path} does not exist{_neighbours(path.parent)}")
    file = path / MANIFEST
    if not file.is_file():
        raise CheckpointError(f"{path} is no complete checkpoint: it has no {MANIFEST}{_neighbours(path)}")
    try:
        text = file.read_text()
        manifest = json.loads(text)
        if manifest["format"] != FORMAT:
            raise CheckpointError(f"{file} is of format {manifest['format']!r}, not {FORMAT!r}")
        if manifest["version"] != VERSION:
            raise CheckpointError(f"{file} has version {manifest['version']}; this program reads version {VERSION}")
        step, entries = int(manifest["step"]), {name: FileEntry(**entry) for name, entry in manifest["files"].items()}
        _check_manifest(path, text, step, entries)
        return step, entries
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file} can't be read ({type(error).__name__}: {error})") from None


def verify(path: Path, names: Iterable[str] | None = None) -> int:
    """Check that the files of a checkpoint are there, with the size and checksum that the manifest says.

    Args:
        path: a checkpoint.
        names: only these of its files; None means all, and that there are no others.

    Returns:
        the step.

    Raises:
        CheckpointError: names every file that is missing, damaged or foreign.
    """
    step, entries = read_manifest(path)
    problems = [] if names is not None else foreign_files(path, entries)
    problems += damaged_files(path, entries, names)
    if problems:
        raise CheckpointError(f"{'; '.join(problems)}; take another checkpoint")
    return step


def foreign_files(path: Path, entries: dict[str, FileEntry]) -> list[str]:
    """Return a sentence for each file of the folder that the manifest doesn't know."""
    return [f"{path / name} is not in the checkpoint's {MANIFEST}" for name in files_of(path) if name not in entries]


def damaged_files(path: Path, entries: dict[str, FileEntry], names: Iterable[str] | None = None) -> list[str]:
    """Return a sentence for each file that is missing or isn't what the manifest says; `names`: only these."""
    problems = (_damage(path / name, entries[name]) for name in sorted(entries if names is None else names))
    return [problem for problem in problems if problem]


def files_of(path: Path) -> list[str]:
    """Return the names of all that lies below `path` but folders and the manifest, in a fixed order."""
    names = (file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_symlink() or not file.is_dir())
    return sorted(name for name in names if name != MANIFEST)


def seal(path: Path, name: str) -> FileEntry:
    """Bring one file of a new checkpoint to disk and return its entry."""
    file = path / name
    with file.open("rb") as handle:
        os.fsync(handle.fileno())
    return FileEntry(file.stat().st_size, checksum(file))


def checksum(file: Path) -> str:
    """Return the hex digest of the file's XXH3 (64 bits)."""
    digest = xxhash.xxh3_64()
    with file.open("rb") as handle:
        while block := handle.read(READ_BYTES):
            digest.update(block)
    return digest.hexdigest()


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


def _render(step: int, entries: dict[str, FileEntry]) -> str:
    """Return the one text of a manifest, the checksum of what it says included."""
    files = {name: vars(entry) for name, entry in sorted(entries.items())}
    manifest = {"format": FORMAT, "version": VERSION, "step": step, "files": files}
    digest = xxhash.xxh3_64(json.dumps(manifest, indent=1).encode()).hexdigest()
    return json.dumps({**manifest, "xxh3": digest}, indent=1)


def _check_manifest(path: Path, text: str, step: int, entries: dict[str, FileEntry]) -> None:
    """Refuse a manifest that differs from what is written for its own content, by as little as a bit.

    A bit of a file's size or checksum would otherwise be blamed on that file.
    """
    if text != _render(step, entries):
        raise ValueError("it is not as it was written: its own checksum is wrong")
    named = STEP_NAME.fullmatch(path.name)
    if named and int(named[1]) != step:
        raise ValueError(f"it is of step {step}")
    for name in entries:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ValueError(f"{name!r} lies outside the checkpoint")


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


def _damage(file: Path, entry: FileEntry) -> str | None:
    try:
        if not file.is_file():
            return f"checkpoint file {file} is missing"
        size = file.stat().st_size
        if size != entry.size:
            return f"checkpoint file {file} has {size} bytes instead of {entry.size}"
        return None if checksum(file) == entry.xxh3 else f"checkpoint file {file} is damaged: its checksum is wrong"
    except OSError as error:
        return f"checkpoint file {file} can't be read: {error}"


def _neighbours(folder: Path) -> str:
    """Say which checkpoints lie in `folder`, for an error message."""
    names = (
        sorted(path.name for path in folder.glob("step-*") if (path / MANIFEST).is_file()) if folder.is_dir() else []
    )
    return f"; checkpoints in {folder}: {', '.join(names)}" if names else ""
