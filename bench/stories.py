"""From files to tokens, the way a user runs it: several photos, a document page, a clip of 60 s. Where the time goes.

qwen2vl-fast bench stories [--size 2B] [--layers N] [--depth N] [--tokens 32]
                            [--peers NAME ...] [--json] [--save]

transformers as it is, the same model after qwen2vl_fast.patch, and our own model, over the same random weights. Preprocessing
is each one's own: transformers' processors, or ours (also in front of the patched model).
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

import qwen2vl_fast
from bench.generate import JUDGED, SIZES, VOCAB, judge_tokens
from bench.preprocess import PICTURES, transformers_pil
from bench.timing import cpu_clock, keep, parser, publish, say, taking_part
from qwen2vl_fast import Qwen2VL
from qwen2vl_fast.media import MIN_PIXELS, preprocess_images
from qwen2vl_fast.positions import mrope_position_ids
from qwen2vl_fast.video import preprocess_videos

IMAGE, VIDEO, START, END = 151655, 151656, 151652, 151653
THEIRS, PATCHED, OURS = "transformers", "transformers, patched", "qwen2vl_fast"
PEERS = (THEIRS,)
PARTS = ("preprocess", "tower", "prefill", "decode a token")
PHOTOS = ((448, 448), (640, 480), (1280, 720))
CLIP = 60, 320, 240  # seconds at one frame each, width, height


def files(folder: Path, scale: float) -> dict[str, list[str]]:
    """{story: picture files}; sides times `scale`. A clip is a folder's worth of frames."""
    photo, page = (Image.open(PICTURES / name).convert("RGB") for name in ("photo.jpg", "page.png"))

    def save(image: Image.Image, name: str, width: int, height: int) -> str:
        path = folder / f"{name}.jpg"
        image.resize((round(width * scale), round(height * scale)), Image.Resampling.LANCZOS).save(path, quality=90)
        return str(path)

    seconds, width, height = CLIP
    shifted = [Image.fromarray(np.roll(np.asarray(photo), 3 * i, axis=1)) for i in range(seconds)]
    return {
        f"{len(PHOTOS)} photos": [save(photo, f"photo{i}", *size) for i, size in enumerate(PHOTOS)],
        "a document page": [save(page, "page", 1240, 1754)],
        f"a clip of {seconds} s": [save(frame, f"frame{i:03}", width, height) for i, frame in enumerate(shifted)],
    }


def models(options: argparse.Namespace, dtype: torch.dtype, device: str) -> tuple[Any, Qwen2VL]:
    hidden, depth, heads, kv_heads, mlp, tied = SIZES[options.size]
    config = Qwen2VLConfig(
        text_config={
            "hidden_size": hidden,
            "num_hidden_layers": options.layers or depth,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "intermediate_size": mlp,
            "vocab_size": VOCAB[options.size],
            "rope_scaling": {"type": "mrope", "rope_type": "default", "mrope_section": [16, 24, 24]},
            "rope_theta": 1e6,
            "tie_word_embeddings": tied,
        },
        vision_config={"depth": options.depth, "hidden_size": hidden},
        tie_word_embeddings=tied,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
    )
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            theirs = Qwen2VLForConditionalGeneration._from_config(config, attn_implementation="sdpa").eval()
    finally:
        torch.set_default_dtype(default)
    return theirs, Qwen2VL.from_transformers(theirs).eval()


