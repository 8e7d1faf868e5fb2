"""Keep what the base image brings: its versions as pip constraints, and a check that they are the same at the end.

    python tools/image_versions.py write --torch 2.13.0a0 --output keep.txt     versions that must stay
    python tools/image_versions.py merge --keep keep.txt --constraints constraints.txt --output both.txt
    python tools/image_versions.py requirements --project pyproject.toml --keep keep.txt --output requirements.txt
    python tools/image_versions.py check --keep keep.txt

Needs nothing but the standard library: it runs before anything is installed.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import re
import sys
import tomllib
from pathlib import Path

# Built for each other in the image. The rest of it may move.
KEPT = ("torch", "triton", "transformer-engine", "flash-attn", "numpy", "setuptools")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for name, act in (("write", write), ("merge", merge), ("requirements", requirements), ("check", check)):
        command = commands.add_parser(name)
        command.set_defaults(act=act)
        for option in ("keep", "output", "constraints", "project"):
            command.add_argument(f"--{option}", type=Path)
        command.add_argument("--torch")
        command.add_argument("--extras", nargs="*", default=[])
    arguments = parser.parse_args(argv)
    arguments.act(arguments)


def write(arguments: argparse.Namespace) -> None:
    """Write the versions of `KEPT` that are installed; torch has to be there, and the one that was asked for."""
    versions = {name: version for name in KEPT if (version := installed(name))}
    if not versions.get("torch", "").startswith(arguments.torch):
        sys.exit(f"the image has torch {versions.get('torch')}, not {arguments.torch}: set BASE and TORCH together")
    arguments.output.write_text("".join(f"{name}=={version}\n" for name, version in versions.items()))


def merge(arguments: argparse.Namespace) -> None:
    """Write the project's constraints with the kept versions in place of its own."""
    kept = read_pins(arguments.keep)
    ours = {name: line for name, line in read_pins(arguments.constraints).items() if name not in kept}
    arguments.output.write_text("".join(f"{line}\n" for line in (*kept.values(), *ours.values())))


def requirements(arguments: argparse.Namespace) -> None:
    """Write what the project asks for, without what is kept."""
    project = tomllib.loads(arguments.project.read_text())["project"]
    extras = [entry for extra in arguments.extras for entry in project["optional-dependencies"][extra]]
    kept = read_pins(arguments.keep)
    wanted = [entry for entry in (*project["dependencies"], *extras) if canonical(entry) not in kept]
    arguments.output.write_text("".join(f"{entry}\n" for entry in wanted))


def check(arguments: argparse.Namespace) -> None:
    """End with an error if a kept version has changed."""
    changed = [
        f"{name} is {installed(name)}, the image brought {line.partition('==')[2]}"
        for name, line in read_pins(arguments.keep).items()
        if installed(name) != line.partition("==")[2]
    ]
    if changed:
        sys.exit("; ".join(changed))


def installed(name: str) -> str | None:
    """Return the installed version, local part included."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def read_pins(path: Path) -> dict[str, str]:
    """Return the lines `name==version` of a file by canonical name."""
    lines = [line.split("#")[0].strip() for line in path.read_text().splitlines()]
    return {canonical(line): line for line in lines if "==" in line}


def canonical(requirement: str) -> str:
    """Return the package's name as PyPI compares it."""
    match = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert match, requirement
    return re.sub(r"[-_.]+", "-", match[0]).lower()


if __name__ == "__main__":
    main()
