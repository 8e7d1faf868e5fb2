"""LPIPS (Zhang et al., arXiv 1801.03924): how different two pictures look, by the features of VGG-16, frame by frame.

The weights come from two local files, which this project doesn't hold: torchvision's VGG-16 (`vgg16-397923af.pth`) and
the linear heads of the package lpips 0.1.4 (`lpips/weights/v0.1/vgg.pth`), whose version 0.1 is computed here.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from megacogvx.errors import CheckpointError

# VGG-16 by stages, a halving between two of them: (index of the convolution among torchvision's `features`, width).
STAGES: tuple[tuple[tuple[int, int], ...], ...] = (
    ((0, 64), (2, 64)),
    ((5, 128), (7, 128)),
    ((10, 256), (12, 256), (14, 256)),
    ((17, 512), (19, 512), (21, 512)),
    ((24, 512), (26, 512), (28, 512)),
)
UNUSED = re.compile(r"classifier\.[036]\.(weight|bias)")  # the layers that tell the classes of ImageNet
# Mean and deviation of ImageNet's colours, for pixels in [-1, 1]; lpips 0.1.4, ScalingLayer.
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
NORM_EPS = 1e-10


class LPIPS(nn.Module):
    """The distance, frozen: its weights are buffers outside checkpoints."""

    def __init__(self, backbone: Path, heads: Path) -> None:
        """Read the weights.

        Args:
            backbone: torchvision's VGG-16, a `.pth` of `features.*` and `classifier.*` (of which LPIPS uses none).
            heads: the package lpips's `weights/v0.1/vgg.pth`, `lin0.model.1.weight` to `lin4.model.1.weight`.

        Raises:
            CheckpointError: a file is missing or unreadable, or holds other tensors than these.
        """
        super().__init__()
        shapes: dict[str, tuple[int, ...]] = {}
        before = 3
        for index, width in (convolution for stage in STAGES for convolution in stage):
            shapes[f"features.{index}.weight"], before = (width, before, 3, 3), width
            shapes[f"features.{index}.bias"] = (width,)
        self._keep(_read_weights(backbone, shapes))
        self._keep(_read_weights(heads, {_head(n): (1, stage[-1][1], 1, 1) for n, stage in enumerate(STAGES)}))
        self.register_buffer("shift", torch.tensor(SHIFT).view(3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor(SCALE).view(3, 1, 1), persistent=False)

    def forward(self, video_BCTHW: torch.Tensor, reconstruction_BCTHW: torch.Tensor) -> torch.Tensor:
        """Return the fp32 mean distance of the frames.

        Args:
            video_BCTHW, reconstruction_BCTHW: `[B, 3, T, H, W]` in [-1, 1], at least 16 x 16 pixels.

        Backward: to the reconstruction alone.
        """
        with torch.no_grad():
            expected = self.features(video_BCTHW)
        distances = []
        for number, (a, b) in enumerate(zip(expected, self.features(reconstruction_BCTHW), strict=True)):
            head = self._buffers[_name(_head(number))]
            assert head is not None
            distances.append(F.conv2d((_unit(a) - _unit(b)).square(), head).mean())
        return torch.stack(distances).sum()

    def features(self, video_BCTHW: torch.Tensor) -> list[torch.Tensor]:
        """Return `[B * T, C, H, W]` after the last ReLU of each stage: relu1_2, 2_2, 3_3, 4_3 and 5_3."""
        x = (video_BCTHW.float().transpose(1, 2).flatten(0, 1) - self.get_buffer("shift")) / self.get_buffer("scale")
        found = []
        for number, stage in enumerate(STAGES):
            x = F.max_pool2d(x, 2) if number else x
            for index, _ in stage:
                weight, bias = (self.get_buffer(_name(f"features.{index}.{kind}")) for kind in ("weight", "bias"))
                x = F.relu(F.conv2d(x, weight, bias, padding=1))
            found.append(x)
        return found

    def _keep(self, weights: dict[str, torch.Tensor]) -> None:
        for name, tensor in weights.items():
            self.register_buffer(_name(name), tensor, persistent=False)


def _unit(features: torch.Tensor) -> torch.Tensor:
    """Return the features divided by their length over the channels; zeros stay zeros, and their gradient finite."""
    return features / (torch.linalg.vector_norm(features, dim=1, keepdim=True) + NORM_EPS)


def _head(number: int) -> str:
    return f"lin{number}.model.1.weight"


def _name(key: str) -> str:
    return key.replace(".", "_")  # names of buffers have no dots


def _read_weights(path: Path, shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """Return the tensors called `shapes`, fp32 on the CPU; every key of the file must be one of them, or `UNUSED`."""
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist; LPIPS needs VGG-16's weights and the heads of lpips 0.1.4")
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
        there = {name: tuple(tensor.shape) for name, tensor in found.items() if not UNUSED.fullmatch(name)}
    except Exception as error:  # whatever a damaged or foreign file makes torch raise
        raise CheckpointError(f"{path} is not a file of tensors ({type(error).__name__}: {error})") from None
    wrong = sorted(name for name in there.keys() | shapes.keys() if there.get(name) != shapes.get(name))
    if wrong:
        raise CheckpointError(
            f"{path}: {wrong[0]} is {there.get(wrong[0], 'not there')}, LPIPS expects "
            f"{shapes.get(wrong[0], 'no such tensor')} ({len(wrong)} tensors differ)"
        )
    return {name: found[name].float() for name in shapes}
