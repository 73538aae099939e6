"""The pictures that nano learns from: a seeded generator of small scenes with a question and its answer.

A sample is a function of (task, seed, level) alone. Training, validation and test draw their seeds from three disjoint ranges,
so that no picture of the test was ever trained on. Sides are multiples of 28 px: a picture goes to the model without resizing.

Shapes are drawn from signed distances (in pixels): coverage = clip(1/2 - distance, 0, 1) is their antialiased edge.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

TRAIN_SEEDS = range(2**40)
VALIDATION_SEEDS = range(2**40, 2**40 + 2**20)
TEST_SEEDS = range(2**41, 2**41 + 2**20)

TASKS = ("count", "name", "color", "shape")
MAX_LEVEL = 2
MAX_COUNT = 6

# Bounds of hue in degrees, saturation and value, drawn from uniformly. The gaps between the boxes keep the names unambiguous.
COLORS: dict[str, tuple[tuple[float, float], tuple[float, float], tuple[float, float]]] = {
    "red": ((-6, 6), (0.85, 1.0), (0.75, 1.0)),
    "orange": ((24, 33), (0.85, 1.0), (0.95, 1.0)),
    "yellow": ((52, 60), (0.75, 1.0), (0.9, 1.0)),
    "green": ((105, 145), (0.6, 1.0), (0.45, 0.85)),
    "blue": ((210, 235), (0.75, 1.0), (0.6, 1.0)),
    "purple": ((270, 288), (0.65, 1.0), (0.45, 0.75)),
    "pink": ((328, 344), (0.35, 0.5), (0.95, 1.0)),
    "black": ((0, 360), (0.0, 0.2), (0.0, 0.1)),
    "white": ((0, 360), (0.0, 0.03), (0.95, 1.0)),
}

QUESTIONS: dict[str, tuple[str, ...]] = {
    "count": ("How many shapes are there?", "How many shapes?", "Count the shapes.", "How many objects do you see?"),
    "name": ("What is this?", "What do you see?", "What is in the picture?", "Describe the picture."),
    "color": ("What color is it?", "Which color is the shape?"),
    "shape": ("What shape is it?", "Which shape is this?"),
}

# Least distance in RGB (0..255 each) between a shape and its background.
CONTRAST = 100.0


@dataclass(frozen=True)
class Placed:
    """A shape on the canvas: centre and circumradius in pixels, angle in radians."""

    shape: str
    color: str
    rgb: np.ndarray
    x: float
    y: float
    radius: float
    angle: float


@dataclass(frozen=True)
class Sample:
    """A picture uint8 [H,W,3], sides multiples of 28, what it shows, a question about it, and the one right answer."""

    picture: np.ndarray
    shapes: tuple[Placed, ...]
    question: str
    answer: str
    task: str


def _circle(x: np.ndarray, y: np.ndarray, r: float) -> np.ndarray:
    return np.hypot(x, y) - r


def _ring(x: np.ndarray, y: np.ndarray, r: float) -> np.ndarray:
    return np.abs(np.hypot(x, y) - 0.75 * r) - 0.25 * r


def _square(x: np.ndarray, y: np.ndarray, r: float) -> np.ndarray:
    return np.maximum(np.abs(x), np.abs(y)) - 0.8 * r


def _triangle(x: np.ndarray, y: np.ndarray, r: float) -> np.ndarray:
    slope = math.sqrt(3) / 2
    return np.maximum(np.maximum(slope * x - 0.5 * y, -slope * x - 0.5 * y), y) - 0.5 * r


def _cross(x: np.ndarray, y: np.ndarray, r: float) -> np.ndarray:
    across, along = np.minimum(np.abs(x), np.abs(y)), np.maximum(np.abs(x), np.abs(y))
    return np.maximum(along - r, across - 0.3 * r)


def _star(x: np.ndarray, y: np.ndarray, r: float) -> np.ndarray:
    # One tenth of the star, from a tip (r, 0) to a notch at 36 degrees, stands for all of it.
    fifth = 2 * math.pi / 5
    turn = np.abs((np.arctan2(x, -y) + fifth / 2) % fifth - fifth / 2)
    away = np.hypot(x, y)
    notch_x, notch_y = 0.42 * r * math.cos(fifth / 2), 0.42 * r * math.sin(fifth / 2)
    edge = math.hypot(r - notch_x, notch_y)
    return ((away * np.cos(turn) - r) * notch_y + away * np.sin(turn) * (r - notch_x)) / edge


SHAPES: dict[str, Callable[[np.ndarray, np.ndarray, float], np.ndarray]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "cross": _cross,
    "ring": _ring,
}


def draw(canvas: np.ndarray, placed: Placed) -> None:
    """Paint one shape on canvas, float32 [H,W,3], in place."""
    height, width = canvas.shape[:2]
    reach = 1.05 * placed.radius + 1
    left, right = max(0, int(placed.x - reach)), min(width, int(placed.x + reach) + 2)
    top, bottom = max(0, int(placed.y - reach)), min(height, int(placed.y + reach) + 2)
    x = np.arange(left, right, dtype=np.float32)[None, :] + np.float32(0.5 - placed.x)
    y = np.arange(top, bottom, dtype=np.float32)[:, None] + np.float32(0.5 - placed.y)
    cos, sin = math.cos(placed.angle), math.sin(placed.angle)
    distance = SHAPES[placed.shape](cos * x + sin * y, cos * y - sin * x, placed.radius)
    cover = np.clip(0.5 - distance, 0, 1)[..., None]
    box = canvas[top:bottom, left:right]
    box += cover * (placed.rgb - box)


def shade(rng: np.random.Generator, color: str) -> np.ndarray:
    """One shade of a named colour, float32 [3] in 0..255."""
    hue, saturation, value = (low + (high - low) * rng.random() for low, high in COLORS[color])
    return np.array(colorsys.hsv_to_rgb((hue % 360) / 360, saturation, value), dtype=np.float32) * 255


def _background(rng: np.random.Generator, shapes: list[np.ndarray], level: int) -> np.ndarray:
    """A colour float32 [3] at a distance of every shape's colour."""
    while True:
        saturation = rng.random() * (0.0, 0.25, 0.5)[level]
        value = 0.05 + 0.95 * rng.random()
        color = np.array(colorsys.hsv_to_rgb(rng.random(), saturation, value), dtype=np.float32) * 255
        if all(np.linalg.norm(color - rgb) >= CONTRAST for rgb in shapes):
            return color


