"""Qwen2VLModel of transformers: position ids at once, images and videos in one tower pass, visual tokens put in by index.

Media come in pairs (of images, of videos), either of which can be None.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..inputs import to_host
from ..positions import check_grid, check_grid_shape, mrope_position_ids
from .hooks import hook_of, original
from .vision import several_ranks

KINDS, PIXELS, GRIDS = ("image", "video"), ("pixel_values", "pixel_values_videos"), ("image_grid_thw", "video_grid_thw")
ENCODE = "_prepare_multimodal_encoder_kwargs_for_generation"
FEATURES = ("get_image_features", "get_video_features", "get_placeholder_mask")
_Pair = list[torch.Tensor | None]


def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Does the class's work up to the embeddings, and leaves the rest to the class."""
    hook = hook_of(self)
    kwargs = dict(hook.bind(args, kwargs))
    reason = _unfit(self, kwargs)
    if not hook.part.enabled or reason is not None:
        if hook.part.enabled and reason:
            hook.part.fell_back(reason)
        return original(self, **kwargs)
    encoded = kwargs.pop("mm_encoder_outputs", None)
    pixels, grids = [kwargs.pop(name, None) for name in PIXELS], [kwargs.get(name) for name in GRIDS]
    input_ids = kwargs["input_ids"]
    embeds = self.get_input_embeddings()(input_ids)
    if encoded and any(encoded.get(kind) is not None for kind in KINDS):
        hook.part.ran()
        embeds = _put(self, embeds, input_ids, *_joined(encoded), None)
    elif any(x is not None for x in pixels):
        hook.part.ran()
        rows, grid, sizes, counts = _gathered(self, pixels, grids, input_ids)
        embeds = _put(self, embeds, input_ids, _tokens(self.visual(rows, grid_thw=grid)), sizes, counts)
    elif encoded is None and _others_wait(kwargs):
        embeds = embeds + _no_media(self).to(embeds.device, embeds.dtype)
    return original(self, **{**kwargs, "inputs_embeds": embeds})


def _unfit(self: nn.Module, kwargs: dict[str, Any]) -> str | None:
    """Why a call is the library's alone: "" where there is nothing to do, else a reason to report."""
    pixels = any(kwargs.get(name) is not None for name in PIXELS)
    if kwargs.get("inputs_embeds") is not None or kwargs.get("input_ids") is None:
        return "embeddings were given" if pixels else ""
    if pixels and kwargs.get("mm_encoder_outputs") is not None:
        return ""  # which the class refuses
    if _precomputed(kwargs):
        return "precomputed inputs of one modality were given"
    changed = _overridden(self, hook_of(self).more["owner"])
    return changed and f"{changed} is not the class's"


def _overridden(self: nn.Module, owner: type) -> str | None:
    """The name of a method of the class that is part of what is replaced, where somebody has put another in its place."""
    for name in FEATURES:
        if hasattr(owner, name) and (name in vars(self) or getattr(type(self), name) is not getattr(owner, name)):
            return name
    return None


def _precomputed(kwargs: dict[str, Any]) -> bool:
    """transformers 5.x: image_cu_seqlens, video_position_ids, ... for the own pass of a modality."""
    return any(name.startswith(("image_", "video_")) and name not in GRIDS for name in kwargs)


def _masks(self: nn.Module, input_ids: torch.Tensor) -> list[torch.Tensor]:
    """[B, S] bool each: the placeholders of images, of videos."""
    return [input_ids == token for token in (self.config.image_token_id, self.config.video_token_id)]


def _tokens(output: Any) -> torch.Tensor:
    """[M, E] of what a tower returns."""
    return getattr(output, "pooler_output", output)


@torch.compiler.disable  # reads the grids on the host
def _gathered(
    self: nn.Module, pixels: _Pair, grids: _Pair, input_ids: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, list[int | None], torch.Tensor | None]:
    """Patch rows of images, then videos; their grids on the host; visual tokens of each kind, None for one that was not given;
    numbers of placeholders in input_ids [2] on the host where they cost no sync of their own.
    """
    for pixel_name, grid_name, one, grid in zip(PIXELS, GRIDS, pixels, grids, strict=True):
        if one is not None and grid is None:
            raise ValueError(f"{grid_name}: expected [N, 3] grids with {pixel_name}, got None")
        if grid is not None:
            check_grid_shape(grid_name, grid)
    copied = any(grid is not None and grid.device.type != "cpu" for grid in grids)
    counts = None
    if input_ids is not None and (copied or input_ids.device.type == "cpu"):
        counts = torch.stack([mask.sum() for mask in _masks(self, input_ids)])
    *grids, counts = to_host(*grids, counts)
    present = [i for i in range(2) if pixels[i] is not None]
    device, merge = pixels[present[0]].device, self.visual.spatial_merge_size
    rows = [pixels[i].to(device, self.visual.dtype) for i in present]
    checked = [check_grid(grids[i], merge) for i in present]
    sizes: list[int | None] = [None, None]
    for i, grid in zip(present, checked, strict=True):
        patches = int(grid.prod(1).sum())
        if pixels[i].dim() == 2 and pixels[i].shape[0] != patches:
            raise ValueError(f"{PIXELS[i]}: expected {patches} rows by {GRIDS[i]}, got {pixels[i].shape[0]}")
        sizes[i] = patches // merge**2
    return rows[0] if len(rows) == 1 else torch.cat(rows), torch.cat(checked), sizes, counts


