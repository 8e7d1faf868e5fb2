"""LoRA adapters in PEFT's format, merged into the weights: W + scale * B A (Hu et al. 2021, equation 3).

An adapter is PEFT's folder (`adapter_config.json`, `adapter_model.safetensors`), or the file that diffusers' training
scripts save (`pytorch_lora_weights.safetensors`). Both name diffusers' modules, so the sum is made in its layout.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from megacogvx.conversion.part import Part
from megacogvx.conversion.published_names import diffusers_transformer
from megacogvx.conversion.safetensors_files import SafetensorsFiles
from megacogvx.conversion.settings import read_json
from megacogvx.conversion.tensors import TensorSource, shortened
from megacogvx.errors import CheckpointError
from megacogvx.log import get_logger
from megacogvx.models.transformer.config import CogVideoXConfig

ADAPTER_CONFIG, ADAPTER_FILE, DIFFUSERS_FILE = (
    "adapter_config.json", "adapter_model.safetensors", "pytorch_lora_weights.safetensors"
)  # fmt: skip
METADATA = "lora_adapter_metadata"  # where newer versions of diffusers put the config
KEY = re.compile(r"(?:base_model\.model\.)?(?:transformer\.)?(?P<module>.+)\.(?P<part>lora_[AB])(?:\.default)?\.weight")
PLAIN = {"use_dora": False, "bias": "none", "fan_in_fan_out": False, "lora_bias": False}  # the only kind that is merged

logger = get_logger(__name__)


@dataclass(frozen=True)
class Adapter:
    """One adapter: where the factors of each module lie, and what their product is multiplied by."""

    files: SafetensorsFiles
    factors: Mapping[str, tuple[str, str]]
    scales: Mapping[str, float]

    @classmethod
    def open(cls, path: Path, strength: float = 1.0) -> Adapter:
        """Read names and settings.

        Args:
            path: the folder, or the file.
            strength: multiplies every scale; 1 is what it was trained with.

        Raises:
            CheckpointError: it isn't there, is damaged, isn't plain LoRA, or lacks half of a pair.
        """
        file, config = _find(path)
        wrong = [f"{key}={config[key]!r}" for key, plain in PLAIN.items() if config.get(key, plain) != plain]
        if wrong:
            raise CheckpointError(f"{path}: {', '.join(wrong)}; only plain LoRA can be merged here")
        files = SafetensorsFiles(file)
        factors = _pairs(files)
        scales = {}
        for module, (a_name, b_name) in factors.items():
            (rank, _), (_, b_rank) = files.infos[a_name].shape, files.infos[b_name].shape
            if rank != b_rank:
                raise CheckpointError(f"{file}: {a_name} has rank {rank}, {b_name} has {b_rank}")
            scales[module] = strength * _scale(config, module, rank)
        return cls(files, factors, scales)

    def add(self, module: str, weight: torch.Tensor) -> torch.Tensor:
        """Return a module's weight with this adapter, computed in fp32, in the weight's dtype."""
        a, b = (self.files.read(name).float() for name in self.factors[module])
        return (weight.float() + self.scales[module] * (b @ a)).to(weight.dtype)


class Merged:
    """A transformer's tensors, in our names, with adapters merged."""

    def __init__(self, source: TensorSource, model: CogVideoXConfig, adapters: Sequence[Adapter]) -> None:
        """Check that every adapted module is a linear layer of this model, of the right size.

        Raises:
            CheckpointError: one isn't.
        """
        self.path, self.infos, self._source, self._adapters = source.path, source.infos, source, adapters
        table = diffusers_transformer(model)
        self._groups = {name: group for group in table for name in group.ours}
        shapes = {name: shape for group in table for name, shape in group.their_shapes().items()}
        for adapter in adapters:
            _check_fits(adapter, shapes)

    def read(self, name: str) -> torch.Tensor:
        """Return one tensor."""
        group = self._groups[name]
        modules = [theirs.removesuffix(".weight") for theirs in group.theirs]
        tensor = self._source.read(name)
        if not any(module in adapter.factors for adapter in self._adapters for module in modules):
            return tensor
        parts = group.to_theirs([tensor])
        for adapter in self._adapters:
            parts = [
                adapter.add(module, part) if module in adapter.factors else part
                for module, part in zip(modules, parts, strict=True)
            ]
        return group.to_ours(parts)[0].contiguous()


