"""Read the kernels' machine code and hold it to budgets.json: registers, shared memory, no local memory, wide accesses.

`ptxas` reports "no spills" also for a kernel whose arrays live in local memory, so the disassembly is asked too. Needs
nvcc, and cuobjdump with nvdisasm (of a CUDA toolkit, or NVIDIA's wheels); nothing runs on a GPU.

    python kernels/machine_code.py [--architectures 80 90 100] [--write]
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import toolchain

BUDGETS = Path(__file__).resolve().parent / "budgets.json"
PROGRAMS = ("cuobjdump", "nvdisasm")
SPARE_REGISTERS = 8  # what --write leaves for another compiler version


@dataclass(frozen=True)
class MachineCode:
    """One kernel, compiled for one architecture.

    Attributes:
        registers: of a thread.
        shared: bytes of shared memory of a block.
        stack: bytes of a thread's stack frame.
        local: instructions that read or write local memory (spills, and arrays with an index known only at run time).
        wide_loads, wide_stores: 16-byte accesses of global memory.
    """

    registers: int
    shared: int
    stack: int
    local: int
    wide_loads: int
    wide_stores: int


def compile_for(architecture: int, source: Path, folder: Path) -> Path:
    """Compile one .cu file to a cubin.

    Raises:
        toolchain.BuildError: no nvcc, or it failed.
    """
    nvcc = toolchain.find_cuda_program("nvcc")
    if nvcc is None:
        raise toolchain.BuildError("no nvcc found")
    output = folder / f"{source.stem}.sm_{architecture}.cubin"
    kind = f"-gencode=arch=compute_{architecture},code=sm_{architecture}"
    toolchain.run(toolchain.device_command(nvcc, source, output, kind, "-cubin"))
    return output


def read(binary: Path, architecture: int) -> dict[str, MachineCode]:
    """Return what the kernels of a cubin or of a library use, by readable name.

    Raises:
        toolchain.BuildError: no cuobjdump, or it failed.
    """
    program, disassembler = (toolchain.find_cuda_program(name) for name in PROGRAMS)
    if program is None or disassembler is None:
        raise toolchain.BuildError("no cuobjdump and nvdisasm found; NVIDIA's wheels nvidia-cuda-... have them")
    os.environ["NVDISASM_PATH"] = str(disassembler.parent)  # cuobjdump calls it
    command = [str(program), "--gpu-architecture", f"sm_{architecture}"]
    usage = toolchain.run([*command, "--dump-resource-usage", str(binary)])
    listing = toolchain.run([*command, "--dump-sass", str(binary)])
    code = _instructions(listing)
    found = {}
    for name, numbers in re.findall(r"Function (\S+):\s*\n\s*(REG:.*)", usage):
        used = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", numbers)}
        text = code[name]
        found[_readable(name)] = MachineCode(
            registers=used["REG"],
            shared=used["SHARED"],
            stack=used["STACK"],
            local=used["LOCAL"] + len(re.findall(r"\b(?:LDL|STL)\b", text)),
            wide_loads=len(re.findall(r"\bLDG\.E\.(?:\S*\.)?128", text)),
            wide_stores=len(re.findall(r"\bSTG\.E\.(?:\S*\.)?128", text)),
        )
    return found


def problems(code: dict[str, MachineCode], budget: dict[str, dict[str, int]]) -> list[str]:
    """Compare the kernels of one architecture with their budgets; a kernel without one is a problem too."""
    found = [f"{name}: in budgets.json and not in the code" for name in budget.keys() - code.keys()]
    for name, used in code.items():
        if name not in budget:
            found.append(f"{name}: not in budgets.json")
            continue
        allowed = budget[name]
        found += [f"{name}: {key} is {value}, budget 0" for key in ("stack", "local") if (value := getattr(used, key))]
        for key in ("registers", "shared"):
            if getattr(used, key) > allowed[key]:
                found.append(f"{name}: {key} is {getattr(used, key)}, budget {allowed[key]}")
        for key in ("wide_loads", "wide_stores"):
            if getattr(used, key) < allowed[key]:
                found.append(f"{name}: {key} is {getattr(used, key)}, at least {allowed[key]} expected")
    return sorted(found)


def built_library() -> Path | None:
    """Return the library that `setup.py build_ext --inplace` made of the sources as they are, with kernels; or None."""
    folder = Path(__file__).resolve().parent / "megacogvx_kernels"
    nvcc = toolchain.find_cuda_program("nvcc")
    tools = toolchain.Tools("", Path(), nvcc)
    return folder / toolchain.LIBRARY if nvcc and toolchain.is_current(folder, tools) else None


def examine(architecture: int, library: Path | None = None) -> dict[str, MachineCode]:
    """Read the kernels of one architecture.

    Args:
        architecture: 80, 90 or 100.
        library: to read them from; None: every .cu file is compiled, and nothing is left on disk.
    """
    if library is not None:
        return read(library, architecture)
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
        cubins = pool.map(lambda source: compile_for(architecture, source, Path(folder)), toolchain.sources(".cu"))
        return {name: used for cubin in cubins for name, used in read(cubin, architecture).items()}


def load_budgets() -> dict[str, dict[str, dict[str, int]]]:
    """Return budgets.json: architecture, then kernel, then limits."""
    loaded: dict[str, dict[str, dict[str, int]]] = json.loads(BUDGETS.read_text())
    return loaded


def main() -> int:
    """Examine, and print what is over budget; `--write` makes the budgets of what is there now."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--architectures", type=int, nargs="+", default=list(toolchain.ARCHITECTURES))
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    code = {f"sm_{each}": examine(each, built_library()) for each in arguments.architectures}
    if arguments.write:
        budgets = {name: {kernel: _budget(used) for kernel, used in found.items()} for name, found in code.items()}
        BUDGETS.write_text(json.dumps(budgets, indent=1, sort_keys=True) + "\n")
    budgets = load_budgets()
    found = [f"{name} {line}" for name in code for line in problems(code[name], budgets.get(name, {}))]
    for name in code:
        for kernel, used in sorted(code[name].items()):
            print(f"{name:7} {kernel:48} {used.registers:4} registers {used.shared:6} B shared")
    print(*found, sep="\n")
    print(f"{sum(len(kernels) for kernels in code.values()) - len(found)} passed, {len(found)} failed")
    return bool(found)


def _budget(used: MachineCode) -> dict[str, int]:
    budget = asdict(used)
    budget["registers"] = min(255, used.registers + SPARE_REGISTERS)
    return {key: budget[key] for key in ("registers", "shared", "wide_loads", "wide_stores")}


def _instructions(listing: str) -> dict[str, str]:
    """Return mangled name -> disassembly."""
    parts = re.split(r"^\s*Function : (\S+)$", listing, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def _readable(mangled: str) -> str:
    """`_ZN3mcv8portable20qk_norm_rope_forwardINS0_4bf16ELi8EEEvNS...` -> `qk_norm_rope_forward<bf16, 8>`."""
    plain = subprocess.run(["c++filt", mangled], capture_output=True, text=True, check=True).stdout.strip()
    name = re.sub(r"\(.*\)$", "", plain).removeprefix("void ").replace("mcv::portable::", "")
    return re.sub(r"\((?:int|bool)\)", "", name)


if __name__ == "__main__":
    sys.exit(main())
