"""One model of a checkpoint, in our names: what every reader gives and every writer takes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from megacogvx.conversion.settings import Settings, TransformerSettings, VAESettings
from megacogvx.conversion.tensors import TensorInfo, TensorSource
from megacogvx.errors import CheckpointError, ConfigError

Kind = Literal["transformer", "vae"]
KINDS: tuple[Kind, ...] = ("transformer", "vae")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LIVE = "live"  # the weights that the optimizer steps


@dataclass(frozen=True)
class ReadOptions:
    """What a reader has to be told.

    Attributes:
        weights: which set of weights: `live`, or one that was kept beside it, such as `ema`.
        variant: a key of `settings.VARIANTS`: the released model that a file without settings holds.
        config: a YAML file with the sections of our config, in place of a variant.
        drop_foreign: leave out tensors that belong to no model here, instead of refusing the file.
    """

    weights: str = LIVE
    variant: str | None = None
    config: Path | None = None
    drop_foreign: bool = False


@dataclass(frozen=True)
class Part:
    """One model.

    Attributes:
        kind: which.
        format: what it was read from.
        settings: sizes and conventions.
        tensors: the weights, in our names and layout.
        knows_scale: whether the format says what a VAE's latents are multiplied by; SAT's files don't.
    """

    kind: Kind
    format: str
    settings: Settings
    tensors: TensorSource
    knows_scale: bool = True

    def cast(self, dtype: str | None) -> Part:
        """Return this part with its floating tensors in another dtype of `DTYPES`; None leaves them as they are."""
        return self if dtype is None else replace(self, tensors=Cast(self.tensors, DTYPES[dtype]))

    @property
    def transformer(self) -> TransformerSettings:
        """The settings of a transformer."""
        assert isinstance(self.settings, TransformerSettings), self.kind
        return self.settings

    @property
    def vae(self) -> VAESettings:
        """The settings of a VAE."""
        assert isinstance(self.settings, VAESettings), self.kind
        return self.settings


class Cast:
    """A source with its floating tensors in another dtype."""

    def __init__(self, source: TensorSource, dtype: torch.dtype) -> None:
        self.path, self._source, self._dtype = source.path, source, dtype
        self.infos = {
            name: TensorInfo(info.shape, dtype if info.dtype.is_floating_point else info.dtype)
            for name, info in source.infos.items()
        }

    def read(self, name: str) -> torch.Tensor:
        """Return one tensor.

        Raises:
            CheckpointError: a finite value is too large for the dtype.
        """
        before = self._source.read(name)
        after = before.to(self.infos[name].dtype)
        if after.dtype != before.dtype and not torch.equal(after.isfinite(), before.isfinite()):
            raise CheckpointError(
                f"{self.path}: {name} has values up to {before.abs().max():.3g}, too large for {after.dtype}; "
                "convert to bf16 or fp32"
            )
        return after


class Renamed:
    """A source under other names: `{new name: old name}`; what isn't named is left out."""

    def __init__(self, source: TensorSource, names: dict[str, str]) -> None:
        self.path, self._source, self._names = source.path, source, names
        self.infos = {new: source.infos[old] for new, old in names.items()}

    def read(self, name: str) -> torch.Tensor:
        """Return one tensor."""
        return self._source.read(self._names[name])


def check_live(options: ReadOptions, what: str) -> None:
    """Raise `ConfigError` when a set of weights is asked for in a format that has one only."""
    if options.weights != LIVE:
        raise ConfigError(f"--weights {options.weights}: {what} holds one set of weights; leave the option out")
