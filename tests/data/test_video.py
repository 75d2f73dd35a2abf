"""Frames by the number that decode, on real XVID .avi and H.264 .mp4 made here."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from phi3v.base.errors import InputError
from phi3v.data import video as room
from phi3v.data.video import frame_indices, sample_frames

av = pytest.importorskip("av", reason="PyAV is not installed: pip install 'phi3v[video]'")


def all_frames(path: Path) -> list[np.ndarray]:
    """Decoded as the original does it."""
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def equal_to(frames: list[np.ndarray], indices: list[int], path: Path, num_frames: int) -> bool:
    pictures = sample_frames(path, num_frames)
    assert all(picture.mode == "RGB" for picture in pictures)
    return len(pictures) == len(indices) and all(
        np.array_equal(np.asarray(picture), frames[index]) for picture, index in zip(pictures, indices, strict=True)
    )


@pytest.mark.parametrize("num_frames", [1, 2, 4, 8, 16, 32])
def test_indices_are_the_originals_where_its_division_is_exact(num_frames: int) -> None:
    for total in range(num_frames, 2000):
        assert frame_indices(total, num_frames) == np.arange(0, total, total / num_frames).astype(int).tolist()


def test_indices_by_hand() -> None:
    assert frame_indices(17, 7) == [0, 2, 4, 7, 9, 12, 14]
    assert frame_indices(294, 18)[15:] == [245, 261, 277]
    assert frame_indices(55, 55) == list(range(55))  # 55 * (1 / 55) and the like are not all whole numbers


@pytest.mark.parametrize("num_frames", [3, 7, 8, 11, 25])
def test_as_many_different_indices_as_asked_for(num_frames: int) -> None:
    for total in range(num_frames, 2000):
        indices = frame_indices(total, num_frames)
        assert len(set(indices)) == num_frames
        assert indices == sorted(indices)
        assert indices[0] == 0
        assert total - indices[-1] >= total // num_frames


@pytest.mark.parametrize(("name", "codec"), [("a.avi", "mpeg4"), ("a.mp4", "libx264"), ("a.mkv", "mpeg4")])
@pytest.mark.parametrize("num_frames", [1, 7, 8, 50])
def test_frames_are_the_originals(
    make_video: Callable[..., Path], tmp_path: Path, name: str, codec: str, num_frames: int
) -> None:
    path = make_video(tmp_path / name, 50, codec=codec)
    frames = all_frames(path)
    assert len(frames) == 50
    assert equal_to(frames, frame_indices(50, num_frames), path, num_frames)


def announce(path: Path, num_frames: int) -> None:
    """Writes another number of frames into both headers of an .avi."""
    data = bytearray(path.read_bytes())
    for place in (data.index(b"avih") + 24, data.index(b"strh") + 40):
        data[place : place + 4] = num_frames.to_bytes(4, "little")
    path.write_bytes(data)


@pytest.mark.parametrize("announced", [0, 3, 49, 51, 444, 2**31 - 1])
def test_header_that_lies(make_video: Callable[..., Path], tmp_path: Path, announced: int) -> None:
    path = make_video(tmp_path / "a.avi", 50)
    announce(path, announced)
    with av.open(str(path)) as container:
        assert container.streams.video[0].frames == announced
    assert equal_to(all_frames(path), frame_indices(50, 8), path, 8)


def test_header_that_is_right_costs_no_second_decoding(
    make_video: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_video(tmp_path / "a.avi", 50)
    decode, calls = room._decode, []
    monkeypatch.setattr(room, "_decode", lambda *given: calls.append(given) or decode(*given))
    sample_frames(path, 8)
    assert len(calls) == 1
    announce(path, 60)
    sample_frames(path, 8)
    assert len(calls) == 3


def test_b_frames_of_a_stream_that_ends_early(make_video: Callable[..., Path], tmp_path: Path) -> None:
    """With B-frames and the last packets gone, fewer frames decode than the index lists."""
    path = make_video(tmp_path / "a.avi", 50, options={"bf": "2"})
    data = bytearray(path.read_bytes())
    for _ in range(3):  # the index still points to them
        place = data.rindex(b"00dc", 0, data.index(b"idx1"))
        data[place : place + 4] = b"JUNK"
    path.write_bytes(data)
    frames = all_frames(path)
    assert 45 < len(frames) < 50
    assert equal_to(frames, frame_indices(len(frames), 8), path, 8)


def test_no_more_frames_in_memory_than_asked_for(
    make_video: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_video(tmp_path / "a.avi", 300)
    for announced in (300, 10, 10_000):
        announce(path, announced)
        frames, count = room._decode(path, 8)
        assert count == 300
        assert len(frames) <= 8


def test_too_few_frames(make_video: Callable[..., Path], tmp_path: Path) -> None:
    path = make_video(tmp_path / "a.avi", 7)
    announce(path, 50)
    with pytest.raises(InputError, match=r"a\.avi: 7 frames decode, 8 are needed"):
        sample_frames(path, 8)
    assert len(sample_frames(path, 7)) == 7


@pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 0.5, 0.95])
@pytest.mark.parametrize(("name", "codec"), [("a.avi", "mpeg4"), ("a.mp4", "libx264")])
def test_cut_short(make_video: Callable[..., Path], tmp_path: Path, name: str, codec: str, share: float) -> None:
    path = make_video(tmp_path / name, 300, codec=codec)
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    reason = "cut short, .* bytes are there" if name == "a.avi" and share else "unreadable video"
    with pytest.raises(InputError, match=rf"{name}: {reason}"):
        sample_frames(path, 8)


def test_damaged_videos_raise_nothing_else(make_video: Callable[..., Path], tmp_path: Path) -> None:
    whole = make_video(tmp_path / "a.avi", 50, options={"bf": "2"}).read_bytes()
    random, path = np.random.default_rng(0), tmp_path / "damaged.avi"
    num_refused = 0
    for _ in range(60):
        data = bytearray(whole)
        for place in random.integers(len(data), size=20):
            data[place] = random.integers(256)
        path.write_bytes(data)
        try:
            assert len(sample_frames(path, 8)) == 8
        except InputError as error:
            assert str(path) in str(error)  # noqa: PT017
            num_refused += 1
    assert 0 < num_refused < 60


def test_what_is_no_video(tmp_path: Path) -> None:
    (tmp_path / "text.avi").write_text("not a video")
    with pytest.raises(InputError, match=r"text\.avi: unreadable video"):
        sample_frames(tmp_path / "text.avi", 8)
    with pytest.raises(InputError, match=r"gone\.avi: no such video"):
        sample_frames(tmp_path / "gone.avi", 8)
    with pytest.raises(InputError, match=r"unreadable video .*directory"):
        sample_frames(tmp_path, 8)


def test_sound_alone_is_no_video(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "a.avi"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 800), dtype=np.int16), format="s16", layout="mono")
        sound.sample_rate = 8000
        container.mux(stream.encode(sound))
    with pytest.raises(InputError, match=r"a\.avi: there is no video in it"):
        sample_frames(tmp_path / "a.avi", 8)


def test_playlist_opens_no_other_file(make_video: Callable[..., Path], tmp_path: Path) -> None:
    """FFmpeg goes by the content: this one would show another video."""
    make_video(tmp_path / "secret.avi", 20)
    (tmp_path / "a.avi").write_text("ffconcat version 1.0\nfile 'secret.avi'\n")
    assert len(all_frames(tmp_path / "a.avi")) == 20
    with pytest.raises(InputError, match=r"a\.avi: unreadable video"):
        sample_frames(tmp_path / "a.avi", 8)


def test_absurdly_large_pictures(
    make_video: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_video(tmp_path / "a.avi", 8)
    monkeypatch.setattr(room, "MAX_PIXELS", 64 * 48 - 1)
    with pytest.raises(InputError, match=r"a\.avi: 64x48 is more than 3071 pixels"):
        sample_frames(path, 8)


def test_pyav_is_an_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(InputError, match=r"videos are read by PyAV: pip install 'phi3v\[video\]'"):
        sample_frames(tmp_path / "a.avi", 8)
