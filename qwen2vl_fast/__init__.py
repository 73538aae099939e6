"""Qwen2-VL, fast: packed vision tower, M-RoPE decoder and the ops underneath. Importing this touches no GPU."""

from . import media, ops, positions, video
from .media import smart_resize
from .model import Qwen2VL
from .ops import backends
from .version import __version__

__all__ = ["Qwen2VL", "__version__", "backends", "media", "ops", "positions", "smart_resize", "video"]
