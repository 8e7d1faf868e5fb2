"""What a new run takes of another one's discriminator."""

from types import SimpleNamespace

from megacogvx.training.adversary import WeightsOnly


def test_weights_alone_come_without_what_the_optimizer_said_of_itself():
    """What is no tensor of a checkpoint is loaded whole, asked for or not: the optimizer's settings among it."""
    taken = []
    WeightsOnly(SimpleNamespace(load_state_dict=taken.append)).load_state_dict(
        {"model": {"a": 1}, "optimizer": {"step": 7}}
    )
    assert taken == [{"model": {"a": 1}}]
