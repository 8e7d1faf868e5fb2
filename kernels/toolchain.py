"""Compile csrc/: the library of ops that `setup.py` installs, and what the tests look at.

Which part is built depends on what the machine has: nvcc -> kernels for sm_80, sm_90, sm_100 and PTX for what comes
later; a C++ compiler alone -> the CPU part; neither, or no torch to compile against -> nothing, and the references
answer. The environment variable MEGACOGVX_KERNELS asks for one of them (`cuda`, `cpu`, `none`); what is asked for by
name and can't be built is an error. One library serves every torch from 2.11 on: `bindings.cpp` uses its stable ABI,
the .cu files include no torch header.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

CSRC = Path(__file__).resolve().parent / "csrc"
LIBRARY, FACTS = "_compiled.so", "_compiled.json"
SWITCH = "MEGACOGVX_KERNELS"
ARCHITECTURES = (80, 90, 100)  # A100, H100 and H200, B200
TORCH_TARGET = "0x020b000000000000ULL"  # the stable ABI of torch 2.11
STANDARD = "-std=c++17"
HOST_FLAGS = ("-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno", "-Wall", "-Wextra")
DEVICE_FLAGS = ("-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden", "--threads", "2")


class BuildError(Exception):
    """The ops can't be built here; the message says what is missing."""


@dataclass(frozen=True)
class Tools:
    """What a build uses. `nvcc` is None for the CPU part alone; PTX is added of the last of the architectures."""

    compiler: str
    torch: Path
    nvcc: Path | None
    architectures: tuple[int, ...] = ARCHITECTURES

    def facts(self) -> dict[str, object]:
        """Return what the library will hold, and from which sources, as `_compiled.json` keeps it."""
        cuda = [f"sm_{architecture}" for architecture in self.architectures] if self.nvcc else []
        return {"cuda": cuda, "cpu": [isa for isa, _ in instruction_sets()], "sources": fingerprint()}


def fingerprint() -> str:
    """Return a hash of everything that a library is made from."""
    digest = hashlib.sha256(Path(__file__).read_bytes())
    for file in sorted(file for file in CSRC.rglob("*") if file.is_file()):
        digest.update(file.relative_to(CSRC).as_posix().encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]


def instruction_sets() -> list[tuple[str, tuple[str, ...]]]:
    """Return (namespace, flags) of each version of the CPU files; the binding chooses one when it runs."""
    avx2 = ("avx2", ("-mavx2", "-mfma", "-mf16c"))
    return [("portable", ()), *([avx2] if platform.machine() in ("x86_64", "AMD64") else [])]


def find_compiler() -> str | None:
    """Return the host's C++ compiler: $CXX, else the usual names."""
    names = (os.environ.get("CXX"), "g++", "c++", "clang++")
    return next((found for name in names if name and (found := shutil.which(name))), None)


def find_torch() -> Path | None:
    """Return the folder of the torch that we would import; from pip's isolated build, of the one that is installed."""
    spec = importlib.util.find_spec("torch")
    places = [Path(spec.origin).parent] if spec and spec.origin else []
    places += [Path(sysconfig.get_path(name)) / "torch" for name in ("platlib", "purelib")]
    return next((place for place in places if (place / "include" / "torch" / "csrc" / "stable").is_dir()), None)


