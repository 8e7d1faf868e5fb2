"""read_pack: a layout of the budget's length, and the tensors of its samples in order."""

import pytest
import torch

from megacogvx.data.config import DataConfig
from megacogvx.data.corpus import Corpus
from megacogvx.data.pack import read_pack
from megacogvx.errors import DataError
from megacogvx.testing.tiny_dataset import SIZES, tiny_item, write_tiny_dataset


@pytest.fixture
def corpus(tmp_path):
    write_tiny_dataset(tmp_path, 12)
    return Corpus(DataConfig(paths=(str(tmp_path),), tokens_per_pack=64))


def test_pack_holds_its_samples_and_the_padding(corpus):
    pack = read_pack(corpus, [7, 2, 4], (1, 2, 2), 64, step=3, place=1)
    assert (pack.step, pack.place, pack.sample_ids) == (3, 1, [1007, 1002, 1004])
    assert pack.layout.num_tokens == 64
    assert pack.layout.num_samples == 4
    assert len(pack.latents) == len(pack.text) == 3  # the padding has no tensors
    for number, latents, text in zip([7, 2, 4], pack.latents, pack.text, strict=True):
        expected_latents, expected_text = tiny_item(1000 + number, SIZES[number % 4], corpus.encoder)
        assert torch.equal(latents, expected_latents)
        assert torch.equal(text, expected_text)
    # 5x4x4, 3x6x4 and 1x4x4 latents in patches of 1x2x2, with 6 text tokens each
    assert pack.layout.boundaries == (0, 26, 50, 60, 64)


def test_more_samples_than_tokens(corpus):
    with pytest.raises(DataError, match="more than the pack's 32"):
        read_pack(corpus, [7, 2, 4], (1, 2, 2), 32, step=0, place=0)


def test_record_that_is_not_the_planned_one(corpus):
    corpus.columns.sample_id[2] = 77
    with pytest.raises(
        DataError, match=r"shard-00000\.bin: sample 1002 \(record 2\): sample 77 was planned, 1002 was read"
    ):
        read_pack(corpus, [2], (1, 2, 2), 32, step=0, place=0)
