import pytest
import torch

from megacogvx import draws
from megacogvx_kernels.causal_halo import causal_halo


def _clip(frames, dtype=torch.float32):
    return draws.normal((2, 3, frames, 4, 5), 0, "clip", frames).to(dtype).requires_grad_()


@pytest.mark.parametrize("frames", [1, 2, 5])
@pytest.mark.parametrize("size", [0, 1, 2, 3])
def test_a_clip_starts_with_repeats_of_its_first_frame(frames, size):
    x = _clip(frames)
    y = causal_halo(x, size)
    assert y.shape == (2, 3, size + frames, 4, 5)
    for t in range(size + frames):
        assert torch.equal(y[:, :, t], x[:, :, max(t - size, 0)])


def test_the_gradients_of_repeats_add_up_in_the_first_frame():
    x = _clip(3)
    weights = draws.normal((2, 3, 5, 4, 5), 0, "weights")
    (causal_halo(x, 2) * weights).sum().backward()
    assert torch.equal(x.grad[:, :, 0], weights[:, :, :3].sum(2))
    assert torch.equal(x.grad[:, :, 1:], weights[:, :, 3:])


def test_previous_frames_stand_in_front_and_receive_their_gradient():
    x, previous = _clip(3), _clip(2)
    y = causal_halo(x, 2, previous)
    assert torch.equal(y, torch.cat([previous, x], dim=2))
    weights = draws.normal(tuple(y.shape), 0, "weights")
    (y * weights).sum().backward()
    assert torch.equal(previous.grad, weights[:, :, :2])
    assert torch.equal(x.grad, weights[:, :, 2:])


def test_dtype_is_kept():
    assert causal_halo(_clip(2, torch.bfloat16), 2).dtype == torch.bfloat16
