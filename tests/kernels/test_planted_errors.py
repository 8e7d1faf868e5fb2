"""Errors planted in the kernels, the bindings and the halo: each is caught by the test that is there for it.

They are planted in copies of the project, several in a copy where they are in different kernels, because the copy's
shim has to be compiled. `make kernels` runs these; on one core they take minutes.
"""

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

PROJECT = Path(__file__).resolve().parents[2]
COPIED = ("kernels", "megacogvx", "tests/kernels")
ROPE, ADALN, NORM = (f"test_{op}_compiled.py" for op in ("qk_norm_rope", "adaln", "group_norm"))
SHAPES = "the_kernels_equal"
CSRC = "kernels/csrc/"


@dataclass(frozen=True)
class Plant:
    """An error: `right` becomes `wrong` in a file, and the tests `chosen` of a test file fail and say `says`."""

    what: str
    copy: str
    file: str
    right: str
    wrong: str
    tests: str
    chosen: str
    says: str


PLANTS = (
    Plant(
        "a missing barrier before the table of turns is read", "barriers", CSRC + "qk_norm_rope/qk_norm_rope.cu",
        "  load_lane(bias, a.bias, a, channel);\n  __syncthreads();", "  load_lane(bias, a.bias, a, channel);",
        ROPE, SHAPES, "NaN or infinite",
    ),
    Plant(
        "a missing barrier in the sum over a block", "barriers", CSRC + "adaln/adaln.cu",
        "  __syncthreads();\n  float sum = 0.0f;\n  for (int warp", "  float sum = 0.0f;\n  for (int warp",
        ADALN, SHAPES, "NaN or infinite",
    ),
    Plant(
        "a missing barrier before the sums of warps are added", "barriers",
        CSRC + "group_norm_moments/group_norm_moments.cu",
        "    __syncthreads();\n    if (threadIdx.x >= 2)", "    if (threadIdx.x >= 2)", NORM, SHAPES, "NaN or infinite",
    ),
    Plant(
        "one wrong rotary frequency", "numbers", CSRC + "qk_norm_rope/call.h",
        "args.half_turns[pair++] = std::pow", "args.half_turns[pair++] = (i == 3 ? 1.02 : 1.0) * std::pow",
        ROPE, SHAPES, "relative error",
    ),
    Plant(
        "a part of a table's gradient dropped", "numbers", CSRC + "adaln/core.h",
        "w * sum_dyx + b * sum_dy", "w * sum_dyx", ADALN, SHAPES, "gradient of modulation_R3D .* relative error",
    ),
    Plant(
        "the gradient through the variance dropped", "numbers", CSRC + "group_norm_moments/group_norm_moments.cu",
        "- k[4] - normal * k[5])", "- k[4])", NORM, SHAPES, "gradient of x_BCTHW .* relative error",
    ),
    Plant(
        "text rotated", "text and threads", CSRC + "qk_norm_rope/core.h",
        "  if (place < 0 || ",
        "  position.is_video = place < 0, position.axis[0] = position.axis[1] = position.axis[2] = C(1);\n"
        "  if (place < 0 || ",
        ROPE, "text_is_bit_equal", "assert False",
    ),
    Plant(
        "threads that skip a barrier", "text and threads", CSRC + "adaln/adaln.cu",
        "    float dr[1][kChunk] = {};\n", "    if (!is_live) continue;\n    float dr[1][kChunk] = {};\n",
        ADALN, SHAPES, "SIMT deadlock",
    ),
    Plant(
        "the next head read beyond the last", "bounds", CSRC + "qk_norm_rope/qk_norm_rope.cu",
        "is_active && head + groups < heads)", "is_active)", ROPE, SHAPES, "AddressSanitizer: .*\n.*READ of size 16",
    ),
    Plant(
        "shared memory that is too small", "bounds", CSRC + "adaln/adaln.cu",
        "memory, 4 * kMaxWarps)", "memory, 3 * kMaxWarps)", ADALN, SHAPES, "AddressSanitizer: .*\n.*WRITE of size 4",
    ),
    Plant(
        "one position too many", "bounds", CSRC + "group_norm_moments/group_norm_moments.cu",
        "at < walk.end;", "at <= walk.end;", NORM, SHAPES, "AddressSanitizer: .*\n.*READ of size 16",
    ),
    Plant(
        "the halo's gradient dropped on one rank", "halo", "kernels/megacogvx_kernels/causal_halo/exchange.py",
        "        if self.tail_gradient is not None:\n            add_to_last",
        "        if self.tail_gradient is not None and self.rank != 0:\n            add_to_last",
        "test_frames_over_ranks.py", "stacked", "gradient of x: relative error",
    ),
)  # fmt: skip


@pytest.fixture(scope="module")
def copies(tmp_path_factory):
    """Return the copy of a name; the errors that belong to it are planted in it."""
    made = {}

    def get(name):
        if name not in made:
            made[name] = tmp_path_factory.mktemp("planted")
            for folder in COPIED:
                shutil.copytree(PROJECT / folder, made[name] / folder, ignore=shutil.ignore_patterns("__pycache__"))
            shutil.copy(PROJECT / "pyproject.toml", made[name])
            for plant in (each for each in PLANTS if each.copy == name):
                file = made[name] / plant.file
                text = file.read_text()
                assert plant.right in text, f"{plant.file} has changed: plant it anew"
                file.write_text(text.replace(plant.right, plant.wrong, 1))
        return made[name]

    return get


def _preloaded(toolchain):
    """Return what lets Python load a library that is compiled with AddressSanitizer."""
    found = subprocess.run([toolchain.find_compiler(), "-print-file-name=libasan.so"], capture_output=True, text=True)
    return {"LD_PRELOAD": found.stdout.strip(), "ASAN_OPTIONS": "detect_leaks=0"}


@pytest.mark.timeout(600)
@pytest.mark.parametrize("plant", PLANTS, ids=lambda plant: plant.what)
def test_a_planted_error_is_caught(copies, toolchain, cannot, plant):
    if toolchain.find_compiler() is None:
        cannot("no C++ compiler")
    copy = copies(plant.copy)
    environment = {**os.environ, "PYTHONPATH": f"{copy}:{copy / 'kernels'}", "MEGACOGVX_KERNELS_SHAPES": "0:40"}
    environment |= _preloaded(toolchain) if plant.copy == "bounds" else {}
    pytest_of = [sys.executable, "-m", "pytest", "-q", "-x", "-s", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*pytest_of, f"tests/kernels/{plant.tests}", "-k", plant.chosen], cwd=copy, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert done.returncode != 0, f"not caught:\n{done.stdout[-2000:]}"
    assert re.search(plant.says, done.stdout), f"caught as something else:\n{done.stdout[-4000:]}"
