import pytest
import torch

from megacogvx.models.transformer import CogVideoXConfig, CogVideoXTransformer, initialize_weights, transformer_core
from megacogvx.parallel.config import ParallelConfig
from megacogvx.parallel.groups import initialize, shutdown


@pytest.fixture(scope="module")
def groups():
    yield initialize(ParallelConfig(device="cpu"))
    shutdown()


def _model(groups, seed, dtype=torch.float32, **settings):
    config = CogVideoXConfig(preset="tiny", num_layers=2, **settings)
    model = CogVideoXTransformer(config, transformer_core(config, ParallelConfig(), groups, dtype), groups)
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.fill_(torch.nan)
    initialize_weights(model, seed)
    return model


def test_every_parameter_follows_its_rule(groups):
    model = _model(groups, seed=0, use_learned_positional_embeddings=True)
    width = model.config.hidden_size
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or ("modulation" in name and name.startswith("blocks")):
            assert not parameter.any(), name
        elif "norm" in name:
            assert (parameter == 1).all(), name
        else:
            fan_out, fan_in = parameter.shape
            limit = (6 / (fan_in + (width if "qkv" in name else fan_out))) ** 0.5
            assert 0.9 * limit < parameter.abs().max() <= limit, name
            assert parameter.std().item() == pytest.approx(limit / 3**0.5, rel=0.1), name
    assert model.head.modulation.linear.weight.any()
    assert not model.embedding.positions.any()


def test_weights_depend_on_seed_and_name_alone(groups):
    first, again, other = (_model(groups, seed).state_dict() for seed in (0, 0, 1))
    drawn = [name for name in first if name.endswith("attention.qkv.weight")]
    assert all(torch.equal(first[name], again[name]) for name in first if first[name] is not None)
    assert not torch.equal(first[drawn[0]], other[drawn[0]])
    assert not torch.equal(first[drawn[0]], first[drawn[1]])


def test_a_narrow_dtype_rounds_the_same_draw(groups):
    wide, narrow = _model(groups, 0), _model(groups, 0, torch.bfloat16)
    for parameter, rounded in zip(wide.parameters(), narrow.parameters(), strict=True):
        assert rounded.dtype == torch.bfloat16
        assert torch.equal(parameter.bfloat16(), rounded)
