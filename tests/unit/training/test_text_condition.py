"""Token ids encoded while training give what stored embeddings do; a dropped text is zeros or the empty prompt."""

import pytest
import torch

from megacogvx.errors import ConfigError
from megacogvx.testing.tiny_conditions import CAPTIONS, TEXT_LENGTH, TEXT_WIDTH, write_text_encoder
from megacogvx.testing.tiny_dataset import tiny_encoder
from megacogvx.training.text_condition import TextConfig, TextRows, text_rows

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("text")
    write_text_encoder(path)
    return path / "text"


@pytest.fixture(scope="module")
def t5(folder, tmp_path_factory):
    return write_text_encoder(tmp_path_factory.mktemp("again"))


def info(kind, t5, **changes):
    fixed = {"text_length": TEXT_LENGTH, "text_width": TEXT_WIDTH}
    made = tiny_encoder(kind, **fixed)
    return made.model_copy(update={"text_encoder_fingerprint": t5.fingerprint, **changes})


def test_ids_encoded_online_are_the_stored_embeddings_bit_for_bit(folder, t5):
    texts = text_rows(TextConfig(encoder=folder), info("token_ids", t5), "zeros", CPU, torch.float32, True)
    stored = t5.encode(list(CAPTIONS))[0].to(torch.bfloat16)
    ids = t5.token_ids(list(CAPTIONS))[0].to(torch.int32)
    for caption_ids, expected in zip(ids, stored, strict=True):
        assert torch.equal(texts.rows(caption_ids), expected)


def test_a_dropped_text_is_zeros_or_the_encoded_empty_prompt(folder, t5):
    zeros = text_rows(TextConfig(), info("padded", t5), "zeros", CPU, torch.float32, True)
    assert zeros.encoder is None and not zeros.dropped(4).any() and zeros.dropped(4).shape == (4, TEXT_WIDTH)
    empty = text_rows(TextConfig(encoder=folder), info("padded", t5), "empty", CPU, torch.float32, True)
    assert torch.equal(empty.dropped(TEXT_LENGTH), t5.encode([""])[0][0].to(torch.bfloat16))
    assert empty.encoder is None, "stored embeddings need it for the empty prompt alone"


def test_a_stage_that_reads_no_text_loads_nothing(folder, t5):
    later = text_rows(TextConfig(encoder=folder), info("token_ids", t5), "empty", CPU, torch.float32, False)
    assert later.encoder is None
    assert later.rows(torch.tensor([5, 1, 0], dtype=torch.int32)).shape == (3, TEXT_WIDTH)


def test_stored_embeddings_pass_as_they_are(t5):
    text = torch.randn(3, TEXT_WIDTH).bfloat16()
    assert TextRows(TEXT_WIDTH).rows(text) is text


def test_another_encoder_than_the_datasets_is_refused(folder, t5):
    other = info("token_ids", t5, text_encoder_fingerprint="other")
    with pytest.raises(ConfigError, match="is not the encoder of the dataset"):
        text_rows(TextConfig(encoder=folder), other, "zeros", CPU, torch.float32, True)
