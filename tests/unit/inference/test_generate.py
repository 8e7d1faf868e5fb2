"""What the verb does itself, with stand-ins for the models; whole runs are in tests/parallel."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megacogvx.inference import generate
from megacogvx.inference.denoise import SamplingSettings
from megacogvx.inference.requests import Job
from megacogvx.inference.work import Work
from megacogvx.testing.drawn_checkpoint import TEXT_LENGTH, TEXT_WIDTH, tiny_settings

REQUESTS = [("a dog", None), ("a cat", "blurry"), ("a dog", "blurry"), ("blurry", None)]


@pytest.mark.parametrize(
    ("unconditional", "asked"), [("zeros", ["a dog", "a cat", "blurry"]), ("empty", ["a dog", "", "a cat", "blurry"])]
)
def test_every_distinct_text_is_encoded_once(monkeypatch, unconditional, asked):
    """Prompts, negative prompts and the empty one alike; every video gets the embeddings of its own texts."""
    seen = []

    class Encoder:
        def encode(self, captions):
            seen.extend(captions)
            return torch.full((1, TEXT_LENGTH, TEXT_WIDTH), float(len(captions[0]))), torch.tensor([2])

    monkeypatch.setattr(generate.TextEncoder, "from_folder", lambda *_: Encoder())
    settings = tiny_settings("5b", unconditional_text=unconditional)
    plan = SimpleNamespace(transformer=SimpleNamespace(settings=settings), text_encoder=Path("t5"))
    work = [
        Work(Job(f"sample-{place}", place, prompt, SamplingSettings(), negative_prompt=negative), {"text": prompt})
        for place, (prompt, negative) in enumerate(REQUESTS)
    ]
    texts = generate.encode_texts(plan, work, torch.device("cpu"), torch.float32)
    assert seen == asked
    for item, (prompt, negative) in zip(work, REQUESTS, strict=True):
        text_LE, null_LE = texts[item.job.name]
        assert text_LE.shape == null_LE.shape == (TEXT_LENGTH, TEXT_WIDTH)
        assert text_LE.unique().tolist() == [len(prompt)]
        assert null_LE.unique().tolist() == [len(negative or "")]
