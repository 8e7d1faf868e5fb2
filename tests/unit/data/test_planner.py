"""PackPlan: pure, complete, within the budget, balanced, resumable; with big corpora and tiny ones."""

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megacogvx.data.config import DataConfig
from megacogvx.data.corpus import CorpusColumns, Group
from megacogvx.data.planner import PackPlan
from megacogvx.errors import ConfigError, DataError
from megacogvx.testing import length_distribution as distribution

PATCH = (1, 1, 1)


def columns_of(lengths, groups=None, checksum=5):
    """Samples of 1 text token and `length - 1` latent cells."""
    lengths = np.asarray(lengths, np.int64)
    one = np.ones_like(lengths)
    groups = groups or (Group(0, len(lengths), 1),)
    return CorpusColumns(np.arange(len(lengths)).astype(np.uint64), lengths - 1, one, one, one, groups, checksum)


def plan_of(lengths, budget, packs, *, seed=0, cost=(1.0, 0.01), **values):
    groups = values.pop("groups", None)
    config = DataConfig(paths=("x",), tokens_per_pack=budget, packs_per_step=packs, **values)
    return PackPlan(columns_of(lengths, groups), config, seed, PATCH, cost)


def mixed(count, seed=0):
    return np.random.default_rng(seed).choice([10, 37, 60, 110, 230], count)


def check_step(plan, step):
    """Every pack has samples, within the budget, none twice."""
    assert len(step) == plan.config.packs_per_step
    for pack in step:
        assert pack
        assert len(set(pack)) == len(pack)
        assert plan.lengths[list(pack)].sum() <= plan.config.tokens_per_pack


def test_each_sample_once_per_epoch():
    """Positions leave the buffer once: the samples used so far are whole epochs, the waiting ones apart."""
    plan = plan_of(mixed(60), 256, 4)
    used = Counter()
    for number in range(40):
        step = plan.step(number)
        check_step(plan, step)
        used.update(index for pack in step for index in pack)
        state = plan.state()
        assert max(state["waiting"][1], default=0) < state["step"]
        expected = Counter(plan._order.at(np.arange(state["drawn"])).tolist())
        expected.subtract(plan._order.at(np.array(state["waiting"][0])).tolist())
        assert used == +expected
    assert min(used.values()) >= 5


def test_a_step_may_cross_the_epoch():
    plan = plan_of([30] * 10, 100, 4)
    steps = [plan.step(number) for number in range(10)]
    for step in steps:
        check_step(plan, step)
        assert all(len(pack) == 3 for pack in step)
    counts = Counter(index for step in steps[:5] for pack in step for index in pack)
    assert set(counts.values()) <= {5, 6, 7}


def test_pure_function_of_its_inputs():
    first, second = plan_of(mixed(200), 256, 4), plan_of(mixed(200), 256, 4)
    forward = [first.step(number) for number in range(12)]
    assert [second.step(number) for number in (11, 0, 5)] == [forward[11], forward[0], forward[5]]
    assert first.step(3) == forward[3]
    assert plan_of(mixed(200), 256, 4, seed=1).step(0) != forward[0]


def test_resuming_goes_on_exactly_and_does_not_replay(monkeypatch):
    plan = plan_of(mixed(200), 256, 4)
    expected = [plan.step(number) for number in range(30)]
    again = plan_of(mixed(200), 256, 4)
    again.step(16)
    state = json.loads(json.dumps(again.state()))
    resumed = plan_of(mixed(200), 256, 4)
    resumed.restore(state)
    advanced = []
    advance = PackPlan._advance
    monkeypatch.setattr(PackPlan, "_advance", lambda self: (advanced.append(self._buffer.step), advance(self))[1])
    assert [resumed.step(number) for number in range(17, 30)] == expected[17:]
    assert advanced == list(range(17, 30))
    assert resumed.step(2) == expected[2]  # an older one still comes out right, from the beginning


def test_a_changed_corpus_is_refused_with_both_checksums_and_the_ways_out():
    before = plan_of(mixed(100), 256, 4)
    before.step(3)
    after = PackPlan(columns_of(mixed(100), checksum=6), before.config, 0, PATCH, (1.0, 0.01))
    with pytest.raises(DataError, match=r"corpus=0{15}5, this run has 0{15}6: samples would repeat.*start_from"):
        after.restore(before.state())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "seed=1"),
        ({"corpus": "00"}, "corpus=00"),
        ({"waiting": [[1, 2], [0]]}, "damaged"),
        ({"waiting": [[10**9], [0]]}, "damaged"),
        ({"waiting": None}, "damaged"),
        ({"drawn": "x"}, "damaged"),
    ],
)
def test_foreign_or_damaged_state(change, message):
    plan = plan_of(mixed(100), 256, 4)
    plan.step(3)
    with pytest.raises(DataError, match=message):
        plan.restore({**plan.state(), **change})


def test_sample_longer_than_the_budget_names_it_and_a_budget_that_works():
    with pytest.raises(DataError, match=r"2 of 4 samples .*tokens_per_pack=100; .*sample 2 .*at least 230"):
        plan_of([50, 101, 230, 60], 100, 2)
    check_step(plan := plan_of([50, 101, 230, 60], 230, 2), plan.step(0))


def test_negative_cost():
    with pytest.raises(ConfigError, match="cost"):
        plan_of([50], 100, 2, cost=(1.0, -1.0))


