"""What a validation video starts from, and that no rank waits for a whole one; tests/parallel makes real ones."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from megacogvx.data.transforms import to_model_range
from megacogvx.inference.conditions import ConditionEncoder
from megacogvx.inference.denoise import SamplingSettings
from megacogvx.models.vae.config import VAEConfig
from megacogvx.models.vae.initialize import initialize_weights
from megacogvx.models.vae.model import CogVideoXVAE
from megacogvx.models.vae.tiling import CHUNKED, WHOLE
from megacogvx.training import validation_videos
from megacogvx.training.validation_videos import ValidationVideos

STEPS, SEED = 3, 5


class FakeDenoiser:
    """Samples zeros; keeps the images that it is given."""

    def __init__(self, model, schedule, groups):
        self.model = model

    def sample(self, text_LE, no_text_LE, shape, settings, place, image_CHW=None, on_step=None):
        for _ in range(settings.num_steps):
            on_step()
        self.model.images.append(image_CHW)
        return torch.zeros(shape)


@pytest.fixture(scope="module")
def vae():
    vae = CogVideoXVAE(VAEConfig(preset="tiny", latent_channels=4))
    initialize_weights(vae, 1)
    return vae


@pytest.fixture
def made(tmp_path, monkeypatch, vae):
    """Make two videos on one rank of two replicas; return (videos, images, when it met the others, told it goes on)."""
    met: list[str] = []
    monkeypatch.setattr(validation_videos, "Denoiser", FakeDenoiser)
    monkeypatch.setattr(validation_videos, "barrier", lambda groups: met.append("met"))
    monkeypatch.setattr(validation_videos, "broadcast_json", lambda value, groups: 2)
    monkeypatch.setattr(validation_videos, "load_vae", lambda *_: vae)

    def build(replica: int, images: ConditionEncoder | None = None):
        torch.manual_seed(0)
        pixels = [torch.randint(0, 256, (16, 16, 3), dtype=torch.uint8) for _ in range(2)]
        pack = SimpleNamespace(
            layout=SimpleNamespace(num_samples=3), latents=[torch.zeros(3, 2, 2, 8)] * 2, text=[torch.zeros(3, 6)] * 2,
            images=pixels, sample_ids=[7, 8],
        )  # fmt: skip
        model = torch.nn.Linear(1, 1)
        model.images = []
        groups = SimpleNamespace(data=(replica, 2), is_first=replica == 0)
        videos = ValidationVideos(
            [pack], 2, model, None, 1.0, tmp_path, SamplingSettings(STEPS, seed=SEED), tmp_path / "out", groups,
            images=images,
        )  # fmt: skip
        met.clear()
        told: list[str] = []
        result = videos.make(9, lambda: told.append("on"))
        return result, model.images, len(met), len(told), pixels

    return build


def test_replicas_meet_after_each_step_and_each_decoded_video(made):
    """The replica that waits meets the one that samples as often, and both say each time that they go on."""
    counts = [made(replica)[2:4] for replica in (0, 1)]
    assert counts == [(2 * STEPS + 2, 2 * STEPS + 2)] * 2


def test_the_first_rank_alone_gets_the_videos(made, tmp_path):
    assert made(1)[0] == {} and not (tmp_path / "out").exists()
    videos = made(0)[0]
    assert {name: tuple(frames.shape) for name, frames in videos.items()} == dict.fromkeys(
        ("video-0", "video-1"), (9, 16, 16, 3)
    )
    assert len(list((tmp_path / "out").glob("step-00000010-video-*.mp4"))) == 2


def test_each_video_starts_from_its_own_first_frame_without_noise(made, vae):
    encoder = ConditionEncoder(vae, 0.7, "divide")
    images, pixels = made(0, encoder)[1], made(0, encoder)[4]
    for place, image_CHW in enumerate(images):
        expected = encoder.image(to_model_range(pixels[place][None])[:, 0], SEED, place)
        assert torch.equal(image_CHW, expected)
    assert not torch.equal(images[0], images[1])
    assert made(0)[1] == [None, None], "text to video"


def test_a_long_video_is_decoded_in_chunks(made, vae, monkeypatch):
    """Beside the model and its optimizer there is no room for the whole of it."""
    codings, decode = [], CogVideoXVAE.decode
    monkeypatch.setattr(
        CogVideoXVAE, "decode", lambda self, z, coding=WHOLE: codings.append(coding) or decode(self, z, coding)
    )
    made(0)
    assert codings == [CHUNKED, CHUNKED]
