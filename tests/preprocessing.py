"""What the tests of media.py and video.py share: transformers as judge, slow re-derivations, small files."""

from __future__ import annotations

import io
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image

try:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil as ImageJudge
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize as _smart_resize
except ImportError:
    # Before transformers 5 the only processor was the one on PIL.
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor as ImageJudge
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize as _smart_resize

# transformers 4 refuses sides below 28, floors a side to 0, and takes an image 3 pixels high for one with channels first.
JUDGE_TAKES_ALL_SIZES = int(transformers.__version__.split(".")[0]) >= 5

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


def judged_size(height: int, width: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """transformers' smart_resize."""
    return _smart_resize(height, width, 28, min_pixels, max_pixels)


def judged_rows(images: list[Image.Image], bounds: list[tuple[int, int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """pixel_values and image_grid_thw of transformers' PIL processor, each image with its own (min_pixels, max_pixels)."""
    rows, grids = [], []
    for image, (low, high) in zip(images, bounds, strict=True):
        processor = ImageJudge(min_pixels=low, max_pixels=high)
        output = processor(images=[image], return_tensors="pt")
        rows.append(output["pixel_values"])
        grids.append(output["image_grid_thw"])
    return torch.cat(rows), torch.cat(grids)


def slow_rows(frames: np.ndarray) -> torch.Tensor:
    """Patch rows of uint8 [N,H,W,3], N even, one patch at a time from the words of MODEL.md section 1."""
    rows = []
    for first in range(0, len(frames), 2):
        for block_y in range(0, frames.shape[1], 28):
            for block_x in range(0, frames.shape[2], 28):
                for y in (block_y, block_y + 14):
                    for x in (block_x, block_x + 14):
                        row = []
                        for channel in range(3):
                            for frame in (first, first + 1):
                                patch = frames[frame, y : y + 14, x : x + 14, channel].astype(np.float32)
                                patch = (patch / np.float32(255) - np.float32(MEAN[channel])) / np.float32(STD[channel])
                                row.append(patch.reshape(-1))
                        rows.append(np.concatenate(row))
    return torch.from_numpy(np.stack(rows))


def all_sizes(side: int, min_pixels: int, max_pixels: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """smart_resize of every size from 1x1 to side x side, at once: rows, columns, and where the aspect ratio is refused."""
    height, width = np.mgrid[1 : side + 1, 1 : side + 1].astype(np.float64)
    area = height * width
    rounded = [np.rint(length / 28) * 28 for length in (height, width)]
    shrink, grow = np.sqrt(area / max_pixels), np.sqrt(min_pixels / area)
    smaller = [np.maximum(28, np.floor(length / shrink / 28) * 28) for length in (height, width)]
    larger = [np.ceil(length * grow / 28) * 28 for length in (height, width)]
    over, under = rounded[0] * rounded[1] > max_pixels, rounded[0] * rounded[1] < min_pixels
    rows, columns = (
        np.where(over, small, np.where(under, large, near)).astype(np.int64)
        for small, large, near in zip(smaller, larger, rounded, strict=True)
    )
    return rows, columns, np.maximum(height, width) > 200 * np.minimum(height, width)


def noise(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def encoded(image: Image.Image, format: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def numbered_frames(count: int, height: int = 56, width: int = 84) -> np.ndarray:
    """uint8 [count,H,W,3], every frame another one: noise, with the number of the frame in the top rows."""
    frames = noise(count, count, height, width, 3)
    frames[:, :8, :, 0] = np.arange(count, dtype=np.uint8)[:, None, None]
    return frames


def write_clip(
    path: Path,
    frames: np.ndarray,
    *,
    rate: Fraction | int = 10,
    codec: str = "png",
    step: int = 1,
    options: dict[str, str] | None = None,
) -> Path:
    """Frames to a video file; the default codec loses nothing. Frame i is shown at i * step / rate seconds."""
    pixels = {"png": "rgb24", "gif": "rgb8"}.get(codec, "yuv420p")
    import av  # the other helpers also serve machines without it

    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, options=options or {})
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], pixels
        for i, array in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(array, format="rgb24")
            frame.pts, frame.time_base = i * step, 1 / Fraction(rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path
