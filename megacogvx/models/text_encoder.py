"""Frozen T5 text encoder: captions -> embeddings, as CogVideoX uses it (t5-v1_1-xxl; paper section 2.2).

Reads the layout of the published CogVideoX folders: `tokenizer/spiece.model` and `text_encoder/` (Hugging Face
config.json and safetensors), or one folder that holds all of them. Captions are padded to a fixed length and encoded
without an attention mask, so padding tokens are seen and have embeddings of their own; released weights need that.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import torch
import transformers
import xxhash
from sentencepiece import SentencePieceProcessor
from transformers import T5Config, T5EncoderModel

from megacogvx.errors import DataError
from megacogvx.log import get_logger, progress

SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
PAD_ID, END_ID = 0, 1  # T5's <pad> and </s>
HASH_BYTES = 16 << 20  # read at once

logger = get_logger(__name__)


class TextEncoder:
    """T5 encoder and its sentencepiece tokenizer; the weights are frozen.

    Attributes:
        width: E, the width of an embedding.
        max_length: L, tokens; shorter captions are padded to it, longer ones cut.
    """

    def __init__(
        self, model: T5EncoderModel, tokenizer: SentencePieceProcessor, max_length: int, files: list[Path]
    ) -> None:
        self._model, self._tokenizer, self._files = model.eval().requires_grad_(False), tokenizer, files
        self.max_length = max_length
        self.width = int(model.config.d_model)

    @classmethod
    def from_folder(
        cls,
        folder: Path | str,
        max_length: int = 226,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> TextEncoder:
        """Load tokenizer and weights from a local folder; nothing is downloaded.

        Args:
            folder: holds `tokenizer/` and `text_encoder/`, or their files directly.
            max_length: L, tokens, the final </s> included; 226 for all released CogVideoX models.
            device: where the model runs.
            dtype: of weights and embeddings (released models were trained with bfloat16 embeddings).

        Raises:
            DataError: files are missing (all are named) or don't fit together.
        """
        folder = Path(folder)
        files = find_files(folder)
        tokenizer = _load_tokenizer(files["spiece.model"])
        model = _load_model(files["config.json"].parent, dtype)
        if tokenizer.vocab_size() > model.config.vocab_size:
            raise DataError(
                f"text encoder {folder}: the tokenizer has {tokenizer.vocab_size()} pieces, the model only "
                f"{model.config.vocab_size} embeddings; they don't belong together"
            )
        logger.info("text encoder %s: width %d, %d tokens", folder, model.config.d_model, max_length)
        return cls(model.to(device), tokenizer, max_length, list(files.values()))

    def token_ids(self, captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokenize: ids int64 [B, L], ended by </s> and padded with <pad>, and the lengths int64 [B] with </s>."""
        ids_BL = torch.full((len(captions), self.max_length), PAD_ID)
        lengths_B = torch.zeros(len(captions), dtype=torch.long)
        for row, pieces in enumerate(self._tokenizer.encode(list(captions))):
            ids = [*pieces[: self.max_length - 1], END_ID]
            ids_BL[row, : len(ids)] = torch.tensor(ids)
            lengths_B[row] = len(ids)
        return ids_BL, lengths_B

    def encode(self, captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Encode captions; "" gives the embedding of the empty prompt, which guidance uses.

        Returns:
            embeddings [B, L, E] in the model's dtype and on its device, padding positions included, and the numbers
            of real tokens int64 [B] (CPU), </s> included.
        """
        ids_BL, lengths_B = self.token_ids(captions)
        return self.encode_ids(ids_BL), lengths_B

    @torch.no_grad()
    def encode_ids(self, ids_BL: torch.Tensor) -> torch.Tensor:
        """Encode padded token ids int64 `[B, L]`; embeddings `[B, L, E]` in the model's dtype and on its device."""
        return self._model(input_ids=ids_BL.to(self._model.device)).last_hidden_state

    @property
    def vocabulary(self) -> int:
        """Number of token ids that the model has embeddings for."""
        return int(self._model.config.vocab_size)

    def unconditional(self, kind: str = "empty") -> torch.Tensor:
        """Return the embedding [1, L, E] that stands for no prompt.

        Args:
            kind: "empty" for the encoded empty prompt (what released pipelines use), "zeros" for zeros (what dropped
                conditions are in training with SAT).
        """
        if kind == "zeros":
            return torch.zeros(1, self.max_length, self.width, device=self._model.device, dtype=self._model.dtype)
        if kind == "empty":
            return self.encode([""])[0]
        raise ValueError(f"kind={kind!r} must be 'empty' or 'zeros'")

    @cached_property
    def fingerprint(self) -> str:
        """xxh3 (hex) of the names and whole contents of tokenizer, config and weights, and of `max_length`.

        Reads all weights again (some seconds for t5-v1_1-xxl), hence only when asked for.
        """
        digest = xxhash.xxh3_128(f"max_length {self.max_length}".encode())
        for path in sorted(self._files, key=lambda path: path.name):
            digest.update(f"\0{path.name}\0{path.stat().st_size}\0".encode())
            for chunk in progress(_chunks(path), f"fingerprint {path.name}"):
                digest.update(chunk)
        return str(digest.hexdigest())


def find_files(folder: Path) -> dict[str, Path]:
    """Find the files of tokenizer and model; name -> path, of spiece.model, config.json and every weight file.

    Raises:
        DataError: some are missing; all of them are named.
    """
    if not folder.is_dir():
        raise DataError(f"text encoder folder {folder} does not exist")
    model = folder / "text_encoder" if (folder / "text_encoder").is_dir() else folder
    places = [folder / "tokenizer" / "spiece.model", folder / "spiece.model", model / "spiece.model"]
    spiece = next((place for place in places if place.is_file()), places[0])
    files = {"spiece.model": spiece, "config.json": model / "config.json"}
    if (model / INDEX_FILE).is_file():
        files |= {name: model / name for name in _shards(model / INDEX_FILE)}
    else:
        files[SINGLE_FILE] = model / SINGLE_FILE
    missing = [str(path.relative_to(folder)) for path in files.values() if not path.is_file()]
    if missing:
        raise DataError(
            f"text encoder folder {folder} misses {', '.join(missing)}; it needs tokenizer/spiece.model and "
            f"text_encoder/ with config.json and {SINGLE_FILE} (or {INDEX_FILE} and its shards)"
        )
    return files


def width_of(folder: Path | str) -> int:
    """Read E, the width of an encoder's embeddings, from its config alone.

    Raises:
        DataError: files are missing (all are named), or the config doesn't say.
    """
    config = find_files(Path(folder))["config.json"]
    try:
        return int(json.loads(config.read_text())["d_model"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{config} is not the config of a T5 encoder: {error!r}") from None


def _shards(index: Path) -> list[str]:
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise DataError(f"{index} is not an index of safetensors files: {error!r}") from None
    if not all(isinstance(name, str) and Path(name).name == name for name in names):
        raise DataError(f"{index} names files outside its folder: {names}")
    return names


def _load_tokenizer(path: Path) -> SentencePieceProcessor:
    try:
        tokenizer = SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError) as error:
        raise DataError(f"{path} is not a sentencepiece model: {error}") from None
    if (tokenizer.pad_id(), tokenizer.eos_id()) != (PAD_ID, END_ID):
        ids = tokenizer.pad_id(), tokenizer.eos_id()
        raise DataError(f"{path} is not T5's: (<pad>, </s>) are {ids}, not {(PAD_ID, END_ID)}")
    return tokenizer


def _load_model(folder: Path, dtype: torch.dtype) -> T5EncoderModel:
    transformers.logging.disable_progress_bar()
    try:
        config = T5Config.from_pretrained(folder, local_files_only=True)
        model, report = T5EncoderModel.from_pretrained(
            folder, config=config, dtype=dtype, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
    except Exception as error:  # transformers and safetensors raise errors of many kinds for damaged files
        raise DataError(f"text encoder {folder} can't be loaded: {type(error).__name__}: {error}") from None
    missing = sorted(report["missing_keys"])
    if missing:
        raise DataError(f"text encoder {folder} lacks {len(missing)} weights, among them {', '.join(missing[:3])}")
    return model


def _chunks(path: Path) -> Iterator[bytes]:
    with open(path, "rb") as file:
        while chunk := file.read(HASH_BYTES):
            yield chunk
