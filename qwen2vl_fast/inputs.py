"""A padded batch with its media -> packed tokens, checked on the host after one copy from the device."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from .config import Config
from .positions import mrope_position_ids

IGNORE = -100


@dataclass(frozen=True)
class Packed:
    """B sequences without their padding: T real tokens in a row, everything on the host.

    shape: (B, S). lengths: real tokens of each sequence. rows: [T] int64, index into the flattened [B * S].
    position_ids: [3, T]. deltas: of each sequence. visual: [M] int64, the tokens among T that visual features replace, images'
    first, then videos'. grid_thw: [N, 3], images', then videos'. patches: of the images and of the videos.
    """

    shape: tuple[int, int]
    lengths: tuple[int, ...]
    rows: torch.Tensor
    position_ids: torch.Tensor
    deltas: tuple[int, ...]
    visual: torch.Tensor
    grid_thw: torch.Tensor
    patches: tuple[int, int]


def to_host(*tensors: torch.Tensor | None) -> list[torch.Tensor | None]:
    """The integer tensors on the host: one copy, and so one sync, for all that are on a device."""
    away = [x for x in tensors if x is not None and x.device.type != "cpu"]
    if not away:
        return list(tensors)
    flat = torch.cat([x.to(torch.int64).flatten() for x in away]).cpu()
    pieces = iter(flat.split([x.numel() for x in away]))
    return [x if x is None or x.device.type == "cpu" else next(pieces).view(x.shape).to(x.dtype) for x in tensors]


def pack(
    config: Config,
    *,
    input_ids: torch.Tensor | None,
    inputs_embeds: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    image_grid_thw: torch.Tensor | None,
    video_grid_thw: torch.Tensor | None,
    mm_token_type_ids: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    offsets: list[tuple[int, int]] | None = None,
) -> Packed:
    """Checks a batch and packs it. offsets: (length, delta) of each sequence that a cache already holds.

    Raises TypeError, ValueError naming the argument, what was expected and what came.
    """
    for name, x in (
        ("input_ids", input_ids), ("inputs_embeds", inputs_embeds), ("attention_mask", attention_mask),
        ("image_grid_thw", image_grid_thw), ("video_grid_thw", video_grid_thw),
        ("mm_token_type_ids", mm_token_type_ids), ("position_ids", position_ids),
    ):  # fmt: skip
        check_tensor(name, x)
    shape = _batch_shape(input_ids, inputs_embeds, config.text.hidden_size)
    if offsets is not None and len(offsets) != shape[0]:
        raise ValueError(f"cache: holds {len(offsets)} sequences, but the input has {shape[0]}")
    for name, x in (("attention_mask", attention_mask), ("mm_token_type_ids", mm_token_type_ids)):
        if x is not None and tuple(x.shape) != shape:
            raise ValueError(f"{name}: expected shape {list(shape)} like the input, got {list(x.shape)}")
    input_ids, attention_mask, image_grid_thw, video_grid_thw, mm_token_type_ids, position_ids = to_host(
        input_ids, attention_mask, image_grid_thw, video_grid_thw, mm_token_type_ids, position_ids
    )
    real = torch.ones(shape, dtype=torch.bool) if attention_mask is None else attention_mask != 0
    lengths = real.sum(1)
    if (lengths == 0).any():
        raise ValueError(f"attention_mask: row {int((lengths == 0).nonzero()[0])} has no token; expected at least one")
    if input_ids is None:
        ids = torch.full(shape, IGNORE)  # no id: embeddings are text
    else:
        ids = input_ids.long()
        outside = real & ((ids < 0) | (ids >= config.text.vocab_size))
        if outside.any():
            raise ValueError(f"input_ids: expected 0..{config.text.vocab_size - 1}, got {int(ids[outside][0])}")
    if mm_token_type_ids is not None and input_ids is not None:
        kind = (ids == config.image_token_id).long() + 2 * (ids == config.video_token_id).long()
        if not torch.equal(kind[real], mm_token_type_ids.long()[real]):
            raise ValueError("mm_token_type_ids: expected 1 at image placeholders, 2 at video placeholders and 0 elsewhere")
    computed, deltas = mrope_position_ids(
        ids,
        image_grid_thw=image_grid_thw,
        video_grid_thw=video_grid_thw,
        attention_mask=real,
        image_token_id=config.image_token_id,
        video_token_id=config.video_token_id,
        merge_size=config.vision.spatial_merge_size,
    )
    if offsets is not None:
        start = torch.tensor([length + delta for length, delta in offsets])
        computed = computed + start[:, None]
        deltas = deltas + torch.tensor([delta for _, delta in offsets])
    if position_ids is not None:
        computed, deltas = _given_positions(position_ids, shape, real, offsets)
    rows = real.flatten().nonzero().squeeze(1)
    packed_ids = ids.flatten()[rows]
    visual = [(packed_ids == token).nonzero().squeeze(1) for token in (config.image_token_id, config.video_token_id)]
    grids = [torch.zeros(0, 3, dtype=torch.int64) if grid is None else grid.long() for grid in (image_grid_thw, video_grid_thw)]
    return Packed(
        shape=shape,
        lengths=tuple(lengths.tolist()),
        rows=rows,
        position_ids=computed.flatten(1)[:, rows],
        deltas=tuple(deltas.tolist()),
        visual=torch.cat(visual),
        grid_thw=torch.cat(grids),
        patches=(int(grids[0].prod(1).sum()), int(grids[1].prod(1).sum())),
    )


def check_tensor(name: str, x: object, *, optional: bool = True) -> None:
    if not isinstance(x, torch.Tensor) and not (optional and x is None):
        raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")


def check_int(name: str, x: object) -> None:
    if not isinstance(x, int) or isinstance(x, bool):
        raise TypeError(f"{name}: expected an int, got {type(x).__name__}")


def check_labels(labels: torch.Tensor, shape: tuple[int, int], vocabulary: int) -> None:
    """Shape and dtype; the values too when they are on the host."""
    check_tensor("labels", labels)
    if tuple(labels.shape) != shape or labels.dtype != torch.int64:
        raise ValueError(f"labels: expected int64 of shape {list(shape)}, got {labels.dtype} {list(labels.shape)}")
    if labels.device.type == "cpu":
        bad = ((labels != IGNORE) & ((labels < 0) | (labels >= vocabulary))).nonzero()
        if bad.numel():
            row, column = bad[0].tolist()
            raise ValueError(
                f"labels[{row}, {column}]: expected {IGNORE} or 0..{vocabulary - 1}, got {int(labels[row, column])}"
            )


def refuse_autocast(device_type: str) -> None:
    """Autocast would round some products and leave the rest of the network in another dtype than its weights."""
    if torch.is_autocast_enabled(device_type):
        raise RuntimeError(
            "autocast is not supported: the ops compute in the dtype of the weights; load the model with dtype=torch.bfloat16"
        )


def _batch_shape(input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None, width: int) -> tuple[int, int]:
    if input_ids is None and inputs_embeds is None:
        raise ValueError("input_ids: expected input_ids or inputs_embeds, got neither")
    if input_ids is not None:
        if input_ids.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"input_ids: expected int32 or int64, got {input_ids.dtype}")
        if input_ids.dim() != 2 or input_ids.numel() == 0:
            raise ValueError(f"input_ids: expected [B, S] with at least one token, got shape {list(input_ids.shape)}")
    if inputs_embeds is not None:
        if not inputs_embeds.is_floating_point():
            raise TypeError(f"inputs_embeds: expected a floating dtype, got {inputs_embeds.dtype}")
        if inputs_embeds.dim() != 3 or inputs_embeds.numel() == 0 or inputs_embeds.shape[2] != width:
            raise ValueError(f"inputs_embeds: expected [B, S, {width}], got shape {list(inputs_embeds.shape)}")
        if input_ids is not None and inputs_embeds.shape[:2] != input_ids.shape:
            raise ValueError(
                f"inputs_embeds: expected {list(input_ids.shape)} positions like input_ids, got {list(inputs_embeds.shape[:2])}"
            )
    first = input_ids if input_ids is not None else inputs_embeds
    return first.shape[0], first.shape[1]


def _given_positions(position_ids, shape, real, offsets) -> tuple[torch.Tensor, torch.Tensor]:
    if position_ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"position_ids: expected int32 or int64, got {position_ids.dtype}")
    if position_ids.dim() == 2:
        position_ids = position_ids.expand(3, -1, -1)
    if tuple(position_ids.shape) != (3, *shape):
        raise ValueError(f"position_ids: expected [3, B, S] = {[3, *shape]} or [B, S], got {list(position_ids.shape)}")
    if (position_ids.masked_select(real) < 0).any():
        raise ValueError("position_ids: expected ids of at least 0")
    largest = position_ids.amax(0).masked_fill(~real, -1).amax(1)
    earlier = torch.tensor([length for length, _ in offsets]) if offsets is not None else 0
    return position_ids.long(), largest + 1 - real.sum(1) - earlier


def check_pixels(name: str, pixel_values: torch.Tensor | None, patches: int, config: Config) -> None:
    """Holds patch rows against the number of patches of their grids."""
    check_tensor(name, pixel_values)
    if pixel_values is None:
        if patches:
            raise ValueError(f"{name}: the grids ask for {patches} patch rows, but no pixels were given")
        return
    if not pixel_values.is_floating_point():
        raise TypeError(f"{name}: expected a floating dtype, got {pixel_values.dtype}; ops.patchify takes uint8 frames")
    if pixel_values.dim() != 2 or pixel_values.shape[1] != config.vision.patch_dim:
        raise ValueError(f"{name}: expected [T, {config.vision.patch_dim}] patch rows, got shape {list(pixel_values.shape)}")
    if pixel_values.shape[0] != patches:
        raise ValueError(f"{name}: expected {patches} rows by its grid_thw, got {pixel_values.shape[0]}")


def capped_packs(grid_thw: torch.Tensor, max_patches: int) -> Iterator[tuple[slice, torch.Tensor]]:
    """(rows, grid) of successive packs of at most max_patches patches.

    The unit is a frame pair, which attends to nothing else; one that is larger than the cap is a pack of its own.
    """
    units = torch.stack((torch.ones_like(grid_thw[:, 0]), grid_thw[:, 1], grid_thw[:, 2]), 1)
    units = units.repeat_interleave(grid_thw[:, 0], 0)
    sizes = units.prod(1).tolist()
    first = start = size = 0
    for index, patches in enumerate(sizes):
        if size and size + patches > max_patches:
            yield slice(start, start + size), units[first:index]
            first, start, size = index, start + size, 0
        size += patches
    if size:
        yield slice(start, start + size), units[first:]


def shifted_labels(labels: torch.Tensor, packed: Packed) -> torch.Tensor:
    """[T]: for each real token the label of the next real token of its sequence; IGNORE for the last one."""
    flat = labels.flatten()[packed.rows.to(labels.device)]
    shifted = torch.cat((flat[1:], flat.new_full((1,), IGNORE)))
    ends = torch.tensor(packed.lengths).cumsum(0) - 1
    return shifted.index_fill(0, ends.to(labels.device), IGNORE)