def _joined(encoded: dict[str, Any]) -> tuple[torch.Tensor, list[int | None]]:
    """Visual tokens that were encoded before, images' first, and their numbers."""
    found = [None if encoded.get(kind) is None else torch.cat(tuple(encoded[kind]["pooler_output"])) for kind in KINDS]
    return torch.cat([x for x in found if x is not None]), [None if x is None else x.shape[0] for x in found]


@torch.compiler.disable  # counts placeholders
def _put(
    self: nn.Module, embeds: torch.Tensor, input_ids: torch.Tensor, features: torch.Tensor, sizes: list[int | None], counts: Any
) -> torch.Tensor:
    """embeds [B, S, E] with visual tokens in the places of their placeholders.

    features: [M, E], images' first. sizes: the number of each kind, None if not given. counts: as `_gathered` returns them.
    """
    masks = _masks(self, input_ids)
    if counts is None and input_ids.device.type == "cpu":
        counts = torch.stack([mask.sum() for mask in masks])
    where = []
    for index, (kind, mask, size) in enumerate(zip(KINDS, masks, sizes, strict=True)):
        if size is None:
            continue
        if counts is None:
            torch._assert_async(mask.sum() == size)
        elif int(counts[index]) != size:
            raise ValueError(f"input_ids: expected {size} {kind} placeholders by {kind}_grid_thw, got {int(counts[index])}")
        where.append(torch.nonzero_static(mask.flatten(), size=size).squeeze(1).to(embeds.device))
    rows = features.to(embeds.device, embeds.dtype)
    return embeds.flatten(0, 1).index_copy(0, torch.cat(where), rows).view_as(embeds)


def encode_for_generation(self: nn.Module, model_kwargs: dict[str, Any]) -> dict[str, Any]:
    """generate of transformers 5.x encodes media before the prefill, images and videos apart: here they go together."""
    hook, inner = hook_of(self, ENCODE), self.model
    pixels, grids = ([model_kwargs.get(name) for name in names] for names in (PIXELS, GRIDS))
    if hook.part.enabled and all(x is None for x in pixels) and not model_kwargs.get("mm_encoder_outputs") and several_ranks():
        _no_media(inner)
    both = all(x is not None for x in (*pixels, *grids)) and not _overridden(inner, hook.more["owner"])
    if not hook.part.enabled or not both or model_kwargs.get("mm_encoder_outputs") or _precomputed(model_kwargs):
        return getattr(type(self), ENCODE)(self, model_kwargs)
    hook.part.ran()
    grids = to_host(*grids)
    rows, grid, _, _ = _gathered(inner, pixels, grids)
    sizes = (grid.prod(1) // inner.visual.spatial_merge_size**2).tolist()
    media, first = _tokens(inner.visual(rows, grid_thw=grid)).split(sizes), grids[0].shape[0]
    outputs = {
        kind: hook.more["output"](pooler_output=part) for kind, part in zip(KINDS, (media[:first], media[first:]), strict=True)
    }
    for name in (*PIXELS, *GRIDS):
        model_kwargs.pop(name)
    model_kwargs["mm_encoder_outputs"] = outputs
    return model_kwargs


def _others_wait(kwargs: dict[str, Any]) -> bool:
    """Whether other ranks may be inside their tower now: at the start of a sequence, not at each decoded token."""
    cache = kwargs.get("past_key_values")
    return several_ranks() and (cache is None or cache.get_seq_length() == 0)


def _no_media(self: nn.Module) -> torch.Tensor:
    """Zero, by way of the tower: a rank without media takes part in the collectives of those that have some, and its
    parameters have a gradient (of zero) everywhere.
    """
    side = self.visual.spatial_merge_size
    proj = self.visual.patch_embed.proj
    width = proj.in_channels
    for size in proj.kernel_size:
        width *= size
    pixels = torch.zeros(side * side, width, dtype=self.visual.dtype, device=self.visual.device)
    features = self.visual(pixels, grid_thw=torch.tensor([[1, side, side]]))
    return _tokens(features).sum() * 0


@torch.compiler.disable  # holds placeholders against the grids
def get_rope_index(self: nn.Module, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """As the class's method, by MODEL.md section 4, in whole-tensor arithmetic: ([3, B, S], [B, 1])."""
    hook = hook_of(self, "get_rope_index")
    given = hook.bind(args, kwargs)
    input_ids, mask = given.get("input_ids"), given.get("attention_mask")
    grids = {name: given.get(name) for name in GRIDS}
    unfit = input_ids is None or all(grid is None for grid in grids.values())
    if not hook.part.enabled or unfit or mask is not None and mask.shape != input_ids.shape:
        return type(self).get_rope_index(self, *args, **kwargs)
    hook.part.ran()
    kinds = given.get("mm_token_type_ids")
    if kinds is None:
        tokens = {"image_token_id": self.config.image_token_id, "video_token_id": self.config.video_token_id}
    else:  # what the class goes by: 1 where an image goes, 2 where a video goes
        input_ids, tokens = kinds.to(input_ids.device, torch.int64), {"image_token_id": 1, "video_token_id": 2}
    merge = self.config.vision_config.spatial_merge_size
    mask = None if mask is None else mask.to(input_ids.device)
    ids, deltas = mrope_position_ids(input_ids, **grids, attention_mask=mask, merge_size=merge, **tokens)
    if hook.more["counts_padding"] and mask is not None:  # 4.52 takes the padded length from the largest id
        deltas = deltas + (mask != 0).sum(1) - mask.shape[1]
    return ids, deltas.unsqueeze(1)
