"""Bad input to the model and to generation, as a table: what must raise which error, and which words it must say.

Run without pytest by tests/bad_checkpoints.py, which adds configurations and checkpoints to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from qwen2vl_fast import Qwen2VL
from qwen2vl_fast.cache import KVCache
from tests import models

ROWS = [[("text", 2), ("image", 4, 6), ("text", 3), ("image", 2, 2)], [("video", 2, 4, 4), ("text", 4)]]


class Case(NamedTuple):
    """call(folder) must raise `error` with every one of `says` in its message. folder: an empty one to work in."""

    call: Callable[[Path], Any]
    error: type[Exception] | tuple[type[Exception], ...]
    says: tuple[str, ...]


CASES: dict[str, Case] = {}


def case(name: str, error: Any, *says: str) -> Callable:
    def register(call: Callable[[Path], Any]) -> None:
        if name in CASES:
            raise KeyError(f"two cases are called {name!r}")
        CASES[name] = Case(call, error, says)

    return register


def ours() -> Qwen2VL:
    return models.pair()[1]


# The inputs of forward and generate.


def given(**changes: Any) -> dict[str, Any]:
    return {**models.batch(ROWS), **changes}


def without(*names: str) -> dict[str, Any]:
    return {name: value for name, value in models.batch(ROWS).items() if name not in names}


def cut(name: str, *index: Any) -> dict[str, Any]:
    return given(**{name: models.batch(ROWS)[name][index]})


GRID = models.batch(ROWS)["image_grid_thw"]
PIXELS = models.batch(ROWS)["pixel_values"]
IDS = models.batch(ROWS)["input_ids"]
B, S = IDS.shape
FREE = {"mm_token_type_ids": None}


def edited(tensor: torch.Tensor, index: Any, value: Any) -> torch.Tensor:
    changed = tensor.clone()
    changed[index] = value
    return changed


INPUTS: dict[str, tuple[dict[str, Any], Any, tuple[str, ...]]] = {
    "no input": (without("input_ids"), ValueError, ("input_ids", "inputs_embeds", "neither")),
    "ids: a list": (given(input_ids=IDS.tolist()), TypeError, ("input_ids", "tensor", "list")),
    "ids: dtype": (given(input_ids=IDS.double()), TypeError, ("input_ids", "int64", "float64")),
    "ids: rank": (given(input_ids=IDS[0]), ValueError, ("input_ids", "[B, S]", f"[{S}]")),
    "ids: empty": ({"input_ids": IDS[:, :0]}, ValueError, ("input_ids", "[2, 0]")),
    "ids: no sequence": ({"input_ids": IDS[:0]}, ValueError, ("input_ids", f"[0, {S}]")),
    "ids: beyond the vocabulary": (
        given(input_ids=edited(IDS, (0, 0), models.VOCAB), attention_mask=None),
        ValueError,
        ("input_ids", "0..271", "272"),
    ),
    "ids: negative": (given(input_ids=edited(IDS, (1, -1), -1)), ValueError, ("input_ids", "0..271", "-1")),
    "mask: shape": (
        given(attention_mask=torch.ones(B, S - 1)),
        ValueError,
        ("attention_mask", f"[{B}, {S}]", f"[{B}, {S - 1}]"),
    ),
    "mask: rank": (given(attention_mask=torch.ones(B, 1, S, S)), ValueError, ("attention_mask", f"[{B}, {S}]")),
    "mask: a list": (given(attention_mask=[[1] * S] * B), TypeError, ("attention_mask", "tensor", "list")),
    "mask: a sequence of padding": (
        given(attention_mask=edited(torch.ones(B, S), 1, 0)),
        ValueError,
        ("attention_mask", "row 1", "at least one"),
    ),
    "types: shape": (given(mm_token_type_ids=torch.zeros(B, 1)), ValueError, ("mm_token_type_ids", f"[{B}, {S}]", f"[{B}, 1]")),
    "types: other places": (given(mm_token_type_ids=torch.zeros(B, S)), ValueError, ("mm_token_type_ids", "placeholders")),
    "pixels: dtype": (given(pixel_values=PIXELS.to(torch.uint8)), TypeError, ("pixel_values", "floating", "uint8", "patchify")),
    "pixels: a list": (given(pixel_values=[[0.0]]), TypeError, ("pixel_values", "tensor", "list")),
    "pixels: width": (given(pixel_values=PIXELS[:, :1175]), ValueError, ("pixel_values", "1176", "1175")),
    "pixels: rank": (given(pixel_values=PIXELS[None]), ValueError, ("pixel_values", "[T, 1176]", "[1, 28, 1176]")),
    "pixels: too few rows": (cut("pixel_values", slice(1, None)), ValueError, ("pixel_values", "28 rows", "27")),
    "pixels: too many rows": (given(pixel_values=torch.cat((PIXELS, PIXELS))), ValueError, ("pixel_values", "28 rows", "56")),
    "pixels: missing": (given(pixel_values=None), ValueError, ("pixel_values", "28 patch rows", "no pixels")),
    "pixels of a video: missing": (given(pixel_values_videos=None), ValueError, ("pixel_values_videos", "32 patch rows")),
    "pixels of a video: rows": (cut("pixel_values_videos", slice(4)), ValueError, ("pixel_values_videos", "32 rows", "4")),
    "pixels without placeholders": (
        {"input_ids": torch.zeros(1, 3, dtype=torch.int64), "pixel_values": PIXELS, "image_grid_thw": GRID},
        ValueError,
        ("0 image placeholders", "image_grid_thw", "7"),
    ),
    "pixels without a grid": (
        {"input_ids": torch.zeros(1, 3, dtype=torch.int64), "pixel_values": PIXELS},
        ValueError,
        ("pixel_values", "0 rows", "28"),
    ),
    "placeholders without a grid": (given(image_grid_thw=None), ValueError, ("7 image placeholders", "image_grid_thw")),
    "placeholders without pixels": ({"input_ids": IDS, **FREE}, ValueError, ("image placeholders", "image_grid_thw")),
    "placeholders: one too many": (given(input_ids=edited(IDS, (1, -1), models.IMAGE), **FREE), ValueError, ("8 image", "7")),
    "placeholders: one too few": (given(input_ids=edited(IDS, (0, 4), 7), **FREE), ValueError, ("6 image", "image 0", "has 1")),
    "grids in another order": (given(image_grid_thw=GRID.flip(0)), ValueError, ("image 1", "needs 6", "has")),
    "grid: a list": (given(image_grid_thw=GRID.tolist()), TypeError, ("image_grid_thw", "tensor", "list")),
    "grid: dtype": (given(image_grid_thw=GRID.float()), TypeError, ("grid_thw", "integers", "float32")),
    "grid: transposed": (given(image_grid_thw=GRID.t()), ValueError, ("grid_thw", "[N, 3]", "[3, 2]")),
    "grid: zero": (given(image_grid_thw=GRID * 0), ValueError, ("grid_thw[0]", "positive", "[0, 0, 0]")),
    "grid: negative": (given(image_grid_thw=edited(GRID, (1, 1), -2)), ValueError, ("grid_thw[1]", "positive", "-2")),
    "grid: odd": (given(image_grid_thw=edited(GRID, (1, 2), 3)), ValueError, ("grid_thw[1]", "merge size 2", "3")),
    "grid of a video: odd": (given(video_grid_thw=torch.tensor([[2, 4, 5]])), ValueError, ("grid_thw[0]", "merge size 2")),
    "positions: shape": (given(position_ids=IDS.expand(4, -1, -1)), ValueError, ("position_ids", f"[3, {B}, {S}]", "[4, ")),
    "positions: dtype": (given(position_ids=torch.zeros(3, B, S)), TypeError, ("position_ids", "int64", "float32")),
    "positions: negative": (given(position_ids=torch.full((3, B, S), -1)), ValueError, ("position_ids", "at least 0")),
    "embeddings: dtype": (
        {"inputs_embeds": torch.zeros(1, 3, 256, dtype=torch.int64)},
        TypeError,
        ("inputs_embeds", "floating", "int64"),
    ),
    "embeddings: rank": ({"inputs_embeds": torch.zeros(3, 256)}, ValueError, ("inputs_embeds", "[B, S, ", "[3, 256]")),
    "embeddings: width": ({"inputs_embeds": torch.zeros(1, 3, 255)}, ValueError, ("inputs_embeds", "256", "255")),
    "embeddings: other positions": (
        given(inputs_embeds=torch.zeros(B, S - 1, 256)),
        ValueError,
        ("inputs_embeds", f"[{B}, {S}]", f"[{B}, {S - 1}]"),
    ),
}
for _name, (_inputs, _error, _says) in INPUTS.items():
    case(f"forward, {_name}", _error, *_says)(lambda folder, inputs=_inputs: ours()(**inputs))
    case(f"generate, {_name}", _error, *_says)(lambda folder, inputs=_inputs: ours().generate(**inputs, max_new_tokens=2))


def forward(**changes: Any) -> Callable[[Path], Any]:
    return lambda folder: ours()(**given(**changes))


LABELS = torch.full((B, S), -100)
case("labels: shape", ValueError, "labels", f"[{B}, {S}]", f"[{B}]")(forward(labels=LABELS[:, 0]))
case("labels: dtype", (TypeError, ValueError), "labels", "int64", "float32")(forward(labels=LABELS.float()))
case("labels: beyond the vocabulary", ValueError, "labels", "0..271", "272")(forward(labels=edited(LABELS, (1, -1), 272)))
case("labels: negative", ValueError, "labels", "-100", "-1")(forward(labels=edited(LABELS, (1, -1), -1)))
case("logits_to_keep: negative", ValueError, "logits_to_keep", "0", "-1")(forward(logits_to_keep=-1))
case("an argument that there isn't", TypeError, "pixels")(forward(pixels=PIXELS))
case("images: rows", ValueError, "pixel_values", "28 rows", "27")(lambda folder: ours().encode_images(PIXELS[1:], GRID))
case("images: grid", ValueError, "grid_thw", "[N, 3]")(lambda folder: ours().encode_images(PIXELS, GRID[0]))
case("images: width", ValueError, "pixel_values", "1176", "588")(lambda folder: ours().encode_images(PIXELS[:, ::2], GRID))


# Generation.


def generate(**options: Any) -> Callable[[Path], Any]:
    return lambda folder: ours().generate(**given(), **{"max_new_tokens": 2, "do_sample": True, **options})


def cache_of(batch: int, name: str = "released", **options: Any) -> KVCache:
    options = {"dtype": torch.float64, "device": torch.device("cpu"), **options}
    return KVCache(models.pair(name)[1].config.text, batch, 8, **options)


def used_cache(batch: int) -> KVCache:
    cache = cache_of(batch)
    ours().generate(torch.ones(batch, 3, dtype=torch.int64), max_new_tokens=2, cache=cache)
    return cache


case("max_new_tokens: missing", TypeError, "max_new_tokens")(lambda folder: ours().generate(**given()))
case("max_new_tokens: negative", ValueError, "max_new_tokens", "at least 0", "-1")(generate(max_new_tokens=-1))
case("max_new_tokens: a fraction", TypeError, "max_new_tokens", "int", "float")(generate(max_new_tokens=2.5))
case("max_new_tokens: a text", TypeError, "max_new_tokens", "int", "str")(generate(max_new_tokens="2"))
case("num_return_sequences: none", ValueError, "num_return_sequences", "at least 1", "0")(generate(num_return_sequences=0))
case("num_return_sequences: a fraction", TypeError, "num_return_sequences", "int")(generate(num_return_sequences=1.5))
case("temperature: zero", ValueError, "temperature", "positive", "do_sample=False")(generate(temperature=0.0))
case("temperature: negative", ValueError, "temperature", "positive", "-1")(generate(temperature=-1.0))
case("temperature: nan", ValueError, "temperature", "positive", "nan")(generate(temperature=float("nan")))
case("temperature: a text", TypeError, "temperature", "number", "str")(generate(temperature="hot"))
case("top_k: negative", ValueError, "top_k", "-5")(generate(top_k=-5))
case("top_k: a fraction", TypeError, "top_k", "int", "float")(generate(top_k=2.5))
case("top_p: zero", ValueError, "top_p", "(0, 1]", "0")(generate(top_p=0.0))
case("top_p: over one", ValueError, "top_p", "(0, 1]", "1.5")(generate(top_p=1.5))
case("top_p: nan", ValueError, "top_p", "(0, 1]", "nan")(generate(top_p=float("nan")))
case("repetition_penalty: zero", ValueError, "repetition_penalty", "positive", "0")(generate(repetition_penalty=0.0))
case("repetition_penalty: nan", ValueError, "repetition_penalty", "nan")(generate(repetition_penalty=float("nan")))
case("eos_token_id: a text", TypeError, "eos_token_id", "str")(generate(eos_token_id="<|im_end|>"))
case("eos_token_id: texts", TypeError, "eos_token_id", "str")(generate(eos_token_id=["<|im_end|>"]))
case("seed: a text", TypeError, "seed", "int", "str")(generate(seed="1"))
case("streamer: no put", TypeError, "streamer", "put", "end")(generate(streamer=object()))
case("cache: something else", TypeError, "cache", "KVCache", "dict")(generate(cache={}))
case("cache: another batch", ValueError, "cache", "3", "2")(generate(cache=cache_of(3)))
case("cache: another batch, used", ValueError, "cache", "3", "2")(lambda folder: generate(cache=used_cache(3))(folder))
case("cache: one for two", ValueError, "cache", "1", "2")(lambda folder: generate(cache=used_cache(1))(folder))
case("cache: another model", ValueError, "cache", "2 layers", "[B, S, 1, 128]", "3", "[B, S, 2, 32]")(
    generate(cache=cache_of(2, "other widths"))
)
case("cache: another dtype", TypeError, "cache", "float64", "float32")(generate(cache=cache_of(2, dtype=torch.float32)))
case("an option that there isn't", TypeError, "beams")(generate(beams=4))


def failures(name: str, folder: Path) -> Iterator[str]:
    """What is wrong with the way in which a case fails; no assert, since this runs under -O too."""
    call, expected, says = CASES[name]
    before = {id(p): p._version for p in ours().parameters()}
    try:
        with torch.no_grad():
            call(folder)
    except expected as error:
        message = str(error)
        for part in says:
            if part not in message:
                yield f"{name}: {part!r} is not in {type(error).__name__}: {message}"
    except Exception as error:  # the wrong kind is the finding
        yield f"{name}: {type(error).__name__} instead of {expected}: {error}"
    else:
        yield f"{name}: no error"
    if {id(p): p._version for p in ours().parameters()} != before:
        yield f"{name}: the model was changed"
