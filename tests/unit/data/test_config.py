"""The config section `data`."""

import pytest

from megacogvx.config import build_config, dump_config
from megacogvx.data.config import DataConfig
from megacogvx.errors import ConfigError


def config(**values):
    return build_config(DataConfig, {"tokens_per_pack": 64, **values})


def test_config_forms():
    assert config(paths="a").paths == ("a",)
    assert config(paths=["a", "b"]).paths == ("a", "b")
    weighted = config(paths=[[0.7, "a"], [3, "b"]])
    assert weighted.paths == ((0.7, "a"), (3.0, "b"))
    assert build_config(DataConfig, dump_config(weighted)) == weighted


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"paths": []}, "at least one"),
        ({"paths": ["a", [1.0, "b"]]}, "every folder a weight"),
        ({"paths": [[-1.0, "b"]]}, "greater than 0"),
        ({"paths": "a", "tokens_per_pack": 0}, "tokens_per_pack"),
        ({"paths": "a", "buffer": 0.5}, "buffer"),
        ({"paths": "a", "packs_per_steps": 3}, r"did you mean packs_per_step\?"),
    ],
)
def test_config_errors(values, message):
    with pytest.raises(ConfigError, match=message):
        config(**values)


def test_a_step_may_be_given_in_samples():
    data = DataConfig(paths=("d",), tokens_per_pack=100, samples_per_step=30)
    assert data.in_packs(mean_tokens=25.0).packs_per_step == 8  # 7.5 packs of four
    assert data.in_packs(mean_tokens=1.0).packs_per_step == 1
    assert data.in_packs(25.0).samples_per_step is None and data.in_packs(25.0).in_packs(99.0).packs_per_step == 8
    packs = DataConfig(paths=("d",), tokens_per_pack=100, packs_per_step=3)
    assert packs.in_packs(mean_tokens=25.0) is packs
    with pytest.raises(ValueError, match="packs_per_step=3 and samples_per_step=5 say the same"):
        DataConfig(paths=("d",), tokens_per_pack=100, packs_per_step=3, samples_per_step=5)


def test_thresholds_of_one_column_follow_each_other():
    values = [{"column": "a", "minimum": 1}, {"column": "a", "minimum": 2, "from_step": 5}, {"column": "b"}]
    made = config(paths="x", thresholds=values)
    assert [(t.column, t.minimum) for t in made.active_thresholds(4)] == [("a", 1), ("b", None)]
    assert [(t.column, t.minimum) for t in made.active_thresholds(5)] == [("a", 2), ("b", None)]
    assert [made.threshold_generation(step) for step in (0, 4, 5)] == [0, 0, 1]
    with pytest.raises(ConfigError, match="begin at the same step"):
        config(paths="x", thresholds=[*values, {"column": "a", "from_step": 5}])
