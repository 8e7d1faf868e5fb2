import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn

from megacogvx.checkpoint.directory import CheckpointDirectory
from megacogvx.checkpoint.manifest import files_of, seal
from megacogvx.checkpoint.whole import load_whole, read_state
from megacogvx.errors import CheckpointError


def make_model(width=6):
    torch.manual_seed(width)
    return nn.Sequential(nn.Linear(4, width), nn.BatchNorm1d(width))


@pytest.fixture
def checkpoint(tmp_path):
    """A checkpoint with the weights of `make_model` and the state of an optimizer, which nobody asks for."""
    directory, model = CheckpointDirectory(tmp_path), make_model()
    partial = directory.begin(7)
    state = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    state |= {f"ema.{name}": tensor / 2 for name, tensor in model.state_dict().items()}
    dcp.save({**state, "optimizer.moment": torch.ones(3)}, checkpoint_id=partial, no_dist=True)
    (partial / "state.json").write_text('{"config": {"vae": {}}}')
    return directory.commit(7, {name: seal(partial, name) for name in files_of(partial)})


def test_weights_come_back_without_process_groups(checkpoint):
    assert not torch.distributed.is_initialized()
    model = make_model()
    nn.init.zeros_(model[0].weight)
    load_whole(checkpoint, model)
    for ours, theirs in zip(model.state_dict().values(), make_model().state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)


def test_averaged_weights_are_taken_when_asked_for(checkpoint):
    model = make_model()
    load_whole(checkpoint, model, "ema.")
    assert torch.equal(model[0].weight, make_model()[0].weight / 2)


def test_weights_take_the_models_dtype(checkpoint):
    model = make_model().bfloat16()
    load_whole(checkpoint, model)
    assert torch.equal(model[0].weight, make_model()[0].weight.bfloat16())


def test_another_model_is_refused_with_the_first_difference(checkpoint):
    with pytest.raises(
        CheckpointError, match=r"another model: 0.bias is \(6,\) in the checkpoint and \(5,\) in the model"
    ):
        load_whole(checkpoint, make_model(5))
    with pytest.raises(CheckpointError, match=r"1.bias is \(6,\) in the checkpoint and not there in the model"):
        load_whole(checkpoint, make_model()[:1])


def test_damage_is_found_before_anything_is_read(checkpoint):
    file = next(checkpoint.glob("*.distcp"))
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match="its checksum is wrong"):
        load_whole(checkpoint, make_model())


def test_state_is_read_and_checked(checkpoint, tmp_path):
    assert read_state(checkpoint) == {"config": {"vae": {}}}
    (checkpoint / "state.json").write_text('{"config": {"vae": 1 }}')
    with pytest.raises(CheckpointError, match=r"state\.json is damaged"):
        read_state(checkpoint)
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        read_state(tmp_path)
