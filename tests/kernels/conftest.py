"""What the tests of the compiled ops share: kernels/toolchain.py, the SIMT shim's library, and what a skip means."""

import importlib
import os
import sys
from pathlib import Path

import pytest
import torch

from megacogvx_kernels.causal_halo import frames
from megacogvx_kernels.group_norm_moments import compiled as group_norm_ops

PROJECT = Path(__file__).resolve().parents[2]
MUST_RUN = "MEGACOGVX_KERNELS_MUST_RUN"  # set where a skipped test of the compiled ops is a failure: in CI with nvcc


def _beside_the_ops(name):
    sys.path.insert(0, str(PROJECT / "kernels"))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.pop(0)


@pytest.fixture(scope="session")
def toolchain():
    return _beside_the_ops("toolchain")


@pytest.fixture(scope="session")
def machine_code():
    return _beside_the_ops("machine_code")


@pytest.fixture(scope="session")
def cannot():
    """Skip for a reason, or fail where nothing may be skipped."""

    def skip(reason):
        if os.environ.get(MUST_RUN):
            pytest.fail(f"{MUST_RUN} is set: {reason}")
        pytest.skip(reason)

    return skip


@pytest.fixture
def shapes(record_property):
    """Return `take(first, step)`: every so many seeds of this run's random cases; kernels/prove.py adds them up.

    MEGACOGVX_KERNELS_SHAPES says which: "2000" are those from 0, "500:750" a part of them.
    """

    def take(first=0, step=1):
        begin, _, end = os.environ.get("MEGACOGVX_KERNELS_SHAPES", "100").rpartition(":")
        seeds = range(int(begin or 0), int(end))[first::step]
        record_property("shapes", len(seeds))
        return seeds

    return take


@pytest.fixture(scope="session")
def simt(toolchain, cannot):
    """`torch.ops.megacogvx_simt`: the .cu files' kernels, run on the CPU; with AddressSanitizer where it is loaded."""
    try:
        tools = toolchain.find_tools("cpu")
    except toolchain.BuildError as error:
        cannot(str(error))
    sanitize = "libasan" in os.environ.get("LD_PRELOAD", "")
    torch.ops.load_library(toolchain.compile_simt(tools, PROJECT / "build" / "simt", sanitize))
    for name, shape in (  # of what has no C++ version, so that opcheck sees the shapes that tracing is told
        ("group_norm", group_norm_ops._shape),
        ("halo_pack", frames._shape_of_message),
        ("halo_unpack_add", frames._nothing),
    ):
        torch.library.register_fake(f"megacogvx_simt::{name}")(shape)
    return torch.ops.megacogvx_simt


@pytest.fixture(scope="session")
def need_compiled(cannot):
    from megacogvx_kernels import compiled

    if "cpu" not in compiled.available():
        cannot("the ops aren't compiled: python setup.py build_ext --inplace")