def _canvas(rng: np.random.Generator, height: int, width: int, shapes: list[np.ndarray], level: int) -> np.ndarray:
    """A background float32 [H,W,3]: plain, then from level 1 a gradient, and at level 2 faint thin lines too."""
    base = _background(rng, shapes, level)
    canvas = np.empty((height, width, 3), dtype=np.float32)
    canvas[:] = base
    if level == 0:
        return canvas
    x = np.arange(width, dtype=np.float32)[None, :] / width - 0.5
    y = np.arange(height, dtype=np.float32)[:, None] / height - 0.5
    if rng.random() < 0.5:
        angle = 2 * math.pi * rng.random()
        ramp = math.cos(angle) * x + math.sin(angle) * y
        canvas += ramp[..., None] * ((rng.random(3, dtype=np.float32) - 0.5) * 80)
    if level == 2:
        for _ in range(rng.integers(0, 4)):
            angle, offset = math.pi * rng.random(), 0.8 * rng.random() - 0.4
            distance = np.abs(math.cos(angle) * x * width + math.sin(angle) * y * height - offset * min(height, width))
            faint = np.clip(1 - distance, 0, 1)[..., None] * np.float32(20 + 20 * rng.random())
            canvas += faint if rng.random() < 0.5 else -faint
    return canvas


def _size(rng: np.random.Generator, level: int) -> tuple[int, int]:
    """Height and width: 56, 84 or 112 px each, at level 2 in one picture of sixteen 140 or 168."""
    sides = (140, 168) if level == 2 and rng.random() < 1 / 16 else (56, 84, 112)
    height, width = rng.choice(sides), rng.choice((56, 84, 112))
    return (int(height), int(width)) if rng.random() < 0.5 else (int(width), int(height))


