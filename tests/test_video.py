"""Videos to patch rows: sampling against qwen-vl-utils' formula, rows against patches cut one by one, bounds, cache."""

from __future__ import annotations

import math
import os
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from qwen2vl_fast import video
from qwen2vl_fast.media import preprocess_images, smart_resize
from qwen2vl_fast.video import FrameCache, VideoLimits, frame_cache, preprocess_videos, sample_indices
from tests.preprocessing import encoded, noise, numbered_frames, slow_rows, write_clip

SEEDED = settings(derandomize=True, database=None, deadline=None, max_examples=80)
FRAMES = numbered_frames(37)


@pytest.fixture(autouse=True)
def empty_cache():
    frame_cache.clear()


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    """37 frames of 56 x 84 at 10 a second, without loss."""
    return write_clip(tmp_path_factory.mktemp("clips") / "clip.mov", FRAMES)


# --- sampling ---------------------------------------------------------------------------------------------------------


def peer_indices(total: int, rate: float, fps: float) -> list[int]:
    """qwen-vl-utils' rule: bounds floored to even, count floored to even, torch.linspace rounded."""
    most = min(768, total) // 2 * 2
    count = math.floor(min(max(total / rate * fps, 4), most, total) / 2) * 2
    return torch.linspace(0, total - 1, count).round().long().tolist()


def test_sampling_equals_the_peer_rule():
    for total in range(2, 1200):
        for rate, fps in ((30, 2), (25, 2), (8, 1), (10, 10), (24, 0.5), (60, 6)):
            assert sample_indices(total, rate, fps=fps) == peer_indices(total, rate, fps), (total, rate, fps)


@pytest.mark.parametrize(
    "total, rate, options, expected",
    [
        (90, 30, {}, [0, 18, 36, 53, 71, 89]),
        (89, 30, {}, [0, 29, 59, 88]),
        (10, 30, {}, [0, 3, 6, 9]),
        (4, 30, {}, [0, 1, 2, 3]),
        (3, 30, {}, [0, 2]),
        (2, 30, {}, [0, 1]),
        (1, 30, {}, [0]),
        (5, 1, {}, [0, 1, 3, 4]),
        (5, 1, {"fps": 100}, [0, 1, 3, 4]),
        (100, None, {"nframes": 5}, [0, 33, 66, 99]),
        (100, None, {"nframes": 2}, [0, 99]),
        (3, None, {"nframes": 768}, [0, 2]),
        (1, None, {"nframes": 2}, [0]),
    ],
)
def test_sampling_examples(total, rate, options, expected):
    assert sample_indices(total, rate, **options) == expected


