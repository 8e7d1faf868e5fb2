import random
import socket
import threading
from pathlib import Path

import av
import pytest
import torch

from megacogvx.data.video import clip_times, frames_at, probe, read_frames, write_video, written_beside
from megacogvx.errors import DataError
from megacogvx.testing.moving_shapes import shape_frames

HEIGHT, WIDTH = 48, 64


def numbered_frames(count: int) -> torch.Tensor:
    """Frames whose grey level tells their number: 5 per frame."""
    return (5 * torch.arange(count, dtype=torch.uint8))[:, None, None, None].repeat(1, HEIGHT, WIDTH, 3)


def numbers(frames_THW3: torch.Tensor) -> list[int]:
    return [round(float(frame.float().mean()) / 5) for frame in frames_THW3]


def remuxed(source: Path, target: Path, **options: str) -> Path:
    """Copy the packets of `source` into another container."""
    with av.open(str(source)) as old, av.open(str(target), "w", options=options) as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        for packet in old.demux(old.streams.video[0]):
            if packet.dts is not None:
                packet.stream = stream
                new.mux(packet)
    return target


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """50 numbered frames at 25 per second, with several key frames and with B-frames."""
    path = tmp_path_factory.mktemp("video") / "numbered.mp4"
    write_video(path, numbered_frames(50), fps=25)
    return path


def test_probe(video: Path) -> None:
    info = probe(video)
    assert (info.height, info.width, info.fps, info.pixel_aspect) == (HEIGHT, WIDTH, 25.0, 1.0)
    assert info.duration == pytest.approx(2.0)


def test_frames_are_those_shown_at_the_times(video: Path) -> None:
    frames = read_frames(video, start=0.5, count=9, fps=8)
    assert numbers(frames) == [int((0.5 + i / 8) * 25 + 1e-6) for i in range(9)]
    assert frames.shape == (9, HEIGHT, WIDTH, 3) and frames.dtype == torch.uint8


def test_more_frames_per_second_than_the_file_has_repeat_frames(video: Path) -> None:
    assert numbers(read_frames(video, start=1.0, count=5, fps=50)) == [25, 25, 26, 26, 27]


def test_the_last_frame_lasts_as_long_as_the_others(video: Path) -> None:
    assert numbers(torch.stack(list(frames_at(video, [1.96, 1.97, 1.99])))) == [49, 49, 49]


def test_every_frame_from_a_start_on(video: Path) -> None:
    assert numbers(read_frames(video)) == list(range(50))
    assert numbers(read_frames(video, start=1.2, count=3)) == [30, 31, 32]


def test_the_end_is_named(video: Path) -> None:
    with pytest.raises(DataError, match=r"numbered\.mp4: no frame at 2\.000 s, decoding ends at 2\.000 s"):
        read_frames(video, start=1.0, count=9, fps=8)
    with pytest.raises(DataError, match=r"has 2 frames from 1\.920 s on, not 3"):
        read_frames(video, start=1.92, count=3)


def test_time_is_counted_from_the_first_frame_of_an_offset_stream(video: Path, tmp_path: Path) -> None:
    path = remuxed(video, tmp_path / "offset.ts", output_ts_offset="100")
    assert numbers(read_frames(path, start=1.0, count=3, fps=25)) == [25, 26, 27]


def test_a_container_without_an_index_is_read_from_its_start(video: Path, tmp_path: Path) -> None:
    frames = numbered_frames(50)
    with av.open(str(tmp_path / "raw.h264"), "w", format="h264") as container:
        stream = container.add_stream("libx264", rate=25, options={"bf": "0"})
        stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, "yuv444p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame.numpy(), format="rgb24")))
        container.mux(stream.encode())
    assert numbers(read_frames(tmp_path / "raw.h264", start=1.0, count=3, fps=25)) == [25, 26, 27]


