"""The public ops: each validates its arguments, picks a backend and is registered with torch (fake tensors, autograd)."""

from .activation import gelu, quick_gelu, swiglu
from .attention import varlen_attention
from .backends import backends
from .loss import linear_cross_entropy
from .merge import merge_patches
from .norm import layer_norm, rms_norm
from .patchify import patchify
from .rope import mrope, mrope_, vision_rope, vision_rope_

__all__ = [
    "backends", "gelu", "layer_norm", "linear_cross_entropy", "merge_patches", "mrope", "mrope_", "patchify", "quick_gelu",
    "rms_norm", "swiglu", "varlen_attention", "vision_rope", "vision_rope_",
]  # fmt: skip
