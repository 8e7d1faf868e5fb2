from pathlib import Path

import torch

from megacogvx.curation.captions import read_captions
from megacogvx.data.video import probe, read_frames
from megacogvx.testing.moving_shapes import BACKGROUNDS, COLOURS, shape_frames, write_shapes


def centre(frame_HW3: torch.Tensor, background: str) -> torch.Tensor:
    """Mean (row, column) of the pixels that are not background."""
    return (frame_HW3 != torch.tensor(BACKGROUNDS[background])).any(-1).nonzero().float().mean(0)


def test_captions_are_true() -> None:
    seen = set()
    for number in range(30):
        frames, caption = shape_frames(number, 9, 32, 48)
        _, colour, shape, _, direction, *_, background, _, _ = caption.replace(".", " .").split()
        assert frames.dtype == torch.uint8 and frames.shape == (9, 32, 48, 3)
        way = centre(frames[-1], background) - centre(frames[0], background)
        axis, sign = {"left": (1, -1), "right": (1, 1), "up": (0, -1), "down": (0, 1)}[direction]
        assert way[axis] * sign > 8 and abs(way[1 - axis]) < 2
        assert set(map(tuple, frames.flatten(0, 2).tolist())) == {COLOURS[colour], BACKGROUNDS[background]}
        seen |= {colour, shape, direction, background}
    assert len(seen) == 4 + 3 + 4 + 3


def test_clips_depend_on_number_and_seed_alone() -> None:
    assert torch.equal(shape_frames(3, 5, 32, 32)[0], shape_frames(3, 5, 32, 32)[0])
    others = [shape_frames(0, 2, 32, 32, seed) for seed in range(4)]
    assert len({frames.numpy().tobytes() for frames, _ in others}) == 4 and len({caption for _, caption in others}) > 1


def test_videos_and_their_caption_file(tmp_path: Path) -> None:
    captions = read_captions(write_shapes(tmp_path, 2, frames=8, height=32, width=48, fps=16))
    assert [(row.video, row.start, row.end) for row in captions] == [(f"shape-00{n}.mp4", 0.0, 0.5) for n in (0, 1)]
    for number, row in enumerate(captions):
        assert probe(tmp_path / row.video).fps == 16
        frames, caption = shape_frames(number, 8, 32, 48)
        assert row.caption == caption
        assert (read_frames(tmp_path / row.video).float() - frames.float()).abs().mean() < 3
