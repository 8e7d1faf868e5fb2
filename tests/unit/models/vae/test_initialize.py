import math

import torch

from megacogvx.config import build_config
from megacogvx.models.vae import CogVideoXVAE, VAEConfig, initialize_weights

TINY = build_config(VAEConfig, {"preset": "tiny"})


def _weights(seed, config=TINY):
    model = CogVideoXVAE(config)
    initialize_weights(model, seed)
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_weights_depend_on_seed_and_name_alone():
    torch.manual_seed(1)
    first = _weights(7)
    torch.manual_seed(2)
    again, other = _weights(7), _weights(8)
    deeper = _weights(7, build_config(VAEConfig, {"preset": "tiny", "layers_per_block": 2}))
    for name, value in first.items():
        assert torch.equal(value, again[name]), name
        assert torch.equal(value, deeper[name]), f"{name} must not depend on which other layers there are"
    drawn = [name for name, value in first.items() if value.dim() > 1]
    assert drawn
    assert all(not torch.equal(first[name], other[name]) for name in drawn)


def test_every_parameter_follows_the_table():
    weights = _weights(0)
    assert weights.pop("encoder.conv_out.bias").tolist() == [0.0] * 16 + [-6.0] * 16
    for name, value in weights.items():
        if name.endswith("bias"):
            assert torch.equal(value, torch.full_like(value, float(name.endswith("conv_y.bias")))), name
        elif value.dim() == 1:
            assert torch.equal(value, torch.ones_like(value)), name
        else:
            gain = 1 if "conv_y" in name or "conv_b" in name else 3
            bound = math.sqrt(gain / value[0].numel())
            assert value.abs().max() <= bound, name
            assert abs(value.std() * math.sqrt(3) / bound - 1) < 0.2, name


def test_two_layers_of_one_shape_differ():
    weights = _weights(0)
    assert not torch.equal(weights["encoder.middle.0.conv1.weight"], weights["encoder.middle.1.conv1.weight"])
