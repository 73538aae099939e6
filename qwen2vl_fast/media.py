"""Images to patch rows: load, convert to RGB, resize, normalise, cut into patches (MODEL.md section 1).

Everything here runs on the host with PIL, numpy and torch. Files are checked from their header before they are decoded.
"""

from __future__ import annotations

import io
import itertools
import math
import operator
import os
import re
import stat
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from .reference import IMAGE_MEAN, IMAGE_STD

PATCH = 14
MERGE = 2
FACTOR = PATCH * MERGE
TOKEN_PIXELS = FACTOR * FACTOR
ROW = 3 * 2 * PATCH * PATCH
MIN_PIXELS = 4 * TOKEN_PIXELS
MAX_PIXELS = 16384 * TOKEN_PIXELS
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")

# Rows normalised at a time: 128 rows of a still image are 300 KB of float32, so the passes over them stay in cache.
_BLOCK = 128
_BAND = 1024  # rows that a thread takes at a time, as whole lines of squares
_SPLIT = 2**20  # pixels from which on the resize of a single image is dealt to threads
_EXIF_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Two letters or more before the colon, so that a Windows drive is a path.
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.\-]+://|data:", re.IGNORECASE)


@dataclass(frozen=True)
class ImageLimits:
    """What one call accepts; known from headers and checked before anything is decoded.

    file_bytes: of one encoded image.
    pixels: of one image as stored. The default is where PIL begins to warn of decompression bombs; PIL refuses twice
        that size, so for more than that raise PIL's Image.MAX_IMAGE_PIXELS too.
    items: images in a call.
    tokens: visual tokens of a call after resizing; one token is 18.8 KB of rows.
    """

    file_bytes: int = 64 * 2**20
    pixels: int = 89_478_485
    items: int = 1024
    tokens: int = 2**18


DEFAULT_LIMITS = ImageLimits()


def smart_resize(
    height: int, width: int, *, factor: int = FACTOR, min_pixels: int = MIN_PIXELS, max_pixels: int = MAX_PIXELS
) -> tuple[int, int]:
    """The size at which an image enters the model: sides that are multiples of `factor`, the area between the bounds.

    Both sides are rounded to the nearest multiple, a tie to the even one. If that area is above max_pixels, the sides
    are scaled by sqrt(max_pixels / (height*width)) and floored to multiples, one factor at least; if it is below
    min_pixels, they are scaled by sqrt(min_pixels / (height*width)) and ceiled.

    Args:
        height, width: pixels, 1 or more.
        factor: patch side times merge side.
        min_pixels, max_pixels: bounds of the area. As no side is below `factor`, a long thin image can stay above
            max_pixels; so can a small one whose sides were ceiled, if the bounds are close together.
    Returns:
        (height, width), multiples of factor.
    Raises:
        TypeError, ValueError: not an integer, not positive, min_pixels over max_pixels, max_pixels below factor^2, or
            one side over 200 times the other.
    Source: MODEL.md section 1.
    """
    height, width, factor = positive("height", height), positive("width", width), positive("factor", factor)
    min_pixels, max_pixels = check_bounds(min_pixels, max_pixels, factor=factor)
    if max(height, width) > 200 * min(height, width):
        raise ValueError(f"height, width: aspect ratio over 200 ({height} x {width}); crop or pad the image")
    rows, columns = round(height / factor) * factor, round(width / factor) * factor
    if rows * columns > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        rows = max(factor, math.floor(height / shrink / factor) * factor)
        columns = max(factor, math.floor(width / shrink / factor) * factor)
    elif rows * columns < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        rows = math.ceil(height * grow / factor) * factor
        columns = math.ceil(width * grow / factor) * factor
    return rows, columns


def load_image(image: Any, *, limits: ImageLimits = DEFAULT_LIMITS, name: str = "image") -> Image.Image:
    """An image from any accepted source, upright and in mode RGB.

    - Transparency (RGBA, LA, PA, a transparent palette entry or colour) is composited over white.
    - 16-bit grey is scaled to 8 bits. CMYK, YCbCr, HSV and 1-bit images are converted by PIL.
    - EXIF orientation is applied, also to a PIL image that still carries it. EXIF that can't be read means upright.
    - The first frame of an animated file is taken; a PIL image is taken at the frame where its owner left it.

    Args:
        image: one of
            a PIL image of any mode but I and F;
            a path (str or os.PathLike) or the bytes of a PNG, JPEG, WebP, GIF or BMP file;
            a numpy array, uint8, [H,W], [H,W,1], [H,W,3] or [H,W,4] (RGBA);
            a tensor, uint8, [3,H,W] or [H,W,3]; with 3 in both places it is channels first.
        limits: bytes and pixels, checked before decoding.
        name: what error messages call the image.
    Returns:
        PIL image of mode RGB; the given object itself if there was nothing to do.
    Raises:
        TypeError: an unknown kind of object, or an array that is not uint8.
        ValueError: a URL; a file that is empty, truncated, damaged or of another format; a limit passed.
        OSError: a path that can't be read (FileNotFoundError and others).
    """
    return _to_rgb(_open(image, limits, name), name)


