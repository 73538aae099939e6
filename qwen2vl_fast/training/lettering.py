"""Rendered text: characters in the fonts that matplotlib ships, so that every machine draws the same ones.

The alphabet leaves out O, 0, I and 1, which some fonts draw alike.
"""

from __future__ import annotations

from functools import cache, lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

ALPHABET = "ABCDEFGHJKLMNPQRSTUVWXYZ23456789"
FONTS = (
    "DejaVuSans", "DejaVuSans-Bold", "DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSansMono", "DejaVuSansMono-Bold",
)  # fmt: skip


@lru_cache(maxsize=1)
def _folder() -> Path:
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("the pictures of text need matplotlib's fonts: pip install qwen2vl-fast[train]") from error
    return Path(matplotlib.get_data_path()) / "fonts" / "ttf"


@cache
def _font(name: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(_folder() / f"{name}.ttf"), size, layout_engine=ImageFont.Layout.BASIC)


@cache
def glyph(name: str, size: int, character: str) -> tuple[np.ndarray, int, int, float]:
    """Coverage float32 [h,w] in 0..1 of a character's ink, its offset (x, y) from pen and top of line, and its advance."""
    font = _font(name, size)
    left, top, right, bottom = font.getbbox(character)
    image = Image.new("L", (right - left, bottom - top))
    ImageDraw.Draw(image).text((-left, -top), character, font=font, fill=255)
    return np.asarray(image, dtype=np.float32) / 255, int(left), int(top), font.getlength(character)


def extent(name: str, size: int, text: str, spacing: float) -> tuple[float, float, float]:
    """Width of a line of text, and top and bottom of its ink measured from the top of the line."""
    glyphs = [glyph(name, size, character) for character in text]
    width = sum(advance for *_, advance in glyphs) + spacing * (len(text) - 1)
    top = min(y for _, _, y, _ in glyphs)
    return width, top, max(y + mask.shape[0] for mask, _, y, _ in glyphs)


def write(
    canvas: np.ndarray, text: str, name: str, size: int, x: float, y: float, rgb: np.ndarray, spacing: float = 0.0
) -> list[tuple[float, float]]:
    """Write a line on canvas, float32 [H,W,3], from x on and with its top at y; the centres of its characters."""
    centers = []
    for character in text:
        mask, left, top, advance = glyph(name, size, character)
        column, row = round(x + left), round(y + top)
        first, above = max(0, -column), max(0, -row)
        part = canvas[row + above : row + mask.shape[0], column + first : column + mask.shape[1]]
        cover = mask[above : above + part.shape[0], first : first + part.shape[1], None]
        part += cover * (rgb - part)
        centers.append((column + mask.shape[1] / 2, row + mask.shape[0] / 2))
        x += advance + spacing
    return centers
