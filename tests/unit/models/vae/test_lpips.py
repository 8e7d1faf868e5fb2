"""LPIPS equals a separate computation from the same files, and accounts for every tensor in them."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from megacogvx import draws
from megacogvx.errors import CheckpointError
from megacogvx.models.vae.lpips import LPIPS
from megacogvx.testing.tolerance import assert_close

# torchvision/models/vgg.py, configuration D; "M" is a max pooling
LAYERS = (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M")
TAPS = (3, 8, 15, 22, 29)  # the ReLUs that lpips/pretrained_networks.py takes


def vgg_features() -> nn.Sequential:
    """Torchvision's `vgg16().features` as it builds them, with weights drawn here."""
    modules: list[nn.Module] = []
    before = 3
    for layer in LAYERS:
        if layer == "M":
            modules.append(nn.MaxPool2d(kernel_size=2, stride=2))
        else:
            modules += [nn.Conv2d(before, int(layer), 3, padding=1), nn.ReLU()]
            before = int(layer)
    net = nn.Sequential(*modules)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            spread = (2 / parameter[0].numel()) ** 0.5 if parameter.dim() > 1 else 0.1
            parameter.copy_(spread * draws.normal(tuple(parameter.shape), 0, name))
    return net


@pytest.fixture(scope="module")
def vgg() -> nn.Sequential:
    return vgg_features()


@pytest.fixture(scope="module")
def heads() -> dict[str, torch.Tensor]:
    widths = (64, 128, 256, 512, 512)
    return {f"lin{n}.model.1.weight": draws.normal((1, w, 1, 1), 0, "head", n).abs() for n, w in enumerate(widths)}


@pytest.fixture(scope="module")
def files(vgg: nn.Sequential, heads: dict, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The two files as they are published; the classifier's tensors are small, since nobody reads them."""
    folder = tmp_path_factory.mktemp("lpips")
    weights = {f"features.{name}": tensor for name, tensor in vgg.state_dict().items()}
    weights |= {f"classifier.{n}.{kind}": torch.zeros(2) for n in (0, 3, 6) for kind in ("weight", "bias")}
    torch.save(weights, folder / "vgg16.pth")
    torch.save(heads, folder / "heads.pth")
    return folder / "vgg16.pth", folder / "heads.pth"


def expected_distance(vgg: nn.Sequential, heads: dict, video: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """The formula of arXiv 1801.03924, equation 1, one frame and one layer at a time, in fp64."""
    total = torch.zeros((), dtype=torch.float64)
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    vgg = copy.deepcopy(vgg).double()
    frames = [(video[b, :, t], other[b, :, t]) for b in range(len(video)) for t in range(video.shape[2])]
    for pair in frames:
        taps: list[list[torch.Tensor]] = []
        for frame in pair:
            x = (((frame + 1) / 2 - mean[:, None, None]) / deviation[:, None, None]).double()[None]
            taps.append([])
            for index, module in enumerate(vgg):
                x = module(x)
                if index in TAPS:
                    taps[-1].append(x[0])
        for n, (a, b) in enumerate(zip(*taps, strict=True)):
            unit_a, unit_b = (y / y.square().sum(dim=0).sqrt().clamp(min=1e-30) for y in (a, b))
            weight = heads[f"lin{n}.model.1.weight"].flatten().double()
            total = total + torch.einsum("chw,c->hw", (unit_a - unit_b) ** 2, weight).mean()
    return total / len(frames)


def videos(size: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    video = draws.normal((2, 3, 2, size, size), 0, "video").tanh()
    return video, (video + 0.3 * draws.normal(tuple(video.shape), 0, "noise")).clamp(-1, 1)


def test_distance_and_gradient_equal_a_separate_computation(vgg, heads, files):
    video, other = videos()
    ours, theirs = other.clone().requires_grad_(), other.clone().requires_grad_()
    actual, expected = LPIPS(*files)(video, ours), expected_distance(vgg, heads, video, theirs)
    assert_close(actual, expected, 1e-5)
    actual.backward()
    expected.backward()
    assert_close(ours.grad, theirs.grad, 1e-4)


def test_equal_and_constant_pictures_have_distance_zero_and_finite_gradients(files):
    net = LPIPS(*files)
    constant = torch.full((1, 3, 1, 32, 32), 0.25, requires_grad=True)
    distance = net(constant.detach(), constant)
    distance.backward()
    assert distance.item() == 0.0 and torch.isfinite(constant.grad).all()
    assert not net.state_dict() and not list(net.parameters())


@pytest.mark.parametrize(
    ("name", "tensor", "which", "message"),
    [
        ("features.28.bias", None, 0, r"features\.28\.bias is not there, LPIPS expects \(512,\)"),
        ("features.30.weight", torch.zeros(1), 0, r"features\.30\.weight is \(1,\), LPIPS expects no such tensor"),
        ("classifier.7.weight", torch.zeros(1), 0, r"classifier\.7\.weight is"),
        ("features.5.weight", torch.zeros(128, 64, 5, 5), 0, r"features\.5\.weight is \(128, 64, 5, 5\)"),
        ("lin2.model.1.weight", None, 1, r"lin2\.model\.1\.weight is not there"),
    ],
)
def test_every_tensor_of_the_files_is_accounted_for(files, tmp_path, name, tensor, which, message):
    weights = torch.load(files[which], weights_only=True)
    weights.pop(name, None)
    if tensor is not None:
        weights[name] = tensor
    torch.save(weights, tmp_path / "changed.pth")
    paths = list(files)
    paths[which] = tmp_path / "changed.pth"
    with pytest.raises(CheckpointError, match=message):
        LPIPS(*paths)


def test_missing_and_foreign_files_are_named(files, tmp_path):
    with pytest.raises(CheckpointError, match=r"absent\.pth does not exist"):
        LPIPS(tmp_path / "absent.pth", files[1])
    (tmp_path / "text.pth").write_text("no tensors")
    with pytest.raises(CheckpointError, match=r"text\.pth is not a file of tensors"):
        LPIPS(files[0], tmp_path / "text.pth")
