"""Images to patch rows: transformers' PIL processor is the judge, bit for bit."""

from __future__ import annotations

import io
import random
import struct
import zlib

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from qwen2vl_fast import media
from qwen2vl_fast.media import (
    MAX_PIXELS,
    MIN_PIXELS,
    ImageLimits,
    load_image,
    patchify_frames,
    preprocess_images,
    smart_resize,
)
from tests.preprocessing import (
    JUDGE_TAKES_ALL_SIZES,
    encoded,
    judged_rows,
    judged_size,
    noise,
    slow_rows,
)

SEEDED = settings(derandomize=True, database=None, deadline=None, max_examples=60)
SMALLEST = 1 if JUDGE_TAKES_ALL_SIZES else 28
# (height, width): exact multiples, ties of the rounding, below and above the bounds, the ratio's limit.
SIZES = [(56, 56), (224, 224), (28, 28), (42, 70), (98, 14), (13, 29), (1, 1), (1, 200), (480, 640), (57, 311), (3, 300)]


def picture(height: int, width: int) -> Image.Image:
    return Image.fromarray(noise(height * 10_000 + width, height, width, 3))


def lopsided(height: int, width: int) -> bool:
    return max(height, width) > 200 * min(height, width)


# --- smart_resize -----------------------------------------------------------------------------------------------------


@SEEDED
@given(st.integers(SMALLEST, 5000), st.integers(SMALLEST, 5000), st.integers(784, 200_000), st.integers(0, 20_000_000))
def test_smart_resize_equals_transformers_for_any_bounds(height, width, low, above):
    if lopsided(height, width):
        with pytest.raises(ValueError, match="ratio over 200"):
            smart_resize(height, width)
        return
    expected = judged_size(height, width, low, low + above)
    if JUDGE_TAKES_ALL_SIZES or 0 not in expected:
        assert smart_resize(height, width, min_pixels=low, max_pixels=low + above) == expected


def test_smart_resize_rounds_a_tie_to_the_even_multiple():
    assert smart_resize(70, 98) == (56, 112)
    assert smart_resize(70, 98, factor=20, min_pixels=400) == (80, 100)


@pytest.mark.parametrize("size, fits", [((1, 200), True), ((1, 201), False), ((2010, 10), False), ((2000, 10), True)])
def test_smart_resize_refuses_a_ratio_over_200(size, fits):
    if fits:
        assert min(smart_resize(*size)) >= 28
    else:
        with pytest.raises(ValueError, match=r"ratio over 200 .*crop or pad"):
            smart_resize(*size)


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"height": 0}, ValueError, "height: expected 1 or more, got 0"),
        ({"width": -5}, ValueError, "width: expected 1 or more, got -5"),
        ({"height": 2.0}, TypeError, "height: expected an integer, got float"),
        ({"height": True}, TypeError, "height: expected an integer, got bool"),
        ({"factor": 0}, ValueError, "factor: expected 1 or more"),
        ({"min_pixels": 5000, "max_pixels": 4000}, ValueError, "min_pixels: expected at most max_pixels = 4000, got 5000"),
        ({"min_pixels": 1, "max_pixels": 783}, ValueError, "max_pixels: expected 784 or more"),
        ({"max_pixels": "many"}, TypeError, "max_pixels: expected an integer, got str"),
    ],
)
def test_smart_resize_bad_arguments(options, error, message):
    with pytest.raises(error, match=message):
        smart_resize(**{"height": 100, "width": 100, **options})


def test_smart_resize_takes_numpy_integers_and_returns_int():
    size = smart_resize(np.int64(100), np.int32(100))
    assert size == (112, 112) and type(size[0]) is int


# --- rows and grids against transformers ------------------------------------------------------------------------------


def test_rows_and_grids_equal_transformers():
    images = [picture(*size) for size in SIZES if min(size) >= SMALLEST]
    rows, grid = preprocess_images(images)
    expected_rows, expected_grid = judged_rows(images, [(MIN_PIXELS, MAX_PIXELS)] * len(images))
    assert rows.dtype == torch.float32 and grid.dtype == torch.int64
    assert torch.equal(grid, expected_grid)
    assert torch.equal(rows, expected_rows)


