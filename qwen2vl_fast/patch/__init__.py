"""qwen2vl_fast.patch(model): one line that speeds up a transformers Qwen2-VL model, on that instance alone.

The name is a function and a package: `qwen2vl_fast.patch` is this module, which can be called. Importing it registers the
package's attention with transformers, if that is installed, as attn_implementation="qwen2vl_fast".
"""

from __future__ import annotations

import importlib.util
import inspect
import sys
from types import ModuleType

import torch
from torch import nn

from ..ops.backends import _WRITTEN, OPS, check_backend
from . import install, interface
from .hooks import Options, restore
from .releases import Release
from .report import PatchReport

__all__ = ["PatchReport", "patch", "unpatch"]


def patch(
    hf_model: nn.Module,
    *,
    rope: bool = True,
    attention: bool = True,
    norms: bool = True,
    activations: bool = True,
    patch_embed: bool = True,
    positions: bool = True,
    fused_loss: bool = True,
    backend: str | None = None,
) -> PatchReport:
    """Replaces the slow parts of a transformers Qwen2-VL model with this package's ops, for inference and training.

    Args:
        hf_model: Qwen2VLForConditionalGeneration, Qwen2VLModel, the text model or the vision tower; or a module that holds
            some of them (a PEFT model, ColQwen2). Only this instance changes; its weights stay where they are.
        rope: M-RoPE of the decoder and the 2-D rotation of the tower.
        attention: the tower packs all media of a call and attends to them with variable-length attention.
        norms: RMSNorm and LayerNorm, fused with the residual addition before them where that is in the same block.
        activations: QuickGELU, GELU and SwiGLU.
        patch_embed: the convolution of the patch embedding as a matrix product.
        positions: position ids in whole-tensor arithmetic, by MODEL.md section 4; False keeps the library's, which overlap
            after a clip with more frame pairs than its merged grid has rows and columns (transformers 5.x).
        fused_loss: in training mode with labels, the loss without [B, S, V] logits; the output's logits are then None.
        backend: prefer this backend for every op that it has (see `backends()`); None = the fastest.
    Returns: a report that counts what runs; `report.verify(batch)` compares the model with itself unpatched.
    Raises: TypeError for another kind of model; ValueError for one that is patched already; ImportError without
        transformers; RuntimeError when a part does not bind to this release.
    """
    if not isinstance(hf_model, nn.Module):
        raise TypeError(f"hf_model: expected a transformers Qwen2-VL model, got {type(hf_model).__name__}")
    wanted = {
        "rope": rope, "attention": attention, "norms": norms, "activations": activations, "patch_embed": patch_embed,
        "positions": positions, "fused_loss": fused_loss,
    }  # fmt: skip
    for name, value in wanted.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name}: expected True or False, got {value!r}")
    check_backend(backend)
    release = Release.installed()
    found = install.targets(hf_model, release.modeling)
    if not any(found.values()):
        raise TypeError(f"hf_model: expected a model of transformers' qwen2_vl classes, got {type(hf_model).__name__}")
    if path := next(install.patched(hf_model), None):
        raise ValueError(f"hf_model: {path} is patched already; call unpatch(hf_model) first")
    options = Options({op: backend if backend is not None and op in _WRITTEN[backend] else None for op in OPS})
    installer = install.Installer(release, options, wanted)
    try:
        with torch.device("cpu"):  # transformers constructs models under torch.device("meta")
            installer.install(hf_model, found)
    except BaseException:
        restore(hf_model)  # a part that doesn't bind leaves nothing patched halfway
        raise
    parts = {name: part for name, part in installer.parts.items() if part.bound or part.refused}
    return PatchReport(hf_model, parts, options, release.version)


def unpatch(hf_model: nn.Module) -> None:
    """Takes every hook of `patch` away: each method is again the identical object that it was.

    Raises: ValueError if the model isn't patched; RuntimeError, before any change, where somebody replaced a patched method.
    """
    if not isinstance(hf_model, nn.Module):
        raise TypeError(f"hf_model: expected a patched model, got {type(hf_model).__name__}")
    if next(install.patched(hf_model), None) is None:
        raise ValueError(f"hf_model: this {type(hf_model).__name__} is not patched")
    restore(hf_model)


class _Callable(ModuleType):
    """The package under the name of its function."""

    __call__ = staticmethod(patch)


__signature__ = inspect.signature(patch)
sys.modules[__name__].__class__ = _Callable
if importlib.util.find_spec("transformers") is not None:
    interface.register()
