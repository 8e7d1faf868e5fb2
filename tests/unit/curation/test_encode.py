import argparse
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megacogvx import draws
from megacogvx.curation import encode, encode_shards
from megacogvx.curation.clip_encoder import ClipEncoder
from megacogvx.curation.clip_list import ClipList, sample_id
from megacogvx.curation.encode_shards import write_dataset
from megacogvx.data.clips import Clip, read_clip, read_clips, write_clips
from megacogvx.data.indexed import IndexedDataset
from megacogvx.data.indexed.encoder_info import TextKind
from megacogvx.data.transforms import to_model_range
from megacogvx.errors import ConfigError, DataError
from megacogvx.models.text_encoder import TextEncoder
from megacogvx.models.vae import gaussian
from megacogvx.models.vae.config import VAEConfig
from megacogvx.models.vae.initialize import initialize_weights
from megacogvx.models.vae.model import CogVideoXVAE
from megacogvx.models.vae.tiling import WHOLE, Coding
from megacogvx.models.weights import weights_fingerprint
from megacogvx.testing.moving_shapes import write_shape_clip
from megacogvx.testing.tiny_text_encoder import build_tiny_text_encoder

HEIGHT, WIDTH, LENGTH = 16, 24, 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six clips of two captions, one an image, and a text encoder in t5/."""
    path = tmp_path_factory.mktemp("encode")
    clips = []
    for number in range(6):
        frames, place = 1 if number == 5 else 9, {"source": "shapes", "start": float(number)}
        clips.append(write_shape_clip(path, number, frames, HEIGHT, WIDTH, scene=number % 2, **place))
    write_clips(path / "clips.jsonl", clips)
    build_tiny_text_encoder(path / "t5", [clip.caption for clip in clips], width=16, vocabulary=64)
    return path


@pytest.fixture(scope="module")
def vae() -> CogVideoXVAE:
    config = VAEConfig(block_out_channels=(4, 4, 4, 4), norm_num_groups=2, layers_per_block=1, latent_channels=4)
    model = CogVideoXVAE(config).requires_grad_(False)
    initialize_weights(model, seed=0)
    return model


def encoder_of(folder: Path, vae: CogVideoXVAE, text_kind: TextKind = "padded") -> ClipEncoder:
    return ClipEncoder(vae, TextEncoder.from_folder(folder / "t5", LENGTH), text_kind)


def write(folder: Path, target: Path, encoder: ClipEncoder, *, clips_per_shard: int = 2, **options: object) -> object:
    clips = ClipList.from_file(folder)
    job = encoder.job(clips, clips_per_shard, scaling_factor=None, measured=3)
    return write_dataset(target, clips, encoder, job, **options)  # type: ignore[arg-type]


def records(target: Path) -> dict[int, tuple[bytes, bytes, str]]:
    dataset = IndexedDataset(target)
    found = [dataset.sample(place) for place in range(len(dataset))]
    return {
        r.sample_id: (r.latents.view(torch.uint8).numpy().tobytes(), r.text.view(torch.uint8).numpy().tobytes(),
                      str(r.metadata))
        for r in found
    }  # fmt: skip


def test_records_hold_what_the_encoders_give(folder: Path, vae: CogVideoXVAE, tmp_path: Path) -> None:
    assert write(folder, tmp_path, encoder_of(folder, vae)) == {}
    dataset, clips = IndexedDataset(tmp_path), read_clips(folder)
    places = {dataset.sample(place).sample_id: place for place in range(len(dataset))}
    assert set(places) == {sample_id(clip) for clip in clips} and len(places) == 6
    text_encoder, moments = TextEncoder.from_folder(folder / "t5", LENGTH), []
    for clip in clips:
        record = dataset.sample(places[sample_id(clip)])
        expected = vae.encode(to_model_range(read_clip(clip))[None])[0].permute(1, 2, 3, 0)
        assert torch.equal(record.latents, expected.to(torch.bfloat16))
        assert record.latents.shape == (1 if clip.is_image else 3, 2, 3, 8)
        assert torch.equal(record.text, text_encoder.encode([clip.caption])[0][0].to(torch.bfloat16))
        assert record.metadata["caption"] == clip.caption and record.metadata["source"] == "shapes"
        moments.append(expected)
    info = dataset.manifest.encoder
    assert (info.text_kind, info.text_length, info.text_width, info.latent_channels) == ("padded", LENGTH, 16, 4)
    measured = [moments[place] for place in (0, 2, 4)]  # three of six, spread evenly
    repeated = [m.movedim(-1, 0)[None].expand(400, 8, *m.shape[:3]) for m in measured]
    drawn = [gaussian.sample(m, draws.normal((400, 4, *m.shape[2:]), 0, "test", i)) for i, m in enumerate(repeated)]
    deviation = float(torch.cat([latents.flatten() for latents in drawn]).std())
    assert info.latent_scale_factor == pytest.approx(1 / deviation, rel=0.02)
    assert info.vae_fingerprint == weights_fingerprint(vae)
    assert info.text_encoder_fingerprint == text_encoder.fingerprint


def test_the_records_do_not_depend_on_the_number_of_processes(folder: Path, vae: CogVideoXVAE, tmp_path: Path) -> None:
    write(folder, tmp_path / "alone", encoder_of(folder, vae))
    for rank in (1, 0):
        assert not (tmp_path / "shared" / "manifest.json").exists(), "the last process publishes the dataset"
        write(folder, tmp_path / "shared", encoder_of(folder, vae), rank=rank, ranks=2)
    assert records(tmp_path / "alone") == records(tmp_path / "shared")
    shards = [IndexedDataset(tmp_path / name).manifest.shards for name in ("alone", "shared")]
    assert [s.samples for s in shards[0]] == [s.samples for s in shards[1]] == [2, 2, 2]


def test_a_restart_goes_on_where_it_stopped(
    folder: Path, vae: CogVideoXVAE, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Clip] = []
    plain = ClipEncoder.moments

    def failing(self: ClipEncoder, clip: Clip) -> torch.Tensor:
        calls.append(clip)
        if len(calls) == 3 + 4:  # three are measured, the fourth record is the second of shard 1
            raise KeyboardInterrupt
        return plain(self, clip)

    monkeypatch.setattr(ClipEncoder, "moments", failing)
    with pytest.raises(KeyboardInterrupt):
        write(folder, tmp_path / "broken", encoder_of(folder, vae))
    first = (tmp_path / "broken" / "shard-00000.bin").stat().st_mtime_ns
    calls[:] = [read_clips(folder)[0]] * 10
    write(folder, tmp_path / "broken", encoder_of(folder, vae))
    assert len(calls) == 10 + 4, "neither the scale nor the first shard is computed again"
    assert (tmp_path / "broken" / "shard-00000.bin").stat().st_mtime_ns == first
    monkeypatch.undo()
    write(folder, tmp_path / "whole", encoder_of(folder, vae))
    assert records(tmp_path / "broken") == records(tmp_path / "whole")
    assert not list((tmp_path / "broken").glob("*.tmp"))


def test_a_clip_is_encoded_in_chunks_where_that_is_asked(folder: Path, vae: CogVideoXVAE, tmp_path: Path) -> None:
    coding = Coding(latents_per_chunk=1)
    text_encoder = TextEncoder.from_folder(folder / "t5", LENGTH)
    write(folder, tmp_path, ClipEncoder(vae, text_encoder, coding=coding))
    dataset, clips = IndexedDataset(tmp_path), {sample_id(clip): clip for clip in read_clips(folder)}
    differing = 0
    for record in map(dataset.sample, range(len(dataset))):
        video = to_model_range(read_clip(clips[record.sample_id]))[None]
        chunked, whole = (vae.encode(video, each)[0].permute(1, 2, 3, 0).to(torch.bfloat16) for each in (coding, WHOLE))
        assert torch.equal(record.latents, chunked)
        differing += not torch.equal(chunked, whole)
    assert differing, "the norms see a chunk at a time, so the numbers tell which coding it was"
    with pytest.raises(DataError, match="coding=chunked by 1 then and whole now"):
        write(folder, tmp_path, encoder_of(folder, vae))


def test_distinct_captions_are_encoded_once(
    folder: Path, vae: CogVideoXVAE, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    plain = TextEncoder.encode

    def counting(self: TextEncoder, captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        asked.extend(captions)
        return plain(self, captions)

    monkeypatch.setattr(TextEncoder, "encode", counting)
    write(folder, tmp_path, encoder_of(folder, vae))
    assert sorted(asked) == sorted({clip.caption for clip in read_clips(folder)})


def test_real_texts_hold_only_their_own_tokens(folder: Path, vae: CogVideoXVAE, tmp_path: Path) -> None:
    write(folder, tmp_path / "padded", encoder_of(folder, vae))
    write(folder, tmp_path / "real", encoder_of(folder, vae, "real"))
    padded, real = IndexedDataset(tmp_path / "padded").sample(0), IndexedDataset(tmp_path / "real").sample(0)
    length = int(TextEncoder.from_folder(folder / "t5", LENGTH).token_ids([real.metadata["caption"]])[1])
    assert len(padded.text) == LENGTH > len(real.text) == length
    assert torch.equal(padded.text[:length], real.text)


def test_first_frames_ids_and_8_bit_latents_where_asked(folder: Path, vae: CogVideoXVAE, tmp_path: Path) -> None:
    text_encoder = TextEncoder.from_folder(folder / "t5", LENGTH)
    made = ClipEncoder(vae, text_encoder, "token_ids", latent_dtype="fp8_e4m3", first_frame=True)
    write(folder, tmp_path / "new", made)
    write(folder, tmp_path / "plain", encoder_of(folder, vae))
    dataset, plain = IndexedDataset(tmp_path / "new"), IndexedDataset(tmp_path / "plain")
    info = dataset.encoder
    assert (info.text_kind, info.text_dtype, info.latent_dtype, info.first_frame) == (
        "token_ids", "int32", "fp8_e4m3", True,
    )  # fmt: skip
    clips = {sample_id(clip): clip for clip in read_clips(folder)}
    assert dataset.has_first_frame().all()
    for number in range(len(dataset)):
        record, stored = dataset.sample(number, first_frame=True), plain.sample(number)
        clip = clips[record.sample_id]
        assert torch.equal(record.first_frame, read_clip(clip)[0]), "the pixels that the VAE saw first"
        assert torch.equal(record.text, text_encoder.token_ids([clip.caption])[0][0].int())
        assert torch.allclose(record.latents.float(), stored.latents.float(), rtol=0.07, atol=0.002)
    with pytest.raises(DataError, match="first_frame=True then and False now"):
        write(folder, tmp_path / "new", ClipEncoder(vae, text_encoder, "token_ids", latent_dtype="fp8_e4m3"))


def test_bad_clips_stop_the_job_or_are_counted(folder: Path, vae: CogVideoXVAE, tmp_path: Path) -> None:
    listed = read_clips(folder)
    listed[2] = listed[2].model_copy(update={"path": folder / "absent.mp4"})
    clips = ClipList.of(listed)
    encoder = encoder_of(folder, vae)
    job = encoder.job(clips, 4, scaling_factor=0.5, measured=4)
    with pytest.raises(DataError, match=r"absent\.mp4 does not exist"):
        write_dataset(tmp_path, clips, encoder, job)
    assert not list(tmp_path.glob("*.idx"))
    skipped = write_dataset(tmp_path, clips, encoder, job, skip_bad=True)
    assert list(skipped.values()) == [1] and "missing" in next(iter(skipped))
    assert len(IndexedDataset(tmp_path)) == 5
    assert IndexedDataset(tmp_path).manifest.encoder.latent_scale_factor == 0.5


def test_other_settings_never_mix_in_one_dataset(folder: Path, vae: CogVideoXVAE, tmp_path: Path) -> None:
    write(folder, tmp_path, encoder_of(folder, vae))
    with pytest.raises(DataError, match="clips_per_shard=2 then and 3 now"):
        write(folder, tmp_path, encoder_of(folder, vae), clips_per_shard=3)


def test_tasks_of_a_slurm_array_share_the_shards(
    folder: Path, vae: CogVideoXVAE, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encode_shards, "load_vae", lambda path, device, dtype: vae)
    parser = argparse.ArgumentParser()
    encode.add_arguments(parser)
    fixed = ["--clips", str(folder), "--vae", "vae", "--text-encoder", str(folder / "t5"), "--text-length", "64",
             "--clips-per-shard", "2", "--output", str(tmp_path), "--device", "cpu"]  # fmt: skip
    for name, value in (("MIN", 5), ("MAX", 6), ("COUNT", 2)):
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", str(value))
    for task, shards in ((6, [1]), (5, [0, 1, 2])):
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", str(task))
        encode.run(parser.parse_args(fixed))
        assert sorted(path.stem for path in tmp_path.glob("*.idx")) == [f"shard-{number:05d}" for number in shards]
    assert len(IndexedDataset(tmp_path)) == 6


def test_the_verb(folder: Path, vae: CogVideoXVAE, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode_shards, "load_vae", lambda path, device, dtype: vae)
    parser = argparse.ArgumentParser()
    encode.add_arguments(parser)
    fixed = ["--clips", str(folder), "--vae", "vae", "--text-encoder", str(folder / "t5"), "--text-length", "64"]
    encode.run(parser.parse_args([*fixed, "--output", str(tmp_path), "--device", "cpu"]))
    assert len(IndexedDataset(tmp_path)) == 6
    for bad, message in (
        (["--clips-per-shard", "0"], "--clips-per-shard 0 must be positive"),
        (["--rank", "2", "--ranks", "2"], "--rank 2 must lie in 0"),
        (["--frame-ranks", "2", "--vae-mode", "chunked"], "--frame-ranks 2 and --vae-mode chunked exclude"),
        (["--frame-ranks", "2", "--rank", "0"], "leave out --rank"),
        (["--frame-ranks", "2", "--ray", "1"], "--ray and --frame-ranks exclude"),
    ):
        with pytest.raises(ConfigError, match=message):
            encode.run(parser.parse_args([*fixed, "--output", str(tmp_path), *bad]))


def test_neighbouring_processes_encode_as_one(
    folder: Path, vae: CogVideoXVAE, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of four processes the last two are the second group: it takes every second shard, on the group's ranks."""
    asked: list[object] = []
    groups = SimpleNamespace(data=(1, 2), context_group=None)
    monkeypatch.setattr(encode_shards, "load_vae", lambda path, device, dtype: vae)
    monkeypatch.setattr(encode, "initialize", lambda config: asked.append(config.context_parallel_size) or groups)
    monkeypatch.setattr(encode, "shutdown", lambda: asked.append("shutdown"))
    parser = argparse.ArgumentParser()
    encode.add_arguments(parser)
    fixed = ["--clips", str(folder), "--vae", "vae", "--text-encoder", str(folder / "t5"), "--text-length", "64"]
    options = ["--output", str(tmp_path), "--device", "cpu", "--clips-per-shard", "2", "--frame-ranks", "2"]
    encode.run(parser.parse_args([*fixed, *options]))
    assert asked == [2, "shutdown"]
    assert [path.stem for path in tmp_path.glob("*.idx")] == ["shard-00001"]