def _place(rng: np.random.Generator, count: int, height: int, width: int) -> list[tuple[float, float, float]]:
    """Centres and radii of count discs inside the canvas, at least 2.5 px apart; all shrink together until they fit."""
    scale = 1.0
    while True:
        largest = scale * min(0.45 * min(height, width), 0.55 * math.sqrt(height * width / count))
        smallest = max(4.5, 0.45 * largest)
        discs: list[tuple[float, float, float]] = []
        for _ in range(20 * count):
            radius = smallest + max(0.0, largest - smallest) * rng.random()
            x = radius + 0.5 + (width - 2 * radius - 1) * rng.random()
            y = radius + 0.5 + (height - 2 * radius - 1) * rng.random()
            if all(math.hypot(x - u, y - v) >= radius + r + 2.5 for u, v, r in discs):
                discs.append((x, y, radius))
                if len(discs) == count:
                    return discs
        scale *= 0.9


def _paint(rng: np.random.Generator, canvas: np.ndarray, shapes: list[Placed], level: int) -> np.ndarray:
    for placed in shapes:
        draw(canvas, placed)
    if level > 0:
        strength = (0, 4, 8)[level] * rng.random()
        canvas += strength * rng.standard_normal(canvas.shape, dtype=np.float32)
    return np.clip(canvas + 0.5, 0, 255).astype(np.uint8)


def generate(task: str, seed: int, level: int = MAX_LEVEL) -> Sample:
    """The sample of a task for a seed.

    Args:
        task: one of TASKS. count: 1 to 6 shapes; name, color, shape: one shape.
        seed: a non-negative integer; the sample depends on nothing else but task and level.
        level: 0 (grey plain background, up to 4 shapes), 1 (tints, gradients, noise, up to 6 shapes) or 2 (faint lines,
            stronger noise, all sizes). The test is made at level 2.
    """
    if task not in TASKS:
        raise ValueError(f"task: expected one of {TASKS}, got {task!r}")
    if not 0 <= level <= MAX_LEVEL:
        raise ValueError(f"level: expected 0 to {MAX_LEVEL}, got {level}")
    rng = np.random.default_rng((seed, TASKS.index(task)))
    height, width = _size(rng, level)
    count = int(rng.integers(1, (4, MAX_COUNT, MAX_COUNT)[level] + 1)) if task == "count" else 1
    names, colors = list(SHAPES), list(COLORS)
    # Half of the scenes of several shapes are of one kind, half of one colour.
    one_kind, one_color = rng.random(2) < 0.5
    kinds = [names[i] for i in rng.integers(0, len(names), count)]
    paints = [colors[i] for i in rng.integers(0, len(colors), count)]
    if one_kind:
        kinds = kinds[:1] * count
    palette = 1 if one_color else 2
    paints = [paints[i % palette] for i in range(count)]
    shades = {color: shade(rng, color) for color in dict.fromkeys(paints)}
    canvas = _canvas(rng, height, width, list(shades.values()), level)
    turns = (rng.random(count) - 0.5) * 0.8
    discs = _place(rng, count, height, width)
    shapes = [
        Placed(kind, color, shades[color], x, y, radius, float(turn))
        for kind, color, turn, (x, y, radius) in zip(kinds, paints, turns, discs, strict=True)
    ]
    picture = _paint(rng, canvas, shapes, level)
    question = QUESTIONS[task][int(rng.integers(len(QUESTIONS[task])))]
    return Sample(picture, tuple(shapes), question, _answer(task, shapes), task)


def _answer(task: str, shapes: list[Placed]) -> str:
    first = shapes[0]
    if task == "count":
        return str(len(shapes))
    if task == "color":
        return first.color
    if task == "shape":
        return first.shape
    return f"{'an' if first.color[0] in 'aeiou' else 'a'} {first.color} {first.shape}"
