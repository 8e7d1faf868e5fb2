from pathlib import Path

import pytest
import torch

from megacogvx.curation.encode_job import JOB_FILE, EncodeJob, agree, latent_scale
from megacogvx.errors import DataError

JOB = EncodeJob(
    clips="0" * 32, clips_per_shard=4, text_kind="padded", text_length=8, text_width=16, text_encoder_fingerprint="t",
    latent_channels=4, vae_fingerprint="v", coding="whole", measured_clips=2, scale=None,
)  # fmt: skip


def never() -> float:
    raise AssertionError("the scale is known already")


def test_the_first_process_measures_and_the_others_follow(tmp_path: Path) -> None:
    first = agree(tmp_path, JOB, lambda: 1.25)
    assert first.scale == 1.25
    assert agree(tmp_path, JOB, never) == first
    assert [path.name for path in tmp_path.iterdir()] == [JOB_FILE]


def test_a_process_that_measured_too_late_takes_the_first_ones_scale(tmp_path: Path) -> None:
    def slow() -> float:
        agree(tmp_path, JOB, lambda: 1.25)  # another process is quicker
        return 1.2500001

    assert agree(tmp_path, JOB, slow).scale == 1.25


def test_a_given_scale_is_not_measured(tmp_path: Path) -> None:
    given = JOB.model_copy(update={"scale": 0.7, "measured_clips": 0})
    assert agree(tmp_path, given, never) == given
    with pytest.raises(DataError, match=r"scale=0\.7 then and 0\.8 now"):
        agree(tmp_path, given.model_copy(update={"scale": 0.8}), never)


@pytest.mark.parametrize(
    "change", [{"clips": "1" * 32}, {"clips_per_shard": 5}, {"vae_fingerprint": "w"}, {"coding": "chunked by 2"}]
)
def test_other_settings_are_refused(tmp_path: Path, change: dict[str, object]) -> None:
    agree(tmp_path, JOB, lambda: 1.0)
    with pytest.raises(DataError, match=f"other settings: {next(iter(change))}="):
        agree(tmp_path, JOB.model_copy(update=change), never)


def test_a_damaged_job_is_a_data_error(tmp_path: Path) -> None:
    (tmp_path / JOB_FILE).write_text("{}")
    with pytest.raises(DataError, match="damaged"):
        agree(tmp_path, JOB, never)


def test_the_scale_makes_drawn_latents_have_unit_deviation() -> None:
    generator = torch.Generator().manual_seed(0)
    moments = [torch.randn(3, 16, n, 8, generator=generator) + 1 for n in (16, 32)]  # both means and log-variances
    draws = [m[..., :4] + (m[..., 4:] / 2).exp() * torch.randn(m[..., :4].shape, generator=generator) for m in moments]
    deviation = torch.cat([draw.flatten() for draw in draws]).std()
    assert latent_scale(moments) == pytest.approx(1 / float(deviation), rel=0.02)


def test_a_scale_that_cannot_be_measured_is_a_data_error() -> None:
    with pytest.raises(DataError, match="no clip could be encoded"):
        latent_scale([])
    with pytest.raises(DataError, match="nan"):
        latent_scale([torch.full((1, 2, 2, 4), float("nan"))])


def test_a_full_disk_is_a_data_error_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("megacogvx.curation.encode_job.os.fsync", fails)
    with pytest.raises(DataError, match=r"cannot write to .*: No space left on device; make room"):
        agree(tmp_path, JOB, lambda: 1.0)
    assert not list(tmp_path.iterdir())
