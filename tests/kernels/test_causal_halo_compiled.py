"""How the halo's frames get into a message and back: without a copy where they lie in one piece, else by a kernel."""

import itertools

import pytest
import torch

from megacogvx import draws
from megacogvx.testing.kernel_cases import FLOATS
from megacogvx.testing.spawn import on_ranks
from megacogvx.testing.tolerance import assert_close
from megacogvx_kernels.causal_halo import causal_halo
from megacogvx_kernels.causal_halo.frames import _clip_of, as_sent, last_frames, layout_of

LAST = torch.channels_last_3d
SHAPES = [(2, 3, 4, 4, 8), (1, 2, 1, 3, 5), (2, 1, 5, 1, 1), (1, 3, 3, 64, 72)]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_kernel_packs_and_adds_what_torch_does(simt, shape, dtype):
    clip = draws.normal(shape, 0, "clip").to(dtype)
    for first, count in itertools.combinations(range(shape[2] + 1), 2):
        frames = slice(first, count)
        message = simt.halo_pack(clip, first, count - first)
        assert torch.equal(message, clip[:, :, frames])
        expected, actual = clip.clone(), clip.clone()
        expected[:, :, frames] += 2 * message
        simt.halo_unpack_add(actual, 2 * message, first)
        assert torch.equal(actual, expected)


def test_the_kernel_takes_clips_and_messages_that_start_anywhere(simt):
    clip, message = (draws.normal((1 + 2 * 3 * frames * 4 * 8,), 0, "clip")[1:] for frames in (4, 2))
    clip, message = clip.view(2, 3, 4, 4, 8), message.view(2, 3, 2, 4, 8)
    assert clip.data_ptr() % 16 and message.data_ptr() % 16
    assert torch.equal(simt.halo_pack(clip, 1, 2), clip[:, :, 1:3])
    for start in (clip, clip.clone()):
        expected, actual = start.clone(), start
        expected[:, :, 1:3] += message
        simt.halo_unpack_add(actual, message, 1)
        assert torch.equal(actual, expected)


def test_opcheck(simt):
    clip = draws.normal((2, 3, 4, 4, 8), 0, "clip")
    torch.library.opcheck(simt.halo_pack.default, (clip, 1, 2))
    torch.library.opcheck(simt.halo_unpack_add.default, (clip, draws.normal((2, 3, 2, 4, 8), 1, "message"), 1))


def test_frames_of_a_channels_last_clip_are_sent_as_they_lie():
    clip = draws.normal((1, 8, 5, 4, 6), 0, "clip").to(memory_format=LAST)
    sent = last_frames(clip[:, :, -2:], layout_of(clip))
    assert sent.data_ptr() == clip[:, :, -2:].data_ptr()
    assert as_sent(sent, LAST).is_contiguous()


def test_frames_of_other_clips_are_packed():
    clips = draws.normal((2, 8, 5, 4, 6), 0, "clip")
    for clip in (clips[:1], clips.to(memory_format=LAST)):
        layout = layout_of(clip)
        sent = last_frames(clip[:, :, -2:], layout)
        assert torch.equal(sent, clip[:, :, -2:])
        assert as_sent(sent, layout).is_contiguous()


def test_clips_that_look_alike_in_both_layouts_count_as_one():
    for shape in ((1, 1, 3, 4, 5), (1, 8, 3, 1, 1)):
        assert layout_of(torch.zeros(shape)) == layout_of(torch.zeros(shape).to(memory_format=LAST))


def test_the_clip_behind_its_last_frames_is_found():
    clip = draws.normal((2, 3, 5, 4, 6), 0, "clip")
    assert torch.equal(_clip_of(clip[:, :, -2:]), clip)
    assert _clip_of(clip.transpose(0, 1)[:, :, -2:]) is None
    assert _clip_of(clip[:, :, -2:, :, 1:]) is None


@on_ranks(2, {"context_parallel_size": 2})
def test_a_channels_last_clip_over_ranks_equals_one_process(groups):
    group, (rank, _) = groups.context_group, groups.context
    for batch, size, counts in ((1, 2, (3, 2)), (1, 2, (1, 2)), (2, 1, (2, 2))):
        whole = draws.normal((batch, 4, sum(counts), 5, 6), 0, "x").double().to(groups.device).requires_grad_()
        mine = whole.detach()[:, :, sum(counts[:rank]) : sum(counts[: rank + 1])].to(memory_format=LAST)
        mine = mine.clone(memory_format=LAST).requires_grad_()
        expected, actual = causal_halo(whole, size), causal_halo(mine, size, group=group)
        start = sum(counts[:rank])
        assert_close(actual, expected[:, :, start : start + counts[rank] + size], 0.0, "frames")
        pull = draws.normal(tuple(actual.shape), rank, "pull").to(actual)
        pulls = [draws.normal((batch, 4, counts[r] + size, 5, 6), r, "pull").to(actual) for r in range(2)]
        actual.backward(pull)
        parts = [expected[:, :, sum(counts[:r]) : sum(counts[:r]) + counts[r] + size] for r in range(2)]
        torch.autograd.backward(parts, pulls)
        assert_close(mine.grad, whole.grad[:, :, start : start + counts[rank]], 1e-12, "gradient")


@pytest.mark.gpu
def test_cuda_packs_and_adds_what_torch_does():
    for dtype, shape in itertools.product(FLOATS, SHAPES):
        clip = draws.normal(shape, 0, "clip").to(dtype).cuda()
        message = torch.ops.megacogvx.halo_pack(clip, shape[2] - 1, 1)
        assert torch.equal(message, clip[:, :, -1:])
        actual = clip.clone()
        torch.ops.megacogvx.halo_unpack_add(actual, message, 0)
        assert torch.equal(actual[:, :, :1], clip[:, :, :1] + message)
