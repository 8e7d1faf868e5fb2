import av
import numpy as np
import pytest
import torch
from PIL import Image

from megacogvx.errors import ConfigError
from megacogvx.inference import video_file
from megacogvx.inference.video_file import contact_sheet, write_mp4, write_png_frames


def clip(frames=9, height=48, width=80):
    """A bright colour that changes from frame to frame, with a moving square."""
    video = torch.zeros(frames, height, width, 3, dtype=torch.uint8)
    for t in range(frames):
        video[t] = torch.tensor([200, 20 * t, 60], dtype=torch.uint8)
        video[t, 10:26, 4 * t : 4 * t + 16] = torch.tensor([20, 40, 230], dtype=torch.uint8)
    return video


def read(path):
    with av.open(str(path)) as container:
        return torch.stack([torch.from_numpy(f.to_ndarray(format="rgb24")) for f in container.decode(video=0)])


def test_mp4_holds_the_frames(tmp_path):
    frames = clip()
    write_mp4(frames, tmp_path / "new" / "clip.mp4", fps=8)
    back = read(tmp_path / "new" / "clip.mp4")
    assert back.shape == frames.shape
    assert (back.float() - frames.float()).abs().mean() < 4.0
    assert list((tmp_path / "new").iterdir()) == [tmp_path / "new" / "clip.mp4"]


def test_mp4_keeps_colours(tmp_path):
    """Saturated colours move by tens of levels when the matrix that is written isn't the one that is said."""
    frames = torch.zeros(3, 32, 96, 3, dtype=torch.uint8)
    for i, colour in enumerate([(230, 20, 20), (20, 220, 20), (20, 20, 230)]):
        frames[:, :, 32 * i : 32 * (i + 1)] = torch.tensor(colour, dtype=torch.uint8)
    write_mp4(frames, tmp_path / "clip.mp4", fps=8)
    back = read(tmp_path / "clip.mp4")
    centres = back[1, 16, [16, 48, 80]].float()
    assert (centres - frames[1, 16, [16, 48, 80]].float()).abs().max() <= 6


def test_mp4_is_h264_at_its_rate_with_the_index_first(tmp_path):
    write_mp4(clip(), tmp_path / "clip.mp4", fps=7.5)
    with av.open(str(tmp_path / "clip.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert float(stream.average_rate) == 7.5
        assert stream.frames == 9
    data = (tmp_path / "clip.mp4").read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")


@pytest.mark.parametrize("size", [(47, 80), (48, 81)])
def test_odd_sizes_are_refused_with_the_nearest(tmp_path, size):
    with pytest.raises(ConfigError, match=r"both must be even; the nearest size that works: (46 x 80|48 x 80)"):
        write_mp4(clip(2, *size), tmp_path / "clip.mp4", fps=8)
    assert not list(tmp_path.iterdir())


def test_fps_must_be_positive(tmp_path):
    with pytest.raises(ConfigError, match="fps=0 must be positive"):
        write_mp4(clip(2), tmp_path / "clip.mp4", fps=0)


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "clip.mp4"
    write_mp4(clip(2), path, fps=8)
    before = path.read_bytes()
    monkeypatch.setattr(video_file.av.VideoFrame, "from_ndarray", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_mp4(clip(5), path, fps=8)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_png_frames(tmp_path):
    frames = clip(3)
    write_png_frames(frames, tmp_path)
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == ["frame-0000.png", "frame-0001.png", "frame-0002.png"]
    assert np.array_equal(np.asarray(Image.open(tmp_path / "frame-0002.png")), frames[2].numpy())


def test_contact_sheet_spreads_from_first_to_last():
    frames = torch.arange(9, dtype=torch.uint8)[:, None, None, None].expand(9, 4, 6, 3).contiguous()
    sheet = contact_sheet(frames, columns=3, gap=2)
    assert sheet.shape == (4, 22, 3)
    assert [int(sheet[0, x, 0]) for x in (0, 8, 16)] == [0, 4, 8]
    assert (sheet[:, 6:8] == 255).all()
    assert contact_sheet(frames, columns=2, rows=2, gap=0).shape == (8, 12, 3)
    assert contact_sheet(frames[:1], columns=4).shape == (4, 6, 3)
