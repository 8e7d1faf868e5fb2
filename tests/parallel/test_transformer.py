"""The transformer split every way equals one process: rows, losses, all gradients, the weights after one step.

The table of layouts. `torchrun --nproc-per-node N -m pytest tests/parallel/test_transformer.py` runs the rows that N
processes hold and names the others; with `-m gpu` on NCCL.
"""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch

from megacogvx.errors import ConfigError
from megacogvx.pack_layout import build_layout, place_sample
from megacogvx.testing.spawn import on_ranks

TP2, CP2, PP2 = ({f"{axis}_parallel_size": 2} for axis in ("tensor", "context", "pipeline"))
RING2 = {**CP2, "ring_size": 2}
PP3 = {"pipeline_parallel_size": 3}
TP4, CP4 = {"tensor_parallel_size": 4}, {"context_parallel_size": 4}
PRODUCTS = ({**TP2, **CP2}, {**TP2, **PP2}, {**CP2, **PP2})
POLICIES = ("none", "selective", "keep_attention", "full", "block:1")


def check(groups, bounds=None, **setting):
    from megacogvx.testing.any_layout import assert_equals_one_process
    from megacogvx.testing.one_process import Setting

    assert_equals_one_process(groups, Setting(**setting), bounds)


@on_ranks(2, {}, TP2, CP2, RING2, PP2)
def test_two_ranks_equal_one(groups):
    assert groups.coordinates == {
        "pipeline": f"dp0 pp{groups.rank} cp0 tp0", "tensor": f"dp0 pp0 cp0 tp{groups.rank}",
        "context": f"dp0 pp0 cp{groups.rank} tp0", "data": f"dp{groups.rank} pp0 cp0 tp0",
    }[next(axis for axis in ("pipeline", "tensor", "context", "data") if getattr(groups, axis)[1] == 2)]  # fmt: skip
    check(groups, variant="5b_i2v")


@on_ranks(2, TP2, CP2)
def test_a_rank_with_text_or_padding_alone_takes_part_in_every_gradient(groups):
    from megacogvx.testing import one_process

    only_text, only_padding = ((((1, 2, 4, 7),),), 14), ((((1, 2, 4, 2),),), 8)  # on rank 0, on rank 1
    for sizes, tokens in (only_text, only_padding):
        with patch.multiple(one_process, SIZES=sizes, PACK_TOKENS=tokens):
            check(groups, variant="5b", overlap=True)


@on_ranks(2, TP2, CP2)
def test_sine_positions_and_the_motion_offset_equal_one_process(groups):
    check(groups, variant="2b")
    check(groups, variant="1_5_i2v")


@on_ranks(2, TP2, RING2)
def test_half_precision_equals_one_process_in_fp32(groups):
    """fp16 is the published precision of 2B; its loss is scaled. Bounds: about three times what was measured."""
    from megacogvx.testing.any_layout import Bounds

    fp16 = Bounds(rows=2e-3, gradients=4e-3, weights=3e-4, updates=0.1, loss=1e-3)
    check(groups, variant="2b", dtype=torch.float16, bounds=fp16)
    bf16 = Bounds(rows=2e-2, gradients=5e-2, weights=1e-3, updates=0.3, loss=1e-2)
    check(groups, variant="5b", dtype=torch.bfloat16, bounds=bf16)


@on_ranks(3, PP3)
def test_three_uneven_stages_equal_one(groups):
    check(groups, variant="1_5_i2v", changes={"num_layers": 4})


@on_ranks(4, TP2, CP2, PP2, TP4, CP4, *PRODUCTS, {**CP4, "ring_size": 2}, {**TP2, **RING2})
def test_four_ranks_equal_one(groups):
    check(groups, variant="5b_i2v", overlap=groups.context[1] > 1)


@on_ranks(4, {**CP4, "ring_size": 4})
def test_more_context_ranks_than_heads_equal_one(groups):
    check(groups, variant="5b", changes={"num_attention_heads": 1, "attention_head_dim": 32})


@on_ranks(8, {**TP2, **CP2}, {**TP2, **CP2, **PP2}, {**TP2, **PP2}, {**CP4, "ring_size": 2, **PP2}, {**TP2, **RING2})
def test_eight_ranks_equal_one(groups):
    check(groups, variant="5b_i2v")


@on_ranks(24, {"context_parallel_size": 24, "ring_size": 4})
def test_six_heads_over_rings_of_four_equal_one(groups):
    check(groups, variant="5b", changes={"num_attention_heads": 6})


@on_ranks(2, TP2, RING2, PP2)
def test_recompute_changes_no_bit(groups):
    """Also with pipeline stages, which keep the packs under way and recompute those of their own layers."""
    from megacogvx.testing.any_layout import forward_and_backward, whole_gradients, wrapped_with_optimizer
    from megacogvx.testing.one_process import Setting

    results = {}
    for policy in POLICIES:
        wrapped, optimizer = wrapped_with_optimizer(groups, Setting("1_5_i2v", recompute=policy))
        loss, packs = forward_and_backward(wrapped, optimizer, groups)
        rows = {f"rows {pack}": rows for pack, rows, _ in packs}
        results[policy] = {"loss": torch.tensor(loss), **rows, **whole_gradients(wrapped, optimizer, groups)}
    for policy, result in results.items():
        assert all(torch.equal(result[name], value) for name, value in results["none"].items()), policy


@on_ranks(2, TP2, CP2)
def test_initial_weights_are_cut_from_the_same_tensors(groups):
    from megacogvx.models.transformer import initialize_weights
    from megacogvx.parallel.tensor_parallel import full_shape, is_cut, shard_of
    from megacogvx.testing.one_process import Setting, alone, make

    reference, model = make(alone(groups), Setting()), make(groups, Setting())
    initialize_weights(reference, seed=3)
    initialize_weights(model, seed=3)
    whole = dict(reference.named_parameters())
    for name, parameter in model.named_parameters():
        assert full_shape(parameter, groups) == whole[name].shape
        assert torch.equal(parameter, shard_of(whole[name], parameter, groups)), name
    assert groups.tensor[1] == 1 or any(is_cut(parameter) for parameter in model.parameters())


@on_ranks(2, TP2, CP2)
def test_checkpoint_names_and_cuts_fit_one_process(groups):
    from megacogvx.testing.one_process import Setting, alone, make

    reference, model = make(alone(groups), Setting()), make(groups, Setting())
    whole, sharded = reference.state_dict(), model.sharded_state_dict()
    assert sharded.keys() == {name for name, tensor in whole.items() if tensor is not None}
    for name, part in sharded.items():
        assert part.global_shape == tuple(whole[name].shape), name
        slices = tuple(slice(o, o + n) for o, n in zip(part.global_offset, part.local_shape, strict=True))
        assert torch.equal(part.data, whole[name][slices]), name


@on_ranks(2, TP2)
def test_a_pack_that_cannot_be_cut_is_refused(groups):
    from megacogvx.testing.one_process import Setting, make

    model = make(groups, Setting("2b"))
    layout = build_layout([place_sample(0, 1, 2, 2, 4, model.config.patch)], model.config.patch)
    rows, text = torch.zeros(1, model.config.row_size_in), torch.zeros(4, 24)
    with pytest.raises(ConfigError, match="5 tokens"):
        model(*(x.to(groups.device) for x in (rows, text, torch.zeros(2, dtype=torch.int64))), layout)
