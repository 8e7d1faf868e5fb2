"""The build takes what the machine has, and what is asked for by name and can't be had is an error."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[2]


@pytest.fixture
def bare(tmp_path):
    """An environment in which no compiler is found."""
    environment = {name: value for name, value in os.environ.items() if name not in ("CXX", "CUDA_HOME", "CUDA_PATH")}
    return {**environment, "PATH": str(tmp_path)}


def _setup(environment, tmp_path, **more):
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", str(tmp_path / "lib")]
    command += ["--build-temp", str(tmp_path / "temp")]
    return subprocess.run(command, cwd=PROJECT, env={**environment, **more}, capture_output=True, text=True)


def test_without_a_compiler_the_installation_goes_on(bare, tmp_path):
    done = _setup(bare, tmp_path)
    assert done.returncode == 0
    assert "their references answer: no C++ compiler found" in done.stderr
    assert not list(tmp_path.rglob("*.so"))


def test_what_is_asked_for_by_name_is_built_or_an_error(bare, tmp_path):
    done = _setup(bare, tmp_path, MEGACOGVX_KERNELS="cpu")
    assert done.returncode != 0
    assert "no C++ compiler found" in done.stderr
    done = _setup(bare, tmp_path, MEGACOGVX_KERNELS="everything")
    assert done.returncode != 0
    assert "MEGACOGVX_KERNELS=everything is none of cuda, cpu, none" in done.stderr


def test_none_builds_nothing_and_says_nothing(bare, tmp_path):
    done = _setup(bare, tmp_path, MEGACOGVX_KERNELS="none")
    assert done.returncode == 0
    assert done.stderr == ""


def test_cuda_without_nvcc_is_an_error(toolchain, monkeypatch):
    monkeypatch.setattr(toolchain, "find_cuda_program", lambda name: None)
    monkeypatch.setattr(toolchain, "find_compiler", lambda: "g++")
    with pytest.raises(toolchain.BuildError, match="MEGACOGVX_KERNELS=cuda, and no nvcc found"):
        toolchain.find_tools("cuda")
    assert toolchain.find_tools().nvcc is None


def test_a_changed_source_changes_the_fingerprint(toolchain, monkeypatch, tmp_path):
    (tmp_path / "op").mkdir()
    (tmp_path / "op" / "core.h").write_text("int a;")
    monkeypatch.setattr(toolchain, "CSRC", tmp_path)
    before = toolchain.fingerprint()
    (tmp_path / "op" / "core.h").write_text("int b;")
    assert toolchain.fingerprint() != before


def test_a_library_is_current_until_its_facts_change(toolchain, tmp_path):
    tools = toolchain.Tools("g++", Path("torch"), None)
    assert not toolchain.is_current(tmp_path, tools)
    (tmp_path / toolchain.LIBRARY).write_bytes(b"")
    (tmp_path / toolchain.FACTS).write_text(json.dumps(tools.facts()))
    assert toolchain.is_current(tmp_path, tools)
    assert not toolchain.is_current(tmp_path, toolchain.Tools("g++", Path("torch"), Path("nvcc")))


def test_a_library_for_one_card_holds_its_machine_code_and_says_so(toolchain, tmp_path):
    tools = toolchain.Tools("g++", Path("torch"), Path("nvcc"), (90,))
    (command, *_) = [words for _, words in toolchain._objects(tools, tmp_path) if words[0] == "nvcc"]
    kinds = [word for word in command if word.startswith("-gencode")]
    assert kinds == ["-gencode=arch=compute_90,code=sm_90", "-gencode=arch=compute_90,code=compute_90"]
    assert toolchain.built_for(tmp_path) == []
    (tmp_path / toolchain.LIBRARY).write_bytes(b"")
    (tmp_path / toolchain.FACTS).write_text(json.dumps(tools.facts()))
    assert toolchain.built_for(tmp_path) == [90]
    (tmp_path / toolchain.FACTS).write_text(json.dumps({**tools.facts(), "sources": "others"}))
    assert toolchain.built_for(tmp_path) == []


def test_a_cuda_file_includes_no_header_of_torch(toolchain):
    """So it compiles in seconds, and one library serves several versions of torch."""
    texts = {file.relative_to(toolchain.CSRC).as_posix(): file.read_text() for file in toolchain.CSRC.rglob("*.*")}
    assert [name for name, text in texts.items() if "<torch/" in text] == ["common/tensors.h"]
    with_torch = {name for name, text in texts.items() if "common/tensors.h" in text}
    assert with_torch == {"bindings.cpp", "adaln/call.h", "qk_norm_rope/call.h"}
    assert [name for name, text in texts.items() if '/call.h"' in text] == ["bindings.cpp"]


def test_an_installed_package_holds_the_library(need_compiled, toolchain, tmp_path):
    from megacogvx_kernels import compiled

    source = Path(compiled.__file__).parent
    if not toolchain.is_current(source, toolchain.find_tools()):
        pytest.skip("the library isn't of these sources and tools: it would be compiled again")
    assert _setup(os.environ, tmp_path).returncode == 0
    for name in (toolchain.LIBRARY, toolchain.FACTS):
        assert (tmp_path / "lib" / "megacogvx_kernels" / name).read_bytes() == (source / name).read_bytes()
