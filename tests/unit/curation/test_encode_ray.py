"""Dispatch of `encode --ray` to a stand-in for Ray: what it is asked for, and that the dataset is the same."""

import argparse
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from megacogvx.curation import clip, clip_plan, encode, encode_ray, encode_shards
from megacogvx.data.clips import Clip, write_clips
from megacogvx.data.indexed import IndexedDataset
from megacogvx.data.video import write_video
from megacogvx.errors import ConfigError
from megacogvx.models.vae.config import VAEConfig
from megacogvx.models.vae.initialize import initialize_weights
from megacogvx.models.vae.model import CogVideoXVAE
from megacogvx.testing.tiny_text_encoder import build_tiny_text_encoder


class Rows:
    """Of Ray's `Dataset` what is used: `map` with a class, one instance an actor, and `take_all`."""

    def __init__(self, items: list[dict[str, Any]], asked: list[Any]) -> None:
        self.items, self.asked = items, asked

    def map(self, function: type, *, fn_constructor_args: tuple[Any, ...], compute: Any, num_gpus: float) -> "Rows":
        self.asked.append((compute.size, num_gpus))
        actors = [function(*fn_constructor_args) for _ in range(compute.size)]
        return Rows([actors[n % compute.size](row) for n, row in enumerate(reversed(self.items))], self.asked)

    def take_all(self) -> list[dict[str, Any]]:
        return self.items


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    seen: list[Any] = []

    def from_items(items: list[dict[str, Any]], *, override_num_blocks: int) -> Rows:
        seen.append((items, override_num_blocks))
        return Rows(items, seen)

    data = ModuleType("ray.data")
    data.from_items, data.ActorPoolStrategy = from_items, lambda size: SimpleNamespace(size=size)  # type: ignore[attr-defined]
    ray = ModuleType("ray")
    ray.data = data  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setitem(sys.modules, "ray.data", data)
    return seen


@pytest.fixture
def parse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Three clips, one of them broken, and what parses the verb's arguments."""
    config = VAEConfig(block_out_channels=(4, 4, 4, 4), norm_num_groups=2, layers_per_block=1, latent_channels=4)
    vae = CogVideoXVAE(config).requires_grad_(False)
    initialize_weights(vae, seed=0)
    monkeypatch.setattr(encode_shards, "load_vae", lambda path, device, dtype: vae)
    clips = []
    for number in range(3):
        path = tmp_path / f"{number}.mp4"
        write_video(path, torch.full((9, 16, 16, 3), 80 * number, dtype=torch.uint8), 8)
        clips.append(Clip(path=path, caption=f"shade {number}", frames=9, height=16, width=16, fps=8, source="x",
                          start=0.0))  # fmt: skip
    write_clips(tmp_path / "clips.jsonl", clips)
    (tmp_path / "1.mp4").write_bytes(b"no video")
    build_tiny_text_encoder(tmp_path / "t5", ["shade 0", "shade 1", "shade 2"], width=16, vocabulary=64)
    parser = argparse.ArgumentParser()
    encode.add_arguments(parser)
    fixed = ["--clips", str(tmp_path), "--vae", "vae", "--text-encoder", str(tmp_path / "t5"), "--text-length", "64",
             "--clips-per-shard", "1", "--skip-bad", "--scaling-factor", "0.7", "--device", "cpu"]  # fmt: skip
    return lambda *more: parser.parse_args([*fixed, *more])


def test_every_shard_goes_to_an_actor_and_the_dataset_is_the_same(parse: Any, asked: list[Any], tmp_path: Path) -> None:
    encode.run(parse("--output", str(tmp_path / "plain")))
    skipped = encode_ray.encode_with_ray(parse("--output", str(tmp_path / "ray"), "--ray", "2"))
    assert sum(skipped.values()) == 1
    assert asked == [([{"shard": 0}, {"shard": 1}, {"shard": 2}], 3), (2, 0)]
    plain, ray = IndexedDataset(tmp_path / "plain"), IndexedDataset(tmp_path / "ray")
    assert len(ray) == 2 and plain.sample_id.tolist() == ray.sample_id.tolist()
    for number in range(2):
        assert torch.equal(plain.sample(number).latents, ray.sample(number).latents)


def test_the_verb_takes_it(parse: Any, asked: list[Any], tmp_path: Path) -> None:
    encode.run(parse("--output", str(tmp_path / "ray"), "--ray", "9"))
    assert asked[1][0] == 3  # no more actors than shards
    with pytest.raises(ConfigError, match="leave out --rank"):
        encode.run(parse("--output", str(tmp_path / "ray"), "--ray", "2", "--rank", "0", "--ranks", "1"))


def test_without_ray_it_says_what_to_install(parse: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"megacogvx\[ray\]"):
        encode.run(parse("--output", str(tmp_path / "ray"), "--ray", "2"))


def test_actors_look_into_the_videos_of_a_list_together(
    parse: Any, asked: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"video": f"{number}.mp4", "image_at": 0.5, "caption": f"shade {number}"} for number in (0, 2)]
    (tmp_path / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    opened, plain = [], clip.probe
    monkeypatch.setattr(clip, "probe", lambda path: opened.append(path.name) or plain(path))
    monkeypatch.setattr(clip_plan, "PART", 1)
    arguments = parse("--output", str(tmp_path / "ray"), "--ray", "2", "--short-sides", "16")
    arguments.clips, arguments.captions = None, tmp_path / "captions.jsonl"
    encode_ray.encode_with_ray(arguments)
    ranks, shards = [{"rank": 0}, {"rank": 1}], [{"shard": 0}, {"shard": 1}]
    assert asked == [(ranks, 2), (2, 0), (shards, 2), (2, 0)]
    assert opened == ["2.mp4", "0.mp4"], "the last row came first, and took its own share first"
    assert len(IndexedDataset(tmp_path / "ray")) == 2
