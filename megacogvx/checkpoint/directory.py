"""The folder of a run's checkpoints: which are complete, which is the latest, and that none is half there.

No ranks here: `distributed.py` decides which rank does what.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import xxhash

from megacogvx.errors import CheckpointError
from megacogvx.log import get_logger

MANIFEST = "manifest.json"
FORMAT = "megacogvx-checkpoint"
VERSION = 1
PARTIAL = ".partial"  # a checkpoint that is being written, or was when the program ended
REPLACED = ".replaced"  # an older checkpoint of the same step, for the moment in which the new one takes its name
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

    def path(self, step: int) -> Path:
        """Return where the complete checkpoint of `step` lies, or will."""
        return self.folder / f"step-{step:08d}"

    def steps(self) -> list[int]:
        """Return the steps of all complete checkpoints, ascending; those that aren't are named in the log."""
        found = []
        for path in sorted(self.folder.iterdir()) if self.folder.is_dir() else []:
            named = re.fullmatch(r"step-(\d{8,})", path.name)
            problem = "it was never finished" if path.name.endswith(PARTIAL) else None
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

    def begin(self, step: int) -> Path:
        """Make an empty folder to write the checkpoint of `step` into; an unfinished one of that step is dropped."""
        partial = self.path(step).with_name(self.path(step).name + PARTIAL)
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir(parents=True)
        return partial

    def commit(self, step: int, entries: dict[str, FileEntry]) -> Path:
        """Write the manifest and give the checkpoint of `step` its name; from now on it counts.

        Args:
            step: as in `begin`.
            entries: every file in the folder, hashed and on disk (`seal`).

        Raises:
            CheckpointError: `begin` wasn't called, or a file isn't among the entries.
        """
        final = self.path(step)
        partial = final.with_name(final.name + PARTIAL)
        if not partial.is_dir() or set(files_of(partial)) != set(entries):
            raise CheckpointError(f"{partial} does not hold the {len(entries)} files that were written for step {step}")
        _write_manifest(partial, step, entries)
        sync_folder(partial)
        replaced = final.with_name(final.name + REPLACED)
        if final.exists():
            os.replace(final, replaced)
        os.replace(partial, final)
        sync_folder(self.folder)
        shutil.rmtree(replaced, ignore_errors=True)
        return final


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
        manifest = json.loads(file.read_text())
        if manifest["format"] != FORMAT:
            raise CheckpointError(f"{file} is of format {manifest['format']!r}, not {FORMAT!r}")
        if manifest["version"] > VERSION:
            raise CheckpointError(f"{file} has version {manifest['version']}; this program reads up to {VERSION}")
        return int(manifest["step"]), {name: FileEntry(**entry) for name, entry in manifest["files"].items()}
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
        CheckpointError: names the first file that is missing, damaged or foreign.
    """
    step, entries = read_manifest(path)
    if names is None:
        foreign = set(files_of(path)) - set(entries)
        if foreign:
            raise CheckpointError(f"{path / min(foreign)} is not in the checkpoint's {MANIFEST}; move it away")
    for name in sorted(entries if names is None else names):
        _verify_file(path / name, entries[name])
    return step


def files_of(path: Path) -> list[str]:
    """Return the names of all files below `path` but the manifest, in a fixed order."""
    names = (file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file())
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


def _write_manifest(path: Path, step: int, entries: dict[str, FileEntry]) -> None:
    files = {name: vars(entry) for name, entry in sorted(entries.items())}
    text = json.dumps({"format": FORMAT, "version": VERSION, "step": step, "files": files}, indent=1)
    temporary = path / (MANIFEST + ".writing")
    with temporary.open("w") as handle:
        handle.write(text)
        handle.flush()
        os.fsync(handle.fileno())
    os.replace(temporary, path / MANIFEST)


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


def _verify_file(file: Path, entry: FileEntry) -> None:
    if not file.is_file():
        raise CheckpointError(f"checkpoint file {file} is missing; take another checkpoint")
    size = file.stat().st_size
    if size != entry.size:
        raise CheckpointError(
            f"checkpoint file {file} has {size} bytes instead of {entry.size}; take another checkpoint"
        )
    if checksum(file) != entry.xxh3:
        raise CheckpointError(f"checkpoint file {file} is damaged: its checksum is wrong; take another checkpoint")


def _neighbours(folder: Path) -> str:
    """Say which checkpoints lie in `folder`, for an error message."""
    names = (
        sorted(path.name for path in folder.glob("step-*") if (path / MANIFEST).is_file()) if folder.is_dir() else []
    )
    return f"; checkpoints in {folder}: {', '.join(names)}" if names else ""
