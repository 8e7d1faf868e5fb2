"""Sampling on two ranks equals sampling on one."""

from __future__ import annotations

import torch

from megacogvx import draws
from megacogvx.pack_layout import build_layout, place_sample
from megacogvx.testing.spawn import on_ranks
from megacogvx.testing.tolerance import assert_close

TEXT_TO_VIDEO = {"in_channels": 4, "max_text_seq_length": 20}
SPLIT = ({"tensor_parallel_size": 2}, {"context_parallel_size": 2})


@on_ranks(2, *SPLIT)
def test_rows_of_two_ranks_are_gathered_in_order(groups, folder):
    _check_gathered_rows(groups)


@on_ranks(4, {"tensor_parallel_size": 2, "context_parallel_size": 2})
def test_rows_of_both_axes_are_gathered_in_order(groups, folder):
    _check_gathered_rows(groups)


def _check_gathered_rows(groups):
    from megacogvx.parallel.gather import gather_rows

    samples = [place_sample(place, *size, (1, 2, 2)) for place, size in enumerate([(3, 4, 6, 5), (1, 8, 8, 21)])]
    layout = build_layout(samples, (1, 2, 2), multiple=16)
    local = layout.local(groups.tensor, groups.context, groups.device)
    tokens = torch.arange(local.tokens.start, local.tokens.stop, device=groups.device)[local.video_index]
    rows = gather_rows(tokens.float()[:, None].expand(-1, 3).clone().requires_grad_(), layout, groups)
    assert rows[:, 0].tolist() == layout.local().video_index.tolist()
    assert not rows.requires_grad


@on_ranks(2, *SPLIT)
def test_sampling_does_not_depend_on_the_layout(groups, folder):
    """The cut falls into the video of the first branch, the pack needs padding, and q = 2 repeats a frame."""
    from megacogvx.diffusion.config import DiffusionConfig
    from megacogvx.diffusion.schedule import NoiseSchedule
    from megacogvx.inference.denoise import Denoiser, SamplingSettings
    from megacogvx.testing.one_process import Setting, alone, make

    solo, schedule = alone(groups), NoiseSchedule(DiffusionConfig())
    text_LE, null_LE = draws.normal((7, 24), 0, "text"), torch.zeros(20, 24)
    for changes, sampler in (({}, "ddim"), ({"patch_size_t": 2}, "dpm"), ({"rope_grid": "crop"}, "ddim")):
        settings = SamplingSettings(num_steps=3, sampler=sampler, guidance_scale=3.0, seed=4)
        results = [
            Denoiser(make(where, Setting("5b", changes={**TEXT_TO_VIDEO, **changes})), schedule, where).sample(
                text_LE, null_LE, (3, 4, 8, 6), settings
            )
            for where in (groups, solo)
        ]
        assert_close(*results, 1e-5, f"{sampler} {changes}")
