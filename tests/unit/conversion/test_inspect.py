import json
import math

import pytest
import torch
from safetensors.torch import save_file

from megacogvx.cli import main
from megacogvx.conversion import inspect
from megacogvx.conversion.convert import convert
from megacogvx.conversion.inspect import Difference, comparable, differences, raw_sources, summaries, summary
from megacogvx.errors import CheckpointError, ConfigError
from megacogvx.testing.drawn_checkpoint import tiny_parts


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("formats")
    parts = {"transformer": tiny_parts("5b")["transformer"]}
    return {to: convert(parts, to, root / to, check=False) for to in ("diffusers", "sat", "megacogvx")}


def test_what_a_tensor_is_like():
    found = summary(torch.tensor([[0.0, 1.0, math.nan], [3.0, math.inf, 0.0]]))
    assert (found.dtype, found.shape) == ("float32", (2, 3))
    assert (found.zeros, found.nans, found.infinities) == (2, 1, 1)
    assert (found.minimum, found.maximum, found.mean) == (0.0, 3.0, 1.0)
    assert found.deviation == pytest.approx(math.sqrt((1 + 0 + 4 + 1) / 4))
    assert found.xxh3 != summary(torch.tensor([[0.0, 1.0, math.nan], [3.0, math.inf, -0.0]])).xxh3
    assert summary(torch.tensor([True, False])).maximum == 1.0
    assert math.isnan(summary(torch.empty(0)).mean)


@pytest.mark.parametrize(
    ("name", "tensor", "count"),
    [
        ("diffusers", "transformer_blocks.1.attn1.to_q.weight", 64),
        ("sat", "model.diffusion_model.transformer.layers.1.attention.query_key_value.weight", 52),
        ("megacogvx", "blocks.1.attention.qkv.weight", 56),
    ],
)
def test_every_format_is_shown_under_its_own_names(folders, name, tensor, count):
    found = summaries(raw_sources(folders[name]))
    assert len(found) == count and tensor in found


def test_two_formats_are_compared_under_our_names(folders):
    found = differences(*comparable(folders["sat"], folders["diffusers"]))
    assert len(found) == 56 and not any(difference.differing for difference in found.values())


@pytest.mark.parametrize("name", ["diffusers", "sat", "megacogvx"])
def test_a_pipeline_is_compared_with_its_transformer_alone(folders, name, monkeypatch, tmp_path):
    said, whole = [], convert(tiny_parts("5b"), "diffusers", tmp_path / "whole", check=False)
    monkeypatch.setattr(inspect.logger, "info", lambda text, *values: said.append(text % values))
    found = differences(*comparable(folders[name] / "transformer", whole))
    assert found and all(isinstance(d, Difference) and not d.differing for d in found.values())
    assert said == ["only one of them holds a vae, which is left out"]
    with pytest.raises(CheckpointError, match=r"transformer holds transformer, .*vae holds vae: they have no model of"):
        comparable(folders[name] / "transformer", whole / "vae")


def test_differences_are_found(tmp_path, capsys):
    one, two, three = (torch.ones(size) for size in (1, 2, 3))
    a = {"same": three, "changed": torch.tensor([3.0, 4.0, math.nan]), "longer": two, "gone": one}
    b = {"same": three, "changed": torch.tensor([3.0, 3.0, math.nan]), "longer": three + 0, "new": one}
    save_file(a, tmp_path / "a.safetensors")
    torch.save(b, tmp_path / "b.pt")
    with pytest.raises(CheckpointError, match="no checkpoint that is known"):
        comparable(tmp_path / "a.safetensors", tmp_path / "b.pt")  # of different formats, and no models
    save_file(b, tmp_path / "b.safetensors")
    report = tmp_path / "report.json"
    arguments = ["inspect", str(tmp_path / "a.safetensors"), "--against", str(tmp_path / "b.safetensors")]
    assert main([*arguments, "--json", str(report)]) == 0
    out = capsys.readouterr().out
    assert "1 of 5 tensors are equal" in out and "largest 1, 1 elements" in out
    found = json.loads(report.read_text())
    assert found["gone"] == "only in the first" and found["new"] == "only in the second"
    assert "(2,) in the first, (3,) in the second" in found["longer"]
    assert found["changed"]["differing"] == 1 and found["same"]["differing"] == 0


def test_the_command_line_shows_a_table(folders, capsys):
    assert main(["inspect", str(folders["diffusers"]), "--only", "*norm_q.weight"]) == 0
    out = capsys.readouterr().out
    assert out.count("norm_q.weight") == 2 and "2 tensors, 32 elements, float32; 0 tensors with NaN or Inf" in out


def test_bad_questions(folders, tmp_path):
    with pytest.raises(ConfigError, match="fits none of 64 names"):
        summaries(raw_sources(folders["diffusers"]), "*nothing*")
    with pytest.raises(CheckpointError, match="does not exist, or is no checkpoint"):
        raw_sources(tmp_path)
    torch.save({"a": 1}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="holds no tensors"):
        summaries(raw_sources(tmp_path / "a.pt"))
