"""The VAE over 2, 3, 4 and 8 ranks equals one rank at every length that the split is held to; two minutes.

A file of its own, since one start of ranks runs all the cases of a file.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from megacogvx.errors import DataError
from megacogvx.testing.spawn import on_ranks

sys.path.append(str(Path(__file__).parent))

from vae_over_ranks import FRAMES, RATIO, check_all, check_coder, check_rounding, check_step

pytestmark = pytest.mark.slow
LENGTHS = (*FRAMES, 49)  # 49 frames, 13 latent ones, are the only length here with a latent frame for each of 8 ranks


def check_every_length(groups):
    """Every clip of the table that has a latent frame for each rank; whole training steps where training takes it.

    In fp64, which tells an error from rounding; in fp32 the lengths up to 25 are in test_frame_parallel.py.
    """
    from megacogvx.parallel.frame_parallel import shard_pixels

    ranks = groups.context[1]
    check_all(groups, LENGTHS, dtype=torch.float64)
    for decode in (False, True):
        check_coder(groups, 49, decode)
        for frames in (25, 49):
            if (frames - 1) // RATIO + 1 >= ranks:
                check_rounding(groups, frames, decode)
    for frames in (n for n in LENGTHS if (n - 1) // RATIO + 1 >= ranks and n % (2 * RATIO) == 1):
        check_step(groups, frames, clips=1)
    for frames in (n for n in LENGTHS if (n - 1) // RATIO + 1 < ranks):
        with pytest.raises(DataError, match=rf"for {frames} frames: {(frames - 1) // RATIO + 1}$"):
            shard_pixels(frames, RATIO, groups.context_group)


@on_ranks(2, {"context_parallel_size": 2})
def test_every_length_on_two_ranks(groups):
    check_every_length(groups)


@on_ranks(3, {"context_parallel_size": 3})
def test_every_length_on_three_ranks(groups):
    check_every_length(groups)


@on_ranks(4, {"context_parallel_size": 4})
def test_every_length_on_four_ranks(groups):
    check_every_length(groups)


@on_ranks(8, {"context_parallel_size": 8})
def test_every_length_on_eight_ranks(groups):
    check_every_length(groups)
