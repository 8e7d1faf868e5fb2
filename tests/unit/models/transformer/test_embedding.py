import math
from types import SimpleNamespace

import pytest
import torch

from megacogvx import draws
from megacogvx.models.transformer.config import CogVideoXConfig
from megacogvx.models.transformer.embedding import PackEmbedding, sincos_positions, sinusoid
from megacogvx.pack_layout import build_layout, place_sample

CORE = SimpleNamespace(params_dtype=torch.float32, sequence_parallel=False)
LEARNED = CogVideoXConfig(
    num_layers=1, num_attention_heads=1, attention_head_dim=16, in_channels=2, text_embed_dim=3, max_text_seq_length=5,
    sample_height=4, sample_width=6, sample_frames=9, use_rotary_positional_embeddings=True,
    use_learned_positional_embeddings=True,
)  # fmt: skip


def test_sinusoid_has_cosines_first():
    code = sinusoid(torch.tensor([0, 999]), 8)
    assert code.dtype == torch.float32
    for row, t in zip(code.tolist(), (0, 999), strict=True):
        angles = [t * 10000 ** (-j / 4) for j in range(4)]
        assert row == pytest.approx([*map(math.cos, angles), *map(math.sin, angles)], abs=1e-4)


def test_sincos_gives_a_quarter_to_time_then_width_then_height():
    grid, width = (2, 3, 4), 32
    codes = sincos_positions(torch.arange(24), grid, width, 2.0, 1.875)

    def axis(position, channels):
        angles = [position / 10000 ** (i / (channels // 2)) for i in range(channels // 2)]
        return [*map(math.sin, angles), *map(math.cos, angles)]

    for place in range(24):
        t, h, w = place // 12, place // 4 % 3, place % 4
        expected = axis(t / 2.0, 8) + axis(w / 1.875, 12) + axis(h / 1.875, 12)
        assert codes[place].tolist() == pytest.approx(expected, abs=1e-6)
    assert codes.dtype == torch.float64
    assert torch.equal(sincos_positions(torch.arange(5, 17), grid, width, 2.0, 1.875), codes[5:17])


def _embed(config, samples):
    """Return (module, hidden, layout, video, text) of random weights and rows."""
    module = PackEmbedding(config, CORE)
    with torch.no_grad():
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            tensor.copy_(draws.normal(tuple(tensor.shape), 0, name))
    layout = build_layout(samples, config.patch, multiple=8)
    local = layout.local()
    video = draws.normal((len(local.video_index), config.row_size_in), 0, "video")
    text = draws.normal((len(local.text_index), config.text_embed_dim), 0, "text")
    return module, module(video, text, layout, local).detach(), layout, video, text


def test_text_comes_before_video_in_every_sample():
    config = LEARNED.model_copy(update={"use_learned_positional_embeddings": False})
    samples = [place_sample(1, 1, 4, 6, 3, config.patch), place_sample(2, 2, 2, 2, 1, config.patch)]
    module, hidden, layout, video, text = _embed(config, samples)
    assert hidden.shape == (layout.num_tokens, 1, config.hidden_size)
    video, text = module.video_proj(video), module.text_proj(text)
    # 3 text and 6 video, 1 text and 2 video, padding
    expected = torch.cat([text[:3], video[:6], text[3:4], video[6:8], text[4:]])
    assert torch.allclose(hidden[:, 0], expected, atol=1e-6)


def test_the_learned_table_has_text_rows_then_frames_from_the_front():
    samples = [place_sample(1, 1, 4, 6, 2, LEARNED.patch), place_sample(2, 3, 4, 6, 5, LEARNED.patch)]
    module, hidden, layout, video, text = _embed(LEARNED, samples)
    table, local = module.positions, layout.local()
    assert table.shape == (5 + 3 * 2 * 3, LEARNED.hidden_size)
    video_table = torch.cat([table[5 : 5 + 6], table[5 : 5 + 18]])
    padding = torch.zeros(layout.samples[-1].length, LEARNED.hidden_size)
    text_table = torch.cat([table[:2], table[:5], padding])
    assert torch.allclose(hidden[local.video_index, 0], module.video_proj(video) + video_table, atol=1e-6)
    assert torch.allclose(hidden[local.text_index, 0], module.text_proj(text) + text_table, atol=1e-6)
