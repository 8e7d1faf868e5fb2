from pathlib import Path

import torch

from megacogvx.models.text_encoder import TextEncoder
from megacogvx.testing.tiny_text_encoder import build_tiny_text_encoder

CAPTIONS = ["A red disc moves left over a grey background.", "A blue square moves up over a white background."]


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        build_tiny_text_encoder(tmp_path / name, CAPTIONS, width=32, vocabulary=64, seed=seed)
    a, b, c = (TextEncoder.from_folder(tmp_path / name, 32).fingerprint for name in "abc")
    assert a == b != c


def test_captions_are_told_apart(tmp_path: Path) -> None:
    encoder = TextEncoder.from_folder(build_tiny_text_encoder(tmp_path, CAPTIONS, width=32, vocabulary=64), 32)
    embeddings = encoder.encode([*CAPTIONS, ""])[0]
    assert 0.5 < float(embeddings.std()) < 2, "unit scale, as T5's final norm gives"
    means = torch.nn.functional.normalize(embeddings.mean(1), dim=-1)
    similar = means @ means.T - torch.eye(3)
    assert similar.max() < 0.98
