"""Videos to patch rows: sample, decode, resize, cut into patches (MODEL.md section 5).

Files are decoded by PyAV, which is imported when the first one comes. Everything runs on the host.
"""

from __future__ import annotations

import hashlib
import math
import os
import threading
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from numbers import Real
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image

from .media import (
    FACTOR,
    TOKEN_PIXELS,
    ImageLimits,
    bounds_per_item,
    check_path,
    check_pixels,
    check_tokens,
    load_image,
    pack_rows,
    per_item,
    positive,
    resize_frame,
    resized,
)

FPS = 2.0
MIN_FRAMES = 4
MAX_FRAMES = 768
MIN_PIXELS = 128 * TOKEN_PIXELS
MAX_PIXELS = 768 * TOKEN_PIXELS
MAX_TOKENS = 16384
# FFmpeg's names. Play lists and the like stay out: they would open further files, or connections, of their own choice.
CONTAINERS = "mov,mp4,matroska,webm,avi,mpegts,mpeg,ogg,flv,gif"


@dataclass(frozen=True)
class VideoLimits:
    """What one call accepts; known from headers and packets, and checked before a frame is decoded.

    file_bytes: of one file. seconds: of one clip. frames: of one clip, before sampling, or of one list.
    pixels: of one frame as stored. items: videos in a call.
    tokens: visual tokens of a call; those of one video are bounded by max_tokens already.
    """

    file_bytes: int = 2 * 2**30
    seconds: float = 7200.0
    frames: int = 432_000
    pixels: int = 2**25
    items: int = 64
    tokens: int = 2**18


DEFAULT_LIMITS = VideoLimits()


@dataclass(frozen=True)
class _Options:
    fps: Fraction
    nframes: int | None
    min_pixels: int
    max_pixels: int
    max_tokens: int


class FrameCache:
    """Decoded and resized clips by key, least recently used first out, bounded in bytes; may be shared by threads."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._entries: OrderedDict[Hashable, torch.Tensor] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def get(self, key: Hashable) -> torch.Tensor | None:
        with self._lock:
            if key in self._entries:
                self._entries.move_to_end(key)
            return self._entries.get(key)

    def put(self, key: Hashable, frames: torch.Tensor) -> None:
        with self._lock:
            if key in self._entries or frames.nbytes > self.max_bytes:
                return
            self._entries[key] = frames
            self._bytes += frames.nbytes
            while self._bytes > self.max_bytes:
                self._bytes -= self._entries.popitem(last=False)[1].nbytes

    def clear(self) -> None:
        with self._lock:
            self._entries.clear()
            self._bytes = 0

    def __len__(self) -> int:
        return len(self._entries)


# Three clips at the default max_tokens; a training clip of 16 frames is about 3 MB.
frame_cache = FrameCache(256 * 2**20)


def preprocess_videos(
    videos: Sequence[Any],
    *,
    fps: float | Sequence[float | None] | None = FPS,
    max_tokens: int = MAX_TOKENS,
    min_pixels: int | Sequence[int | None] | None = None,
    max_pixels: int | Sequence[int | None] | None = None,
    nframes: int | Sequence[int | None] | None = None,
    limits: VideoLimits = DEFAULT_LIMITS,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Videos to patch rows and grids: sample frames, resize them alike, (x/255 - mean) / std, patches of two frames.

    Files are sampled by sample_indices, and their frames kept in `frame_cache`. Frames that are given are all taken.
    If their number is odd, the last one counts twice. All frames of a video get one size: smart_resize between the
    bounds, then smaller if the video would come to more than max_tokens.

    Args:
        videos: list or tuple; each a path (str or os.PathLike) to a file of FFmpeg's formats MP4/MOV, Matroska/WebM,
            AVI, MPEG, Ogg, FLV or GIF; or a list of frames, each of them what load_image takes; or a uint8 array or
            tensor [N,H,W,3] (a tensor may be [N,3,H,W]). The frames of a video have one size.
        fps: frames to take a second of a file; one for all the files, or a list with one for each video, None where
            it is not a file. None is 2.
        max_tokens: visual tokens of one video, at most; wins over min_pixels. A pair of frames is h*w/784 tokens.
        min_pixels, max_pixels: bounds of the area of one frame, one for all or a list with one for each. None is 128
            and 768 visual tokens a pair, or less (more) where that would cross the other bound.
        nframes: frames to take of a file, in place of fps; one for all or a list with one for each.
        limits: bytes, seconds, frames, pixels, videos and visual tokens, checked before decoding.
    Returns:
        pixel_values: [T, 1176] float32, T = sum t*h*w, rows as preprocess_images has them.
        grid_thw: [N, 3] int64, (frame pairs, h, w) in patches.
    Raises:
        TypeError, ValueError: as load_image and smart_resize; a damaged file; frames of different sizes; nframes, or
            fps of its own, for a video that is not a file; a limit passed. The message begins with the place of the
            video, videos[i].
        OSError: a path that can't be read. ImportError: a file, and PyAV is not installed.
    Source: MODEL.md section 5.
    """
    if not isinstance(videos, (list, tuple)):
        raise TypeError(f"videos: expected a list or tuple, got {type(videos).__name__}; put a single video in a list")
    if len(videos) > limits.items:
        raise ValueError(f"videos: {len(videos)} videos, the limit is {limits.items} (limits.items)")
    max_tokens = positive("max_tokens", max_tokens)
    rates = [_check_fps(rate) for rate in per_item("fps", fps, len(videos))]
    counts = [_check_nframes(count) for count in per_item("nframes", nframes, len(videos))]
    bounds = bounds_per_item(min_pixels, max_pixels, len(videos), (MIN_PIXELS, MAX_PIXELS))

    clips, tokens = [], 0
    for i, video in enumerate(videos):
        if isinstance(fps, (list, tuple)) and fps[i] is not None and not isinstance(video, (str, os.PathLike)):
            raise ValueError(f"videos[{i}]: fps is for files; frames that are given are all taken")
        options = _Options(rates[i], counts[i], *bounds[i], max_tokens)
        clips.append(_load(video, options, limits, f"videos[{i}]"))
        tokens += len(clips[i]) // 2 * clips[i].shape[1] * clips[i].shape[2] // TOKEN_PIXELS
        check_tokens("videos", tokens, limits.tokens)
    return pack_rows(clips)


