"""What differs between releases of transformers, read off the installed one; docs/patch.md says how to add a release."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import nn

OLDEST, NEWEST = (4, 52), (5, 23)
_warned = False


@dataclass(frozen=True)
class Release:
    """modeling: transformers' module of this model. The rest: what its classes return, and where they checkpoint."""

    version: str
    modeling: ModuleType
    tower_output: type | None  # None: the tower returns the visual tokens alone
    tower_checkpoints: bool  # the tower, not its blocks, applies gradient checkpointing
    forward_checkpoints: bool  # a block's class applies it inside forward, not inside __call__
    layer_returns_tuple: bool
    attention_returns_cache: bool
    record: Callable  # around the tower's forward, for output_hidden_states

    @classmethod
    def installed(cls) -> Release:
        """Imports transformers. Raises ImportError that says what to install; warns once outside the tested range."""
        global _warned
        try:
            import transformers
            from transformers.modeling_outputs import BaseModelOutputWithPooling
            from transformers.models.qwen2_vl import modeling_qwen2_vl as modeling
        except ImportError as error:
            raise ImportError("patch needs transformers 4.52 or newer: pip install qwen2vl-fast[transformers]") from error
        numbers = tuple(int(n) for n in transformers.__version__.split(".")[:2])
        if not OLDEST <= numbers <= NEWEST and not _warned:
            _warned = True
            warnings.warn(
                f"patch is tested with transformers {_dotted(OLDEST)} to {_dotted(NEWEST)}, this is {transformers.__version__};"
                " report.verify(batch) compares the model before and after",
                stacklevel=3,
            )
        block, layer = modeling.Qwen2VLVisionBlock, modeling.Qwen2VLDecoderLayer
        own_checkpoints = hasattr(block, "gradient_checkpointing")
        return cls(
            version=transformers.__version__,
            modeling=modeling,
            tower_output=BaseModelOutputWithPooling if numbers >= (5, 0) else None,
            tower_checkpoints=not own_checkpoints,
            forward_checkpoints=own_checkpoints and block.__call__ is nn.Module.__call__,
            layer_returns_tuple="tuple" in str(inspect.signature(layer.forward).return_annotation).lower(),
            attention_returns_cache=hasattr(modeling, "QWEN2_VL_ATTENTION_CLASSES"),
            record=_recorder(),
        )

    def interface(self) -> Callable[[nn.Module, dict], Callable | None]:
        """(attention module, arguments) -> the attention function that its config names, or None where it has none."""
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        if self.attention_returns_cache:
            return _old_interface
        eager = self.modeling.eager_attention_forward

        def interface(module: nn.Module, kwargs: dict) -> Callable | None:
            name = module.config._attn_implementation
            return eager if name in (None, "eager") else ALL_ATTENTION_FUNCTIONS[name]

        return interface

    def mask_options(self) -> Callable[..., dict[str, Any]]:
        """What the attention function is told besides the mask."""
        return _old_mask_options if self.attention_returns_cache else _mask_options

    def padded_deltas(self, model: nn.Module) -> bool:
        """Whether the class counts rope_deltas from the padded length (4.52) or from that of the real tokens."""
        ids = torch.tensor([[0, 1, 1]])
        names = inspect.signature(model.get_rope_index).parameters
        kinds = {"mm_token_type_ids": torch.zeros_like(ids)} if "mm_token_type_ids" in names else {}
        _, deltas = type(model).get_rope_index(model, ids, attention_mask=torch.tensor([[0, 1, 1]]), **kinds)
        return int(deltas) < 0


def _dotted(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))


def _recorder() -> Callable:
    try:
        from transformers.utils.output_capturing import capture_outputs
    except ImportError:
        return lambda forward: forward
    return capture_outputs


def _mask_options(module: nn.Module, q: torch.Tensor, mask: Any, kwargs: dict) -> dict[str, Any]:
    return {"sliding_window": getattr(module, "sliding_window", None), "position_ids": kwargs.get("position_ids")}


def _old_interface(module: nn.Module, kwargs: dict) -> Callable | None:
    """4.52 has a class for each implementation."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if kwargs.get("output_attentions"):
        return None
    names = {"Qwen2VLSdpaAttention": "sdpa", "Qwen2VLFlashAttention2": "flash_attention_2"}
    name = next((names[cls.__name__] for cls in type(module).__mro__ if cls.__name__ in names), None)
    return None if name is None else ALL_ATTENTION_FUNCTIONS[name]


def _old_mask_options(module: nn.Module, q: torch.Tensor, mask: Any, kwargs: dict) -> dict[str, Any]:
    config = module.config
    windowed = config.use_sliding_window and config.sliding_window is not None and module.layer_idx >= config.max_window_layers
    return {"sliding_window": config.sliding_window if windowed else None, "is_causal": mask is None and q.shape[2] > 1}
