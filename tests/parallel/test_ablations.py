"""The ablations split over ranks equal one process: rows, losses, gradients, a step; or say that they can't run so."""

from __future__ import annotations

from unittest.mock import patch

import pytest

from megacogvx.errors import ConfigError
from megacogvx.testing.spawn import on_ranks

TP2, CP2, PP2 = ({f"{axis}_parallel_size": 2} for axis in ("tensor", "context", "pipeline"))
RING2 = {**CP2, "ring_size": 2}


def _check(groups, **changes):
    from megacogvx.testing.any_layout import assert_equals_one_process
    from megacogvx.testing.one_process import Setting

    assert_equals_one_process(groups, Setting(variant="5b", changes=changes))


def _make(groups, **changes):
    from megacogvx.testing.one_process import Setting, make

    make(groups, Setting(variant="5b", changes=changes))


@on_ranks(2, TP2, CP2, PP2)
def test_shared_modulation_and_2d_1d_equal_one_process(groups):
    _check(groups, block="shared_adaln", attention="2d_1d", num_layers=4)  # layer 3, of the odd kind, begins a stage


@on_ranks(2, CP2, RING2)
def test_mmdit_over_context_ranks_equals_one_process(groups):
    from megacogvx.testing import one_process

    _check(groups, block="mmdit")
    with patch.multiple(one_process, SIZES=(((1, 2, 4, 7),),), PACK_TOKENS=14):  # rank 0 holds text alone
        _check(groups, block="mmdit")


@on_ranks(2, TP2)
def test_mmdit_over_tensor_ranks_is_refused(groups):
    with pytest.raises(ConfigError, match=r"model\.block=mmdit with parallel\.tensor_parallel_size=2"):
        _make(groups, block="mmdit")


@on_ranks(2, RING2)
def test_2d_1d_in_a_ring_is_refused(groups):
    with pytest.raises(ConfigError, match=r"model\.attention=2d_1d with parallel\.ring_size=2.*works is 1"):
        _make(groups, attention="2d_1d")
