"""Answers megatron-core's bare CUDA calls when there is no GPU; nothing else in the project does.

megatron-core calls `torch.cuda.current_device()`, `device="cuda"`, `tensor.cuda()` and the CUDA generator without
asking. On the CPU, `enable_cpu` gives the modules under `megatron.core`, and only them, a stand-in for `torch` in
which these mean the CPU. The project's own code still sees the real `torch`, so that an unguarded CUDA call of ours
fails as it should. `PATCHED_SYMBOLS` lists what is replaced by name: a test checks that the installed megatron-core
still has it.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.abc
import importlib.machinery
import logging
import sys
import types
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch

CORE = "megatron.core."
RANDOM_MODULE = "megatron.core.tensor_parallel.random"
OPTIMIZER_MODULE = "megatron.core.optimizer"

# (module, name) of everything that is replaced by name, here and in fused_adam.py.
PATCHED_SYMBOLS = (
    (RANDOM_MODULE, "_get_cuda_rng_state"),
    (RANDOM_MODULE, "_set_cuda_rng_state"),
    (OPTIMIZER_MODULE, "Adam"),
    (OPTIMIZER_MODULE, "USING_PYTORCH_OPTIMIZER"),
    ("megatron.core.optimizer.distrib_optimizer", "Adam"),
    ("megatron.core.optimizer.distrib_optimizer", "HAVE_APEX_OR_TE"),
    ("megatron.core.optimizer.distrib_optimizer", "USING_APEX_OPTIMIZER"),
)

FACTORIES = (
    "empty", "zeros", "ones", "full", "tensor", "arange", "rand", "randn", "empty_like", "zeros_like", "ones_like",
)  # fmt: skip

_CPU = torch.device("cpu")
_stand_in: types.ModuleType | None = None


def enable_cpu(device: torch.device) -> None:
    """Let megatron-core run on the CPU for the rest of the process; a no-op if `device` is a GPU, or done already."""
    global _stand_in
    if device.type == "cuda" or _stand_in is not None:
        return
    _stand_in = _torch_without_gpu()
    warnings.filterwarnings("ignore", message=".*CUDA_DEVICE_MAX_CONNECTIONS")
    for name, module in list(sys.modules.items()):
        if name.startswith(CORE) and module is not None:
            _patch(module)
    sys.meta_path.insert(0, _PatchOnImport())
    _answer_tensor_methods()


class _Overlay(types.ModuleType):
    """A module in which some names are replaced and all others are the original's."""

    def __init__(self, original: types.ModuleType, **replaced: Any) -> None:
        super().__init__(original.__name__)
        self.__dict__["_original"] = original
        self.__dict__.update(replaced)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_original"], name)


class _NoStream:
    """Stands for a CUDA stream or event: everything on the CPU is in order and finished."""

    def __getattr__(self, name: str) -> Callable[..., _NoStream]:
        return lambda *arguments, **options: self

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: object) -> float:
        return 0.0

    def __enter__(self) -> _NoStream:
        return self

    def __exit__(self, *error: object) -> None:
        return None


class _PatchOnImport(importlib.abc.MetaPathFinder):
    """Patches modules of megatron-core as they are imported; it imports some of them late."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if not fullname.startswith(CORE):
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_patch(module: types.ModuleType) -> None:
            execute(module)
            _patch(module)

        spec.loader.exec_module = execute_and_patch  # type: ignore[method-assign]
        return spec


def _torch_without_gpu() -> types.ModuleType:
    """Return `torch` with the CUDA calls of megatron-core answered on the CPU."""
    nothing = lambda *arguments, **options: None  # noqa: E731
    stream = lambda *arguments, **options: _NoStream()  # noqa: E731
    random = _Overlay(torch.cuda.random, get_rng_state=_get_state, set_rng_state=_set_state)
    cuda = _Overlay(
        torch.cuda,
        current_device=lambda: _CPU,
        **dict.fromkeys(("set_device", "synchronize", "empty_cache", "set_stream"), nothing),
        **dict.fromkeys(("current_stream", "default_stream", "Stream", "Event"), stream),
        stream=lambda *arguments, **options: contextlib.nullcontext(),
        manual_seed=torch.default_generator.manual_seed,
        get_rng_state=_get_state,
        set_rng_state=_set_state,
        random=random,
    )
    return _Overlay(torch, cuda=cuda, **{name: _on_cpu(getattr(torch, name)) for name in FACTORIES})


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Wrap `torch.empty` and the like: a CUDA device becomes the CPU, pinned memory plain memory."""

    @functools.wraps(factory)
    def made_on_cpu(*arguments: Any, **options: Any) -> torch.Tensor:
        if str(options.get("device")).startswith("cuda"):
            options["device"] = _CPU
        options.pop("pin_memory", None)
        return factory(*arguments, **options)

    return made_on_cpu


def _get_state(*arguments: Any, **options: Any) -> torch.Tensor:
    return torch.get_rng_state()


def _set_state(state: torch.Tensor, *arguments: Any, **options: Any) -> None:
    torch.set_rng_state(state)


def _patch(module: types.ModuleType) -> None:
    """Give one module of megatron-core the stand-in, if it imported `torch` under that name."""
    if module.__dict__.get("torch") is torch:
        module.torch = _stand_in  # type: ignore[attr-defined]
    if module.__name__ == RANDOM_MODULE:
        module._get_cuda_rng_state = _get_state  # type: ignore[attr-defined]
        module._set_cuda_rng_state = _set_state  # type: ignore[attr-defined]
        # Every fork of its generator moves the CPU generator, which here is the one it means to move.
        logging.getLogger(RANDOM_MODULE).addFilter(lambda record: "CPU RNG state changed" not in record.getMessage())


def _answer_tensor_methods() -> None:
    """Answer `tensor.cuda()`, `.pin_memory()` and `.type()` for callers in megatron-core, by looking at the caller.

    Methods can't be replaced for one module alone; every other caller reaches the original. Its optimizer tells
    fp32 from half precision by comparing `.type()` with 'torch.cuda.FloatTensor' and the like.
    """
    originals = {name: getattr(torch.Tensor, name) for name in ("cuda", "pin_memory", "type")}

    def stay(name: str) -> Callable[..., torch.Tensor]:
        @functools.wraps(originals[name])
        def method(tensor: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
            if _caller().startswith(CORE):
                return tensor
            return originals[name](tensor, *arguments, **options)

        return method

    @functools.wraps(originals["type"])
    def type_name(tensor: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        answer = originals["type"](tensor, *arguments, **options)
        if not arguments and not options and _caller().startswith(OPTIMIZER_MODULE):
            return answer.replace("torch.", "torch.cuda.", 1)
        return answer

    torch.Tensor.cuda = stay("cuda")  # type: ignore[method-assign]
    torch.Tensor.pin_memory = stay("pin_memory")  # type: ignore[method-assign]
    torch.Tensor.type = type_name  # type: ignore[method-assign, assignment]


def _caller() -> str:
    """Name of the module that called the method that called this."""
    return str(sys._getframe(2).f_globals.get("__name__", ""))
