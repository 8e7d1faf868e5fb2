import pytest
import torch

from megacogvx import draws
from megacogvx.config import build_config
from megacogvx.errors import CheckpointError, ConfigError
from megacogvx.models.vae import VAELoss, VAELossConfig, gaussian
from megacogvx.models.vae.losses import PerceptualRandomNet
from megacogvx.testing.tolerance import assert_close


def _video(what="video", frames=2, size=16):
    return draws.normal((2, 3, frames, size, size), 0, what).tanh()


def _moments():
    return draws.normal((2, 8, 1, 2, 2), 0, "moments")


def test_total_is_the_weighted_sum_of_the_named_terms():
    config = VAELossConfig(l1_weight=2.0, perceptual_weight=0.5, kl_weight=3.0)
    video, other, moments = _video(), _video("other"), _moments()
    loss = VAELoss(config)
    total, terms, reconstruction = loss(video, other, moments)
    assert tuple(terms) == loss.term_names == ("l1", "perceptual_random_net", "kl")
    assert_close(terms["l1"], (video - other).abs().mean(), 1e-6)
    assert_close(terms["kl"], gaussian.kl(moments).sum() / video.numel(), 1e-6)
    assert_close(reconstruction, 2.0 * terms["l1"] + 0.5 * terms["perceptual_random_net"], 1e-6)
    assert_close(total, reconstruction + 3.0 * terms["kl"], 1e-6)


def test_without_perceptual_term_there_is_no_net():
    for config in (VAELossConfig(perceptual="none"), VAELossConfig(perceptual_weight=0.0)):
        loss = VAELoss(config)
        assert loss.perceptual is None and loss.term_names == ("l1", "kl")
        assert set(loss(_video(), _video("other"), _moments()).terms) == {"l1", "kl"}


def test_lpips_needs_its_files_and_is_never_a_random_net(tmp_path):
    with pytest.raises(ConfigError, match=r"perceptual=lpips needs lpips_heads: .*set perceptual=random_net or none"):
        build_config(VAELossConfig, {"perceptual": "lpips", "lpips_backbone": "a.pth"})
    with pytest.raises(ConfigError, match=r"perceptual=random_net doesn't read it; set perceptual=lpips"):
        build_config(VAELossConfig, {"lpips_backbone": "a.pth", "lpips_heads": "b.pth"})
    files = {"lpips_backbone": str(tmp_path / "a.pth"), "lpips_heads": str(tmp_path / "b.pth")}
    with pytest.raises(CheckpointError, match=r"a\.pth does not exist"):
        VAELoss(build_config(VAELossConfig, {"perceptual": "lpips", **files}))


def test_loss_has_no_parameters_and_no_state_and_is_the_same_each_time():
    first, second = VAELoss(VAELossConfig()), VAELoss(VAELossConfig())
    assert not list(first.parameters())
    assert not first.state_dict()
    arguments = (_video(), _video("other"), _moments())
    assert torch.equal(first(*arguments).total, second(*arguments).total)


def test_perceptual_distance_is_zero_for_equal_videos_and_grows_with_blur():
    net, video = PerceptualRandomNet(), _video(size=32)
    soft = 0.5 * video + 0.5 * video.roll(1, -1)
    softer = 0.25 * (video + video.roll(1, -1) + video.roll(1, -2) + video.roll((1, 1), (-1, -2)))
    assert net(video, video).item() == 0.0
    assert 0.01 < net(video, soft) < net(video, softer) < 12.0


def test_perceptual_distance_looks_at_each_frame_by_itself():
    net, video, other = PerceptualRandomNet(), _video(frames=3), _video("other", frames=3)
    order = torch.tensor([2, 0, 1])
    assert_close(net(video[:, :, order], other[:, :, order]), net(video, other), 1e-6)
    frames = [net(video[:, :, t : t + 1], other[:, :, t : t + 1]) for t in range(3)]
    assert_close(torch.stack(frames).mean(), net(video, other), 1e-6)


@pytest.mark.parametrize("value", [0.0, 0.5])
def test_constant_videos_have_finite_losses_and_gradients(value):
    video = torch.full((1, 3, 1, 16, 16), value)
    reconstruction = video.clone().requires_grad_()
    moments = torch.zeros(1, 8, 1, 2, 2, requires_grad=True)
    VAELoss(VAELossConfig())(video, reconstruction, moments).total.backward()
    assert torch.isfinite(reconstruction.grad).all()
    assert torch.isfinite(moments.grad).all()


def test_the_gradient_reaches_the_reconstruction_alone():
    video, reconstruction = _video().requires_grad_(), _video("other").requires_grad_()
    PerceptualRandomNet()(video, reconstruction).backward()
    assert video.grad is None
    assert reconstruction.grad.abs().max() > 0
