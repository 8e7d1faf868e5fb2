"""Where the two packages lie, and how the compiled ops get into them; what else pip needs is in pyproject.toml.

`kernels/` itself is not a package: a published one is imported as `kernels`, and ours would shadow it.
"""

import os
import shutil
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

PROJECT = Path(__file__).resolve().parent
sys.path.insert(0, str(PROJECT / "kernels"))
import toolchain  # noqa: E402  (found there, not installed)


class BuildKernels(build_ext):
    """Compile the ops if the machine can; without, the package works on their references."""

    def run(self) -> None:
        """Build into the source tree (`--inplace`, editable) or into the package that is being built."""
        wanted = os.environ.get(toolchain.SWITCH, "")
        if wanted == "none":
            return
        try:
            self._build(toolchain.find_tools(wanted))
        except toolchain.BuildError as error:
            if wanted:
                raise SystemExit(f"megacogvx: {error}") from error
            print(f"megacogvx: the ops are not compiled, their references answer: {error}", file=sys.stderr)

    def _build(self, tools: toolchain.Tools) -> None:
        source = PROJECT / "kernels" / "megacogvx_kernels"
        target = source if self.inplace or self.editable_mode else Path(self.build_lib) / "megacogvx_kernels"
        if not toolchain.is_current(source, tools):
            toolchain.compile_library(tools, target, Path(self.build_temp) / "kernels")
        elif target != source:
            target.mkdir(parents=True, exist_ok=True)
            for name in (toolchain.LIBRARY, toolchain.FACTS):
                shutil.copyfile(source / name, target / name)

    def get_outputs(self) -> list[str]:
        """Return the files that this command made, for pip's record."""
        folder = Path(self.build_lib) / "megacogvx_kernels"
        return [str(file) for name in (toolchain.LIBRARY, toolchain.FACTS) if (file := folder / name).exists()]

    def get_output_mapping(self) -> dict[str, str]:
        """Return nothing: an editable installation finds the library in the source tree."""
        return {}


setup(
    packages=[
        *find_packages(".", include=["megacogvx", "megacogvx.*"]),
        *find_packages("kernels", include=["megacogvx_kernels", "megacogvx_kernels.*"]),
    ],
    package_dir={"megacogvx": "megacogvx", "megacogvx_kernels": "kernels/megacogvx_kernels"},
    # The sources are found by kernels/toolchain.py; an extension makes pip build one wheel per platform.
    ext_modules=[Extension("megacogvx_kernels._compiled", sources=[])],
    cmdclass={"build_ext": BuildKernels},
)
