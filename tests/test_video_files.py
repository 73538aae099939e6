"""Bad videos and bad files: refused by place, and past a limit before they are decoded."""

from __future__ import annotations

import io
import math
import random
import struct
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
from PIL import Image

from qwen2vl_fast import video
from qwen2vl_fast.video import VideoLimits, frame_cache, preprocess_videos
from tests.preprocessing import encoded, noise, numbered_frames, write_clip

FRAMES = numbered_frames(37)


@pytest.fixture(autouse=True)
def empty_cache():
    frame_cache.clear()


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    """37 frames of 56 x 84 at 10 a second, without loss."""
    return write_clip(tmp_path_factory.mktemp("clips") / "clip.mov", FRAMES)


@pytest.fixture
def no_decoding(monkeypatch):
    def refuse(*_):
        raise AssertionError("decoded")

    monkeypatch.setattr(video, "_collect", refuse)
    monkeypatch.setattr(video, "load_image", refuse)


# --- bad input --------------------------------------------------------------------------------------------------------

BAD = {
    "none": (None, TypeError, "expected a path, a list of frames or a uint8 array"),
    "image": (Image.new("RGB", (30, 30)), TypeError, "got Image"),
    "bytes": (b"some", TypeError, "got bytes"),
    "no frames": ([], ValueError, r"expected 1 to 432000 frames \(limits.frames\), got 0"),
    "array of no frames": (np.zeros((0, 28, 28, 3), np.uint8), ValueError, "got 0"),
    "one frame as an array": (np.zeros((28, 28, 3), np.uint8), ValueError, r"\[N,H,W,3\], got \(28, 28, 3\)"),
    "float frames": (np.zeros((2, 28, 28, 3), np.float32), TypeError, "expected uint8 .* got float32"),
    "frame that is no image": ([np.zeros((28, 28, 3), np.uint8), "no/file.png"], FileNotFoundError, "No such file"),
    "frame that is damaged": ([encoded(Image.fromarray(FRAMES[0]), "PNG")[:500]], ValueError, "truncated or damaged"),
    "frames of two sizes": (
        [Image.new("L", (30, 30)), Image.new("L", (31, 30))],
        ValueError,
        "frame 1 is 30 x 31, the first one 30 x 30",
    ),
    "aspect ratio": (np.zeros((2, 2, 402, 3), np.uint8), ValueError, "ratio over 200"),
    "url": ("https://example.com/a.mp4", ValueError, "URLs are not opened"),
    "rtsp": ("rtsp://example.com/a", ValueError, "URLs are not opened"),
    "null byte": ("a\0b", ValueError, "can't be a path"),
    "missing file": ("no/such/file.mp4", FileNotFoundError, "No such file"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_videos_are_refused_by_place(name):
    source, error, message = BAD[name]
    with pytest.raises(error, match=rf"videos\[1\].*({message})"):
        preprocess_videos([FRAMES[:2], source])


def audio_file() -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format="mov") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return file.getvalue()


FILES = {
    "empty": (b"", "the file is empty"),
    "noise": (noise(0, 5000).tobytes(), "can't be decoded"),
    "text": (b"hello, this is no video", "can't be decoded"),
    "picture": (encoded(Image.new("RGB", (30, 30)), "PNG"), "can't be decoded"),
    "sound": (audio_file(), "no video stream"),
    "play list": (b"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\nclip.mov\n#EXT-X-ENDLIST\n", "can't be decoded"),
    "list of files": (b"ffconcat version 1.0\nfile clip.mov\n", "can't be decoded"),
    "description of a stream": (b"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nm=video 5004 RTP/AVP 96\n", "can't be decoded"),
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("suffix", [".mp4", ".m3u8"])
def test_files_that_are_no_videos(tmp_path, clip, name, suffix):
    (tmp_path / "clip.mov").write_bytes(clip.read_bytes())
    path = tmp_path / f"file{suffix}"
    path.write_bytes(FILES[name][0])
    with pytest.raises(ValueError, match=rf"videos\[0\]: .*{FILES[name][1]}"):
        preprocess_videos([path])


def test_a_folder_is_no_video(tmp_path):
    with pytest.raises(ValueError, match=r"videos\[0\]: not a regular file"):
        preprocess_videos([tmp_path])


@pytest.mark.parametrize("suffix", [".mp4", ".avi"])
@pytest.mark.parametrize("share", [0.4, 0.8, 0.99])
def test_truncated_files(tmp_path, suffix, share):
    path = tmp_path / f"clip{suffix}"
    options = {"movflags": "faststart"} if suffix == ".mp4" else {}
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.height, stream.width, stream.pix_fmt = 56, 84, "yuv420p"
        for frame in FRAMES:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    assert preprocess_videos([path])[1].tolist() == [[3, 20, 28]]
    data = path.read_bytes()
    index = len(data) - data.rindex(b"idx1") if suffix == ".avi" else 0
    path.write_bytes(data[: int((len(data) - index) * share)])
    with pytest.raises(ValueError, match=r"videos\[0\]: .*truncated or damaged"):
        preprocess_videos([path])


def test_damaged_files_give_a_video_or_a_value_error(tmp_path):
    dice = random.Random(0)
    path = tmp_path / "clip"
    for codec, suffix in (("mpeg4", ".mp4"), ("mpeg4", ".mkv"), ("mpeg4", ".avi"), ("gif", ".gif")):
        intact = write_clip(tmp_path / f"clip{suffix}", FRAMES[:12], codec=codec).read_bytes()
        for _ in range(25):
            data = bytearray(intact)
            for _ in range(dice.choice((1, 3, 20))):
                data[dice.randrange(min(len(data), dice.choice((1000, len(data)))))] = dice.randrange(256)
            path.write_bytes(data)
            try:
                rows, grid = preprocess_videos([path], limits=VideoLimits(pixels=10**6))
            except ValueError as error:
                assert str(error).startswith("videos[0]: ")
            else:
                assert len(rows) == grid.prod()


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"fps": 0}, ValueError, "fps: expected a positive number, got 0"),
        ({"fps": math.nan}, ValueError, "fps: expected a positive number"),
        ({"fps": math.inf}, ValueError, "fps: expected a positive number"),
        ({"fps": "2"}, TypeError, "fps: expected a number, got str"),
        ({"fps": [1, 2]}, ValueError, "fps: expected one value, or a list of 1"),
        ({"nframes": 1}, ValueError, "nframes: expected 2 to 768, got 1"),
        ({"nframes": 769}, ValueError, "nframes: expected 2 to 768"),
        ({"nframes": 4.0}, TypeError, "nframes: expected an integer, got float"),
        ({"nframes": 4}, ValueError, r"videos\[0\]: nframes is for files"),
        ({"fps": [2.0]}, ValueError, r"videos\[0\]: fps is for files"),
        ({"max_tokens": 0}, ValueError, "max_tokens: expected 1 or more, got 0"),
        ({"max_tokens": None}, TypeError, "max_tokens: expected an integer, got NoneType"),
        ({"min_pixels": 5000, "max_pixels": 4000}, ValueError, "min_pixels: expected at most max_pixels"),
        ({"max_pixels": 100}, ValueError, "max_pixels: expected 784 or more"),
    ],
)
def test_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        preprocess_videos([FRAMES[:2]], **options)