def preprocess_images(
    images: Sequence[Any],
    *,
    min_pixels: int | Sequence[int | None] | None = MIN_PIXELS,
    max_pixels: int | Sequence[int | None] | None = MAX_PIXELS,
    limits: ImageLimits = DEFAULT_LIMITS,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Images to patch rows and grids: load_image, smart_resize by PIL's bicubic filter, (x/255 - mean) / std, patches.

    Args:
        images: list or tuple of what load_image takes.
        min_pixels, max_pixels: bounds for smart_resize, one for all or a list with one for each. None is the default,
            or less (more) where that would cross the other bound.
        limits: bytes, pixels, images and visual tokens, checked before decoding.
    Returns:
        pixel_values: [T, 1176] float32, T = sum t*h*w. A row is (channel 3, frame 2, y 14, x 14), the two frames of an
            image being equal; rows are in merge order (t, h/2, w/2, 2, 2).
        grid_thw: [N, 3] int64, (1, h, w) in patches.
    Raises:
        As load_image and smart_resize; the message begins with the place of the image, images[i].
    Precision: float32; x/255, minus mean, over std are rounded one by one.
    Source: MODEL.md section 1.
    """
    if not isinstance(images, (list, tuple)):
        raise TypeError(f"images: expected a list or tuple, got {type(images).__name__}; put a single image in a list")
    if len(images) > limits.items:
        raise ValueError(f"images: {len(images)} images, the limit is {limits.items} (limits.items)")
    bounds = bounds_per_item(min_pixels, max_pixels, len(images), (MIN_PIXELS, MAX_PIXELS))
    named = [(f"images[{i}]", image, *bounds[i]) for i, image in enumerate(images)]

    # A first round over the headers alone, none of which is kept: a thousand open files are too many.
    tokens = 0
    for name, image, low, high in named:
        header = _open(image, limits, name)
        # EXIF may still swap the sides; the number of tokens is the same either way.
        rows, columns = resized(header.height, header.width, low, high, name)
        tokens += rows * columns // TOKEN_PIXELS
    check_tokens("images", tokens, limits.tokens)

    def frame(item: tuple[str, Any, int, int]) -> np.ndarray:
        name, image, low, high = item
        loaded = load_image(image, limits=limits, name=name)
        size = resized(loaded.height, loaded.width, low, high, name)
        return resize_frame(loaded, size, threads=torch.get_num_threads() if len(images) == 1 else 1)[None]

    # Two of the list may be one PIL object, which decodes itself when it is first looked at.
    alone = not any(isinstance(image, Image.Image) for image in images)
    return pack_rows(_on_threads(frame, named) if alone else list(map(frame, named)))


def _on_threads(function: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
    """function of each item, on as many threads as torch has: PIL and numpy work outside the interpreter's lock.

    The threads end with the call, so that none is missing in a process that is forked later.
    """
    threads = min(len(items), torch.get_num_threads())
    if threads < 2:
        return list(map(function, items))
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(function, items))


def pack_rows(media: Sequence[np.ndarray | torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Resized media, uint8 [N,H,W,3] with N = 1 or even, to one pack: rows float32 [T,1176], grids int64 [len,3]."""
    grids = [(max(1, len(frames) // 2), frames.shape[1] // PATCH, frames.shape[2] // PATCH) for frames in media]
    rows = _rows(sum(math.prod(grid) for grid in grids))
    start = 0
    for frames, grid in zip(media, grids, strict=True):
        patchify_frames(frames, out=rows[start : start + math.prod(grid)])
        start += math.prod(grid)
    return rows, torch.tensor(grids, dtype=torch.int64).reshape(-1, 3)


def _rows(count: int) -> torch.Tensor:
    """Not torch.empty: numpy asks for huge pages, and the first touch of small ones costs more than what is written to them."""
    return torch.from_numpy(np.empty((count, ROW), np.float32))


def patchify_frames(frames: np.ndarray | torch.Tensor, *, out: torch.Tensor | None = None) -> torch.Tensor:
    """Frames on the host to normalised patch rows in merge order; (x/255 - mean) / std in one pass over the rows.

    Args:
        frames: uint8 [N,H,W,3], sides multiples of 28. N is even, or 1 for a still image: two equal frames.
        out: float32 [T,1176], contiguous, to write to. T = max(1, N/2) * H/14 * W/14.
    Returns:
        [T,1176] float32, rows (pair, h/2, w/2, 2, 2), columns (channel 3, frame 2, y 14, x 14).
    Raises:
        TypeError, ValueError: dtype, shape or device of frames or out.
    Precision: the bits that float32 arithmetic in this order gives.
    """
    if isinstance(frames, torch.Tensor):
        if frames.device.type != "cpu":
            raise ValueError(f"frames: expected a host tensor, got one on {frames.device}; use ops.patchify there")
        frames = frames.numpy()
    if frames.dtype != np.uint8:
        raise TypeError(f"frames: expected uint8, got {frames.dtype}")
    shape = frames.shape
    if len(shape) != 4 or shape[3] != 3 or shape[1] % FACTOR or shape[2] % FACTOR:
        raise ValueError(f"frames: expected [N,H,W,3] with H and W multiples of {FACTOR}, got {shape}")
    n, height, width = shape[:3]
    if n % 2 and n != 1:
        raise ValueError(f"frames: expected an even number of frames, or one, got {n}; repeat the last frame")
    per_pair = 1 if n == 1 else 2
    pairs, patches = n // per_pair, (height // PATCH) * (width // PATCH)
    if out is None:
        out = _rows(pairs * patches)
    elif out.shape != (pairs * patches, ROW) or out.dtype != torch.float32 or not out.is_contiguous():
        raise ValueError(f"out: expected float32 [{pairs * patches}, {ROW}], got {out.dtype} {tuple(out.shape)}")

    # numpy: as fast as torch on one core, and not slowed when other work keeps torch's thread pool waiting.
    mean, std = (np.array(values, np.float32)[:, None, None, None] for values in (IMAGE_MEAN, IMAGE_STD))
    target = out.numpy().reshape(pairs, patches, 3, 2, PATCH * PATCH)
    cells = frames.reshape(pairs, per_pair, height // FACTOR, MERGE, PATCH, width // FACTOR, MERGE, PATCH, 3)
    bands = target.reshape(pairs, height // FACTOR, width // FACTOR * MERGE * MERGE, *target.shape[2:])

    def normalise(place: tuple[int, int, int]) -> None:
        pair, first, end = place
        # Axes of a pair: frame, H/28, merge y, y, W/28, merge x, x, channel. Bytes are cheaper to move than floats, and those
        # of a patch's line lie together; the channels are parted by the cast, so that what follows runs over long rows.
        rows = bands[pair, first:end].reshape(-1, *target.shape[2:])
        values = cells[pair, :, first:end].transpose(1, 4, 2, 5, 0, 3, 6, 7).reshape(len(rows), per_pair, PATCH * PATCH, 3)
        for start in range(0, len(rows), _BLOCK):
            block = values[start : start + _BLOCK].transpose(3, 0, 1, 2).astype(np.float32, order="C")
            block /= 255
            block -= mean
            block /= std
            rows[start : start + _BLOCK] = block.transpose(1, 0, 2, 3)

    step = max(1, _BAND // max(1, width // FACTOR * MERGE * MERGE))
    places = [(pair, first, first + step) for pair in range(pairs) for first in range(0, height // FACTOR, step)]
    if len(places) * step * width // FACTOR * MERGE * MERGE < 2 * _BAND:
        list(map(normalise, places))
    else:
        _on_threads(normalise, places)
    return out


def resize_frame(image: Image.Image, size: tuple[int, int], *, threads: int = 1) -> np.ndarray:
    """An RGB image at `size` = (height, width) by PIL's bicubic filter, as uint8 [H,W,3] to read.

    Large images are dealt to threads, rows of PIL's pass along them and then columns of its pass down: each row and column
    is computed by itself and rounded to 8 bits, so the bits are those of one call. That holds where PIL takes these passes in
    this order: since Pillow 13 not where the height shrinks by more than twice as many pixels as the width.
    """
    height, width = size
    small = max(image.width * image.height, height * width) < _SPLIT
    down_first = image.height - height > max(0, 2 * (image.width - width))
    if threads < 2 or image.size == (width, height) or small or down_first:
        return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))
    wide = Image.new("RGB", (width, image.height))
    frame = np.empty((height, width, 3), np.uint8)

    def along(rows: tuple[int, int]) -> None:
        part = image.crop((0, rows[0], image.width, rows[1]))
        wide.paste(part.resize((width, part.height), Image.Resampling.BICUBIC), (0, rows[0]))

    def down(columns: tuple[int, int]) -> None:
        part = wide.crop((columns[0], 0, columns[1], wide.height))
        frame[:, slice(*columns)] = part.resize((part.width, height), Image.Resampling.BICUBIC)

    _on_threads(along, _parts(wide.height, threads))
    _on_threads(down, _parts(width, threads))
    return frame


def _parts(length: int, count: int) -> list[tuple[int, int]]:
    """`count` ranges of about the same size, none empty, that make up range(length)."""
    ends = [length * i // count for i in range(count + 1)]
    return [(start, end) for start, end in itertools.pairwise(ends) if start < end]


def resized(height: int, width: int, min_pixels: int, max_pixels: int, name: str) -> tuple[int, int]:
    """smart_resize whose error says which image it was."""
    try:
        return smart_resize(height, width, min_pixels=min_pixels, max_pixels=max_pixels)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def per_item(name: str, value: Any, count: int) -> list[Any]:
    """One value for all, or a list with one for each of `count` items, to a list."""
    if not isinstance(value, (list, tuple)):
        return [value] * count
    if len(value) != count:
        raise ValueError(f"{name}: expected one value, or a list of {count}, one for each item, got {len(value)}")
    return list(value)


def bounds_per_item(min_pixels: Any, max_pixels: Any, count: int, default: tuple[int, int]) -> list[tuple[int, int]]:
    """The two bounds of every item. A bound that is None is its default, or gives way to the other where they cross."""
    bounds = []
    for low, high in zip(per_item("min_pixels", min_pixels, count), per_item("max_pixels", max_pixels, count), strict=True):
        low = low if low is None else positive("min_pixels", low)
        high = high if high is None else positive("max_pixels", high)
        if low is None:
            low = default[0] if high is None else min(default[0], high)
        bounds.append(check_bounds(low, max(default[1], low) if high is None else high))
    return bounds


def check_bounds(min_pixels: int, max_pixels: int, *, factor: int = FACTOR) -> tuple[int, int]:
    """The bounds of an area as integers, in order, with room for one square of factor x factor."""
    min_pixels, max_pixels = positive("min_pixels", min_pixels), positive("max_pixels", max_pixels)
    if max_pixels < factor * factor:
        raise ValueError(f"max_pixels: expected {factor * factor} or more, one visual token, got {max_pixels}")
    if min_pixels > max_pixels:
        raise ValueError(f"min_pixels: expected at most max_pixels = {max_pixels}, got {min_pixels}")
    return min_pixels, max_pixels


def check_tokens(name: str, tokens: int, limit: int) -> None:
    """Refuses a call whose media come to more visual tokens than the limit."""
    if tokens > limit:
        raise ValueError(f"{name}: {tokens} visual tokens, the limit is {limit} (limits.tokens); lower max_pixels")


def check_path(path: str | os.PathLike, limit: int, name: str) -> str:
    """The path of a regular file, not empty and of at most `limit` bytes. URLs are refused."""
    path = os.fsdecode(path)
    if _URL.match(path):
        raise ValueError(f"{name}: URLs are not opened; download it and pass a path or bytes, got {path[:80]!r}")
    try:
        status = os.stat(path)
    except OSError as error:
        raise OSError(error.errno, f"{name}: {error.strerror}", path) from error
    except ValueError as error:  # a null byte, or a character that the file system can't spell
        raise ValueError(f"{name}: {path[:80]!r} can't be a path: {error}") from error
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{name}: not a regular file: {path!r}")
    check_bytes(status.st_size, limit, name)
    return path


def check_bytes(size: int, limit: int, name: str) -> None:
    """Refuses an empty file and one over the limit."""
    if size == 0:
        raise ValueError(f"{name}: the file is empty")
    if size > limit:
        raise ValueError(f"{name}: {size} bytes, the limit is {limit} (limits.file_bytes)")


def check_pixels(height: int, width: int, limit: int, name: str) -> None:
    """Refuses an image without pixels and one over the limit."""
    if height < 1 or width < 1:
        raise ValueError(f"{name}: expected at least one pixel, got {height} x {width}")
    if height * width > limit:
        raise ValueError(f"{name}: {height} x {width} pixels are over the limit of {limit} (limits.pixels)")


def _open(image: Any, limits: ImageLimits, name: str) -> Image.Image:
    """A PIL image within the limits; the pixels of a file are not decoded yet."""
    if isinstance(image, (np.ndarray, torch.Tensor)):
        return _from_array(image, limits, name)
    if isinstance(image, (str, os.PathLike)):
        with open(check_path(image, limits.file_bytes, name), "rb") as file:
            # One byte more than allowed shows a file that has grown since.
            image = file.read(limits.file_bytes + 1)
    if isinstance(image, (bytes, bytearray, memoryview)):
        check_bytes(len(image), limits.file_bytes, name)
        try:
            image = Image.open(io.BytesIO(image), formats=FORMATS)
        except Image.UnidentifiedImageError as error:
            raise ValueError(f"{name}: not a PNG, JPEG, WebP, GIF or BMP file, or its header is damaged") from error
        except Exception as error:  # decoders raise many types on damaged data
            raise ValueError(f"{name}: the file can't be opened: {error}") from error
    if not isinstance(image, Image.Image):
        raise TypeError(
            f"{name}: expected a PIL image, a path, bytes, or a uint8 numpy array or tensor, got {type(image).__name__}"
        )
    check_pixels(image.height, image.width, limits.pixels, name)
    return image


def _from_array(array: np.ndarray | torch.Tensor, limits: ImageLimits, name: str) -> Image.Image:
    shape = tuple(array.shape)
    if array.dtype not in (np.uint8, torch.uint8):
        raise TypeError(
            f"{name}: expected uint8 values from 0 to 255, got {array.dtype}; convert it, "
            "values from 0 to 1 by (x * 255).round() and a cast to uint8"
        )
    if isinstance(array, torch.Tensor):
        if len(shape) != 3 or 3 not in (shape[0], shape[2]):
            raise ValueError(f"{name}: expected a tensor [3,H,W] or [H,W,3], got {shape}")
        array = (array.permute(1, 2, 0) if shape[0] == 3 else array).cpu().numpy()
    elif len(shape) != 2 and not (len(shape) == 3 and shape[2] in (1, 3, 4)):
        raise ValueError(f"{name}: expected an array [H,W], [H,W,1], [H,W,3] or [H,W,4], got {shape}")
    elif shape[2:] == (1,):
        array = array[:, :, 0]
    check_pixels(array.shape[0], array.shape[1], limits.pixels, name)
    return Image.fromarray(np.ascontiguousarray(array))


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    """Decoded, upright, over white, mode RGB."""
    if image.mode in ("I", "F"):
        raise ValueError(f"{name}: mode {image.mode} has no fixed range; scale it to 0..255 and convert it to L first")
    try:
        image.load()
        turn = _TURNS.get(_orientation(image))
        if image.mode.startswith("I;16"):
            image = _grey16(image)
        elif image.has_transparency_data:
            # PIL has no direct way from premultiplied grey to RGBA.
            image = image.convert("LA") if image.mode == "La" else image
            white = Image.new("RGBA", image.size, (255, 255, 255, 255))
            image = Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
        elif image.mode != "RGB":
            image = image.convert("RGB")
        return image if turn is None else image.transpose(turn)
    except Exception as error:  # decoders raise many types on damaged data
        raise ValueError(f"{name}: can't be decoded, it may be truncated or damaged: {error}") from error


def _orientation(image: Image.Image) -> int:
    """EXIF orientation. Much software writes damaged EXIF round good pixels: such an image counts as upright."""
    try:
        return image.getexif().get(_EXIF_ORIENTATION, 1)
    except Exception:  # PIL's parser raises SyntaxError, struct.error, ValueError and others
        return 1


def _grey16(image: Image.Image) -> Image.Image:
    """16-bit grey to RGB, 0..65535 to 0..255, to the nearest; PIL's own conversion clips at 255."""
    values = np.asarray(image).astype(np.uint32)
    grey = ((values + 128) // 257).astype(np.uint8)
    transparent = image.info.get("transparency")
    if transparent is not None:
        grey[values == transparent] = 255
    return Image.fromarray(grey).convert("RGB")


def positive(name: str, value: Any) -> int:
    """An option that is an integer of 1 or more; numpy's integers count, bool does not."""
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None:
        raise TypeError(f"{name}: expected an integer, got {type(value).__name__}")
    if number < 1:
        raise ValueError(f"{name}: expected 1 or more, got {number}")
    return number