def sample_indices(total: int, rate: Real | None, *, fps: Real = FPS, nframes: int | None = None) -> list[int]:
    """Which frames of a clip are taken: evenly spread from the first to the last.

    Their number is total / rate * fps, clamped to 4..768, or nframes; then no more than the clip has, and floored to
    even. One frame remains of a clip that has one. Frame i of n is round(i * (total - 1) / (n - 1)), a tie to even.

    Args:
        total: frames of the clip.
        rate: its frames per second; not needed with nframes.
        fps: frames to take per second.
        nframes: how many to take.
    Returns:
        Increasing indices, an even number of them, or one.
    Raises:
        ValueError: the rate is needed and not known.
    Source: MODEL.md section 5. The rounding is exact; qwen-vl-utils rounds in float32, which gives the neighbouring
        frame now and then in clips of many thousand frames.
    """
    if nframes is None:
        if not rate:
            raise ValueError("the clip does not say its frame rate; pass nframes")
        nframes = min(max(Fraction(total) / Fraction(rate) * Fraction(fps), MIN_FRAMES), MAX_FRAMES)
    count = min(math.floor(nframes), total) // 2 * 2
    return [round(Fraction(i * (total - 1), count - 1)) for i in range(count)] or [0]


def _load(video: Any, options: _Options, limits: VideoLimits, name: str) -> torch.Tensor:
    """One video as resized frames, uint8 [N,H,W,3], N even."""
    if isinstance(video, (str, os.PathLike)):
        return _from_file(video, options, limits, name)
    if isinstance(video, (np.ndarray, torch.Tensor)):
        if video.ndim != 4:
            raise ValueError(f"{name}: expected frames [N,H,W,3], got {tuple(video.shape)}")
    elif not isinstance(video, (list, tuple)):
        raise TypeError(f"{name}: expected a path, a list of frames or a uint8 array [N,H,W,3], got {type(video).__name__}")
    if options.nframes is not None:
        raise ValueError(f"{name}: nframes is for files; frames that are given are all taken")
    if not 1 <= len(video) <= limits.frames:
        raise ValueError(f"{name}: expected 1 to {limits.frames} frames (limits.frames), got {len(video)}")
    stack = _Stack(len(video), options, name)
    for i, frame in enumerate(video):
        stack.add(load_image(frame, limits=ImageLimits(pixels=limits.pixels), name=f"{name}[{i}]"))
    return stack.finish()