def test_what_cannot_be_stored_is_left_out_and_never_stored(
    folder: Path, vae: CogVideoXVAE, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A caption of more than a record's metadata may have, and a clip of which the VAE makes NaN."""
    listed = read_clips(folder)
    listed[1] = listed[1].model_copy(update={"caption": "long " * 2**18})
    clips, encoder = ClipList.of(listed), encoder_of(folder, vae)
    plain, calls = ClipEncoder._encoded, []

    def breaking(self: ClipEncoder, video_BCTHW: torch.Tensor) -> torch.Tensor:
        calls.append(video_BCTHW)
        return plain(self, video_BCTHW) * (float("nan") if len(calls) == 3 else 1.0)

    monkeypatch.setattr(ClipEncoder, "_encoded", breaking)
    job = encoder.job(clips, 4, scaling_factor=0.5, measured=4)
    with pytest.raises(DataError, match=r"1\.mp4: sample \d+: 1310\d+ bytes of metadata, the limit is 1048576"):
        write_dataset(tmp_path, clips, encoder, job)
    calls.clear()
    skipped = write_dataset(tmp_path, clips, encoder, job, skip_bad=True)
    assert list(skipped.values()) == [2]
    dataset = IndexedDataset(tmp_path)
    assert dataset.sample_id.tolist() == [sample_id(listed[place]) for place in (0, 2, 4, 5)]
    assert all(bool(dataset.sample(number).latents.isfinite().all()) for number in range(4))
    calls[:] = calls[:2]
    with pytest.raises(DataError, match=r"3\.mp4: the VAE makes NaN or infinity of it in torch\.float32"):
        encoder.moments(listed[3])
    monkeypatch.setattr(
        encoder.text_encoder, "encode", lambda captions: (torch.full((1, 4, 16), torch.inf), torch.tensor([4]))
    )
    with pytest.raises(DataError, match="the text encoder makes NaN or infinity of 'new'"):
        encoder.texts(["new"])
