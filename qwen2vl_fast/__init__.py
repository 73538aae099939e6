"""Qwen2-VL, fast: packed vision tower, M-RoPE decoder and the ops underneath. Importing this touches no GPU."""

from importlib import import_module
from typing import Any

from . import media, ops, positions, video
from .media import smart_resize
from .model import Qwen2VL
from .ops import backends
from .version import __version__

__all__ = [
    "Qwen2VL", "__version__", "backends", "media", "ops", "patch", "positions", "smart_resize", "unpatch", "video",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """patch and unpatch on first use: the package `patch`, which can be called, imports transformers to register with it."""
    if name not in ("patch", "unpatch"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    package = import_module("qwen2vl_fast.patch")
    return package if name == "patch" else package.unpatch
