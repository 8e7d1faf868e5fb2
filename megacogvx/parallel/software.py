"""What the kernels and layers that section `parallel` names need of this machine, asked before process groups exist."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import torch

from megacogvx.errors import ConfigError
from megacogvx.parallel.config import ParallelConfig
from megacogvx_kernels.packed_attention import BACKENDS, missing

TRANSFORMER_ENGINE = ("transformer_engine", "transformer_engine_torch")
CAPABILITY = {"tensorwise": (8, 9), "blockwise": (9, 0), "mxfp8": (10, 0)}  # first GPUs with the recipe's FP8


def check_software(config: ParallelConfig) -> None:
    """Check that whatever the config names can be used here.

    Raises:
        ConfigError: naming the keys, what is missing, and what can be used.
    """
    problems = list(software_problems(config))
    if problems:
        raise ConfigError("\n".join(problems))


def software_problems(config: ParallelConfig) -> Iterator[str]:
    """Yield what is missing for each named kernel or layer."""
    backend = config.attention_backend
    if backend != "auto" and (problem := _lacks(config, backend)):
        usable = [name for name in BACKENDS if not _lacks(config, name)]
        yield (
            f"parallel.attention_backend={backend} can't be used: {problem}; what can: {', '.join(['auto', *usable])}"
        )
    if config.transformer_impl == "transformer_engine" and (problem := _lacks_transformer_engine(config)):
        yield f"parallel.transformer_impl=transformer_engine can't be used: {problem}; what can: local"
    elif (
        config.fp8_recipe != "none"
        and (capability := torch.cuda.get_device_capability()) < CAPABILITY[config.fp8_recipe]
    ):
        usable = [name for name, needed in CAPABILITY.items() if capability >= needed]
        yield (
            f"parallel.fp8_recipe={config.fp8_recipe} needs a GPU of compute capability "
            f"{'.'.join(map(str, CAPABILITY[config.fp8_recipe]))}, not {'.'.join(map(str, capability))}; "
            f"what can be used: {', '.join(['none', *usable])}"
        )


def _lacks(config: ParallelConfig, backend: str) -> str:
    if config.device == "cpu" and backend != "reference":
        return "parallel.device=cpu"
    return missing(backend)


def _lacks_transformer_engine(config: ParallelConfig) -> str:
    for module in TRANSFORMER_ENGINE:
        if importlib.util.find_spec(module) is None:
            return f"the module {module} can't be found (pip install 'transformer-engine[pytorch]')"
    return "" if config.device != "cpu" and torch.cuda.is_available() else "it needs a GPU"