def test_nothing_waits_longer_than_the_cap():
    """Samples of just over half a budget: one fits a pack, so that the buffer drains as slowly as it ever can."""
    for lengths in (mixed(300), [130] * 300, [130] * 30 + [60] * 10, [30]):
        plan = plan_of(lengths, 256, 6)
        for number in range(60):
            plan.step(number)
            assert plan.oldest_age <= plan.config.max_age


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    lengths=st.lists(st.integers(2, 100), min_size=1, max_size=40),
    packs=st.integers(1, 6),
    budget=st.integers(100, 400),
    seed=st.integers(0, 2**64 - 1),
)
def test_any_tiny_corpus(lengths, packs, budget, seed):
    plan = plan_of(lengths, budget, packs, seed=seed)
    used = Counter()
    for number in range(7):
        check_step(plan, plan.step(number))
        used.update(index for pack in plan.step(number) for index in pack)
        assert plan.oldest_age <= plan.config.max_age
    waiting = Counter(plan._order.at(np.array(plan.state()["waiting"][0], np.int64)).tolist())
    assert used + waiting == Counter(plan._order.at(np.arange(plan.state()["drawn"])).tolist())


def test_weights_decide_the_share():
    groups = (Group(0, 100, 3), Group(100, 100, 1))
    plan = plan_of([20] * 200, 200, 4, groups=groups)
    first = [index < 100 for number in range(40) for pack in plan.step(number) for index in pack]
    assert abs(np.mean(first) - 0.75) < 0.01


@pytest.mark.parametrize(
    ("stage", "packs", "steps", "fill", "imbalance"),
    [("stage1", 16, 8, 0.996, 1.010), ("stage2", 16, 8, 0.998, 1.010), ("stage3", 8, 4, 0.9995, 1.002)],
)
def test_full_and_balanced_on_the_synthetic_distribution(stage, packs, steps, fill, imbalance):
    tokens, per_frame, frames = distribution.sample_lengths(stage, 20_000)
    ids, one = np.arange(len(tokens)).astype(np.uint64), np.ones_like(tokens)
    columns = CorpusColumns(ids, frames, one, per_frame, tokens - per_frame * frames, (Group(0, len(tokens), 1),))
    budget = distribution.STAGES[stage]["budget"]
    config = DataConfig(paths=("x",), tokens_per_pack=budget, packs_per_step=packs)
    cost = (distribution.LINEAR_SECONDS_PER_TOKEN, distribution.ATTENTION_SECONDS_PER_TOKEN_SQUARED)
    plan = PackPlan(columns, config, 0, PATCH, cost)
    fills, ratios = [], []
    for number in range(steps):
        check_step(plan, plan.step(number))
        loads = np.array([distribution.cost(tokens[list(pack)]).sum() for pack in plan.step(number)])
        fills.append(sum(tokens[list(pack)].sum() for pack in plan.step(number)) / (packs * budget))
        ratios.append(loads.max() / loads.mean())
    assert np.mean(fills[1:]) >= fill
    assert np.mean(ratios[1:]) <= imbalance


def scored_plan(scores, thresholds, **values):
    lengths = [20] * len(scores)
    columns = replace(columns_of(lengths), scores={"flow": np.array(scores, np.float32)})
    config = DataConfig(paths=("x",), tokens_per_pack=100, packs_per_step=4, thresholds=thresholds, **values)
    return PackPlan(columns, config, 0, PATCH)


def used(plan, steps):
    return {index for number in steps for pack in plan.step(number) for index in pack}


def test_thresholds_change_with_the_step_and_leave_the_rest_alone():
    scores = np.append(np.arange(99) / 128, np.nan)
    thresholds = ({"column": "flow", "minimum": 0.25}, {"column": "flow", "minimum": 0.5, "from_step": 10})
    plan = scored_plan(scores, thresholds)
    early, late = used(plan, range(10)), used(plan, range(10, 30))
    assert early == {index for index in range(99) if scores[index] >= 0.25}
    assert late == {index for index in range(99) if scores[index] >= 0.5}
    assert plan.state()["threshold_generation"] == 1
    unchanged = scored_plan(scores, thresholds[:1])
    assert [unchanged.step(number) for number in range(10)] == [plan.step(number) for number in range(10)]


def test_every_admitted_sample_comes_once_per_epoch_and_after_resuming():
    plan = scored_plan(np.arange(60) % 3, ({"column": "flow", "maximum": 1.0},))
    steps = [plan.step(number) for number in range(12)]
    counts = Counter(index for step in steps for pack in step for index in pack)
    assert set(counts) == {index for index in range(60) if index % 3 < 2}
    assert max(counts.values()) - min(counts.values()) <= 2
    again = scored_plan(np.arange(60) % 3, ({"column": "flow", "maximum": 1.0},))
    again.step(4)
    resumed = scored_plan(np.arange(60) % 3, ({"column": "flow", "maximum": 1.0},))
    resumed.restore(json.loads(json.dumps(again.state())))
    assert [resumed.step(number) for number in range(5, 12)] == steps[5:]


def test_thresholds_that_admit_nothing_are_named():
    with pytest.raises(DataError, match=r"step 2 .*flow in \[5.0, None\]\) admit none of 8"):
        used(scored_plan(np.zeros(8), ({"column": "flow", "minimum": 5, "from_step": 2},)), range(4))


def test_the_place_of_a_pack_says_nothing_of_how_long_its_samples_have_waited():
    """The paper's sampling of timesteps goes by place; the pack with the oldest sample would otherwise stand first."""
    plan = plan_of(mixed(400), 256, 4)
    turn = {index: position for position, index in enumerate(plan._order.at(np.arange(400)).tolist())}  # first epoch
    steps = [plan.step(number) for number in range(8)]
    first = {min(range(4), key=lambda place: min(turn[index] for index in step[place])) for step in steps}
    assert len(first) > 1
