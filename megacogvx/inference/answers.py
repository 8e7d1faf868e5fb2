"""What language models answered, kept beside the videos: a run that goes on has the same texts, and asks nobody again.

One JSON object a line, of what was asked and the answer; a line that an interruption cut short is left out.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash

from megacogvx.errors import ConfigError


@dataclass(frozen=True)
class Question:
    """What an answer depends on.

    Attributes:
        model: the language model's name.
        kind: which of the instructions it gets.
        prompt: what the user wrote.
        pictures: hex digests (xxh3, 64 bits) of the pictures that are shown.
    """

    model: str
    kind: str
    prompt: str
    pictures: tuple[str, ...] = ()


class Answers:
    """Answers by question.

    Args:
        file: where they are kept; None: in memory alone.

    Raises:
        ConfigError: the file is there and can't be read.
    """

    def __init__(self, file: Path | None = None) -> None:
        self.file = file
        self._known = dict(_read(file)) if file is not None and file.is_file() else {}

    def get(self, question: Question) -> str | None:
        """Return what was answered, if it was asked before."""
        return self._known.get(question)

    def keep(self, question: Question, text: str) -> None:
        """Keep an answer; it is on disk when this returns."""
        self._known[question] = text
        if self.file is None:
            return
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with open(self.file, "ab") as file:
            # a new line first ends one that was cut short
            file.write(b"\n" + json.dumps({**asdict(question), "text": text}).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())


def digest(picture_HW3: torch.Tensor) -> str:
    """Return the xxh3 of a uint8 picture and of its size."""
    found = xxhash.xxh3_64(str(tuple(picture_HW3.shape)).encode())
    found.update(picture_HW3.contiguous().numpy().data)
    return found.hexdigest()


def _read(file: Path) -> list[tuple[Question, str]]:
    try:
        lines = file.read_bytes().split(b"\n")
    except OSError as error:
        raise ConfigError(f"{file}, which keeps written-out prompts, can't be read: {error}") from None
    return [entry for line in lines if (entry := _parse(line)) is not None]


def _parse(line: bytes) -> tuple[Question, str] | None:
    try:
        found: dict[str, Any] = json.loads(line)
        text = found.pop("text")
        question = Question(**{**found, "pictures": tuple(found["pictures"])})
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    return (question, text) if isinstance(text, str) else None