@pytest.mark.parametrize("videos", [FRAMES[:2], "clip.mov", None])
def test_one_video_is_no_list(videos):
    with pytest.raises(TypeError, match="put a single video in a list"):
        preprocess_videos(videos)


def test_without_pyav_the_error_says_what_to_install(clip, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    assert len(preprocess_videos([FRAMES[:2]])[0]), "frames that are given need no PyAV"
    with pytest.raises(ImportError, match=r"pip install qwen2vl-fast\[video\]"):
        preprocess_videos([clip])


# --- limits, before decoding ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "limits, message",
    [
        ({"file_bytes": 1000}, r"bytes, the limit is 1000 \(limits.file_bytes\)"),
        ({"seconds": 3.5}, r"4 seconds, the limit is 3.5 \(limits.seconds\)"),
        ({"frames": 36}, r"37 frames or more, the limit is 36 \(limits.frames\)"),
        ({"pixels": 56 * 84 - 1}, r"56 x 84 pixels are over the limit of 4703 \(limits.pixels\)"),
    ],
)
def test_limits_of_a_file(clip, no_decoding, limits, message):
    with pytest.raises(ValueError, match=rf"videos\[0\]: .*{message}"):
        preprocess_videos([clip], limits=VideoLimits(**limits))


def test_limits_that_just_hold(clip):
    limits = VideoLimits(file_bytes=clip.stat().st_size, seconds=3.7, frames=37, pixels=56 * 84, items=1)
    assert len(preprocess_videos([clip], limits=limits)[0])


def test_limits_of_given_frames():
    with pytest.raises(ValueError, match="expected 1 to 3 frames .* got 4"):
        preprocess_videos([FRAMES[:4]], limits=VideoLimits(frames=3))
    with pytest.raises(ValueError, match=r"videos\[0\]\[0\]: 56 x 84 pixels are over the limit"):
        preprocess_videos([FRAMES[:4]], limits=VideoLimits(pixels=1000))


