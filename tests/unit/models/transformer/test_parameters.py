import pytest
import torch

from megacogvx.models.transformer import PRESETS, CogVideoXConfig, CogVideoXTransformer, transformer_core
from megacogvx.models.transformer.parameters import parameter_count, with_parameters_of
from megacogvx.parallel.config import ParallelConfig
from megacogvx.parallel.groups import initialize, shutdown

ABLATIONS = (
    {"block": "shared_adaln"},
    {"block": "mmdit"},
    {"attention": "2d_1d"},
    {"use_rotary_positional_embeddings": False},
    {"block": "mmdit", "attention": "2d_1d"},
)


@pytest.fixture(scope="module")
def groups():
    yield initialize(ParallelConfig(device="cpu"))
    shutdown()


def _counted(config, groups):
    core = transformer_core(config, ParallelConfig(), groups, torch.bfloat16)
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in CogVideoXTransformer(config, core, groups).parameters())


@pytest.mark.parametrize("preset", PRESETS)
def test_the_closed_form_counts_every_preset(preset, groups):
    config = CogVideoXConfig(preset=preset, num_layers=2)
    assert parameter_count(config) == _counted(config, groups)


@pytest.mark.parametrize("change", ABLATIONS, ids=str)
@pytest.mark.parametrize("preset", ["tiny", "cogvideox_5b"])
def test_the_closed_form_counts_every_ablation(preset, change, groups):
    config = CogVideoXConfig(**{"preset": preset, "num_layers": 3, **change})
    assert parameter_count(config) == _counted(config, groups)


def test_the_published_5b_model_has_the_published_number():
    assert parameter_count(CogVideoXConfig(preset="cogvideox_5b")) == 5_570_283_072


def test_equal_parameters_are_the_nearest_number_of_layers():
    published = CogVideoXConfig(preset="cogvideox_5b")
    equal = with_parameters_of(CogVideoXConfig(preset="cogvideox_5b", block="mmdit"), published)
    distance = {
        layers: abs(parameter_count(equal.model_copy(update={"num_layers": layers})) - parameter_count(published))
        for layers in range(1, 43)
    }
    assert min(distance, key=distance.get) == equal.num_layers == 23
    assert with_parameters_of(published, published) == published
