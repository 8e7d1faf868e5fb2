"""Where the two packages lie; everything else that pip needs is in pyproject.toml.

`kernels/` itself is not a package: a published one is imported as `kernels`, and ours would shadow it.
"""

from setuptools import find_packages, setup

setup(
    packages=[
        *find_packages(".", include=["megacogvx", "megacogvx.*"]),
        *find_packages("kernels", include=["megacogvx_kernels", "megacogvx_kernels.*"]),
    ],
    package_dir={"megacogvx": "megacogvx", "megacogvx_kernels": "kernels/megacogvx_kernels"},
)
