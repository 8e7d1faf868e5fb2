# syntax=docker/dockerfile:1
# megacogvx with its compiled ops, Transformer Engine, flash-attn and Apex, on NVIDIA's PyTorch image.
#
#   docker build -t megacogvx .
#   docker run --gpus all --ipc=host --ulimit memlock=-1 -it megacogvx megacogvx doctor
#
# The image brings Python 3.12, torch, CUDA, NCCL and Transformer Engine, built for each other. None of them is
# replaced: pip gets their versions as constraints, and the build fails if torch has changed at its end.
ARG BASE=nvcr.io/nvidia/pytorch:26.06-py3
FROM ${BASE}

# What torch the image has to have; the tag above may move.
ARG TORCH=2.13.0a0
# NVIDIA/apex of 2026-07-08; the project called apex on PyPI is another one.
ARG APEX_COMMIT=6424da3b4faa6c8f062da4a48c424fff3f02d42d
ARG FLASH_ATTN=2.8.3
# Ampere, Hopper, Blackwell
ARG ARCHITECTURES="8.0;9.0;10.0"
ARG JOBS=16

ENV PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_CONSTRAINT="" \
    TORCH_CUDA_ARCH_LIST=${ARCHITECTURES} \
    MAX_JOBS=${JOBS}
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
WORKDIR /workspace/megacogvx

# What must stay as it is, as constraints for every pip below.
COPY tools/image_versions.py tools/
RUN python tools/image_versions.py write --torch "${TORCH}" --output /opt/keep.txt

# Apex: fused Adam and multi-tensor kernels, which Megatron-Core's optimizer takes where they are.
# hadolint ignore=DL3059
RUN APEX_CPP_EXT=1 APEX_CUDA_EXT=1 APEX_PARALLEL_BUILD=${JOBS} python -m pip install --no-build-isolation --no-deps \
        "git+https://github.com/NVIDIA/apex.git@${APEX_COMMIT}"

# flash-attn where the image has none; built against its torch.
# hadolint ignore=DL3059
RUN python -c "import flash_attn" 2>/dev/null || python -m pip install --no-build-isolation --no-deps \
        "flash-attn==${FLASH_ATTN}"

# The packages that the project needs, at the versions that its tests ran with, as far as the image leaves the choice.
COPY constraints.txt pyproject.toml ./
RUN python tools/image_versions.py merge --keep /opt/keep.txt --constraints constraints.txt --output /opt/constraints.txt \
    && python tools/image_versions.py requirements --project pyproject.toml --keep /opt/keep.txt --extras tracking \
        --output /opt/requirements.txt \
    && python -m pip install -c /opt/constraints.txt -r /opt/requirements.txt

# The project itself, with its ops compiled for the architectures above.
COPY . .
RUN MEGACOGVX_KERNELS=cuda python -m pip install --no-build-isolation --no-deps .

# The image's torch is still there, and everything can be imported.
RUN python tools/image_versions.py check --keep /opt/keep.txt \
    && python -c "import apex, flash_attn, megatron.core, transformer_engine.pytorch, megacogvx_kernels" \
    && megacogvx --version
