import pytest
import torch

from megacogvx.models.transformer import PRESETS, CogVideoXConfig, CogVideoXTransformer, transformer_core
from megacogvx.models.transformer.parameters import parameter_count, with_parameters_of
from megacogvx.parallel.config import ParallelConfig
from megacogvx.parallel.groups import initialize, shutdown
from megacogvx.parallel.tensor_parallel import is_cut

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


def test_what_is_whole_on_every_tensor_rank_is_not_worth_cutting(groups):
    """The figures in the docstring of `PackEmbedding`."""
    config = CogVideoXConfig(preset="cogvideox_5b")
    core = transformer_core(config, ParallelConfig(), groups, torch.bfloat16)
    with torch.device("meta"):
        model = CogVideoXTransformer(config, core, groups)

    def share(chosen):
        found = [p.numel() for name, p in model.named_parameters() if p.dim() == 2 and chosen(name, p)]
        return sum(found) / parameter_count(config)

    assert share(lambda name, p: name.startswith("embedding.")) == pytest.approx(0.0023, rel=0.01)
    assert share(lambda name, p: not is_cut(p)) == pytest.approx(0.0027, rel=0.02)
    assert share(lambda name, p: "blocks" in name and "modulation" in name) == pytest.approx(0.142, rel=0.01)
    assert all(is_cut(p) for name, p in model.named_parameters() if "modulation" in name and p.dim() == 2)


def test_equal_parameters_are_the_nearest_number_of_layers():
    published = CogVideoXConfig(preset="cogvideox_5b")
    equal = with_parameters_of(CogVideoXConfig(preset="cogvideox_5b", block="mmdit"), published)
    distance = {
        layers: abs(parameter_count(equal.model_copy(update={"num_layers": layers})) - parameter_count(published))
        for layers in range(1, 43)
    }
    assert min(distance, key=distance.get) == equal.num_layers == 23
    assert with_parameters_of(published, published) == published
