"""The sampling loop around a model that knows the answer; layouts are compared in tests/parallel/test_sampling.py."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from megacogvx import draws
from megacogvx.diffusion.config import DiffusionConfig
from megacogvx.diffusion.schedule import NoiseSchedule
from megacogvx.errors import ConfigError
from megacogvx.inference.denoise import Denoiser, SamplingSettings, local_text
from megacogvx.models.transformer.config import CogVideoXConfig
from megacogvx.pack_layout import build_layout, place_sample
from megacogvx.patches import patchify
from megacogvx.testing.tolerance import assert_close

SCHEDULE = NoiseSchedule(DiffusionConfig())
SHAPE = (3, 4, 4, 6)  # T, C, H, W


def alone():
    group = SimpleNamespace(size=lambda: 1)
    return SimpleNamespace(
        tensor=(0, 1), context=(0, 1), device=torch.device("cpu"), tensor_group=group, context_group=group
    )


class Oracle(nn.Module):
    """Answers with the velocity that leads to `target`, plus an error of each branch's mean text."""

    def __init__(self, target_TCHW, patch_size_t=1, spoil_front=False):
        super().__init__()
        self.config = CogVideoXConfig(
            num_layers=1, num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4,
            text_embed_dim=8, patch_size_t=patch_size_t, use_rotary_positional_embeddings=True,
        )  # fmt: skip
        self.weight = nn.Parameter(torch.zeros(1))
        self.target_VP = patchify(target_TCHW, self.config.patch)
        self.spoil_front, self.calls, self.fronts, self.inputs = spoil_front, [], [], []

    def forward(self, video_VP, text_LE, timesteps_M, layout):
        self.calls.append((len(layout.samples) - 1, timesteps_M.tolist()))
        self.inputs.append(video_VP.chunk(layout.num_samples - 1)[0].clone())
        local, predictions = layout.local(), []
        t = int(timesteps_M[0])
        signal, sigma = SCHEDULE.alpha(t) ** 0.5, (1 - SCHEDULE.alpha(t)) ** 0.5
        for m, rows_VP in enumerate(video_VP.chunk(layout.num_samples - 1)):
            text = text_LE[local.modulation_rows[local.text_index] == 2 * m + 1]
            v_VP = (signal * rows_VP - self.target_VP) / sigma + text.mean()
            if self.spoil_front:
                frames = v_VP.reshape(len(v_VP), 4, 2, 4)
                first = layout.samples[m].grid[1] * layout.samples[m].grid[2]
                self.fronts.append(rows_VP.reshape(len(v_VP), 4, 2, 4)[:first])
                frames[:first, :, 0] = 50.0  # no loss reached these in training: anything may come out
            predictions.append(v_VP)
        return torch.cat(predictions)


def target():
    return draws.normal(SHAPE, 5, "target")


def sample(model, text=0.0, null=0.0, shape=SHAPE, place=0, **settings):
    settings = SamplingSettings(**{"num_steps": 8, **settings})
    return Denoiser(model, SCHEDULE, alone()).sample(
        torch.full((5, 8), text), torch.full((3, 8), null), shape, settings, place
    )


@pytest.mark.parametrize("sampler", ["ddim", "dpm"])
def test_reaches_what_the_model_knows(sampler):
    model = Oracle(target())
    assert_close(sample(model, sampler=sampler), target(), 1e-4)
    assert [calls for calls, _ in model.calls] == [2] * 8
    assert [t[0] for _, t in model.calls] == [999, 874, 749, 624, 499, 374, 249, 124]
    assert all(t == [t[0], t[0], 0] for _, t in model.calls)


def test_guidance_moves_away_from_no_text():
    """The branch without text errs by 1, the one with text by 0: guidance 6 errs by -5 where no guidance errs by 0."""
    one_step = {"num_steps": 1}
    plain = sample(Oracle(target()), null=1.0, guidance_scale=1.0, **one_step)
    guided = sample(Oracle(target()), null=1.0, guidance_scale=6.0, **one_step)
    assert_close(plain, target(), 1e-5)
    assert_close(guided, target() + 5.0, 1e-5)  # at t = 999 x0 = -v


def test_without_guidance_there_is_one_branch():
    model = Oracle(target())
    sample(model, guidance_scale=1.0)
    assert {calls for calls, _ in model.calls} == {1}


def inputs(**settings):
    """What the model is shown at each step, when it answers that the clean latents are zero."""
    model = Oracle(0 * target())
    sample(model, **settings)
    return model.inputs


def correlation(a, b):
    return float((a * b).sum() / (a.norm() * b.norm()))


def test_noise_depends_on_seed_and_place_alone():
    start = inputs()[0]
    assert abs(float(start.std()) - 1.0) < 0.15
    assert torch.equal(start, inputs(num_steps=2, sampler="dpm")[0])
    assert abs(correlation(start, inputs(seed=1)[0])) < 0.25
    assert abs(correlation(start, inputs(place=1)[0])) < 0.25
    frames = start.reshape(3, -1)
    assert abs(correlation(frames[0], frames[1])) < 0.4


def test_stochastic_steps_draw_noise_of_their_own():
    first, second, third, _ = inputs(sampler="dpm", num_steps=4)  # at t = 999, 749, 499
    assert abs(correlation(first, second)) < 0.25  # the first step keeps nothing
    before, after = SCHEDULE.alpha(749), SCHEDULE.alpha(499)
    kept = (1 - after) / (1 - before) * (before / after) ** 0.5 * second
    assert abs(correlation(third - kept, second)) < 0.25
    assert all(torch.equal(a, b) for a, b in zip(inputs(sampler="dpm"), inputs(sampler="dpm"), strict=True))


def test_repeated_frames_follow_the_first_frame():
    """With q = 2 and 3 frames the first patch holds a copy in front; what the model says of the copy is not used."""
    model = Oracle(target(), patch_size_t=2, spoil_front=True)
    result = sample(model)
    assert result.shape == SHAPE
    assert_close(result, target(), 1e-4)
    last = model.fronts[-1]  # at t = 124 little noise is left: the copy is near the first frame
    assert (last[:, :, 0] - last[:, :, 1]).abs().mean() < 0.5


@pytest.mark.parametrize("steps", [0, 1001])
def test_steps_must_fit_the_schedule(steps):
    with pytest.raises(ConfigError, match=rf"{steps} sampling steps .* any number from 1 to 1000 works"):
        SamplingSettings(num_steps=steps).check(1000)


def test_text_rows_of_ranks_join_to_the_whole():
    texts = [draws.normal((length, 8), 0, "text", length) for length in (3, 5)]
    samples = [place_sample(i, 3, 4, 6, len(text), (1, 2, 2)) for i, text in enumerate(texts)]
    layout = build_layout(samples, (1, 2, 2), num_tokens=64)
    whole = local_text(texts, layout, layout.local())
    assert torch.equal(whole[:8], torch.cat(texts))
    assert not whole[8:].any()
    assert len(whole) == 64 - 36
    parts = [local_text(texts, layout, layout.local((rank, 4))) for rank in range(4)]
    assert torch.equal(torch.cat(parts), whole)
