"""What pip and a newcomer get: two packages, one command, and pins for everything that is asked for."""

import os
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import megacogvx

PROJECT = Path(__file__).resolve().parents[2]
SETTINGS = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
EXTRAS = SETTINGS["optional-dependencies"]
MEASURED = [*SETTINGS["dependencies"], *EXTRAS["dev"], *EXTRAS["tracking"]]  # [gpu] is what the machine has


def pins() -> dict[str, Version]:
    """Return canonical name -> version of every line of constraints.txt."""
    lines = [line.partition("#")[0].strip() for line in (PROJECT / "constraints.txt").read_text().splitlines()]
    pairs = [line.split("==") for line in lines if line]
    return {canonicalize_name(name): Version(version) for name, version in pairs}


@pytest.mark.parametrize("text", MEASURED)
def test_everything_asked_for_is_pinned_to_a_version_that_satisfies_it(text):
    requirement = Requirement(text)
    pin = pins()[canonicalize_name(requirement.name)]
    assert requirement.specifier.contains(pin), f"constraints.txt pins {pin}, pyproject.toml asks for {text}"


def test_torch_is_pinned_without_a_local_build_and_core_as_designed():
    assert pins()["torch"] == Version("2.13.0")
    assert pins()["megatron-core"] == Version("0.16.1")


@pytest.mark.skipif(Path(sys.prefix) != PROJECT / ".venv", reason="the pins are those of the project's own environment")
def test_what_runs_is_what_is_pinned():
    wrong = {name: (metadata.version(name), str(pin)) for name, pin in pins().items() if _differs(name, pin)}
    assert not wrong, f"installed and pinned differ: {wrong}; `make setup` installs the pins"


def _differs(name: str, pin: Version) -> bool:
    try:
        return Version(metadata.version(name)).public != pin.public
    except metadata.PackageNotFoundError:
        return False  # of an extra that isn't installed here


def test_no_extra_names_apex():
    # NVIDIA's Apex isn't on PyPI; the project of that name there is another one
    wanted = [Requirement(text).name for text in [*MEASURED, *EXTRAS["gpu"]]]
    assert "apex" not in wanted
    assert {"transformer-engine", "flash-attn"} <= set(wanted)


def test_diffusers_is_asked_for_by_the_tests_alone():
    names = {group: [Requirement(text).name for text in texts] for group, texts in EXTRAS.items()}
    assert [group for group, wanted in names.items() if "diffusers" in wanted] == ["dev"]
    assert "diffusers" not in [Requirement(text).name for text in SETTINGS["dependencies"]]


def test_the_version_is_the_one_that_pip_knows():
    assert metadata.version("megacogvx") == megacogvx.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+", megacogvx.__version__)


def test_the_command_is_installed():
    (script,) = [entry for entry in metadata.entry_points(group="console_scripts") if entry.name == "megacogvx"]
    assert script.value == "megacogvx.cli:main"


def test_both_packages_are_found_from_another_folder(tmp_path):
    program = "import megacogvx, megacogvx_kernels as k; print(megacogvx.__file__, k.__file__, sep='\\n')"
    found = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True
    ).stdout.split()
    expected = ["megacogvx/__init__.py", "kernels/megacogvx_kernels/__init__.py"]
    assert found == [str(PROJECT / path) for path in expected]


def test_the_command_line_answers_without_loading_torch(tmp_path):
    program = "import sys, megacogvx.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=tmp_path).returncode == 0


def test_a_built_package_holds_every_module(tmp_path):
    # setup.py's own steps: what a wheel would hold, without an isolated build that needs the network
    steps = ["-q", "egg_info", "--egg-base", str(tmp_path), "build", "--build-base", str(tmp_path / "build")]
    steps += ["--build-lib", str(tmp_path / "lib")]
    without_ops = {**os.environ, "MEGACOGVX_KERNELS": "none"}  # tests/kernels/test_toolchain.py builds those
    subprocess.run([sys.executable, "setup.py", *steps], cwd=PROJECT, check=True, capture_output=True, env=without_ops)
    built = {path.relative_to(tmp_path / "lib") for path in (tmp_path / "lib").rglob("*.py")}
    roots = [(PROJECT, "megacogvx"), (PROJECT / "kernels", "megacogvx_kernels")]
    assert built == {path.relative_to(root) for root, package in roots for path in (root / package).rglob("*.py")}
