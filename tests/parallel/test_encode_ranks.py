"""Clips whose frames are encoded by several ranks together give the records of one rank."""

from __future__ import annotations

from megacogvx.testing.spawn import on_ranks

CP2 = {"context_parallel_size": 2}


def _clips(folder):
    """Write a video of 13 frames, one of 9, an image, and a text encoder, once a rank; return the list."""
    from megacogvx.testing.moving_shapes import write_shape_clip
    from megacogvx.testing.tiny_text_encoder import build_tiny_text_encoder

    sizes = enumerate((13, 1, 9))
    clips = [write_shape_clip(folder, number, count, 16, 24, start=float(number)) for number, count in sizes]
    build_tiny_text_encoder(folder / "t5", [clip.caption for clip in clips], width=16, vocabulary=48)
    return clips


def _encoder(folder, helpers):
    from megacogvx.curation.clip_encoder import ClipEncoder
    from megacogvx.models.text_encoder import TextEncoder
    from megacogvx.models.vae.config import VAEConfig
    from megacogvx.models.vae.initialize import initialize_weights
    from megacogvx.models.vae.model import CogVideoXVAE

    config = VAEConfig(block_out_channels=(4, 4, 4, 4), norm_num_groups=2, layers_per_block=1, latent_channels=4)
    vae = CogVideoXVAE(config).requires_grad_(False)
    initialize_weights(vae, seed=0)
    return ClipEncoder(vae, TextEncoder.from_folder(folder / "t5", 32), first_frame=True, helpers=helpers)


@on_ranks(2, CP2)
def test_the_records_are_those_of_one_rank(groups, folder):
    import pytest
    import torch

    from megacogvx.curation.clip_list import ClipList
    from megacogvx.curation.encode_shards import write_dataset
    from megacogvx.data.indexed import IndexedDataset
    from megacogvx.data.transforms import to_model_range
    from megacogvx.errors import DataError
    from megacogvx.parallel.frame_parallel import ALONE, FrameHelpers
    from megacogvx.parallel.groups import barrier
    from megacogvx.testing.tolerance import assert_close

    mine = folder / f"rank{groups.rank}"
    mine.mkdir(parents=True)
    clips = ClipList.of(_clips(mine))
    alone, together = _encoder(mine, ALONE), _encoder(mine, FrameHelpers(groups.context_group))
    seen = []
    for model in (alone.vae, together.vae):
        model.encoder.register_forward_hook(lambda module, given, made: seen.append(given[0].shape[2]))
    for clip in clips:
        video_BCTHW = to_model_range(alone.pixels(clip))[None]
        with torch.no_grad():
            assert_close(together._encoded(video_BCTHW), alone._encoded(video_BCTHW), 1e-5)
    assert seen == [(5, 8)[groups.rank], 13, 1, 1, (5, 4)[groups.rank], 9], "frames that this rank's encoder saw"

    job = together.job(clips, 2, scaling_factor=None, measured=2)
    for _ in range(2):  # the second time every shard is there already
        write_dataset(folder / "together", clips, together, job)
        barrier(groups)
    write_dataset(mine / "alone", clips, alone, job)
    found, expected = IndexedDataset(folder / "together"), IndexedDataset(mine / "alone")
    assert len(found) == len(expected) == 3 and len(found.shards) == 2
    for number in range(3):
        one, other = found.sample(number, first_frame=True), expected.sample(number, first_frame=True)
        assert_close(one.latents.float(), other.latents.float(), 2**-8)  # a rounding to bf16 may fall on either side
        assert torch.equal(one.text, other.text) and torch.equal(one.first_frame, other.first_frame)
        assert (one.sample_id, one.metadata) == (other.sample_id, other.metadata)
    assert found.encoder.latent_scale_factor == pytest.approx(expected.encoder.latent_scale_factor, rel=1e-4)

    if groups.rank == 1:
        clips[2].path.unlink()
    with pytest.raises(DataError, match=r"2\.mp4 does not exist"):  # on both ranks, or the first would wait for ever
        write_dataset(folder / "broken", clips, together, job.model_copy(update={"scale": 1.0}))