def test_a_large_image_equals_transformers_under_each_bound():
    image = picture(1003, 1530)
    for bounds in [(MIN_PIXELS, MAX_PIXELS), (MIN_PIXELS, 200_000), (3_000_000, MAX_PIXELS)]:
        rows, grid = preprocess_images([image], min_pixels=bounds[0], max_pixels=bounds[1])
        expected_rows, expected_grid = judged_rows([image], [bounds])
        assert torch.equal(grid, expected_grid) and torch.equal(rows, expected_rows)


@SEEDED
@given(st.integers(28, 240), st.integers(28, 240), st.integers(784, 30_000), st.integers(784, 30_000), st.integers(0, 99))
def test_any_rgb_image_equals_transformers(height, width, one, other, seed):
    low, high = sorted((one, other))
    assume(JUDGE_TAKES_ALL_SIZES or 0 not in judged_size(height, width, low, high))
    image = Image.fromarray(noise(seed, height, width, 3))
    rows, grid = preprocess_images([image], min_pixels=low, max_pixels=high)
    expected_rows, expected_grid = judged_rows([image], [(low, high)])
    assert torch.equal(grid, expected_grid) and torch.equal(rows, expected_rows)


def test_bounds_for_each_image():
    images = [picture(200, 300), picture(300, 200), picture(100, 100)]
    bounds = [(MIN_PIXELS, 20_000), (100_000, 200_000), (MIN_PIXELS, MAX_PIXELS)]
    rows, grid = preprocess_images(images, min_pixels=[None, 100_000, None], max_pixels=[20_000, 200_000, None])
    expected_rows, expected_grid = judged_rows(images, bounds)
    assert torch.equal(grid, expected_grid) and torch.equal(rows, expected_rows)


def test_a_bound_that_is_none_gives_way_to_the_other():
    image = picture(200, 300)
    assert preprocess_images([image], min_pixels=None, max_pixels=784)[1].tolist() == [[1, 2, 2]]
    _, grid = preprocess_images([picture(28, 28)], min_pixels=MAX_PIXELS + 784, max_pixels=None)
    assert grid[0, 1] * grid[0, 2] * 196 >= MAX_PIXELS + 784


def test_an_image_has_the_same_rows_alone_and_in_any_company():
    images = [picture(100, 60), picture(300, 200), picture(28, 28)]
    rows, grid = preprocess_images(images)
    alone = [preprocess_images([image]) for image in images]
    assert torch.equal(rows, torch.cat([part for part, _ in alone]))
    assert torch.equal(grid, torch.cat([part for _, part in alone]))


def test_threads_change_nothing(monkeypatch, tmp_path):
    """Images side by side, and the lines of one image: the same rows in the same order as one thread makes them."""
    paths = []
    for i, size in enumerate(((84, 140), (56, 56), (300, 200), (29, 211))):
        paths.append(tmp_path / f"{i}.png")
        picture(*size).save(paths[-1])
    images = [*paths, noise(5, 60, 90, 3), paths[0].read_bytes()]
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    expected, grids = preprocess_images(images)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    monkeypatch.setattr(media, "_BAND", 8)
    frames = noise(6, 6, 112, 84, 3)
    alone = patchify_frames(frames)
    for _ in range(5):
        found, same = preprocess_images(images)
        assert torch.equal(found, expected) and torch.equal(same, grids)
        assert torch.equal(patchify_frames(frames), alone)
    assert torch.equal(alone, slow_rows(frames))
    one = Image.open(paths[2])  # not decoded yet, and twice in the list
    assert torch.equal(preprocess_images([one, one])[0], preprocess_images([paths[2]] * 2)[0])


