import pytest
import torch

from megacogvx import draws
from megacogvx.config import build_config
from megacogvx.errors import ConfigError
from megacogvx.models.vae.discriminator import (
    Discriminator,
    DiscriminatorConfig,
    adaptive_weight,
    discriminator_hinge,
    generator_hinge,
    initialize_discriminator,
)
from megacogvx.testing.tolerance import assert_close

SMALL = DiscriminatorConfig(channels=4, layers=2, norm_num_groups=2)


def make(config: DiscriminatorConfig = SMALL, temporal_levels: int = 2) -> Discriminator:
    model = Discriminator(config, 3, temporal_levels)
    initialize_discriminator(model, 0)
    return model


def video(frames: int = 9, size: int = 32, what: str = "video") -> torch.Tensor:
    return draws.normal((2, 3, frames, size, size), 0, what).tanh()


@pytest.mark.parametrize(("frames", "logit_frames"), [(1, 1), (9, 3), (17, 5)])
def test_one_logit_for_each_patch(frames, logit_frames):
    assert make()(video(frames)).shape == (2, 1, logit_frames, 6, 6)


def test_published_sizes_see_seventy_pixels():
    with torch.device("meta"):
        model = Discriminator(DiscriminatorConfig(), 3, 2)
    seen = 1
    for conv in [model.conv_out, *reversed(model.convs), model.conv_in]:
        seen = (seen - 1) * conv.stride[1] + conv.kernel_size[1]
    assert seen == 70
    assert sum(parameter.numel() for parameter in model.parameters()) == 8_294_081
    assert model(torch.empty(1, 3, 17, 256, 256, device="meta")).shape == (1, 1, 5, 30, 30)


def test_smallest_side_gives_a_logit_and_one_less_does_not():
    model = make()
    side = model.smallest_side()
    assert model(video(1, side)).shape[3:] == (1, 1)
    with pytest.raises(RuntimeError):
        model(video(1, side - 1))


def test_logits_depend_on_the_motion_and_never_on_later_frames():
    model = make().eval()
    for norm in model.norms:  # statistics run over the whole clip; without them nothing is left that sees the future
        norm.forward = lambda x, frames: x
    still, clip = video()[:, :, :1].expand(-1, -1, 9, -1, -1), video()
    changed = torch.cat([clip[:, :, :5], video(what="other")[:, :, 5:]], dim=2)
    assert torch.equal(model(clip)[:, :, :2], model(changed)[:, :, :2])
    assert not torch.allclose(model(clip)[:, :, 2], model(changed)[:, :, 2])
    assert not torch.allclose(model(still)[:, :, 1:], model(clip)[:, :, 1:], atol=1e-2)


def test_hinge_losses():
    real, fake = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-2.0, 0.0, 1.0])
    assert_close(discriminator_hinge(real, fake), torch.tensor(0.5 * (2.5 / 3 + 3.0 / 3)), 1e-6)
    assert_close(generator_hinge(fake), torch.tensor(1 / 3), 1e-6)


def test_adaptive_weight_is_the_ratio_up_to_its_limit():
    assert_close(adaptive_weight(torch.tensor(3.0), torch.tensor(2.0), 1e4), torch.tensor(3.0 / 2.0001), 1e-6)
    assert adaptive_weight(torch.tensor(3.0), torch.tensor(0.0), 100.0) == 100.0


def test_constant_clips_have_finite_logits_and_gradients():
    model, constant = make(), torch.full((1, 3, 9, 32, 32), 0.5, requires_grad=True)
    generator_hinge(model(constant)).backward()
    assert torch.isfinite(constant.grad).all()


def test_groups_that_do_not_divide_are_refused():
    with pytest.raises(ConfigError, match=r"norm_num_groups=32 must divide 2 x channels=40"):
        build_config(DiscriminatorConfig, {"channels": 20})