class _Stack:
    """Collects the frames of one video, all resized to the size that the first one determines."""

    def __init__(self, count: int, options: _Options, name: str) -> None:
        self.count = count
        self.taken = 0
        self._options, self._name = options, name
        self._source = (0, 0)
        self._frames = np.empty((0, 0, 0, 3), np.uint8)

    def add(self, image: Image.Image) -> None:
        if self.taken == 0:
            self._source = image.size
            size = _frame_size(image.height, image.width, (self.count + 1) // 2, self._options, self._name)
            self._frames = np.empty((self.count + self.count % 2, *size, 3), np.uint8)
        elif image.size != self._source:
            raise ValueError(
                f"{self._name}: frame {self.taken} is {image.height} x {image.width}, "
                f"the first one {self._source[1]} x {self._source[0]}; the frames of a video have one size"
            )
        self._frames[self.taken] = resize_frame(image, self._frames.shape[1:3])
        self.taken += 1

    def finish(self) -> torch.Tensor:
        """uint8 [N,H,W,3], N even: an odd count repeats the last frame."""
        self._frames[self.taken :] = self._frames[self.taken - 1]
        return torch.from_numpy(self._frames)


def _frame_size(height: int, width: int, pairs: int, options: _Options, name: str) -> tuple[int, int]:
    """(height, width) of the resized frames; pairs * height * width / 784 never exceeds max_tokens."""
    share = options.max_tokens // pairs
    if share == 0:
        raise ValueError(f"{name}: {pairs} frame pairs can't fit max_tokens = {options.max_tokens}; pass fewer frames")
    budget = share * TOKEN_PIXELS
    rows, columns = resized(height, width, options.min_pixels, options.max_pixels, name)
    if rows * columns > budget:
        # As smart_resize shrinks, but strict: where a short side stays at 28, the long one gives way.
        shrink = math.sqrt(height * width / budget)
        rows, columns = (
            min(share * FACTOR, max(FACTOR, math.floor(side / shrink / FACTOR) * FACTOR)) for side in (height, width)
        )
    return rows, columns


def _from_file(path: str | os.PathLike, options: _Options, limits: VideoLimits, name: str) -> torch.Tensor:
    """The sampled frames of a file, from the cache or decoded."""
    with open(check_path(path, limits.file_bytes, name), "rb") as file:
        before = os.fstat(file.fileno())
        key = (_digest(file), before.st_size, options, limits)
        frames = frame_cache.get(key)
        if frames is None:
            frames = _decode(file, options, limits, name)
            after = os.fstat(file.fileno())
            # A file that was written to meanwhile may not be what the digest says.
            if (before.st_size, before.st_mtime_ns) == (after.st_size, after.st_mtime_ns):
                frame_cache.put(key, frames)
    return frames


def _digest(file: BinaryIO) -> bytes:
    digest = hashlib.sha256()
    while chunk := file.read(2**20):
        digest.update(chunk)
    return digest.digest()


def _decode(file: BinaryIO, options: _Options, limits: VideoLimits, name: str) -> torch.Tensor:
    av = _import_av()
    try:
        total, rate = _count_frames(av, file, limits, name)
        while True:
            stack, decoded = _collect(av, file, total, rate, options, limits, name)
            if stack.taken == stack.count:
                return stack.finish()
            # Fewer frames than packets, as when a broadcast was cut before a key frame: sample those that there are.
            if decoded == 0:
                raise ValueError(f"{name}: no frame can be decoded, the file may be truncated or damaged")
            total = decoded
    except av.FFmpegError as error:
        raise ValueError(f"{name}: can't be decoded, it may be truncated or damaged: {error}") from error


def _import_av() -> Any:
    try:
        import av
    except ImportError as error:
        raise ImportError("video files need PyAV: pip install qwen2vl-fast[video]") from error
    return av


def _open(av: Any, file: BinaryIO, limits: VideoLimits) -> Any:
    file.seek(0)
    # Opening may decode a frame to learn about the stream, and the size in a header is no promise: decoders hold the
    # limit themselves, with room for their padding, since they count a row as a multiple of up to 64 pixels.
    options = {"format_whitelist": CONTAINERS, "max_pixels": str(2 * limits.pixels + 200_000)}
    container = av.open(file, metadata_errors="replace", options=options)
    for stream in container.streams.video[:1]:
        if stream.codec_context is not None:
            stream.codec_context.options = {"max_pixels": options["max_pixels"]}
    return container


def _count_frames(av: Any, file: BinaryIO, limits: VideoLimits, name: str) -> tuple[int, Fraction | None]:
    """Frames and frame rate of a clip, and all its limits, from headers and packets; nothing is decoded."""
    with _open(av, file, limits) as container:
        if not container.streams.video or container.streams.video[0].codec_context is None:
            raise ValueError(f"{name}: no video stream that can be decoded")
        stream = container.streams.video[0]
        check_pixels(stream.codec_context.height, stream.codec_context.width, limits.pixels, name)
        _check_length(stream.frames, limits, name)
        _check_seconds((container.duration or 0) / av.time_base, limits, name)
        total, cut = 0, False
        for packet in container.demux(stream):
            # The packet that ends a stream has no data; those that an edit list cuts away are marked.
            if packet.size > 0 and not packet.is_discard:
                total, cut = total + 1, packet.is_corrupt
                _check_length(total, limits, name)
        # Elsewhere the mark is a gap, as where two broadcasts were joined, and the decoder knows what to do.
        if cut:
            raise ValueError(f"{name}: the file is truncated or damaged after {total - 1} frames")
        rate = stream.average_rate or stream.guessed_rate
    if total == 0:
        raise ValueError(f"{name}: the file has no frames")
    if rate:
        _check_seconds(total / rate, limits, name)
    return total, rate


def _check_length(frames: int, limits: VideoLimits, name: str) -> None:
    if frames > limits.frames:
        raise ValueError(f"{name}: {frames} frames or more, the limit is {limits.frames} (limits.frames)")


def _check_seconds(seconds: Real, limits: VideoLimits, name: str) -> None:
    if seconds > limits.seconds:
        raise ValueError(f"{name}: {float(seconds):.0f} seconds, the limit is {limits.seconds} (limits.seconds)")


def _collect(
    av: Any, file: BinaryIO, total: int, rate: Fraction | None, options: _Options, limits: VideoLimits, name: str
) -> tuple[_Stack, int]:
    """Decodes until the sampled frames of `total` are there. Returns them and how many frames went by."""
    try:
        wanted = sample_indices(total, rate, fps=options.fps, nframes=options.nframes)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    stack, decoded = _Stack(len(wanted), options, name), 0
    with _open(av, file, limits) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        for decoded, frame in enumerate(container.decode(stream), start=1):
            if decoded - 1 == wanted[stack.taken]:
                check_pixels(frame.height, frame.width, limits.pixels, name)
                stack.add(Image.fromarray(_upright(frame)))
                if stack.taken == stack.count:
                    break
    return stack, decoded


def _upright(frame: Any) -> np.ndarray:
    """A decoded frame as RGB [H,W,3], turned by the quarters that the camera noted."""
    return np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90)))


def _check_fps(fps: Any) -> Fraction:
    if fps is None:
        return Fraction(FPS)
    if isinstance(fps, bool) or not isinstance(fps, Real):
        raise TypeError(f"fps: expected a number, got {type(fps).__name__}")
    if not 0 < fps < math.inf:
        raise ValueError(f"fps: expected a positive number, got {fps}")
    return Fraction(float(fps))


def _check_nframes(nframes: Any) -> int | None:
    if nframes is None:
        return None
    nframes = positive("nframes", nframes)
    if not 2 <= nframes <= MAX_FRAMES:
        raise ValueError(f"nframes: expected 2 to {MAX_FRAMES}, got {nframes}")
    return nframes
