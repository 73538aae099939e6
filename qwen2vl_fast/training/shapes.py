"""Coloured shapes on a background: what most of nano's pictures are made of.

Shapes are drawn from signed distances (in pixels): coverage = clip(1/2 - distance, 0, 1) is their antialiased edge. Levels of
difficulty: 0 grey and plain, 1 tints, gradients and noise, 2 faint lines and stronger noise too.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

MAX_LEVEL = 2

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


def draw(canvas: np.ndarray, placed: Placed) -> tuple[int, int, int, int]:
    """Paint one shape on canvas, float32 [H,W,3], in place; returns its tight box left, top, right, bottom in pixels."""
    height, width = canvas.shape[:2]
    reach = 1.05 * placed.radius + 1
    left, right = max(0, int(placed.x - reach)), min(width, int(placed.x + reach) + 2)
    top, bottom = max(0, int(placed.y - reach)), min(height, int(placed.y + reach) + 2)
    x = np.arange(left, right, dtype=np.float32)[None, :] + np.float32(0.5 - placed.x)
    y = np.arange(top, bottom, dtype=np.float32)[:, None] + np.float32(0.5 - placed.y)
    cos, sin = math.cos(placed.angle), math.sin(placed.angle)
    distance = SHAPES[placed.shape](cos * x + sin * y, cos * y - sin * x, placed.radius)
    cover = np.clip(0.5 - distance, 0, 1)[..., None]
    canvas[top:bottom, left:right] += cover * (placed.rgb - canvas[top:bottom, left:right])
    columns, rows = (np.flatnonzero((distance < 0).any(axis)) for axis in (0, 1))
    return left + int(columns[0]), top + int(rows[0]), left + int(columns[-1]) + 1, top + int(rows[-1]) + 1


def shade(rng: np.random.Generator, color: str) -> np.ndarray:
    """One shade of a named colour, float32 [3] in 0..255."""
    hue, saturation, value = (low + (high - low) * rng.random() for low, high in COLORS[color])
    return np.array(colorsys.hsv_to_rgb((hue % 360) / 360, saturation, value), dtype=np.float32) * 255


def _base(rng: np.random.Generator, shapes: list[np.ndarray], level: int) -> np.ndarray:
    """A colour float32 [3] at a distance of every shape's colour."""
    while True:
        saturation = rng.random() * (0.0, 0.25, 0.5)[level]
        value = 0.05 + 0.95 * rng.random()
        color = np.array(colorsys.hsv_to_rgb(rng.random(), saturation, value), dtype=np.float32) * 255
        if all(np.linalg.norm(color - rgb) >= CONTRAST for rgb in shapes):
            return color


def background(rng: np.random.Generator, height: int, width: int, shapes: list[np.ndarray], level: int) -> np.ndarray:
    """A background float32 [H,W,3]: plain, then from level 1 a gradient, and at level 2 faint thin lines too."""
    base = _base(rng, shapes, level)
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


def place(rng: np.random.Generator, count: int, height: int, width: int) -> list[tuple[float, float, float]]:
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


def finish(rng: np.random.Generator, canvas: np.ndarray, level: int) -> np.ndarray:
    """The canvas as uint8, with noise that grows with the level."""
    if level > 0:
        canvas += (0, 4, 8)[level] * rng.random() * rng.standard_normal(canvas.shape, dtype=np.float32)
    return np.clip(canvas + 0.5, 0, 255).astype(np.uint8)