@SEEDED
@given(st.integers(1, 10**6), st.fractions(Fraction(1, 100), 240), st.fractions(Fraction(1, 100), 60))
def test_sampling_of_any_clip(total, rate, fps):
    indices = sample_indices(total, rate, fps=fps)
    assert len(indices) == 1 if total == 1 else len(indices) % 2 == 0
    assert len(indices) <= min(768, total) and len(indices) >= min(4, total // 2 * 2)
    assert indices[0] == 0 and (indices[-1] == total - 1 or total == 1)
    gaps = np.diff(indices)
    assert (gaps >= 1).all() and (gaps.max(initial=0) - gaps.min(initial=10**6) <= 1)
    wanted = total / rate * fps
    if 4 <= wanted <= min(768, total):
        assert len(indices) == math.floor(wanted) // 2 * 2


def test_a_count_that_is_exact_does_not_fall_to_the_next_even_number():
    # In floating point 54 / (100/3) * 3.7037... is a little under 6.
    rate = Fraction(30000, 1001)
    for seconds in range(2, 300):
        total = round(seconds * rate)
        fps = Fraction(2 * seconds) * rate / total
        assert len(sample_indices(total, rate, fps=fps)) == 2 * seconds


def test_sampling_without_a_frame_rate():
    with pytest.raises(ValueError, match="pass nframes"):
        sample_indices(10, None)


# --- rows and grids ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"fps": 4}, {"fps": 0.1}, {"nframes": 9}, {"fps": 1000}, {"fps": [None]}])
def test_a_file_equals_its_sampled_frames(clip, options):
    fps, nframes = options.get("fps", 2), options.get("nframes")
    indices = sample_indices(37, 10, fps=2 if fps == [None] else fps, nframes=nframes)
    rows, grid = preprocess_videos([clip], min_pixels=784, **options)
    assert grid.tolist() == [[len(indices) // 2, 4, 6]] and grid.dtype == torch.int64
    assert rows.dtype == torch.float32
    assert torch.equal(rows, slow_rows(FRAMES[indices]))


def test_resized_frames_are_pil_bicubic_images():
    frames = noise(0, 4, 100, 150, 3)
    rows, grid = preprocess_videos([frames])
    height, width = smart_resize(100, 150, min_pixels=128 * 784, max_pixels=768 * 784)
    assert grid.tolist() == [[2, height // 14, width // 14]]
    resized = [np.asarray(Image.fromarray(frame).resize((width, height), Image.Resampling.BICUBIC)) for frame in frames]
    assert torch.equal(rows, slow_rows(np.stack(resized)))


def test_two_equal_frames_are_an_image():
    frame = noise(1, 77, 130, 3)
    rows, grid = preprocess_videos([[frame, frame]])
    image_rows, image_grid = preprocess_images([frame], min_pixels=128 * 784, max_pixels=768 * 784)
    assert torch.equal(rows, image_rows) and torch.equal(grid, image_grid)


def test_frames_from_every_source():
    array = FRAMES[:6]
    expected = preprocess_videos([array])[0]
    tensor = torch.from_numpy(array)
    sources = {
        "list of arrays": list(array),
        "tuple of images": tuple(Image.fromarray(frame) for frame in array),
        "list of PNG files": [encoded(Image.fromarray(frame), "PNG") for frame in array],
        "tensor": tensor,
        "tensor, channels first": tensor.permute(0, 3, 1, 2),
        "list of tensors": list(tensor.permute(0, 3, 1, 2)),
        "strided array": np.repeat(array, 2, 0)[::2],
    }
    for name, source in sources.items():
        assert torch.equal(preprocess_videos([source])[0], expected), name


def test_a_video_has_the_same_rows_alone_and_in_any_company(clip):
    videos = [clip, FRAMES[:5], list(FRAMES[:2])]
    rows, grid = preprocess_videos(videos)
    alone = [preprocess_videos([one]) for one in videos]
    assert torch.equal(rows, torch.cat([part for part, _ in alone]))
    assert torch.equal(grid, torch.cat([part for _, part in alone]))


def test_options_for_each_video(clip):
    rows, grid = preprocess_videos(
        [clip, FRAMES[:4], clip],
        fps=[4.0, None, None],
        nframes=[None, None, 6],
        min_pixels=[784, 784, 784 * 16],
        max_pixels=[784 * 4, None, None],
    )
    assert grid.tolist() == [[7, 2, 4], [2, 4, 6], [3, 8, 10]]
    each = [
        preprocess_videos([clip], fps=4, min_pixels=784, max_pixels=784 * 4)[0],
        preprocess_videos([FRAMES[:4]], min_pixels=784)[0],
        preprocess_videos([clip], nframes=6, min_pixels=784 * 16)[0],
    ]
    assert torch.equal(rows, torch.cat(each))


def test_no_videos():
    rows, grid = preprocess_videos([])
    assert rows.shape == (0, 1176) and grid.shape == (0, 3)


@pytest.mark.parametrize(
    "suffix, codec", {".mp4": "mpeg4", ".avi": "mpeg4", ".mkv": "mpeg4", ".ts": "mpeg2video", ".gif": "gif"}.items()
)
def test_containers(tmp_path, codec, suffix):
    frames = np.zeros((24, 64, 64, 3), np.uint8)
    frames[..., 0] = (np.arange(24) * 10)[:, None, None]
    path = write_clip(tmp_path / f"clip{suffix}", frames, rate=25, codec=codec)
    rows, grid = preprocess_videos([path], nframes=4, min_pixels=784)
    assert grid.tolist() == [[2, 4, 4]]
    red = rows.view(2, -1, 3, 2, 196)[:, :, 0].mean((1, 3)).flatten() * 0.26862954 + 0.48145466
    # Lossy codecs, and a palette of 3 bits for red, keep each frame nearest to itself: they are 70 levels apart.
    nearest = (red[:, None] * 255 - torch.arange(24) * 10).abs().argmin(1)
    assert (nearest - torch.tensor(sample_indices(24, None, nframes=4))).abs().max() <= 2


def test_a_broadcast_that_was_cut_before_a_key_frame(tmp_path):
    """Three packets come before the first key frame: the 18 frames that can be decoded are the clip."""
    whole, cut = tmp_path / "whole.ts", tmp_path / "cut.ts"
    frames = np.zeros((24, 64, 64, 3), np.uint8)
    frames[..., 0] = (np.arange(24) * 10)[:, None, None]
    write_clip(whole, frames, rate=25, codec="mpeg2video", options={"g": "6", "sc_threshold": "1000000000"})
    with av.open(str(whole)) as source, av.open(str(cut), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        packets = [packet for packet in source.demux(video=0) if packet.size]
        assert [packet.is_keyframe for packet in packets[:7]] == [True] + [False] * 5 + [True]
        for packet in packets[3:]:
            packet.stream = stream
            target.mux(packet)
    rows, grid = preprocess_videos([cut], nframes=18, min_pixels=784)
    expected, _ = preprocess_videos([whole], nframes=24, min_pixels=784)
    assert grid.tolist() == [[9, 4, 4]]
    assert torch.equal(rows, expected[3 * 16 :])


@pytest.mark.parametrize("quarters, matrix", [(0, (1, 0, 0, 1)), (1, (0, 1, -1, 0)), (2, (-1, 0, 0, -1)), (3, (0, -1, 1, 0))])
def test_a_clip_that_was_filmed_upright_is_turned(tmp_path, quarters, matrix):
    path = write_clip(tmp_path / "clip.mov", FRAMES[:4])
    data = bytearray(path.read_bytes())
    # The track header's matrix, fixed point: a b u, c d v, x y w. (0 1 -1 0) shows the picture turned clockwise.
    start = data.index(b"tkhd") + 4 + 40
    for place, value in zip((0, 1, 3, 4), matrix, strict=True):
        data[start + 4 * place : start + 4 * place + 4] = (value * 65536).to_bytes(4, "big", signed=True)
    path.write_bytes(data)
    rows, _ = preprocess_videos([path], min_pixels=784)
    assert torch.equal(rows, slow_rows(np.rot90(FRAMES[:4], -quarters, axes=(1, 2))))


def test_pil_bicubic_is_within_two_levels_of_torch():
    """transformers resizes videos by torch's antialiased bicubic filter for bytes, whose weights have fewer bits than PIL's."""
    for before, after in (((100, 150), (280, 420)), ((300, 500), (140, 224)), ((97, 61), (308, 196)), ((480, 640), (84, 112))):
        grain = noise(before[0], *before, 3)
        smooth = np.array(Image.fromarray(grain).resize((before[1] // 3, before[0] // 3)).resize(before[::-1]))
        for frame in (grain, smooth):
            ours = np.array(Image.fromarray(frame).resize(after[::-1], Image.Resampling.BICUBIC))
            tensor = torch.from_numpy(frame).permute(2, 0, 1)[None]
            theirs = torch.nn.functional.interpolate(tensor, after, mode="bicubic", antialias=True)[0].permute(1, 2, 0)
            apart = (torch.from_numpy(ours).int() - theirs.int()).abs()
            assert apart.max() <= 2 and apart.float().mean() < 0.5


# --- bounds -----------------------------------------------------------------------------------------------------------


def test_the_bounds_of_a_frame_pair():
    _, grid = preprocess_videos([np.zeros((2, 28, 28, 3), np.uint8), np.zeros((2, 1200, 1600, 3), np.uint8)])
    tokens = grid[:, 1] * grid[:, 2] // 4
    assert 128 <= tokens[0] <= 150 and 700 <= tokens[1] <= 768


def test_the_total_wins_over_the_lower_bound_of_a_pair():
    frames = [np.zeros((56, 56, 3), np.uint8)] * 21
    _, grid = preprocess_videos([frames], max_tokens=11 * 30)
    assert grid.tolist() == [[11, 10, 10]], "25 tokens a pair, though 128 is the lower bound"
    _, grid = preprocess_videos([frames], max_tokens=11)
    assert grid.tolist() == [[11, 2, 2]]


def test_the_default_total_is_16384():
    frames = [np.zeros((600, 800, 3), np.uint8)] * 60
    _, grid = preprocess_videos([frames])
    tokens = grid.prod() // 4
    assert grid[0, 0] == 30 and 15_000 < tokens <= 16384


@SEEDED
@given(
    st.integers(1, 120),
    st.integers(1, 120),
    st.integers(1, 9),
    st.integers(5, 60),
    st.integers(784, 40_000),
    st.integers(784, 40_000),
)
def test_the_total_holds_for_any_size_and_bounds(height, width, count, max_tokens, one, other):
    low, high = sorted((one, other))
    frames = np.zeros((count, height, width, 3), np.uint8)
    _, grid = preprocess_videos([frames], min_pixels=low, max_pixels=high, max_tokens=max_tokens)
    pairs, rows, columns = grid[0].tolist()
    assert pairs == (count + 1) // 2
    assert pairs * rows * columns <= 4 * max_tokens
    alone = smart_resize(height, width, min_pixels=low, max_pixels=high)
    if pairs * alone[0] * alone[1] <= 784 * max_tokens and high <= max_tokens // pairs * 784:
        assert (14 * rows, 14 * columns) == alone, "a total that does not bind changes nothing"


def test_the_total_holds_for_the_longest_thinnest_frames():
    for shape in ((28, 5600), (5600, 28), (1, 200)):
        _, grid = preprocess_videos([np.zeros((4, *shape, 3), np.uint8)], max_tokens=20)
        assert grid.prod() <= 80 and min(grid[0, 1:]) == 2 and max(grid[0, 1:]) == 20


def test_more_frame_pairs_than_tokens():
    with pytest.raises(ValueError, match=r"videos\[0\]: 6 frame pairs can't fit max_tokens = 5"):
        preprocess_videos([FRAMES[:11]], max_tokens=5)


# --- cache ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def decodings(monkeypatch) -> list:
    """One entry for every file that is decoded."""
    calls, decode = [], video._decode
    monkeypatch.setattr(video, "_decode", lambda *args: calls.append(args) or decode(*args))
    return calls


def test_a_clip_is_decoded_once_for_the_same_content_and_parameters(clip, decodings, tmp_path):
    first = preprocess_videos([clip, clip])
    copy = tmp_path / "another name.bin"
    copy.write_bytes(clip.read_bytes())
    again = preprocess_videos([copy, str(clip)])
    assert len(decodings) == 1
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize(
    "options",
    [
        {"fps": 3},
        {"nframes": 4},
        {"min_pixels": 784},
        {"max_pixels": 120_000},
        {"max_tokens": 9000},
        {"limits": VideoLimits(items=3)},
    ],
)
def test_other_parameters_are_another_entry(clip, decodings, options):
    preprocess_videos([clip])
    preprocess_videos([clip], **options)
    assert len(decodings) == 2


def test_changed_content_of_equal_size_and_time_is_seen(tmp_path, decodings):
    path = write_clip(tmp_path / "clip.mov", FRAMES[:4], codec="png")
    before, status = preprocess_videos([path])[0], path.stat()
    data = bytearray(path.read_bytes())
    start = data.index(b"tkhd") + 4 + 40
    for place, value in zip((0, 1, 3, 4), (-1, 0, 0, -1), strict=True):
        data[start + 4 * place : start + 4 * place + 4] = (value * 65536).to_bytes(4, "big", signed=True)
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (status.st_size, status.st_mtime_ns)
    assert not torch.equal(preprocess_videos([path])[0], before)
    assert len(decodings) == 2


def test_a_file_that_is_written_to_meanwhile_is_not_kept(tmp_path, monkeypatch):
    path, decode = write_clip(tmp_path / "clip.mov", FRAMES[:4]), video._decode

    def decode_and_write(*args):
        frames = decode(*args)
        with open(path, "ab") as file:
            file.write(b"\0")
        return frames

    monkeypatch.setattr(video, "_decode", decode_and_write)
    preprocess_videos([path])
    assert len(frame_cache) == 0


def test_nothing_is_kept_of_a_file_that_fails(tmp_path):
    path = write_clip(tmp_path / "clip.mov", FRAMES)
    path.write_bytes(path.read_bytes()[:-20_000])
    with pytest.raises(ValueError):
        preprocess_videos([path])
    assert len(frame_cache) == 0


def test_the_least_recently_used_clip_goes_first():
    cache = FrameCache(max_bytes=100)
    clips = {name: torch.zeros(size, dtype=torch.uint8) for name, size in (("a", 40), ("b", 40), ("c", 40), ("all", 100))}
    cache.put("a", clips["a"])
    cache.put("b", clips["b"])
    assert cache.get("a") is clips["a"]
    cache.put("c", clips["c"])
    assert cache.get("b") is None and cache.get("a") is clips["a"] and cache.get("c") is clips["c"]
    cache.put("too large", torch.zeros(101, dtype=torch.uint8))
    assert len(cache) == 2
    cache.put("all", clips["all"])
    assert len(cache) == 1 and cache.get("all") is clips["all"]
    cache.clear()
    assert len(cache) == 0 and cache.get("all") is None


def test_threads_agree(clip):
    expected = preprocess_videos([clip])[0]
    frame_cache.clear()
    with ThreadPoolExecutor(4) as pool:
        results = pool.map(lambda _: preprocess_videos([clip])[0], range(8))
        assert all(torch.equal(result, expected) for result in results)
