"""Makes the pictures of `qwen2vl-fast demo`: run `python qwen2vl_fast/assets/make_pictures.py` in a checkout.

All of them are drawn by this script and by the generator of nano's tasks; nothing is downloaded and every random number is
seeded. pictures.json lists them with a question each, the expected answer, and whether nano was trained on such pictures.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from qwen2vl_fast.training import shapes, tasks
from qwen2vl_fast.training.data import CLIP_BOUNDS

FOLDER = Path(__file__).parent / "pictures"

# Task and frames, height and width of each of its media: the sample is the generator's first one of these sizes among its test
# seeds whose answer is not on show yet, whatever nano says to it.
SHOWN: tuple[tuple[str, tuple[tuple[int, int, int], ...]], ...] = (
    ("read", ((1, 28, 112),)),
    ("read", ((1, 56, 84),)),
    ("name", ((1, 56, 56),)),
    ("count", ((1, 84, 112),)),
    ("box", ((1, 84, 84),)),
    ("relation", ((1, 84, 56),)),
    ("compare", ((1, 56, 84), (1, 56, 56))),
    ("motion", ((8, 56, 84),)),
    ("order", ((12, 56, 56),)),
    ("followup", ((1, 112, 84),)),
    ("name", ((1, 112, 168),)),
)
# The sample of this index is asked once more at twice its sides.
TWICE = 3

TITLE = "The Tide Mill"
PARAGRAPHS = (
    "A tide mill grinds corn twice a day and asks the moon for the time of it. When the sea comes in it opens a gate "
    "by its own weight and fills a pond behind the dam. When the sea turns, the gate falls shut, and the pond is left "
    "standing higher than the water outside.",
    "The miller waits until the difference is about one metre. Then he lifts a sluice, the pond runs back to the sea "
    "through a narrow channel, and the wheel in that channel turns for four or five hours. A spring tide does the work "
    "of two horses; a neap tide does little more than keep the stones warm.",
    "Because the tide comes fifty minutes later each day, so did the miller. His neighbours said that he lived by a "
    "calendar of his own, and that his bread was always fresh at an hour when nobody wanted it.",
)
TABLE = (
    ("Tide", "Fall of water", "Flour"),
    ("spring", "2.1 m", "340 kg"),
    ("mean", "1.4 m", "190 kg"),
    ("neap", "0.8 m", "60 kg"),
)


def page(height: int = 868, width: int = 644) -> Image.Image:
    """A page of text with a title, three paragraphs and a table."""
    image = Image.new("L", (width, height), 250)
    draw = ImageDraw.Draw(image)
    body, small = ImageFont.load_default(19), ImageFont.load_default(17)
    draw.text((56, 48), TITLE, font=ImageFont.load_default(40), fill=15)
    draw.line((56, 106, width - 56, 106), fill=90, width=2)
    y = 126
    for paragraph in PARAGRAPHS:
        line = ""
        for word in [*paragraph.split(), None]:
            longer = f"{line} {word}".strip()
            if word is None or draw.textlength(longer, font=body) > width - 112:
                draw.text((56, y), line, font=body, fill=25)
                line, y = word, y + 27
            else:
                line = longer
        y += 14
    for row, cells in enumerate(TABLE):
        for x, cell in zip((56, 220, 420), cells, strict=True):
            draw.text((x, y + 28 * row), cell, font=small, fill=25)
        if row == 0:
            draw.line((56, y + 25, width - 56, y + 25), fill=90)
    draw.text((width // 2 - 4, height - 44), "7", font=small, fill=60)
    return image


def _noise(rng: np.random.Generator, height: int, width: int, octaves: int) -> np.ndarray:
    """Smooth noise [H,W], about -1..1: random grids of growing resolution, enlarged and summed with falling weights."""
    total = np.zeros((height, width), dtype=np.float32)
    for octave in range(octaves):
        grid = rng.standard_normal((3 * 2**octave + 2, 4 * 2**octave + 2)).astype(np.float32)
        total += np.asarray(Image.fromarray(grid).resize((width, height), Image.Resampling.BICUBIC)) * 0.5**octave
    return total / 2


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def _hits(origin: np.ndarray, direction: np.ndarray, center: np.ndarray, radius: float) -> np.ndarray:
    """Distance along unit rays [..,3] to a sphere, infinity where they miss it."""
    offset = origin - center
    half = (offset * direction).sum(-1)
    root = half**2 - (offset**2).sum(-1) + radius**2
    distance = -half - np.sqrt(np.maximum(root, 0))
    return np.where((root > 0) & (distance > 1e-3), distance, np.inf)


def photo(height: int = 672, width: int = 896) -> Image.Image:
    """Three glossy balls on a wooden table, lit by a window: ray-traced, with soft shadows, film grain and vignette."""
    rng = np.random.default_rng(7)
    balls = [  # centre (x right, y up, z away), radius, colour
        (np.array([-1.25, 0.85, 5.2]), 0.85, np.array([0.72, 0.09, 0.07])),
        (np.array([0.45, 0.62, 4.3]), 0.62, np.array([0.10, 0.26, 0.62])),
        (np.array([1.75, 0.95, 6.1]), 0.95, np.array([0.86, 0.62, 0.10])),
    ]
    window, window_x, window_y = np.array([-4.5, 5.0, 2.0]), np.array([0.0, 0.0, 1.3]), np.array([0.6, 1.1, 0.0])
    lights = [window + (i - 1.5) / 2 * window_x + (j - 1.5) / 2 * window_y for i in range(4) for j in range(4)]
    camera = np.array([0.0, 1.75, 0.0])
    y, x = np.mgrid[0 : 2 * height, 0 : 2 * width].astype(np.float32)
    rays = _unit(np.stack([(x / width - 1) * 0.62, (1 - y / height) * 0.62 * height / width - 0.16, np.ones_like(x)], -1))

    distances = [_hits(camera, rays, center, radius) for center, radius, _ in balls]
    down = rays[..., 1] < -1e-4
    table = np.where(down, -camera[1] / np.where(down, rays[..., 1], -1), np.inf)
    wall = 9.0 / rays[..., 2]
    nearest = np.argmin(np.stack([*distances, table, wall]), 0)
    depth = np.min(np.stack([*distances, table, wall]), 0)
    point = camera + depth[..., None] * rays

    normal = np.where((nearest == 3)[..., None], [0.0, 1.0, 0.0], [0.0, 0.0, -1.0])
    # Boards that run from left to right, each with a tone and a phase of its own, and dark seams between them.
    board = np.floor(point[..., 2] / 0.9)
    seam = np.exp(-(((point[..., 2] / 0.9 - board - 0.5) ** 2 - 0.25) ** 2) * 9000)
    waves = 0.5 * np.sin(0.9 * point[..., 0] + 2.4 * board) + 0.6 * _noise(rng, 2 * height, 2 * width, 4)
    grain = np.sin(46 * point[..., 2] + 9 * waves) * np.exp(-0.12 * depth) + 0.5 * _noise(rng, 2 * height, 2 * width, 8)
    tone = (1 + 0.14 * np.sin(5.3 * board)) * (1 + 0.2 * grain) * (1 - 0.7 * seam)
    wood = np.array([0.40, 0.22, 0.105]) * tone[..., None]
    plaster = np.array([0.60, 0.58, 0.53]) * (1 + 0.05 * _noise(rng, 2 * height, 2 * width, 6)[..., None])
    albedo = np.where((nearest == 3)[..., None], wood, plaster)
    for i, (center, radius, color) in enumerate(balls):
        on = (nearest == i)[..., None]
        normal, albedo = np.where(on, (point - center) / radius, normal), np.where(on, color, albedo)

    light = np.zeros(depth.shape)
    for source in lights:
        toward = source - point
        away = np.linalg.norm(toward, axis=-1)
        toward /= away[..., None]
        clear = np.ones(depth.shape, dtype=bool)
        for center, radius, _ in balls:
            clear &= _hits(point + 1e-3 * normal, toward, center, radius) > away
        light += clear * np.maximum((toward * normal).sum(-1), 0) * 34 / away**2 / len(lights)
    # Less of the room's light reaches the table close under a ball.
    open_sky = np.ones(depth.shape)
    for center, radius, _ in balls:
        near = np.linalg.norm(point[..., ::2] - center[::2], axis=-1) / radius
        open_sky = np.where(nearest == 3, open_sky * (1 - 0.75 * np.exp(-2.2 * near**2)), open_sky)
    ambient = (0.11 + 0.06 * normal[..., 1]) * open_sky
    color = albedo * (light[..., None] * np.array([1.0, 0.95, 0.86]) + ambient[..., None] * np.array([0.85, 0.95, 1.1]))

    # Reflections on the balls: the window as a bright rectangle with a bar, the table below, the room above.
    mirror = rays - 2 * (rays * normal).sum(-1, keepdims=True) * normal
    side = _unit(np.cross(window_x, window_y))
    along = ((window - point) * side).sum(-1) / np.where(np.abs(mirror @ side) > 1e-6, mirror @ side, np.inf)
    landing = point + along[..., None] * mirror - window
    u, v = landing @ window_x / (window_x @ window_x), landing @ window_y / (window_y @ window_y)
    pane = (along > 0) & (np.abs(u) < 1) & (np.abs(v) < 1) & (np.abs(u) > 0.07) & (np.abs(v) > 0.07)
    room = np.where(mirror[..., 1:2] > 0, [0.34, 0.35, 0.36], [0.22, 0.13, 0.07])
    fresnel = 0.05 + 0.6 * (1 - np.maximum(-(rays * normal).sum(-1), 0)) ** 5
    shine = fresnel[..., None] * (room + 9.0 * pane[..., None])
    color += np.where((nearest < 3)[..., None], shine, 0)

    corner = ((x / width - 1) ** 2 + (y / height - 1) ** 2)[..., None]
    color = np.clip(color * (1 - 0.18 * corner), 0, None)
    color = (1 - np.exp(-1.35 * color)).reshape(height, 2, width, 2, 3).mean((1, 3)) ** (1 / 2.2)
    color += 0.012 * rng.standard_normal((height, width, 1)) + 0.006 * rng.standard_normal((height, width, 3))
    return Image.fromarray(np.clip(color * 255 + 0.5, 0, 255).astype(np.uint8))


def clip(frames: int = 8, height: int = 140, width: int = 196) -> list[Image.Image]:
    """A red ball that moves from left to right over a grey gradient."""
    result = []
    for i in range(frames):
        canvas = np.empty((height, width, 3), dtype=np.float32)
        canvas[:] = np.linspace(170, 215, height, dtype=np.float32)[:, None, None]
        x = 30 + (width - 60) * i / (frames - 1)
        red = np.array([205, 30, 35], dtype=np.float32)
        shapes.draw(canvas, shapes.Placed("circle", "red", red, x, height * 0.55, 22.0, 0.0))
        result.append(Image.fromarray(canvas.astype(np.uint8)))
    return result


def samples() -> list[tuple[int, tasks.Sample]]:
    """Seeds and samples of nano's own tasks, from the test seeds."""
    result: list[tuple[int, tasks.Sample]] = []
    for task, sizes in SHOWN:
        on_show = {sample.answer for _, sample in result}
        made = ((seed, tasks.generate(task, seed)) for seed in tasks.TEST_SEEDS)
        result.append(next((seed, s) for seed, s in made if _sizes(s) == sizes and s.answer not in on_show))
    return result