def test_a_phones_rotation_is_applied(video: Path, tmp_path: Path) -> None:
    frames = numbered_frames(3)
    frames[:, : HEIGHT // 2] = 255  # the upper half is white
    write_video(tmp_path / "flat.mp4", frames, 25)
    data = bytearray((tmp_path / "flat.mp4").read_bytes())
    matrix = data.find(b"tkhd") + 4 + 40  # version, times, id, duration, layer, volume
    turned = [0, 1 << 16, 0, -(1 << 16), 0, 0, HEIGHT << 16, 0, 1 << 30]  # by a quarter, clockwise
    data[matrix : matrix + 36] = b"".join(value.to_bytes(4, "big", signed=True) for value in turned)
    (tmp_path / "turned.mp4").write_bytes(data)
    upright = read_frames(tmp_path / "turned.mp4")
    assert upright.shape[1:3] == (WIDTH, HEIGHT)
    assert (probe(tmp_path / "turned.mp4").height, probe(tmp_path / "turned.mp4").width) == (WIDTH, HEIGHT)
    assert upright[0, :, HEIGHT // 2 + 2 :].float().mean() > 250, "what was above is on the right"
    assert upright[0, :, : HEIGHT // 2 - 2].float().mean() < 5


def test_missing_and_foreign_files_are_data_errors(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"absent\.mp4 does not exist"):
        probe(tmp_path / "absent.mp4")
    (tmp_path / "text.mp4").write_text("not a video" * 100)
    with pytest.raises(DataError, match="can't be decoded"):
        probe(tmp_path / "text.mp4")
    (tmp_path / "empty.mp4").touch()
    with pytest.raises(DataError, match="can't be decoded"):
        probe(tmp_path / "empty.mp4")


def test_truncated_files_are_data_errors(video: Path, tmp_path: Path) -> None:
    whole = video.read_bytes()
    front = remuxed(video, tmp_path / "front.mp4", movflags="faststart").read_bytes()
    for name, data in (("index lost", whole[: len(whole) * 2 // 3]), ("frames lost", front[: len(front) - 400])):
        (tmp_path / f"{name}.mp4").write_bytes(data)
        with pytest.raises(DataError, match=f"{name}.mp4"):
            read_frames(tmp_path / f"{name}.mp4", start=1.0, count=25, fps=25)


def test_flipped_bytes_give_frames_or_a_data_error(video: Path, tmp_path: Path) -> None:
    whole, draw = video.read_bytes(), random.Random(0)
    for trial in range(40):
        data = bytearray(whole)
        for _ in range(8):
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        (tmp_path / f"{trial}.mp4").write_bytes(data)
        try:
            frames = read_frames(tmp_path / f"{trial}.mp4", start=0.0, count=5, fps=8)
        except DataError:
            continue
        assert frames.dtype == torch.uint8 and frames.shape[0] == 5


def test_a_title_that_is_not_utf_8_does_no_harm(tmp_path: Path) -> None:
    write_video(tmp_path / "sound.mp4", shape_frames(0, 9, 32, 32)[0], 8)
    content = (tmp_path / "sound.mp4").read_bytes()
    assert b"Lavf" in content, "the muxer writes its name as a tag"
    (tmp_path / "titled.mp4").write_bytes(content.replace(b"Lavf", b"\x8cavf"))
    assert torch.equal(read_frames(tmp_path / "titled.mp4"), read_frames(tmp_path / "sound.mp4"))


def test_a_playlist_opens_no_address(tmp_path: Path) -> None:
    calls: list[bool] = []

    def answer(server: socket.socket) -> None:
        caller, _ = server.accept()
        calls.append(True)
        caller.close()

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=answer, args=(server,))
        thread.start()
        head = "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n"
        address = f"http://127.0.0.1:{server.getsockname()[1]}/a.ts"
        (tmp_path / "list.m3u8").write_text(f"{head}{address}\n#EXT-X-ENDLIST\n")
        with pytest.raises(DataError, match=r"list\.m3u8"):
            probe(tmp_path / "list.m3u8")
        called = bool(calls)
        if not called:
            socket.create_connection(server.getsockname()).close()  # lets the thread end
        thread.join()
    assert not called


def test_written_videos_keep_their_colours_and_bytes(tmp_path: Path) -> None:
    frames, _ = shape_frames(0, 9, HEIGHT, WIDTH)
    for name in ("a.mp4", "b.mp4"):
        write_video(tmp_path / name, frames, fps=8)
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()
    error = (read_frames(tmp_path / "a.mp4").float() - frames.float()).square().mean()
    assert error < 255**2 / 10**4, "40 dB"


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("old")

    def fail() -> None:
        with written_beside(tmp_path / "kept") as beside:
            beside.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    assert (tmp_path / "kept").read_text() == "old"


def test_clip_times() -> None:
    assert clip_times(1.0, 3, 8) == [1.0, 1.125, 1.25]


def test_a_video_that_changes_its_size_is_a_data_error(tmp_path: Path) -> None:
    parts = []
    for number, (height, width) in enumerate(((48, 64), (64, 96))):
        write_video(tmp_path / f"{number}.mp4", numbered_frames(4)[:, :1, :1].repeat(1, height, width, 1), fps=8)
        parts.append(remuxed(tmp_path / f"{number}.mp4", tmp_path / f"{number}.ts").read_bytes())
    (tmp_path / "both.ts").write_bytes(b"".join(parts))
    assert len(read_frames(tmp_path / "both.ts", count=3)) == 3
    with pytest.raises(DataError, match=r"changes its size at .* frames of 48 x 64 and then 64 x 96 pixels"):
        read_frames(tmp_path / "both.ts")