def find_cuda_program(name: str) -> Path | None:
    """Return nvcc, cuobjdump and the like: of $CUDA_HOME, the path, the usual folder, or NVIDIA's wheels."""
    roots = [Path(home) for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")) if home]
    wheels = sorted((Path(sysconfig.get_path("purelib")) / "nvidia").glob("cu*"), reverse=True)
    found = shutil.which(name)
    candidates = [root / "bin" / name for root in roots] + ([Path(found).resolve()] if found else [])
    candidates += [root / "bin" / name for root in (Path("/usr/local/cuda"), *wheels)]
    return next((file for file in candidates if file.is_file()), None)


def find_tools(wanted: str = "", architectures: tuple[int, ...] = ARCHITECTURES) -> Tools:
    """Find what the build needs.

    Args:
        wanted: "cuda", "cpu", or "" for the most that is possible.
        architectures: of the kernels, ascending.

    Raises:
        BuildError: something is missing.
    """
    if wanted not in ("", "cuda", "cpu"):
        raise BuildError(f"{SWITCH}={wanted} is none of cuda, cpu, none")
    compiler, torch, nvcc = find_compiler(), find_torch(), find_cuda_program("nvcc")
    if compiler is None:
        raise BuildError("no C++ compiler found (CXX, g++, c++, clang++)")
    if torch is None:
        raise BuildError("no torch found to compile against; once it is there: python setup.py build_ext --inplace")
    if wanted == "cuda" and nvcc is None:
        raise BuildError(f"{SWITCH}=cuda, and no nvcc found ($CUDA_HOME, PATH, /usr/local/cuda, NVIDIA's wheels)")
    return Tools(compiler, torch, None if wanted == "cpu" else nvcc, architectures)


def compile_library(tools: Tools, folder: Path, work: Path) -> Path:
    """Write `_compiled.so` and `_compiled.json` into `folder`; `work` takes the object files.

    Raises:
        BuildError: a compiler failed; the message is its output.
    """
    work.mkdir(parents=True, exist_ok=True)
    commands = dict(_objects(tools, work))
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        list(pool.map(run, commands.values()))
    library = folder / LIBRARY
    linked = work / LIBRARY
    run([*_linker(tools), "-shared", *map(str, commands), "-o", str(linked), *_link_flags(tools)])
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(linked, library.with_suffix(".tmp"))
    os.replace(library.with_suffix(".tmp"), library)
    (folder / FACTS).write_text(json.dumps(tools.facts(), indent=2) + "\n")
    return library


def compile_simt(tools: Tools, folder: Path, sanitize: bool = False) -> Path:
    """Compile the .cu files for the CPU (csrc/common/simt.h) as a library of ops `megacogvx_simt::`, for the tests.

    Args:
        tools: nvcc isn't used.
        folder: takes the library; one that was made from the same sources is left as it is.
        sanitize: with AddressSanitizer; the process that loads it has to preload libasan.

    Raises:
        BuildError: the compiler failed; the message is its output.
    """
    library = folder / f"simt_{'asan_' if sanitize else ''}{fingerprint()}.so"
    if library.exists():
        return library
    folder.mkdir(parents=True, exist_ok=True)
    flags = [STANDARD, "-O1", "-g1", "-fPIC", "-ffp-contract=off", "-Wall", "-DMCV_SIMT", "-DMCV_ISA=simt_body"]
    flags += ["-fsanitize=address,alignment", "-fno-sanitize-recover=alignment"] if sanitize else []
    commands = {}
    for source in [CSRC / "bindings.cpp", *sources(".cu")]:
        output = folder / f"{source.stem}.{library.stem}.o"
        torch = ["-isystem", str(tools.torch / "include"), f"-DTORCH_TARGET_VERSION={TORCH_TARGET}"]
        kind = torch if source.suffix == ".cpp" else []
        commands[output] = [tools.compiler, *flags, *kind, "-x", "c++", "-c", str(source), "-o", str(output)]
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        list(pool.map(run, commands.values()))
    without_nvcc = Tools(tools.compiler, tools.torch, None)
    partial = library.with_suffix(f".{os.getpid()}")
    run([tools.compiler, *flags, "-shared", *map(str, commands), "-o", str(partial), *_link_flags(without_nvcc)])
    os.replace(partial, library)
    return library


def is_current(folder: Path, tools: Tools) -> bool:
    """Tell whether `folder` holds the library that `tools` would make of the sources as they are."""
    try:
        return (folder / LIBRARY).is_file() and json.loads((folder / FACTS).read_text()) == tools.facts()
    except (OSError, ValueError):
        return False


def built_for(folder: Path) -> list[int]:
    """Return the architectures of the library in `folder`, if it was made of the sources as they are; else none."""
    try:
        facts = json.loads((folder / FACTS).read_text())
    except (OSError, ValueError):
        return []
    is_of_these = (folder / LIBRARY).is_file() and facts.get("sources") == fingerprint()
    return [int(name.removeprefix("sm_")) for name in facts["cuda"]] if is_of_these else []


def device_command(nvcc: Path, source: Path, output: Path, *flags: str) -> list[str]:
    """Return the nvcc command for one .cu file."""
    return [str(nvcc), STANDARD, *DEVICE_FLAGS, *flags, str(source), "-o", str(output)]


def run(command: Sequence[str]) -> str:
    """Run a compiler and return what it printed.

    Raises:
        BuildError: it failed.
    """
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}  # libasan is the tests'
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    if done.returncode:
        raise BuildError(f"{' '.join(command)}\nfailed with {done.returncode}:\n{done.stdout}")
    return done.stdout


def sources(suffix: str) -> list[Path]:
    """Return the files of csrc/<op>/ that end in `suffix`."""
    return sorted(CSRC.glob(f"*/*{suffix}"))


def _objects(tools: Tools, work: Path) -> list[tuple[Path, list[str]]]:
    """Return the object files and the commands that make them."""
    made = []
    for isa, flags in instruction_sets():
        for source in sources("_cpu.cpp"):
            output = work / f"{source.stem}.{isa}.o"
            made.append((output, [*_host(tools), f"-DMCV_ISA={isa}", *flags, "-c", str(source), "-o", str(output)]))
    defines = [f"-DTORCH_TARGET_VERSION={TORCH_TARGET}"]
    defines += ["-DMCV_HAS_AVX2"] if len(instruction_sets()) > 1 else []
    if tools.nvcc:
        defines.append("-DMCV_CUDA")
        kinds = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in tools.architectures]
        kinds.append(f"-gencode=arch=compute_{tools.architectures[-1]},code=compute_{tools.architectures[-1]}")
        for source in sources(".cu"):
            output = work / f"{source.stem}.cu.o"
            made.append((output, device_command(tools.nvcc, source, output, *kinds, "-c", f"-ccbin={tools.compiler}")))
    binding = [*_host(tools), "-isystem", str(tools.torch / "include"), *defines, "-c", str(CSRC / "bindings.cpp")]
    return [(work / "bindings.o", [*binding, "-o", str(work / "bindings.o")]), *made]


def _host(tools: Tools) -> list[str]:
    return [tools.compiler, STANDARD, *HOST_FLAGS]


def _linker(tools: Tools) -> list[str]:
    """The runtime is linked statically, by nvcc, which knows where it lies: the library loads without a driver."""
    return [str(tools.nvcc), "-ccbin", tools.compiler, "-cudart", "static"] if tools.nvcc else [tools.compiler]


def _link_flags(tools: Tools) -> list[str]:
    """Nothing of libtorch is called, but with CUDA it is what brings libtorch_cuda along, and with it the streams."""
    pass_on = ("-Xlinker", "--no-as-needed") if tools.nvcc else ("-Wl,--no-as-needed",)
    return [f"-L{tools.torch / 'lib'}", *pass_on, "-ltorch", "-ltorch_cpu", "-lc10"]


if __name__ == "__main__":  # `python kernels/toolchain.py nvcc`: where it is; fails if it is nowhere
    file = find_cuda_program(sys.argv[1])
    sys.exit(print(file) if file else f"{sys.argv[1]} not found")