def test_a_resize_dealt_to_threads_has_the_bits_of_one_call(monkeypatch):
    """Enlarged, reduced, along one side alone, sides below the number of threads; where PIL changes its order."""
    monkeypatch.setattr(media, "_SPLIT", 1)
    sizes = [(28, 28), (84, 140), (140, 84), (300, 29), (720, 1280), (728, 1288), (1, 3)]
    pairs = [(size, other) for size in sizes for other in sizes]
    pairs += [((200, 150), (200 - 2 * less + edge, 150 - less)) for less in (0, 1, 10, 50) for edge in (-1, 0, 1)]
    for i, ((height, width), size) in enumerate(pairs):
        image = Image.fromarray(noise(i, height, width, 3))
        expected = np.asarray(image.resize(size[::-1], Image.Resampling.BICUBIC))
        for threads in (1, 2, 5):
            found = media.resize_frame(image, size, threads=threads)
            assert np.array_equal(found, expected), (height, width, size, threads)


def test_a_large_image_alone_is_resized_by_all_threads(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(media, "_SPLIT", 500 * 700)
    ranges, on_threads = [], media._on_threads
    monkeypatch.setattr(media, "_on_threads", lambda function, items: ranges.append(list(items)) or on_threads(function, items))
    image = Image.fromarray(noise(0, 500, 700, 3))
    alone, _ = preprocess_images([image])
    assert ranges[:2] == [[(0, 250), (250, 500)], [(0, 350), (350, 700)]]
    assert torch.equal(alone, preprocess_images([image, image])[0][: len(alone)])


def test_the_first_bad_image_is_named_whatever_the_threads_do(monkeypatch, tmp_path):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    good = encoded(picture(64, 64), "PNG")
    with pytest.raises(ValueError, match=r"images\[2\]: can't be decoded"):
        preprocess_images([good, good, good[: len(good) // 2], good, good[: len(good) // 3]])


def test_no_images():
    rows, grid = preprocess_images([])
    assert rows.shape == (0, 1176) and grid.shape == (0, 3) and grid.dtype == torch.int64


# --- patchify_frames --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(2, 28, 28, 3), (2, 28, 84, 3), (6, 84, 56, 3), (4, 252, 280, 3)])
def test_patchify_equals_patches_cut_one_by_one(shape):
    frames = noise(0, *shape)
    expected = slow_rows(frames)
    assert torch.equal(patchify_frames(frames), expected)
    assert torch.equal(patchify_frames(torch.from_numpy(frames)), expected)
    # Neither strides nor what was in `out` matter.
    assert torch.equal(patchify_frames(np.asfortranarray(frames)), expected)
    out = torch.full_like(expected, torch.nan)
    assert patchify_frames(frames, out=out) is out and torch.equal(out, expected)


def test_every_grey_level_is_normalised_as_float32_arithmetic_does():
    levels = np.arange(256, dtype=np.uint8)
    frame = np.zeros((1, 28, 28, 3), np.uint8)
    frame.reshape(-1, 3)[:256] = levels[:, None]
    assert torch.equal(patchify_frames(frame), slow_rows(np.repeat(frame, 2, 0)))


def test_a_single_frame_counts_as_two_equal_ones():
    frame = noise(1, 1, 56, 84, 3)
    assert torch.equal(patchify_frames(frame), patchify_frames(np.repeat(frame, 2, 0)))
    assert patchify_frames(frame[:0]).shape == (0, 1176)


@pytest.mark.parametrize(
    "frames, out, error, message",
    [
        (np.zeros((2, 28, 28, 3), np.float32), None, TypeError, "frames: expected uint8, got float32"),
        (np.zeros((3, 28, 28, 3), np.uint8), None, ValueError, "even number of frames, or one, got 3"),
        (np.zeros((2, 28, 42, 3), np.uint8), None, ValueError, "multiples of 28"),
        (np.zeros((2, 3, 28, 28), np.uint8), None, ValueError, r"\[N,H,W,3\]"),
        (np.zeros((28, 28, 3), np.uint8), None, ValueError, r"\[N,H,W,3\]"),
        (torch.zeros(2, 28, 28, 3, dtype=torch.uint8, device="meta"), None, ValueError, "ops.patchify"),
        (np.zeros((2, 28, 28, 3), np.uint8), torch.zeros(5, 1176), ValueError, r"out: expected float32 \[4, 1176\]"),
        (np.zeros((2, 28, 28, 3), np.uint8), torch.zeros(4, 1176).half(), ValueError, "out: expected float32"),
    ],
)
def test_patchify_bad_arguments(frames, out, error, message):
    with pytest.raises(error, match=message):
        patchify_frames(frames, out=out)


# --- sources ----------------------------------------------------------------------------------------------------------


def test_every_source_of_the_same_pixels_gives_the_same_rows(tmp_path):
    array = noise(5, 60, 90, 3)
    image = Image.fromarray(array)
    path = tmp_path / "picture.png"
    path.write_bytes(encoded(image, "PNG"))
    tensor = torch.from_numpy(array)
    sources = {
        "PIL": image,
        "str": str(path),
        "PathLike": path,
        "bytes": path.read_bytes(),
        "bytearray": bytearray(path.read_bytes()),
        "BMP": encoded(image, "BMP"),
        "WebP": encoded(image, "WEBP", lossless=True),
        "array": array,
        "strided array": np.repeat(array, 2, 1)[:, ::2],
        "channels last": tensor,
        "channels first": tensor.permute(2, 0, 1),
        "contiguous channels first": tensor.permute(2, 0, 1).contiguous(),
    }
    expected, _ = preprocess_images([image])
    for name, source in sources.items():
        assert torch.equal(preprocess_images([source])[0], expected), name
    assert np.array_equal(np.asarray(image), array), "an image that was passed in is left as it was"


def test_grey_arrays_with_and_without_a_channel_axis():
    grey = noise(6, 20, 30)
    for source in (grey, grey[:, :, None]):
        assert np.array_equal(np.asarray(load_image(source)), np.repeat(grey[:, :, None], 3, 2))


def test_the_channels_of_a_tensor():
    cube = torch.from_numpy(noise(7, 3, 5, 3))
    assert np.array_equal(np.asarray(load_image(cube)), cube.permute(1, 2, 0).numpy()), "3 in both places: first"
    wide = torch.from_numpy(noise(8, 4, 5, 3))
    assert np.array_equal(np.asarray(load_image(wide)), wide.numpy())


def test_a_jpeg_is_decoded_as_pil_does():
    data = encoded(picture(90, 70), "JPEG")
    decoded = Image.open(io.BytesIO(data)).convert("RGB")
    assert torch.equal(preprocess_images([data])[0], preprocess_images([decoded])[0])


@SEEDED
@given(
    st.sampled_from(["L", "RGB", "RGBA", "LA", "P", "CMYK", "1", "YCbCr", "HSV"]),
    st.integers(1, 50),
    st.integers(1, 50),
    st.integers(0, 99),
)
def test_any_mode_and_size_comes_out_as_rgb_of_that_size(mode, height, width, seed):
    image = Image.fromarray(noise(seed, height, width, 4), "RGBA" if mode in ("RGBA", "LA") else None)
    image = image.convert("RGB").convert(mode) if mode not in ("RGBA", "LA") else image.convert(mode)
    loaded = load_image(image)
    assert loaded.mode == "RGB" and loaded.size == (width, height)
    assert preprocess_images([image])[0].isfinite().all()


# --- bad input --------------------------------------------------------------------------------------------------------

PNG = encoded(picture(40, 50), "PNG")
JPEG = encoded(picture(40, 50), "JPEG")
BAD = {
    "none": (None, TypeError, "expected a PIL image, a path, bytes"),
    "number": (7, TypeError, "got int"),
    "float array": (np.zeros((8, 8, 3), np.float32), TypeError, "expected uint8 .* got float32"),
    "float tensor": (torch.zeros(3, 8, 8), TypeError, "expected uint8 .* got torch.float32"),
    "bool array": (np.zeros((8, 8, 3), bool), TypeError, "got bool"),
    "16-bit array": (np.zeros((8, 8), np.uint16), TypeError, "got uint16"),
    "array of two channels": (np.zeros((8, 8, 2), np.uint8), ValueError, r"got \(8, 8, 2\)"),
    "batch of arrays": (np.zeros((1, 8, 8, 3), np.uint8), ValueError, r"got \(1, 8, 8, 3\)"),
    "vector": (np.zeros(8, np.uint8), ValueError, r"got \(8,\)"),
    "array without pixels": (np.zeros((0, 8, 3), np.uint8), ValueError, "at least one pixel, got 0 x 8"),
    "tensor of four channels": (torch.zeros(4, 8, 8, dtype=torch.uint8), ValueError, r"\[3,H,W\] or \[H,W,3\]"),
    "flat tensor": (torch.zeros(8, 8, dtype=torch.uint8), ValueError, r"\[3,H,W\] or \[H,W,3\]"),
    "image without pixels": (Image.new("RGB", (0, 4)), ValueError, "at least one pixel"),
    "32-bit mode": (Image.new("I", (40, 40)), ValueError, "mode I has no fixed range"),
    "float mode": (Image.new("F", (40, 40)), ValueError, "mode F has no fixed range"),
    "url": ("https://example.com/a.png", ValueError, "URLs are not opened"),
    "other url": ("s3+ssl://bucket/a.png", ValueError, "URLs are not opened"),
    "file url": ("file:///a.png", ValueError, "URLs are not opened"),
    "data url": ("data:image/png;base64,AAAA", ValueError, "URLs are not opened"),
    "null byte": ("a\0b", ValueError, "can't be a path"),
    "missing file": ("no/such/file.png", FileNotFoundError, "No such file"),
    "empty bytes": (b"", ValueError, "the file is empty"),
    "text": (b"hello, this is no picture", ValueError, "not a PNG, JPEG, WebP, GIF or BMP"),
    "TIFF": (encoded(picture(40, 50), "TIFF"), ValueError, "not a PNG, JPEG, WebP, GIF or BMP"),
    "PPM": (encoded(picture(40, 50), "PPM"), ValueError, "not a PNG, JPEG, WebP, GIF or BMP"),
    "half a PNG": (PNG[: len(PNG) // 2], ValueError, "truncated or damaged"),
    "half a JPEG": (JPEG[: len(JPEG) // 2], ValueError, "truncated or damaged"),
    "half a GIF": (encoded(picture(40, 50), "GIF")[:1500], ValueError, "truncated or damaged"),
    "half a BMP": (encoded(picture(40, 50), "BMP")[:1500], ValueError, "truncated or damaged"),
    "half a WebP": (encoded(picture(40, 50), "WEBP")[:500], ValueError, "can't be opened|not a PNG"),
    "PNG with a wrong byte": (PNG[:200] + b"\0\0\0" + PNG[203:], ValueError, "truncated or damaged"),
    "aspect ratio": (np.zeros((1, 201), np.uint8), ValueError, "ratio over 200"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_images_are_refused_by_place(name):
    source, error, message = BAD[name]
    with pytest.raises(error, match=rf"images\[1\]: .*({message})"):
        preprocess_images([picture(30, 30), source])


def test_paths_that_are_no_files(tmp_path):
    with pytest.raises(ValueError, match=r"images\[0\]: not a regular file"):
        preprocess_images([tmp_path])
    empty = tmp_path / "empty.png"
    empty.touch()
    with pytest.raises(ValueError, match=r"images\[0\]: the file is empty"):
        preprocess_images([empty])


@pytest.mark.parametrize("images", [Image.new("RGB", (30, 30)), np.zeros((30, 30, 3), np.uint8), "a.png", None, b"x"])
def test_one_image_is_no_list(images):
    with pytest.raises(TypeError, match="put a single image in a list"):
        preprocess_images(images)


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"min_pixels": [1, 2]}, ValueError, "min_pixels: expected one value, or a list of 1, .* got 2"),
        ({"max_pixels": []}, ValueError, "max_pixels: expected one value, or a list of 1"),
        ({"max_pixels": [2.5]}, TypeError, "max_pixels: expected an integer, got float"),
        ({"min_pixels": 0}, ValueError, "min_pixels: expected 1 or more, got 0"),
        ({"max_pixels": 1000}, ValueError, "min_pixels: expected at most max_pixels = 1000, got 3136"),
    ],
)
def test_bad_bounds(options, error, message):
    with pytest.raises(error, match=message):
        preprocess_images([picture(30, 30)], **options)


# --- limits, before decoding ------------------------------------------------------------------------------------------


def bomb(format: str, width: int, height: int) -> bytes:
    """A small file whose header claims width x height."""
    data = bytearray(encoded(picture(16, 16), format))
    if format == "PNG":
        data[16:24] = struct.pack(">II", width, height)
        data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    elif format == "GIF":
        data[6:10] = struct.pack("<HH", width, height)
    elif format == "BMP":
        data[18:26] = struct.pack("<ii", width, height)
    elif format == "WEBP":
        data[26:30] = struct.pack("<HH", width, height)
    else:
        start = data.index(b"\xff\xc0")
        data[start + 5 : start + 9] = struct.pack(">HH", height, width)
    return bytes(data)


@pytest.fixture
def no_decoding(monkeypatch):
    def refuse(*_):
        raise AssertionError("decoded")

    monkeypatch.setattr(media, "_to_rgb", refuse)


@pytest.mark.parametrize(
    "format, side",
    [(format, side) for format in media.FORMATS for side in (10_000, 60_000) if (format, side) != ("WEBP", 60_000)],
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_bombs_are_refused_from_the_header(format, side, no_decoding):
    # PIL itself refuses the larger one when it opens the file.
    with pytest.raises(ValueError, match=r"images\[1\]: .*(limits.pixels|exceeds limit)"):
        preprocess_images([np.zeros((28, 28, 3), np.uint8), bomb(format, side, side)])


def test_the_limit_of_pixels_is_exact(no_decoding):
    small = ImageLimits(pixels=99)
    for source in (np.zeros((10, 10), np.uint8), Image.new("RGB", (10, 10)), encoded(Image.new("L", (10, 10)), "PNG")):
        with pytest.raises(ValueError, match=r"10 x 10 pixels are over the limit of 99 \(limits.pixels\)"):
            preprocess_images([source], limits=small)
        with pytest.raises(AssertionError, match="decoded"):
            preprocess_images([source], limits=ImageLimits(pixels=100))


def test_the_limit_of_bytes(tmp_path, no_decoding):
    path = tmp_path / "picture.png"
    path.write_bytes(PNG)
    for source in (path, PNG):
        with pytest.raises(ValueError, match=rf"images\[0\]: {len(PNG)} bytes, the limit is {len(PNG) - 1}"):
            preprocess_images([source], limits=ImageLimits(file_bytes=len(PNG) - 1))


def test_a_file_that_grows_while_it_is_opened(tmp_path, monkeypatch, no_decoding):
    path = tmp_path / "picture.png"
    path.write_bytes(PNG)
    monkeypatch.setattr(media, "check_path", lambda path, *_: path)
    with pytest.raises(ValueError, match=r"images\[0\]: .* the limit is 100 "):
        preprocess_images([path], limits=ImageLimits(file_bytes=100))


def test_the_limit_of_items(no_decoding):
    with pytest.raises(ValueError, match="images: 3 images, the limit is 2"):
        preprocess_images([PNG] * 3, limits=ImageLimits(items=2))


def test_the_limit_of_visual_tokens(no_decoding):
    # 280 x 280 is 100 tokens.
    with pytest.raises(ValueError, match="images: 300 visual tokens, the limit is 299"):
        preprocess_images([picture(280, 280)] * 3, limits=ImageLimits(tokens=299))


@pytest.mark.parametrize("format", media.FORMATS)
def test_damaged_files_give_an_image_or_a_value_error(format):
    dice = random.Random(format)
    intact = encoded(picture(30, 40), format)
    for _ in range(60):
        data = bytearray(intact)
        for _ in range(dice.choice((1, 3, 20))):
            data[dice.randrange(min(len(data), dice.choice((64, len(data)))))] = dice.randrange(256)
        if dice.random() < 0.2:
            del data[dice.randrange(len(data)) :]
        try:
            image = load_image(bytes(data), limits=ImageLimits(pixels=1_000_000))
        except ValueError as error:
            assert str(error).startswith("image: ")
        else:
            assert image.mode == "RGB"
