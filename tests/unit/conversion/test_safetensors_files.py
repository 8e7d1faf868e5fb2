"""Shards beside an index that promises something else."""

import json

import pytest
import torch
from safetensors.torch import save_file

from megacogvx.conversion.safetensors_files import SafetensorsFiles
from megacogvx.errors import CheckpointError


def test_a_shard_that_lacks_what_the_index_promises_is_named(tmp_path):
    save_file({"a": torch.zeros(2), "b": torch.ones(2)}, tmp_path / "one.safetensors")
    save_file({"c": torch.zeros(2)}, tmp_path / "two.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    places = {"a": "one.safetensors", "b": "one.safetensors", "c": "two.safetensors"}
    index.write_text(json.dumps({"weight_map": places}))
    assert sorted(SafetensorsFiles(tmp_path).infos) == ["a", "b", "c"]
    index.write_text(json.dumps({"weight_map": {**places, "b": "two.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"two\.safetensors lacks b, which the index beside it promises"):
        SafetensorsFiles(tmp_path)