def _sizes(sample: tasks.Sample) -> tuple[tuple[int, ...], ...]:
    return tuple(medium.frames.shape[:3] for medium in sample.media)


def save(medium: tasks.Medium, name: str) -> str:
    """Save an image as a file, a clip as a folder of frames; its path in the folder of pictures."""
    if medium.kind == "image":
        Image.fromarray(medium.frames[0]).save(FOLDER / f"{name}.png", optimize=True)
        return f"{name}.png"
    (FOLDER / name).mkdir()
    for i, frame in enumerate(medium.frames):
        Image.fromarray(frame).save(FOLDER / name / f"{i:02}.png", optimize=True)
    return name


def own() -> list[dict[str, Any]]:
    """Saves the pictures of nano's tasks; their entries of pictures.json."""
    entries: list[dict[str, Any]] = []
    for number, (seed, sample) in enumerate(samples()):
        names = [f"{sample.task}_{m.frames.shape[2]}x{m.frames.shape[1]}" for m in sample.media]
        entry: dict[str, Any] = {
            "files": [save(medium, name) for medium, name in zip(sample.media, names, strict=True)],
            "before": [list(turn) for turn in sample.turns[:-1]],
            "question": sample.question,
            "answer": sample.answer,
            "nano": True,
            "task": sample.task,
            "seed": seed,
        }
        if sample.media[0].kind == "video":
            entry["options"] = CLIP_BOUNDS
        entries.append(entry)
        if number == TWICE:
            _, height, width, _ = sample.media[0].frames.shape
            entries.append({**entry, "options": {"min_pixels": 4 * height * width}})
    return entries


def main() -> None:
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir()
    entries = own()
    photo().save(FOLDER / "photo.jpg", quality=88, optimize=True)
    page().save(FOLDER / "page.png", optimize=True)
    (FOLDER / "clip").mkdir()
    for i, frame in enumerate(clip()):
        frame.save(FOLDER / "clip" / f"{i:02}.png", optimize=True)
    for file, question, answer in (
        ("photo.jpg", "How many balls lie on the table?", "3"),
        ("page.png", "What is the title of this page?", TITLE),
        ("clip", "Which way does the ball move?", "to the right"),
    ):
        entries.append({"files": [file], "question": question, "answer": answer, "nano": False})
    (FOLDER / "pictures.json").write_text(json.dumps(entries, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
