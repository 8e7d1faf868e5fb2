from dataclasses import replace
from pathlib import Path

import pytest

from megacogvx.config import load_config
from megacogvx.errors import ConfigError
from megacogvx.training.config import TrainConfig
from megacogvx.training.estimate.machine import GiB, machine
from megacogvx.training.estimate.memory import stage_layers
from megacogvx.training.estimate.prediction import predict, reach
from megacogvx.training.estimate.suggest import layouts, suggest
from megacogvx.training.estimate.workload import workload

CONFIGS = Path(__file__).resolve().parents[4] / "examples" / "configs"
H100, H200 = machine("h100-80"), machine("h200-141")


def _config(stage, **parallel):
    overrides = [f"parallel.{name}={value}" for name, value in parallel.items()]
    return load_config(TrainConfig, CONFIGS / f"cogvideox_5b_stage{stage}.yaml", overrides)


def _predict(stage, gpus, packs=None, gpu=H100, **parallel):
    config = _config(stage, **{"tensor_parallel_size": 1, "context_parallel_size": 1, **parallel})
    work = workload(config)
    if packs:
        work = replace(work, packs=packs)
    return predict(config, work, gpu, gpus)


@pytest.mark.parametrize(
    ("stage", "replicas", "context", "recompute", "gib"),
    [(1, 64, 1, "selective", 114), (2, 64, 1, "keep_attention", 85), (3, 8, 8, "keep_attention", 94)],
)
def test_memory_agrees_with_an_independent_count_on_141_gb(stage, replicas, context, recompute, gib):
    """An independent model of the same GPU gave these; it holds one live layer and 5 GB that are no tensors."""
    found = _predict(
        stage, replicas * context, packs=replicas, gpu=H200, context_parallel_size=context, recompute=recompute
    )
    assert found.memory.total / GiB == pytest.approx(gib, rel=0.03)


def test_a_step_of_one_gpu_takes_what_its_products_take():
    found = _predict(1, 64, packs=64, recompute="none")
    products = found.seconds["matrix products"] * 0.71 * 989.4e12
    attention = found.seconds["attention"] * 0.42 * 989.4e12
    assert products + attention == pytest.approx(4 * 191.1e12 + 3 * 2 * 4.756e9 * 25_344 * 0.18, rel=0.05)
    ideal = (products + attention) / 989.4e12
    assert 0.3 < found.mfu < ideal / found.step_seconds


def test_gradients_that_overlap_hide_behind_the_last_backward_pass():
    apart, behind = (_predict(1, 64, packs=64, overlap_grad_reduce=overlap) for overlap in (False, True))
    hidden = apart.seconds["data x context ranks"] - behind.seconds["data x context ranks"]
    gradients = sum(entry.sent for entry in apart.traffic if entry.term == "gradients") / H100.between
    assert 0.9 * gradients < hidden < gradients and apart.step_seconds - behind.step_seconds == pytest.approx(hidden)


@pytest.mark.parametrize(("policy", "cause"), [("full", "attention"), ("keep_attention", "matrix products")])
def test_recompute_costs_one_more_forward_pass(policy, cause):
    kept, again = _predict(2, 8, packs=8, recompute="none"), _predict(2, 8, packs=8, recompute=policy)
    assert again.seconds[cause] == pytest.approx(kept.seconds[cause] * 4 / 3)
    if policy == "keep_attention":
        assert again.seconds["attention"] == kept.seconds["attention"]
    assert again.memory.activations < kept.memory.activations / 5


def test_twice_the_packs_take_twice_the_time_but_for_gradients_and_optimizer():
    once, twice = _predict(1, 64, packs=64), _predict(1, 64, packs=128)
    for name in ("matrix products", "attention", "elementwise"):
        assert twice.seconds[name] == pytest.approx(2 * once.seconds[name])
    for name in ("data x context ranks", "optimizer"):
        assert twice.seconds[name] == once.seconds[name]


def test_stages_idle_less_with_more_packs():
    few, many = (_predict(1, 8, packs=packs, pipeline_parallel_size=4) for packs in (8, 64))
    assert few.seconds["idle stages"] == pytest.approx(3 / 4 * _work(few))
    assert many.seconds["idle stages"] == pytest.approx(3 / 32 * _work(many))


def _work(found):
    return sum(found.seconds[name] for name in ("matrix products", "attention", "elementwise"))


def test_groups_within_a_node_use_its_links():
    parallel = _config(1, tensor_parallel_size=2, context_parallel_size=4).parallel
    assert reach(parallel, "tensor", 2) == 2 and reach(parallel, "context", 4) == 8
    inside = _predict(2, 8, packs=8, context_parallel_size=8, recompute="selective")
    outside = _predict(2, 16, packs=8, context_parallel_size=16, recompute="selective")
    ratio = outside.seconds["context ranks"] / inside.seconds["context ranks"]
    assert ratio == pytest.approx(450 / 50 * (15 / 16 / 16) / (7 / 8 / 8), rel=0.01)


def test_suggestions_fit_keep_the_rules_and_come_fastest_first():
    config = _config(3)
    work = workload(config)
    found = suggest(config, work, H100, 64)
    assert found and all(entry.fits(H100) and not entry.broken for entry in found)
    speeds = [entry.step_seconds / entry.packs for entry in found]
    assert speeds == sorted(speeds)
    assert all(abs(entry.packs - work.packs) <= 0.25 * work.packs for entry in found)
    assert not suggest(config, work, H100, 4)


def test_suggested_layouts_divide():
    config = _config(1)
    tried = list(layouts(config, H100, 48))
    assert len({entry.model_dump_json() for entry in tried}) == len(tried) > 50
    for entry in tried:
        assert 48 % entry.replica_size == 0 and config.model.num_attention_heads % entry.stage_size == 0
        assert stage_layers(config.model, entry, entry.pipeline_parallel_size - 1)


def test_measured_rates_replace_assumed_ones():
    fast = machine("h100-80", matrix_tflops=800, attention_tflops=600)
    assert (fast.matrix_share, fast.attention_share) == pytest.approx((800 / 989.4, 600 / 989.4))
    with pytest.raises(ConfigError, match="known ones: a100-80, h100-80"):
        machine("h100")


def _table():
    """Return the rows of the launchers' table of layouts."""
    lines = (CONFIGS.parent / "launch" / "README.md").read_text().splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| cogvideox")]
    assert len(rows) == 4
    return rows


@pytest.mark.parametrize("row", _table(), ids=lambda row: row[0])
def test_the_launchers_layouts_are_those_of_the_configs_and_fit(row):
    name, gpus, packs, tensor, context, recompute, gib, seconds, mfu, days = row
    overrides = ["data.samples_per_step=null", f"data.packs_per_step={packs}"]
    config = load_config(TrainConfig, CONFIGS / f"{name}.yaml", overrides)
    assert config.parallel.model_dump(include={"tensor_parallel_size", "context_parallel_size", "recompute"}) == {
        "tensor_parallel_size": int(tensor), "context_parallel_size": int(context), "recompute": recompute,
    }  # fmt: skip
    found = predict(config, workload(config), H100, int(gpus))
    assert found.fits(H100) and not found.broken
    assert found.memory.total / GiB == pytest.approx(float(gib), rel=0.01)
    assert found.step_seconds == pytest.approx(float(seconds), rel=0.01)
    assert found.mfu * 100 == pytest.approx(float(mfu.removesuffix(" %")), rel=0.01)
    assert found.step_seconds * config.training.steps / 86400 == pytest.approx(float(days), rel=0.01)
