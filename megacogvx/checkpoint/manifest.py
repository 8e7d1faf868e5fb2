"""The manifest of a checkpoint: which files it has, with size and checksum, and whether they are what it says."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import xxhash

from megacogvx.errors import CheckpointError

MANIFEST = "manifest.json"
FORMAT = "megacogvx-checkpoint"
VERSION = 2  # 1 had no checksum of the manifest itself
STEP_NAME = re.compile(r"step-(\d{8,})")
READ_BYTES = 1 << 22  # per read while hashing


@dataclass(frozen=True)
class FileEntry:
    """One file of a checkpoint: its size in bytes and the hex digest of its XXH3 (64 bits)."""

    size: int
    xxh3: str


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


def manifest_text(step: int, entries: dict[str, FileEntry]) -> str:
    """Return the one text of a manifest, the checksum of what it says included."""
    files = {name: vars(entry) for name, entry in sorted(entries.items())}
    manifest = {"format": FORMAT, "version": VERSION, "step": step, "files": files}
    digest = xxhash.xxh3_64(json.dumps(manifest, indent=1).encode()).hexdigest()
    return json.dumps({**manifest, "xxh3": digest}, indent=1)


def _check_manifest(path: Path, text: str, step: int, entries: dict[str, FileEntry]) -> None:
    """Refuse a manifest that differs from what is written for its own content, by as little as a bit.

    A bit of a file's size or checksum would otherwise be blamed on that file.
    """
    if text != manifest_text(step, entries):
        raise ValueError("it is not as it was written: its own checksum is wrong")
    named = STEP_NAME.fullmatch(path.name)
    if named and int(named[1]) != step:
        raise ValueError(f"it is of step {step}")
    for name in entries:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ValueError(f"{name!r} lies outside the checkpoint")


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
