import json
from pathlib import Path

import pytest
import torch
from transformers import T5EncoderModel, T5Tokenizer

from megacogvx.errors import DataError
from megacogvx.models.text_encoder import TextEncoder, find_files
from megacogvx.testing.tiny_text_encoder import build_tiny_text_encoder
from megacogvx.testing.tolerance import assert_close

CAPTIONS = [
    "A red disc moves left over a grey background.",
    "",
    "Two  spaces, a\ttab, an é, a 漢, and 'quotes'.",
    "A blue square moves up over a white background. " * 8,
]
LENGTH = 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_text_encoder(tmp_path_factory.mktemp("t5"), CAPTIONS, width=32, vocabulary=128)


def copied(folder: Path, target: Path) -> Path:
    """Copy the published layout, so that files can be damaged."""
    for path in find_files(folder).values():
        place = target / path.relative_to(folder)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(path.read_bytes())
    return target


def test_equal_to_hugging_face_without_an_attention_mask(folder: Path) -> None:
    tokenizer = T5Tokenizer.from_pretrained(folder / "tokenizer")
    expected = tokenizer(CAPTIONS, padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt")
    encoder = TextEncoder.from_folder(folder, LENGTH)
    ids_BL, lengths_B = encoder.token_ids(CAPTIONS)
    assert torch.equal(ids_BL, expected.input_ids)
    assert torch.equal(lengths_B, expected.attention_mask.sum(1))
    model = T5EncoderModel.from_pretrained(folder / "text_encoder").eval()
    with torch.no_grad():
        published = model(expected.input_ids)[0]
    embeddings_BLE, lengths = encoder.encode(CAPTIONS)
    assert embeddings_BLE.shape == (4, LENGTH, 32) and encoder.width == 32
    assert_close(embeddings_BLE, published, 1e-6)
    assert torch.equal(lengths, lengths_B) and lengths.tolist()[1:2] == [1] and lengths.tolist()[3] == LENGTH


def test_a_batch_gives_what_each_caption_gives(folder: Path) -> None:
    encoder = TextEncoder.from_folder(folder, LENGTH)
    batch = encoder.encode(CAPTIONS)[0]
    for caption, expected in zip(CAPTIONS, batch, strict=True):
        assert_close(encoder.encode([caption])[0][0], expected, 1e-5)


def test_no_gradient_and_the_wanted_dtype(folder: Path) -> None:
    encoder = TextEncoder.from_folder(folder, LENGTH, dtype=torch.bfloat16)
    embeddings, _ = encoder.encode(CAPTIONS[:1])
    assert embeddings.dtype == torch.bfloat16 and not embeddings.requires_grad
    assert_close(embeddings.float(), TextEncoder.from_folder(folder, LENGTH).encode(CAPTIONS[:1])[0], 3e-2)


def test_no_prompt_is_the_empty_one_or_zeros(folder: Path) -> None:
    encoder = TextEncoder.from_folder(folder, LENGTH)
    assert torch.equal(encoder.unconditional(), encoder.encode([""])[0])
    zeros = encoder.unconditional("zeros")
    assert zeros.shape == (1, LENGTH, 32) and not zeros.any()
    with pytest.raises(ValueError, match="kind='nothing'"):
        encoder.unconditional("nothing")


def test_one_folder_and_shards_are_read_too(folder: Path, tmp_path: Path) -> None:
    expected = TextEncoder.from_folder(folder, LENGTH)
    flat, sharded = tmp_path / "flat", copied(folder, tmp_path / "sharded")
    flat.mkdir()
    for path in find_files(folder).values():
        (flat / path.name).write_bytes(path.read_bytes())
    (sharded / "text_encoder" / "model.safetensors").unlink()
    T5EncoderModel.from_pretrained(folder / "text_encoder").save_pretrained(
        sharded / "text_encoder", max_shard_size="30KB"
    )
    assert len(list((sharded / "text_encoder").glob("*.safetensors"))) > 1
    for other in (flat, sharded):
        encoder = TextEncoder.from_folder(other, LENGTH)
        assert torch.equal(encoder.encode(CAPTIONS)[0], expected.encode(CAPTIONS)[0])
    assert TextEncoder.from_folder(flat, LENGTH).fingerprint == expected.fingerprint, "the layout doesn't matter"


def test_the_fingerprint_tells_weights_and_length_apart(folder: Path, tmp_path: Path) -> None:
    first = TextEncoder.from_folder(folder, LENGTH).fingerprint
    assert first == TextEncoder.from_folder(folder, LENGTH).fingerprint
    assert first != TextEncoder.from_folder(folder, LENGTH + 1).fingerprint
    other = copied(folder, tmp_path / "other")
    data = bytearray((other / "text_encoder" / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (other / "text_encoder" / "model.safetensors").write_bytes(data)
    assert first != TextEncoder.from_folder(other, LENGTH).fingerprint


def test_missing_files_are_all_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="absent does not exist"):
        TextEncoder.from_folder(tmp_path / "absent")
    (tmp_path / "text_encoder").mkdir()
    with pytest.raises(DataError) as caught:
        TextEncoder.from_folder(tmp_path)
    for name in ("tokenizer/spiece.model", "text_encoder/config.json", "text_encoder/model.safetensors"):
        assert name in str(caught.value)
    broken = copied(folder, tmp_path / "broken")
    index = broken / "text_encoder" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model-1-of-2.safetensors", "b": "model-2-of-2.safetensors"}}))
    with pytest.raises(DataError, match=r"misses text_encoder/model-1-of-2.*, text_encoder/model-2-of-2"):
        TextEncoder.from_folder(broken)
    for text in ("{}", "[]", '{"weight_map": {"a": "../b.safetensors"}}', "{"):
        index.write_text(text)
        with pytest.raises(DataError, match="index"):
            TextEncoder.from_folder(broken)


def test_damaged_files_are_data_errors(folder: Path, tmp_path: Path) -> None:
    for name in ("tokenizer/spiece.model", "text_encoder/config.json", "text_encoder/model.safetensors"):
        broken = copied(folder, tmp_path / name.replace("/", "-"))
        (broken / name).write_bytes((broken / name).read_bytes()[:100])
        with pytest.raises(DataError):
            TextEncoder.from_folder(broken)


def test_weights_that_are_absent_are_not_drawn_at_random(folder: Path, tmp_path: Path) -> None:
    broken = copied(folder, tmp_path / "broken")
    config = json.loads((broken / "text_encoder" / "config.json").read_text())
    (broken / "text_encoder" / "config.json").write_text(json.dumps({**config, "num_layers": 3}))
    with pytest.raises(DataError, match=r"lacks \d+ weights, among them encoder.block.2"):
        TextEncoder.from_folder(broken)


def test_a_tokenizer_of_another_model_is_refused(folder: Path, tmp_path: Path) -> None:
    other = build_tiny_text_encoder(tmp_path / "other", ["abc"], width=32, vocabulary=16)
    (other / "tokenizer" / "spiece.model").write_bytes((folder / "tokenizer" / "spiece.model").read_bytes())
    with pytest.raises(DataError, match="pieces, the model only 16 embeddings"):
        TextEncoder.from_folder(other)
