"""Faults 9 to 12 of QUALITY.md: frame padding, smart_resize, image modes and orientations, max_pixels."""

from __future__ import annotations

import io
import random

import numpy as np
import pytest
import torch
from PIL import Image

from qwen2vl_fast.media import MAX_PIXELS, MIN_PIXELS, load_image, preprocess_images, smart_resize
from qwen2vl_fast.video import preprocess_videos
from tests.preprocessing import (
    JUDGE_TAKES_ALL_SIZES,
    all_sizes,
    encoded,
    judged_size,
    noise,
    numbered_frames,
    slow_rows,
    write_clip,
)

# --- 9: frame padding -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", range(1, 34))
def test_fault_9_frame_padding(count):
    frames = numbered_frames(count)
    padded = frames if count % 2 == 0 else np.concatenate((frames, frames[-1:]))
    expected = slow_rows(padded)
    for given in (frames, list(frames), [Image.fromarray(frame) for frame in frames], torch.from_numpy(frames)):
        rows, grid = preprocess_videos([given], min_pixels=784)
        assert grid.tolist() == [[(count + 1) // 2, 4, 6]]
        assert torch.equal(rows, expected)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 7])
def test_fault_9_short_files(count, tmp_path):
    frames = numbered_frames(count)
    path = write_clip(tmp_path / "clip.mov", frames)
    rows, grid = preprocess_videos([path], fps=10, min_pixels=784)
    # An odd count is floored to even, but for a file of a single frame, which is repeated.
    taken = [0, 0] if count == 1 else [round(i * (count - 1) / max(1, count // 2 * 2 - 1)) for i in range(count // 2 * 2)]
    assert grid.tolist() == [[len(taken) // 2, 4, 6]]
    assert torch.equal(rows, slow_rows(frames[taken]))


# --- 10: smart_resize -------------------------------------------------------------------------------------------------


def test_fault_10_smart_resize_of_every_size_to_2048():
    rows, columns, refused = all_sizes(2048, MIN_PIXELS, MAX_PIXELS)
    for height in range(1, 2049):
        fits = np.flatnonzero(~refused[height - 1]) + 1
        expected = list(zip(rows[height - 1, fits - 1].tolist(), columns[height - 1, fits - 1].tolist(), strict=True))
        assert [smart_resize(height, width) for width in fits.tolist()] == expected
        for width in (np.flatnonzero(refused[height - 1]) + 1).tolist():
            with pytest.raises(ValueError, match="ratio over 200"):
                smart_resize(height, width)


def test_fault_10_the_formula_is_that_of_transformers():
    rows, columns, refused = all_sizes(2048, MIN_PIXELS, MAX_PIXELS)
    dice = random.Random(10)
    sizes = [(height, width) for height in range(1, 150) for width in range(1, 150)]
    sizes += [(dice.randint(1, 2048), dice.randint(1, 2048)) for _ in range(100_000)]
    sizes += [(dice.randint(1, 40), dice.randint(1, 2048)) for _ in range(20_000)]
    for height, width in sizes:
        if min(height, width) < 28 and not JUDGE_TAKES_ALL_SIZES:
            continue
        if refused[height - 1, width - 1]:
            with pytest.raises(ValueError):
                judged_size(height, width, MIN_PIXELS, MAX_PIXELS)
        else:
            expected = judged_size(height, width, MIN_PIXELS, MAX_PIXELS)
            assert (rows[height - 1, width - 1], columns[height - 1, width - 1]) == expected, (height, width)


# --- 11: modes, orientations, animations ------------------------------------------------------------------------------


def loaded(source) -> np.ndarray:
    image = load_image(source)
    assert image.mode == "RGB"
    return np.asarray(image)


def triple(grey: np.ndarray) -> np.ndarray:
    return np.repeat(grey[:, :, None], 3, 2)


def over_white(colour: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """[H,W,3] over white by alpha [H,W], exact, in 0..255 with fractions."""
    alpha = alpha[:, :, None].astype(np.float64) / 255
    return colour * alpha + 255 * (1 - alpha)


def both(image: Image.Image, format: str = "PNG", **options) -> list:
    """An image as it is, and as a file that keeps its mode."""
    file = encoded(image, format, **options)
    with Image.open(io.BytesIO(file)) as again:
        assert again.mode == image.mode
    return [image, file]


def test_fault_11_mode_l():
    grey = noise(1, 5, 7)
    for source in both(Image.fromarray(grey)):
        assert np.array_equal(loaded(source), triple(grey))


def test_fault_11_mode_1():
    bits = noise(2, 5, 7) > 127
    for source in both(Image.fromarray(bits)):
        assert np.array_equal(loaded(source), triple(bits * np.uint8(255)))


@pytest.mark.parametrize("mode", ["LA", "RGBA"])
def test_fault_11_transparent_modes_go_over_white(mode):
    colour, alpha = noise(3, 16, 16, 3), noise(4, 16, 16)
    alpha[:, 0], alpha[:, 1] = 0, 255
    if mode == "LA":
        colour = triple(colour[:, :, 0])
    image = Image.fromarray(np.dstack((colour, alpha))).convert(mode)
    for source in both(image):
        result = loaded(source)
        # 8-bit compositing rounds to one of the two nearest levels.
        assert np.abs(result - over_white(colour, alpha)).max() < 1
        assert (result[:, 0] == 255).all() and np.array_equal(result[:, 1], colour[:, 1])


@pytest.mark.parametrize("mode", ["La", "RGBa"])
def test_fault_11_premultiplied_modes_go_over_white(mode):
    image = Image.fromarray(np.dstack((np.repeat(noise(12, 8, 8, 1), 3, 2), noise(13, 8, 8)))).convert(mode[:-1] + "A")
    assert np.array_equal(loaded(image.convert(mode)), loaded(image.convert(mode).convert(mode[:-1] + "A")))


def test_fault_11_rgba_array_goes_over_white():
    array = np.dstack((noise(5, 4, 4, 3), np.full((4, 4), 255, np.uint8)))
    array[0, 0, 3] = 0
    expected = array[:, :, :3].copy()
    expected[0, 0] = 255
    assert np.array_equal(loaded(array), expected)


def palette_image() -> tuple[Image.Image, np.ndarray]:
    """Mode P, and its colours [H,W,3]."""
    palette = noise(6, 16, 3)
    indices = noise(7, 6, 8) % 16
    indices[0, :3] = 0, 1, 2
    image = Image.fromarray(indices)
    image = image.convert("L")
    image.putpalette(palette.tobytes())
    assert image.mode == "P"
    return image, palette[indices]


def test_fault_11_mode_p():
    image, colours = palette_image()
    for source in both(image):
        assert np.array_equal(loaded(source), colours)


@pytest.mark.parametrize("format", ["PNG", "GIF"])
def test_fault_11_mode_p_with_a_transparent_entry(format):
    image, colours = palette_image()
    indices = np.asarray(image)
    expected = np.where((indices == 2)[:, :, None], 255, colours)
    assert np.array_equal(loaded(encoded(image, format, transparency=2)), expected)


def test_fault_11_mode_p_with_an_alpha_for_every_entry():
    image, colours = palette_image()
    alpha = bytes([0, 255, 128] + [255] * 13)
    result = loaded(encoded(image, "PNG", transparency=alpha))
    expected = over_white(colours, np.frombuffer(alpha, np.uint8)[np.asarray(image)])
    assert np.abs(result - expected).max() < 1


@pytest.mark.parametrize("mode, key", [("L", 7), ("RGB", (7, 7, 7))])
def test_fault_11_a_transparent_colour_goes_to_white(mode, key):
    grey = noise(8, 6, 6)
    grey[2, 3] = 7
    expected = np.where(grey == 7, 255, grey)
    assert np.array_equal(loaded(encoded(Image.fromarray(grey).convert(mode), "PNG", transparency=key)), triple(expected))


def test_fault_11_mode_cmyk():
    inks = np.array(
        [[[0, 0, 0, 0], [255, 0, 0, 0], [0, 255, 0, 0]], [[0, 0, 255, 0], [0, 0, 0, 255], [0, 0, 0, 128]]], np.uint8
    )
    light = np.array([[[255] * 3, [0, 255, 255], [255, 0, 255]], [[255, 255, 0], [0] * 3, [127] * 3]], np.uint8)
    image = Image.frombytes("CMYK", (3, 2), inks.tobytes())
    assert np.array_equal(loaded(image), light)
    # A JPEG keeps flat areas: 16 x 16 pixels for each ink.
    large = image.resize((48, 32), Image.Resampling.NEAREST)
    assert np.abs(loaded(encoded(large, "JPEG", quality=100))[8::16, 8::16].astype(int) - light).max() <= 2


def test_fault_11_mode_i16():
    levels = np.array([[0, 128, 129, 257, 32767], [32768, 65278, 65406, 65407, 65535]], np.uint16)
    expected = triple(np.array([[0, 0, 1, 1, 127], [128, 254, 254, 255, 255]], np.uint8))
    for source in both(Image.fromarray(levels)):
        assert np.array_equal(loaded(source), expected)
    big_endian = Image.frombytes("I;16B", (5, 2), levels.astype(">u2").tobytes())
    assert np.array_equal(loaded(big_endian), expected)


def test_fault_11_mode_i16_with_a_transparent_level():
    levels = np.array([[0, 1000], [2000, 65535]], np.uint16)
    file = bytearray(encoded(Image.fromarray(levels), "PNG", transparency=1000))
    assert b"tRNS" in file
    assert loaded(bytes(file)).tolist() == [[[0] * 3, [255] * 3], [[8] * 3, [255] * 3]]


# Stored raster of a picture for each orientation: which of its sides the first row and the first column are.
STORED = {
    1: lambda shown: shown,
    2: lambda shown: shown[:, ::-1],
    3: lambda shown: shown[::-1, ::-1],
    4: lambda shown: shown[::-1],
    5: lambda shown: shown.transpose(1, 0, 2),
    6: lambda shown: shown.transpose(1, 0, 2)[::-1],
    7: lambda shown: shown[::-1, ::-1].transpose(1, 0, 2),
    8: lambda shown: shown.transpose(1, 0, 2)[:, ::-1],
}


def with_orientation(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


@pytest.mark.parametrize("orientation", range(1, 9))
def test_fault_11_exif_orientation(orientation):
    shown = noise(9, 30, 80, 3)
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](shown)))
    exif = with_orientation(orientation)
    expected = preprocess_images([Image.fromarray(shown)])
    files = [encoded(stored, "PNG", exif=exif), encoded(stored, "WEBP", lossless=True, exif=exif)]
    opened = Image.open(io.BytesIO(files[0]))
    for source in [*files, opened]:
        assert np.array_equal(loaded(source), shown)
        rows, grid = preprocess_images([source])
        assert torch.equal(grid, expected[1]) and torch.equal(rows, expected[0])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_fault_11_exif_orientation_of_a_jpeg(orientation):
    quarters = np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [255, 255, 255]]], np.uint8)
    shown = quarters.repeat(32, 0).repeat(64, 1)
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](shown)))
    result = loaded(encoded(stored, "JPEG", exif=with_orientation(orientation)))
    assert result.shape == shown.shape
    assert np.array_equal(result[16::32, 32::64] > 127, quarters > 127)