def test_limits_of_a_call(clip):
    with pytest.raises(ValueError, match="videos: 3 videos, the limit is 2"):
        preprocess_videos([clip] * 3, limits=VideoLimits(items=2))
    # Seven pairs of 28 x 56 pixels each.
    with pytest.raises(ValueError, match="videos: 28 visual tokens, the limit is 27"):
        preprocess_videos([clip, clip], fps=4, min_pixels=784, max_pixels=784 * 4, limits=VideoLimits(tokens=27))


def test_an_absurd_duration_is_refused(tmp_path, no_decoding):
    # Four frames, a day apart.
    path = write_clip(tmp_path / "clip.mov", FRAMES[:4], rate=1, step=86_400)
    with pytest.raises(ValueError, match=r"seconds, the limit is 7200.0 \(limits.seconds\)"):
        preprocess_videos([path])


def test_an_endless_animation_is_refused(tmp_path, no_decoding):
    path = tmp_path / "endless.gif"
    frames = [Image.new("P", (2, 2), i % 7) for i in range(300)]
    frames[0].save(path, "GIF", save_all=True, append_images=frames[1:], duration=10, loop=0, optimize=False)
    with pytest.raises(ValueError, match=r"limit is 200 \(limits.frames\)"):
        preprocess_videos([path], limits=VideoLimits(frames=200))


def test_an_absurd_duration_in_the_header_is_refused(tmp_path, no_decoding):
    path = write_clip(tmp_path / "clip.mkv", FRAMES[:4], codec="mpeg4")
    data = bytearray(path.read_bytes())
    # Matroska's Duration: element 4489 of 8 bytes, milliseconds.
    start = data.index(b"\x44\x89\x88") + 3
    data[start : start + 8] = struct.pack(">d", 1e9)
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"1000000 seconds, the limit is 7200.0 \(limits.seconds\)"):
        preprocess_videos([path])


def test_a_duration_that_no_header_tells(tmp_path, no_decoding):
    path = write_clip(tmp_path / "clip.mkv", FRAMES, codec="mpeg4")
    data = bytearray(path.read_bytes())
    # The element of the duration becomes one that means nothing.
    start = data.index(b"\x44\x89\x88")
    data[start : start + 2] = b"\xec\x89"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"videos\[0\]: 4 seconds, the limit is 3 \(limits.seconds\)"):
        preprocess_videos([path], limits=VideoLimits(seconds=3))


def test_frames_are_counted_where_no_header_says_how_many(tmp_path, no_decoding):
    path = write_clip(tmp_path / "clip.mkv", FRAMES, codec="mpeg4")
    with pytest.raises(ValueError, match=r"37 frames or more, the limit is 36 \(limits.frames\)"):
        preprocess_videos([path], limits=VideoLimits(frames=36))


def test_a_header_that_claims_too_many_frames_is_enough(clip, monkeypatch):
    # The limit holds before the packets are read, which for a long clip is the whole file.
    stream = SimpleNamespace(frames=37, codec_context=SimpleNamespace(height=56, width=84))
    container = SimpleNamespace(streams=SimpleNamespace(video=[stream]), duration=None)
    monkeypatch.setattr(video, "_open", lambda *_: nullcontext(container))
    with pytest.raises(ValueError, match=r"37 frames or more"):
        preprocess_videos([clip], limits=VideoLimits(frames=36))


def test_clips_that_change_their_size(tmp_path):
    parts = {}
    for side in (64, 128, 640):
        frames = np.zeros((6, side, side, 3), np.uint8)
        parts[side] = write_clip(tmp_path / f"{side}.ts", frames, rate=25, codec="mpeg2video").read_bytes()
    path = tmp_path / "clip.ts"
    path.write_bytes(parts[64] + parts[128])
    with pytest.raises(ValueError, match=r"videos\[0\]: frame 1 is 128 x 128, the first one 64 x 64"):
        preprocess_videos([path], nframes=2)
    with pytest.raises(ValueError, match=r"videos\[0\]: 128 x 128 pixels are over the limit of 5000"):
        preprocess_videos([path], nframes=2, limits=VideoLimits(pixels=5000))
    # Frames that are not sampled are decoded all the same, so the decoder has a limit of its own.
    path.write_bytes(parts[64] + parts[640] + parts[64])
    assert len(preprocess_videos([path], nframes=2)[0])
    with pytest.raises(ValueError, match=r"videos\[0\]: can't be decoded"):
        preprocess_videos([path], nframes=2, limits=VideoLimits(pixels=5000))
