"""Addresses of endpoints, and tiny models in local folders; `test_prompt_upsampler.py` asks a running endpoint."""

import pytest
import torch
from PIL import Image

from megacogvx import draws
from megacogvx.errors import ConfigError
from megacogvx.inference import language_models
from megacogvx.inference.language_models import Endpoint, LocalModel


@pytest.mark.parametrize("url", ["http://me:secret@host/v1", "https://host/v1?key=secret", "https://host/v1#secret"])
def test_an_address_with_a_secret_is_refused_without_telling_it(url):
    with pytest.raises(ConfigError, match=r"must be an address alone.*MEGACOGVX_UPSAMPLER_KEY") as refusal:
        Endpoint(url, "writer")
    assert "secret" not in str(refusal.value)
    assert "secret" not in Endpoint("https://host/secret/v1", "writer").name


@pytest.mark.parametrize("url", ["localhost:8000", "file:///etc/passwd", "http://", "ftp://host/v1"])
def test_an_address_that_is_none_is_refused_at_once(url):
    with pytest.raises(ConfigError, match="must be an address such as http://localhost:8000/v1"):
        Endpoint(url, "writer")


TOKENIZER = {"unk_token": "<unk>", "eos_token": "</s>", "model_input_names": ["input_ids", "attention_mask"]}


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """A tiny random language model in transformers' files, and a tokenizer of whole words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("local")
    words = ["<unk>", "</s>", "Caption", "Idea", ":", *(f"word{number}" for number in range(59))]
    tokenizer = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **TOKENIZER).save_pretrained(folder)
    torch.manual_seed(3)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=64, eos_token_id=1, **sizes)).save_pretrained(folder)
    return folder


def greedy(model, text, count):
    """The likeliest words after a text, one at a time."""
    ids = model._processor(text, return_tensors="pt")["input_ids"]
    start = ids.shape[1]
    while ids.shape[1] < start + count and (ids.shape[1] == start or int(ids[0, -1]) != 1):
        ids = torch.cat([ids, model._model(ids).logits[:, -1:].argmax(-1)], dim=1)
    return model._processor.decode(ids[0, start:], skip_special_tokens=True)


def test_a_local_model_answers_without_repeating_what_it_was_asked(local, monkeypatch):
    monkeypatch.setattr(language_models, "MOST_TOKENS", 4)
    model = LocalModel(local)
    answer = model.write("word1 word2", "word7")
    assert answer == greedy(model, "word1 word2\n\nIdea: word7\n\nCaption:", 4)
    model._processor.chat_template = "{% for m in messages %}word3 {{ m['content'] }}{% endfor %}"
    assert model.write("word1 word2", "word7") == greedy(model, "word3 word1 word2 word7", 4)


def test_a_local_model_without_vision_says_so(local):
    with pytest.raises(ConfigError, match="sees no pictures; name a vision model"):
        LocalModel(local).write("a", "b", [torch.zeros(8, 8, 3, dtype=torch.uint8)])


@pytest.fixture(scope="module")
def seeing(tmp_path_factory):
    """A tiny random LLaVA in transformers' files: pictures of 16 x 16 pixels, as four patches."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        CLIPImageProcessorPil,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        PreTrainedTokenizerFast,
    )

    folder = tmp_path_factory.mktemp("seeing")
    words = ["<unk>", "</s>", "<image>", *(f"word{number}" for number in range(61))]
    tokenizer = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="</s>", additional_special_tokens=["<image>"], **TOKENIZER
    )
    pixels = {"height": 16, "width": 16}
    LlavaProcessor(
        CLIPImageProcessorPil(size=pixels, crop_size=pixels), fast, patch_size=8, image_token="<image>",
        vision_feature_select_strategy="default", num_additional_image_tokens=1, chat_template=TURNS,
    ).save_pretrained(folder)  # fmt: skip
    torch.manual_seed(3)
    sizes = {"intermediate_size": 32, "num_attention_heads": 2}
    vision = CLIPVisionConfig(hidden_size=16, num_hidden_layers=1, image_size=16, patch_size=8, **sizes)
    text = LlamaConfig(vocab_size=64, eos_token_id=1, hidden_size=32, num_hidden_layers=2, **sizes)
    model = LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_index=2, vision_feature_layer=-1)
    )
    for parameter in model.parameters():
        parameter.data *= 4  # so that what is seen turns the likeliest word
    model.save_pretrained(folder)
    return folder


TURNS = (
    "{% for m in messages %}{% for c in m['content'] %}"
    "{{ '<image> ' if c['type'] == 'image' else c['text'] + ' ' }}{% endfor %}{% endfor %}word0"
)


def test_a_local_vision_model_sees_the_pictures_in_their_order(seeing, monkeypatch):
    """The words it finds likeliest after pictures and text, taken one at a time without its own loop."""
    monkeypatch.setattr(language_models, "MOST_TOKENS", 4)
    model = LocalModel(seeing)
    assert model.has_vision
    black = torch.zeros(24, 32, 3, dtype=torch.uint8)
    noise = (draws.normal((24, 32, 3), 0, "noise") * 60 + 128).clamp(0, 255).to(torch.uint8)
    answers = []
    for pictures in ((), (black,), (noise,), (black, noise), (noise, black)):
        answer = model.write("word1 word2", "word7", pictures)
        shown = [Image.fromarray(picture.numpy()) for picture in pictures]
        prompt = "<image> " * len(pictures) + "word1 word2\n\nword7 word0"
        inputs = dict(model._processor(text=prompt, images=shown or None, return_tensors="pt"))
        start = inputs["input_ids"].shape[1]
        assert start == 4 * len(pictures) + 4
        while inputs["input_ids"].shape[1] < start + 4 and int(inputs["input_ids"][0, -1]) != 1:
            word = model._model(**inputs).logits[:, -1:].argmax(-1)
            inputs["input_ids"] = torch.cat([inputs["input_ids"], word], dim=1)
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        assert answer == model._processor.decode(inputs["input_ids"][0, start:], skip_special_tokens=True)
        answers.append(answer)
    assert len(set(answers)) == 5, answers


def test_a_vision_model_without_turns_says_so(seeing):
    model = LocalModel(seeing)
    model._processor.chat_template = None
    with pytest.raises(ConfigError, match="has no chat template, which pictures need"):
        model.write("word1", "word2", [torch.zeros(8, 8, 3, dtype=torch.uint8)])


def test_a_folder_without_a_local_model_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"has no config.json; a local language model is a folder"):
        LocalModel(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ConfigError, match="can't be loaded"):
        LocalModel(tmp_path)
