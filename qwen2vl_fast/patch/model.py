"""Qwen2VLModel of transformers: position ids at once, images and videos in one tower pass, visual tokens put in by index."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..inputs import to_host
from ..positions import mrope_position_ids
from .hooks import hook_of, original
from .vision import several_ranks

_PRECOMPUTED = ("image_", "video_")  # transformers 5.x: image_cu_seqlens, video_position_ids, ...: for one modality's own pass
_GRIDS = ("image_grid_thw", "video_grid_thw")


def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Does the class's work up to the embeddings, and leaves the rest to the class."""
    hook = hook_of(self)
    kwargs = dict(hook.bind(args, kwargs))
    reason = _unfit(kwargs)
    if not hook.active or reason is not None:
        if hook.active and reason:
            hook.part.fell_back(reason)
        return original(self, **kwargs)
    media = [kwargs.pop(name, None) for name in ("pixel_values", "pixel_values_videos")]
    input_ids = kwargs["input_ids"]
    embeds = self.get_input_embeddings()(input_ids)
    if all(pixels is None for pixels in media):
        if _others_wait(kwargs):
            embeds = embeds + _no_media(self).to(embeds.device, embeds.dtype)
    else:
        hook.part.ran()
        embeds = _embed_media(self, embeds, input_ids, media, [kwargs.get(name) for name in _GRIDS])
    return original(self, **{**kwargs, "inputs_embeds": embeds})


def _unfit(kwargs: dict[str, Any]) -> str | None:
    """Why a call is the library's alone: "" where there is nothing to do, else a reason to report."""
    if kwargs.get("inputs_embeds") is not None or kwargs.get("input_ids") is None:
        return "embeddings were given" if kwargs.get("pixel_values") is not None else ""
    if kwargs.get("mm_encoder_outputs") is not None:
        return "encoded media were given"
    if any(name.startswith(_PRECOMPUTED) and name not in _GRIDS for name in kwargs):
        return "precomputed inputs of one modality were given"
    return None


def _embed_media(
    self: nn.Module,
    embeds: torch.Tensor,
    input_ids: torch.Tensor,
    media: list[torch.Tensor | None],
    grids: list[torch.Tensor | None],
) -> torch.Tensor:
    """embeds [B, S, E] with visual tokens in the places of their placeholders: images', then videos'."""
    names = ("pixel_values", "pixel_values_videos")
    for name, grid_name, pixels, grid in zip(names, _GRIDS, media, grids, strict=True):
        if pixels is not None and grid is None:
            raise ValueError(f"{grid_name}: expected [N, 3] grids with {name}, got None")
    merge, tokens = self.visual.spatial_merge_size, (self.config.image_token_id, self.config.video_token_id)
    masks = [input_ids == token for token in tokens]
    counts = None
    if any(grid is not None and grid.device.type != "cpu" for grid in grids):
        counts = torch.stack([mask.sum() for mask in masks])  # they come along in the one copy that the grids need
    elif input_ids.device.type == "cpu":
        counts = torch.stack([mask.sum() for mask in masks])
    *grids, counts = to_host(*grids, counts)
    wanted = [0 if pixels is None else int(grid.prod(1).sum()) // merge**2 for pixels, grid in zip(media, grids, strict=True)]
    for kind, pixels, mask, number, count in zip(
        ("image", "video"), media, masks, wanted, (None, None) if counts is None else counts.tolist(), strict=True
    ):
        if pixels is not None and count is not None and count != number:
            raise ValueError(f"input_ids: expected {number} {kind} placeholders by {kind}_grid_thw, got {count}")
        if pixels is not None and count is None:
            torch._assert_async(mask.sum() == number)
    dtype, present = self.visual.dtype, [i for i in range(2) if media[i] is not None]
    device = media[present[0]].device
    pixels = [media[i].to(device, dtype) for i in present]
    pixels = pixels[0] if len(pixels) == 1 else torch.cat(pixels)
    features = self.visual(pixels, grid_thw=torch.cat([grids[i] for i in present]))
    features = getattr(features, "pooler_output", features)
    where = [torch.nonzero_static(masks[i].flatten(), size=wanted[i]).squeeze(1) for i in present]
    where = torch.cat(where).to(embeds.device)
    rows = embeds.flatten(0, 1).index_copy(0, where, features.to(embeds.device, embeds.dtype))
    return rows.view_as(embeds)


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
    return getattr(features, "pooler_output", features).sum() * 0


def get_rope_index(self: nn.Module, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """As the class's method, by MODEL.md section 4, in whole-tensor arithmetic: ([3, B, S], [B, 1])."""
    hook = hook_of(self, "get_rope_index")
    given = hook.bind(args, kwargs)
    input_ids, mask = given.get("input_ids"), given.get("attention_mask")
    grids = {name: given.get(name) for name in _GRIDS}
    unfit = input_ids is None or all(grid is None for grid in grids.values())
    if not hook.active or unfit or mask is not None and mask.shape != input_ids.shape:
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
    if hook["counts_padding"] and mask is not None:  # 4.52 takes the padded length from the largest id
        deltas = deltas + (mask != 0).sum(1) - mask.shape[1]
    return ids, deltas.unsqueeze(1)