def batch(pixels: torch.Tensor, grid: torch.Tensor, video: bool, device: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """A prompt of 32 words around the media, in the keywords that both models take."""
    words = torch.arange(1000, 1032).tolist()
    token = VIDEO if video else IMAGE
    ids = words[:16]
    for size in (grid.prod(1) // 4).tolist():
        ids += [START, *[token] * size, END]
    ids += words[16:]
    kinds = [2 if i == VIDEO else 1 if i == IMAGE else 0 for i in ids]
    names = ("pixel_values_videos", "video_grid_thw") if video else ("pixel_values", "image_grid_thw")
    ids_tensor = torch.tensor([ids], device=device)
    return {
        "input_ids": ids_tensor,
        "attention_mask": torch.ones_like(ids_tensor),
        "mm_token_type_ids": torch.tensor([kinds], device=device, dtype=torch.int32),
        names[0]: pixels.to(device, dtype),
        names[1]: grid.to(device),
    }


def seconds_of(run: Callable[[], Any], repeats: int) -> tuple[float, Any]:
    """The shortest of a few: stories are long, and what disturbs them only adds."""
    best, out, clock = float("inf"), None, cpu_clock()
    for _ in range(repeats):
        _wait()
        start = clock()
        out = run()
        _wait()
        best = min(best, clock() - start)
    return best, out


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def tell(story: str, name: str, seconds: dict[str, float]) -> str:
    return f"{story:<20} {name:<24} " + ", ".join(f"{part} {value * 1e3:.1f} ms" for part, value in seconds.items())


@contextlib.contextmanager
def patched_as(name: str, model: Any) -> Iterator[Any]:
    """The model as this contender has it, and the report if that is patched."""
    if name != PATCHED:
        yield None
        return
    report = qwen2vl_fast.patch(model)
    try:
        yield report
    finally:
        qwen2vl_fast.unpatch(model)


def run_story(
    story: str, paths: list[str], theirs: Any, ours: Qwen2VL, options: argparse.Namespace, dtype: torch.dtype, device: str
) -> dict[str, Any]:
    video = story.startswith("a clip")
    if video:
        frames = [Image.open(path).convert("RGB") for path in paths]
        own = lambda: preprocess_videos([frames], fps=1.0, min_pixels=MIN_PIXELS)  # noqa: E731
        other = own  # transformers' video processor needs torchvision; the frames are resized by ours for both
    else:
        processor = transformers_pil()
        own = lambda: preprocess_images(paths)  # noqa: E731

        def other() -> tuple[torch.Tensor, torch.Tensor]:
            return processor(paths), own_grid

    _, (pixels, own_grid) = seconds_of(own, 1)
    prepared = batch(pixels, own_grid, video, device, dtype)
    kind = "videos" if video else "images"
    device_pixels = prepared["pixel_values_videos" if video else "pixel_values"]
    tokens = options.tokens
    head: list[str] = []

    def greedy(count: int) -> torch.Tensor:
        return theirs.generate(**prepared, do_sample=False, min_new_tokens=count, max_new_tokens=count)

    def our_greedy(count: int) -> torch.Tensor:
        return ours.generate(**prepared, do_sample=False, max_new_tokens=count, eos_token_id=[], repetition_penalty=1.0)

    # transformers 5 gives a clip other positions when it has more frame pairs than rows: here ours for both.
    grids = {"video_grid_thw" if video else "image_grid_thw": own_grid}
    places = mrope_position_ids(prepared["input_ids"], **grids)[0]
    expected, found = (model(**prepared, position_ids=places, logits_to_keep=1).logits.float() for model in (theirs, ours))
    error = float((found - expected).norm() / expected.norm())
    if not error < (1e-3 if dtype == torch.float32 else 5e-2):
        raise RuntimeError(f"{story}: the models disagree, relative error {error:.1e} of the logits")

    names = taking_part(options, dict.fromkeys((THEIRS, PATCHED, OURS)), PEERS)
    for name in names:
        if name != THEIRS:  # who judges, at our positions
            with patched_as(name, theirs):
                out = (our_greedy if name == OURS else greedy)(JUDGED)
            kinds = torch.nn.functional.pad(prepared["mm_token_type_ids"], (0, JUDGED))
            more = {"mm_token_type_ids": kinds, "position_ids": mrope_position_ids(out, **grids)[0]}
            judge_tokens(f"{story}, {name}", theirs, prepared, out, JUDGED, **more)
    facts = {}
    for name in names:
        with patched_as(name, theirs) as report:
            if name == OURS:
                tower, generate = lambda: ours.encode_images(device_pixels, own_grid), our_greedy
            else:
                tower, generate = lambda: theirs.model.visual(device_pixels, own_grid.to(device)), greedy
            preprocess_seconds, _ = seconds_of(other if name == THEIRS else own, options.repeats)
            seconds_of(tower, 1)
            tower_seconds, _ = seconds_of(tower, options.repeats)
            generate(2)
            first, _ = seconds_of(lambda run=generate: run(1), options.repeats)
            whole, _ = seconds_of(lambda run=generate: run(1 + tokens), options.repeats)
        if report is not None:
            head = str(report).splitlines()[:1]
        values = (preprocess_seconds, tower_seconds, first - tower_seconds, (whole - first) / tokens)
        facts[name] = {"seconds": dict(zip(PARTS, values, strict=True))}
        say(options, tell(story, name, facts[name]["seconds"]))
    return {
        "story": story,
        "kind": kind,
        "visual_tokens": int(own_grid.prod(1).sum()) // 4,
        "prompt_tokens": prepared["input_ids"].shape[1],
        "error": error,
        "patched": head,
        "contenders": facts,
    }


def main(argv: list[str] | None = None) -> None:
    cuda = torch.cuda.is_available()
    arguments = parser("stories", __doc__, repeats=3 if cuda else 2, peers=PEERS)
    arguments.add_argument("--size", choices=tuple(SIZES), default="2B")
    arguments.add_argument(
        "--layers", type=int, default=None if cuda else 1, help="of the decoder (default: all, on the CPU 1)"
    )
    arguments.add_argument("--depth", type=int, default=32 if cuda else 1, help="of the tower (default: 32, on the CPU 1)")
    arguments.add_argument(
        "--scale", type=float, default=1.0 if cuda else 0.25, help="of every side (default: 1, on the CPU 0.25)"
    )
    arguments.add_argument("--tokens", type=int, default=32 if cuda else 8, help="tokens to decode")
    options = arguments.parse_args(argv)
    device, dtype = ("cuda", torch.bfloat16) if cuda else ("cpu", torch.float32)
    theirs, ours = models(options, dtype, device)
    rows = []
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        for story, paths in files(Path(folder), options.scale).items():
            rows.append(run_story(story, paths, theirs, ours, options, dtype, device))
            keep(f"stories_{device}", options, rows)
    publish(f"stories_{device}", options, rows)


if __name__ == "__main__":
    main()