def merge(part: Part, adapters: Sequence[Adapter]) -> Part:
    """Return a transformer with adapters merged.

    Raises:
        CheckpointError: an adapter doesn't fit it.
    """
    for adapter in adapters:
        logger.info("merging %d modules of %s", len(adapter.factors), adapter.files.path)
    merged = Merged(part.tensors, part.transformer.model, adapters)
    return Part(part.kind, part.format, part.settings, merged)


def _find(path: Path) -> tuple[Path, dict[str, Any]]:
    """Return the file with the tensors and the adapter's config (empty: the file says nothing)."""
    if path.is_dir() and (path / ADAPTER_CONFIG).is_file():
        return path / ADAPTER_FILE, read_json(path / ADAPTER_CONFIG)
    file = path / DIFFUSERS_FILE if path.is_dir() else path
    if not file.is_file() or file.suffix != ".safetensors":
        raise CheckpointError(
            f"{path} is no LoRA adapter: it must be a folder with {ADAPTER_CONFIG} and {ADAPTER_FILE}, or a file such "
            f"as {DIFFUSERS_FILE}"
        )
    SafetensorsFiles(file)  # says what is wrong with a damaged one
    with safe_open(file, "pt") as handle:
        metadata = handle.metadata() or {}
    try:
        config = json.loads(metadata.get(METADATA, "{}"))
    except ValueError as error:
        raise CheckpointError(f"{file}: its metadata can't be read: {error}") from None
    return file, {key.removeprefix("transformer."): value for key, value in config.items()}


def _pairs(files: SafetensorsFiles) -> dict[str, tuple[str, str]]:
    found: dict[str, dict[str, str]] = {}
    foreign = []
    for name, info in files.infos.items():
        match = KEY.fullmatch(name)
        if match is None or len(info.shape) != 2:
            foreign.append(name)
        else:
            found.setdefault(match["module"], {})[match["part"]] = name
    halves = [module for module, pair in found.items() if len(pair) != 2]
    if foreign or halves or not found:
        raise CheckpointError(
            f"{files.path} is no plain LoRA of linear layers: {len(foreign)} other tensors ({shortened(foreign)}), "
            f"{len(halves)} modules with one factor ({shortened(halves)}), {len(found) - len(halves)} pairs"
        )
    return {module: (pair["lora_A"], pair["lora_B"]) for module, pair in found.items()}


def _scale(config: Mapping[str, Any], module: str, rank: int) -> float:
    """Return alpha / r, or alpha / sqrt(r) for rank-stabilised LoRA; without a config 1, as diffusers does."""
    alpha = _by_pattern(config.get("alpha_pattern"), module, config.get("lora_alpha", rank))
    said = _by_pattern(config.get("rank_pattern"), module, config.get("r", rank))
    if said != rank:
        raise CheckpointError(f"the adapter's config says rank {said} for {module}, whose factors have {rank}")
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _by_pattern(patterns: Any, module: str, default: Any) -> Any:
    """Return the value of the first pattern that a module's name ends with, as PEFT looks them up."""
    for pattern, value in (patterns or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", module):
            return value
    return default


def _check_fits(adapter: Adapter, shapes: Mapping[str, tuple[int, ...]]) -> None:
    unknown, wrong = [], []
    for module, (a_name, b_name) in adapter.factors.items():
        shape = shapes.get(f"{module}.weight")
        product = adapter.files.infos[b_name].shape[0], adapter.files.infos[a_name].shape[1]
        if shape is None or len(shape) != 2:
            unknown.append(module)
        elif product != shape:
            wrong.append(f"{module} is {product}, not {shape}")
    if unknown or wrong:
        raise CheckpointError(
            f"{adapter.files.path} is an adapter of another model: {len(unknown)} modules are no linear layers here "
            f"({shortened(unknown)}), {len(wrong)} have another shape ({shortened(wrong)})"
        )