@pytest.mark.parametrize("exif", [b"Exif\0\0garbage", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff", b"\0"])
@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_fault_11_damaged_exif_means_upright(exif):
    image = Image.fromarray(noise(10, 20, 30, 3))
    assert np.array_equal(loaded(encoded(image, "PNG", exif=exif)), np.asarray(image))


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_fault_11_unknown_orientation_means_upright(orientation):
    image = Image.fromarray(noise(11, 20, 30, 3))
    assert np.array_equal(loaded(encoded(image, "PNG", exif=with_orientation(orientation))), np.asarray(image))


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP"])
def test_fault_11_the_first_frame_of_an_animation(format):
    frames = [Image.new("RGB", (20, 10), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if format == "WEBP" else {}
    file = encoded(frames[0], format, save_all=True, append_images=frames[1:], duration=100, loop=0, **options)
    with Image.open(io.BytesIO(file)) as animation:
        assert animation.n_frames == 3
    assert np.array_equal(loaded(file), np.asarray(frames[0]))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"])
def test_fault_11_one_pixel(mode):
    image = Image.new(mode, (1, 1))
    rows, grid = preprocess_images([image])
    assert grid.tolist() == [[1, 4, 4]]
    grey = loaded(image)[0, 0]
    assert torch.equal(rows, slow_rows(np.broadcast_to(grey, (2, 56, 56, 3))))


# --- 12: max_pixels ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_pixels", [784, 3136, 50_000, 1_000_000])
def test_fault_12_max_pixels_of_images(max_pixels):
    sizes = [(28, 28), (100, 1000), (777, 333), (1500, 1500)]
    images = [Image.new("RGB", (width, height)) for height, width in sizes]
    # A ratio of ten needs room for ten tokens: below that a side would be under 28.
    images = [image for image in images if max(image.size) / min(image.size) < max_pixels / 784 or image.width == image.height]
    _, grid = preprocess_images(images, min_pixels=784, max_pixels=max_pixels)
    assert (grid.prod(1) * 196).le(max_pixels).all()
    _, each = preprocess_images(images, min_pixels=784, max_pixels=[max_pixels] * len(images))
    assert torch.equal(each, grid)


def test_fault_12_max_pixels_of_one_image_leaves_the_others():
    images = [Image.new("RGB", (560, 560))] * 3
    _, grid = preprocess_images(images, max_pixels=[None, 28 * 28 * 16, None])
    assert grid.tolist() == [[1, 40, 40], [1, 8, 8], [1, 40, 40]]


def test_fault_12_the_default_is_16384_tokens():
    _, grid = preprocess_images([np.zeros((3600, 3700, 3), np.uint8)])
    assert 16000 < grid.prod() // 4 <= 16384


def test_fault_12_max_pixels_and_max_tokens_of_videos():
    frames = np.zeros((6, 280, 280, 3), np.uint8)
    assert preprocess_videos([frames])[1].tolist() == [[3, 24, 24]], "at least 128 tokens a pair"
    assert preprocess_videos([frames], max_pixels=28 * 28 * 16)[1].tolist() == [[3, 8, 8]]
    assert preprocess_videos([frames, frames], max_pixels=[784 * 16, None], max_tokens=75)[1].tolist() == [
        [3, 8, 8],
        [3, 10, 10],
    ]
