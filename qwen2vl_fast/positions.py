"""Grids -> rotary positions and segment boundaries: whole-tensor arithmetic, no loop over tokens, no device sync.

A grid row is (t, h, w): frame pairs, patch rows, patch columns. Patches are stored in merge order
(t, h/m, w/m, m, m), so m*m consecutive rows make one visual token (MODEL.md sections 1, 4).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from numbers import Integral

import torch

_MAX_PATCHES = 2**31 - 1  # boundaries are int32
# Of the backward: clocks of a step in blocks of 64 keys over those of one of as many pairs in blocks of 128, by the machine
# code; and those of a block alone on a multiprocessor over its share of two, as measured of the forward.
_SMALL_STEP, _ALONE = 1.14, 1.4


def vision_position_ids(grid_thw: torch.Tensor, merge_size: int = 2) -> torch.Tensor:
    """Row and column of every patch of a pack, in merge order.

    Args:
        grid_thw: [N, 3] integer, (t, h, w) in patches; h and w multiples of merge_size. Read on the host.
        merge_size: side m of the square of patches that becomes one visual token.
    Returns:
        [2, T] int64 on grid_thw's device, T = sum t*h*w: (row, column). Every frame pair starts again at (0, 0).
    Raises:
        TypeError, ValueError: grid_thw is not an integer [N, 3], not positive, or h, w are no multiples of merge_size.
    Source: MODEL.md sections 1, 2.
    """
    grid = check_grid(grid_thw, merge_size)
    segment_h, segment_w = (side.repeat_interleave(grid[:, 0]) for side in (grid[:, 1], grid[:, 2]))
    local, segment = _local_index(segment_h * segment_w)
    merged_w = (segment_w // merge_size)[segment]
    token, within = local // merge_size**2, local % merge_size**2
    row = token // merged_w * merge_size + within // merge_size
    column = token % merged_w * merge_size + within % merge_size
    return torch.stack((row, column)).to(grid_thw.device)


def vision_cu_seqlens(grid_thw: torch.Tensor) -> torch.Tensor:
    """Boundaries of the attention segments of a pack: one segment of h*w patches per frame pair.

    Args:
        grid_thw: [N, 3] integer, (t, h, w) in patches. Read on the host.
    Returns:
        [1 + sum(t)] int32 on grid_thw's device: 0 and the running sums of h*w.
    Raises:
        TypeError, ValueError: grid_thw is not an integer [N, 3] of positive numbers, or the pack passes 2^31 - 1 patches.
    Source: MODEL.md section 2.
    """
    grid = check_grid(grid_thw, 1)
    total = int(grid.prod(1).sum())
    if total > _MAX_PATCHES:
        raise ValueError(f"grid_thw: {total} patches in one pack do not fit int32 boundaries; use max_pack_patches")
    ends = (grid[:, 1] * grid[:, 2]).repeat_interleave(grid[:, 0]).cumsum(0)
    return torch.cat((ends.new_zeros(1), ends)).to(device=grid_thw.device, dtype=torch.int32)


def mrope_position_ids(
    input_ids: torch.Tensor,
    *,
    image_grid_thw: torch.Tensor | None = None,
    video_grid_thw: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    image_token_id: int = 151655,
    video_token_id: int = 151656,
    merge_size: int = 2,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The three rotary ids (t, h, w) of every token.

    A text token advances all three ids by one. A medium of t x h x w patches that starts at p gives its tokens
    (p + frame, p + row, p + column) on the merged grid, and the next modality starts at the largest id so far plus one:
    p + max(t, h/m, w/m). So the start of a token is the exclusive running sum of advances, where a medium's whole advance
    sits on its last token: a cumsum instead of a loop.

    Args:
        input_ids: [B, S] integer. Media appear as runs of image_token_id / video_token_id, t*h*w/m^2 each, in grid order.
        image_grid_thw, video_grid_thw: [N, 3] integer, the grids in the order of the flattened batch.
        attention_mask: [B, S], nonzero = a real token; any pattern of padding. None = no padding.
    Returns:
        position_ids: [3, B, S] int64 on input_ids' device; padded positions hold 0 and mean nothing.
        deltas: [B] int64, largest id + 1 - number of real tokens: a later token's ids are its index + delta.
    Raises:
        TypeError, ValueError: wrong rank or shape; for host tensors also placeholders that don't come in the runs of the grids.
        Values on a device are not read (no sync).
    Source: MODEL.md section 4; arXiv:2409.12191 section 2.1.
    """
    check_integer("merge_size", merge_size, 1)
    check_tensor("input_ids", input_ids)
    if input_ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"input_ids: expected int32 or int64, got {input_ids.dtype}")
    if input_ids.dim() != 2:
        raise ValueError(f"input_ids: expected [B, S], got shape {list(input_ids.shape)}")
    if attention_mask is None:
        real = torch.ones_like(input_ids, dtype=torch.bool)
    elif check_tensor("attention_mask", attention_mask).shape != input_ids.shape:
        raise ValueError(f"attention_mask: expected shape {list(input_ids.shape)}, got {list(attention_mask.shape)}")
    else:
        real = attention_mask != 0
    advance = real.long()
    local = input_ids.new_zeros((3, *input_ids.shape), dtype=torch.int64)
    for name, grid, token_id in (
        ("image", image_grid_thw, image_token_id),
        ("video", video_grid_thw, video_token_id),
    ):
        visual = (input_ids == token_id) & real
        if grid is not None:
            check_grid_shape(f"{name}_grid_thw", grid)
        if grid is None or grid.shape[0] == 0:
            if visual.device.type == "cpu" and visual.any():
                raise ValueError(f"input_ids: {int(visual.sum())} {name} placeholders ({token_id}) but no {name}_grid_thw")
            continue
        if grid.device.type == "cpu":
            check_grid(grid, merge_size)
        merged = grid.to(device=input_ids.device, dtype=torch.int64, non_blocking=True)
        merged = torch.stack((merged[:, 0], merged[:, 1] // merge_size, merged[:, 2] // merge_size))
        ends = merged.prod(0).cumsum(0)
        if visual.device.type == "cpu":
            _check_runs(name, token_id, visual, real, grid, ends)
        ordinal = visual.flatten().cumsum(0).view_as(input_ids) - 1  # among this modality's tokens of the whole batch
        medium = torch.searchsorted(ends, ordinal, right=True).clamp_(max=ends.numel() - 1)
        frames, rows, columns = merged[:, medium]
        index = ordinal - (ends - merged.prod(0))[medium]
        axes = torch.stack((index // (rows * columns), index // columns % rows, index % columns))
        local = torch.where(visual, axes, local)
        last = index == frames * rows * columns - 1
        advance = torch.where(visual, last * torch.maximum(frames, torch.maximum(rows, columns)), advance)
    total = advance.sum(1)
    position_ids = (advance.cumsum(1) - advance + local).masked_fill_(~real, 0)
    return position_ids, total - real.sum(1)


def _check_runs(
    name: str, token_id: int, visual: torch.Tensor, real: torch.Tensor, grid: torch.Tensor, ends: torch.Tensor
) -> None:
    """Every medium has its placeholders in one unbroken run of real tokens of one sequence; none are left over.

    visual, real: [B, S] bool. ends: [N], running sum of the media's placeholders.
    """
    rows = torch.arange(real.shape[0])[:, None]
    where = (real.flatten().cumsum(0).view_as(real) + rows)[visual]  # rows are one apart, so that no run reaches over them
    count, starts = where.numel(), ends - ends.diff(prepend=ends.new_zeros(1))
    fits = ends <= count
    whole = torch.zeros_like(fits)
    whole[fits] = where[ends[fits] - 1] - where[starts[fits]] == (ends - starts - 1)[fits]
    if whole.all() and count == int(ends[-1]):
        return
    message = f"input_ids: {count} {name} placeholders ({token_id}), but {name}_grid_thw asks for {int(ends[-1])}"
    if not whole.all():
        index = int((~whole).nonzero()[0])
        run = where[int(starts[index]) :]
        held = int((run - run[:1] == torch.arange(run.numel())).cumprod(0).sum())
        message += (
            f"; {name} {index} of the batch, grid {grid[index].tolist()}, needs {int(ends[index] - starts[index])} in a row "
            f"and has {held}: a prompt must not be cut inside a medium, nor its grids be in another order"
        )
    raise ValueError(message)


@dataclass(frozen=True)
class AttentionSchedule:
    """What varlen attention needs to know of a pack, computed once and reused by every layer.

    cu_seqlens: [N + 1] int32 on the device. lengths: the N segment lengths, on the host. max_seqlen: their maximum.
    total: their sum T. Lists of work of the extension for these heads, this head dim and this mask, [M, 8] int32 on a CUDA
    device, None elsewhere: tiles, of the forward, in blocks of block_m query rows; key_tiles and query_tiles, of the backward,
    in blocks of backward_m keys and queries, None where none was asked for.
    """

    cu_seqlens: torch.Tensor
    lengths: tuple[int, ...]
    max_seqlen: int
    total: int
    heads: int
    heads_k: int
    head_dim: int
    causal: bool
    block_m: int
    tiles: torch.Tensor | None
    backward_m: int = 0
    key_tiles: torch.Tensor | None = None
    query_tiles: torch.Tensor | None = None


def attention_schedule(
    cu_seqlens_or_grid_thw: torch.Tensor, *, heads: int, device: torch.device | str, heads_k: int | None = None,
    head_dim: int = 80, causal: bool = False, backward: bool | None = None,
) -> AttentionSchedule:  # fmt: skip
    """Builds the schedule of a pack on the host; copies that wait for nobody, no sync if the input is on the host.

    Args:
        cu_seqlens_or_grid_thw: [N + 1] int32 boundaries, or an [N, 3] grid (then one segment a frame pair).
        heads, heads_k, head_dim, causal: of the attention that will use it; heads_k None = heads.
        device: where the attention runs.
        backward: whether the backward's lists are made as well; None = torch.is_grad_enabled().
    Raises:
        TypeError, ValueError: boundaries that do not start at 0 or decrease; a bad grid; heads < 1.
    """
    check_integer("heads", heads, 1)
    heads_k = heads if heads_k is None else heads_k
    check_integer("heads_k", heads_k, 1)
    check_integer("head_dim", head_dim, 1)
    if check_tensor("cu_seqlens_or_grid_thw", cu_seqlens_or_grid_thw).dim() == 2:
        cu_seqlens_or_grid_thw = vision_cu_seqlens(cu_seqlens_or_grid_thw)
    cu_seqlens = check_cu_seqlens("cu_seqlens", cu_seqlens_or_grid_thw.cpu())
    lengths, device = tuple(cu_seqlens.diff().tolist()), torch.device(device)
    schedule = AttentionSchedule(
        cu_seqlens=cu_seqlens,
        lengths=lengths,
        max_seqlen=max(lengths, default=0),
        total=sum(lengths),
        heads=heads,
        heads_k=heads_k,
        head_dim=head_dim,
        causal=causal,
        block_m=0,
        tiles=None,
    )
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        processors = torch.cuda.get_device_properties(device).multi_processor_count
        with_backward = torch.is_grad_enabled() if backward is None else backward
        schedule = with_lists(schedule, capability, processors, with_backward)
        lists = {name: getattr(schedule, name) for name in ("tiles", "key_tiles", "query_tiles")}
        there = {name: x.pin_memory().to(device, non_blocking=True) for name, x in lists.items() if x is not None}
        schedule = replace(schedule, **there)
    return replace(schedule, cu_seqlens=cu_seqlens.to(device, non_blocking=True))


def with_lists(schedule: AttentionSchedule, capability: tuple[int, int], processors: int, backward: bool) -> AttentionSchedule:
    """A schedule on the host with the lists of work, there too, for a device of this capability and so many multiprocessors."""
    bounds, lengths, causal = schedule.cu_seqlens, schedule.lengths, schedule.causal
    block_m = block_rows(lengths, schedule.heads, schedule.head_dim, capability, causal)
    tiles = attention_tiles(bounds, schedule.heads, block_m, causal)
    if capability == (9, 0) and not causal:  # causal tiles of one segment differ in length, and short ones end the list
        tiles = dealt_tiles(tiles, processors * hopper_blocks(block_m))
    schedule = replace(schedule, block_m=block_m, tiles=tiles)
    if not backward:
        return schedule
    rows = backward_rows(lengths, schedule.heads_k, schedule.head_dim, processors, causal)
    return replace(
        schedule,
        backward_m=rows,
        key_tiles=attention_key_tiles(bounds, schedule.heads_k, rows, causal),
        query_tiles=attention_tiles(bounds, schedule.heads, rows, causal),
    )


def block_rows(lengths: Sequence[int], heads: int, head_dim: int, capability: tuple[int, int], causal: bool) -> int:
    """Query rows of a block of the extension's attention: docs/attention.md has the measurements behind it.

    Large blocks read keys less often; small ones waste less at the ends of segments, and fill a device that large ones can't.
    """
    if capability == (9, 0):
        return 128 if head_dim != 80 else min((128, 192, 64), key=lambda rows: _hopper_microseconds(lengths, heads, rows))
    large, small = (heads * sum(-(-length // rows) for length in lengths) for rows in (128, 64))
    return 64 if large < 256 or 2 * large > 1.2 * small else 128


def _hopper_microseconds(lengths: Sequence[int], heads: int, rows: int) -> float:
    """Time of the busiest of an H100's resident blocks: whole tiles of the longest segments, no less than an equal share.

    Fitted to measurements: a tile of 192 rows costs 1.6 microseconds and 1.30 for each block of 96 keys. That one of 128 rows
    takes 1.10 a block is an estimate from blocks of 128 keys, which take 1.36. Tiles of 64 rows, two on a multiprocessor, wait
    for their loads: 2 x 1300 clocks (docs/hopper.md) are 1.5 microseconds, an estimate too.
    """
    workers = 132 * hopper_blocks(rows)
    length = torch.tensor(lengths, dtype=torch.int64)
    count = -(-length // rows) * heads
    cost = 1.6 + {192: 1.30, 128: 1.10, 64: 1.5}[rows] * -(-length // 96)
    longest = int(count[length == max(lengths, default=0)].sum())
    return max(float((count * cost).sum()) / workers, -(-longest // workers) * float(cost.max()) if longest else 0.0)


def hopper_blocks(rows: int) -> int:
    """Blocks of the Hopper forward that a multiprocessor holds: BLOCKS of csrc/fwd_sm90.cuh."""
    return 2 if rows == 64 else 1


def backward_rows(lengths: Sequence[int], heads_k: int, head_dim: int, processors: int, causal: bool) -> int:
    """Keys of a block of the backward, and queries of one of its second pass: docs/attention.md has the counts behind it.

    Blocks of 64 cost more for a pair of a query and a key. They serve where those of 128 would pad the lengths much, or leave
    a device of so many multiprocessors idle.
    """
    if head_dim > 80:
        return 64
    large, small = (backward_steps(lengths, heads_k, rows, processors, causal) for rows in (128, 64))
    return 64 if _SMALL_STEP * small < large else 128


def backward_steps(lengths: Sequence[int], heads_k: int, rows: int, processors: int, causal: bool) -> float:
    """Steps of the busiest multiprocessor, for each query head of a key head: no less than an equal share, nor than its blocks
    of the longest segments. Two blocks are resident; one that has its multiprocessor to itself takes _ALONE times its share.
    """
    queries = {128: 32, 64: 64}[rows]  # of a step
    total = longest = count = 0
    for length, segments in Counter(lengths).items():
        blocks, steps = -(-length // rows), -(-length // queries)
        unseen = rows // queries * blocks * (blocks - 1) // 2 if causal else 0
        total += segments * (blocks * steps - unseen)
        if steps > longest:
            longest, count = steps, 0
        if steps == longest:
            count += segments * (1 if causal else blocks)
    turns = -(-count * heads_k // processors)
    return max(total * heads_k / processors, longest * (turns + (_ALONE - 1) * (turns % 2)))


def attention_tiles(cu_seqlens: torch.Tensor, heads: int, rows: int, causal: bool) -> torch.Tensor:
    """The extension's list of work for these boundaries (on the host): [M, 8] int32, Tile of csrc/varlen_attention.h.

    The longest segment comes first, since what starts last should be short. The blocks of one head stand together and share its
    keys in the cache; under a causal mask the last block, which sees the most keys, leads.
    """
    start, length, head, block, blocks = _blocks(cu_seqlens, heads, rows)
    if causal:
        block = blocks - 1 - block
    first = block * rows
    count = (length - first).clamp(max=rows)
    zero = torch.zeros_like(first)
    return torch.stack((start + first, count, start, first + count if causal else length, head, first, zero, zero), 1).int()


def attention_key_tiles(cu_seqlens: torch.Tensor, heads_k: int, rows: int, causal: bool) -> torch.Tensor:
    """The backward's list of work by blocks of keys, [M, 8] int32: key_tiles of csrc/varlen_attention.h. Ordered as
    attention_tiles orders; under a causal mask the first block is seen by the most queries.
    """
    start, length, head, block, blocks = _blocks(cu_seqlens, heads_k, rows)
    first = block * rows
    unseeing = first if causal else torch.zeros_like(first)
    columns = (start + unseeing, length - unseeing, start + first, (length - first).clamp(max=rows), head, unseeing - first)
    return torch.stack((*columns, block, blocks), 1).int()


def _blocks(cu_seqlens: torch.Tensor, heads: int, rows: int) -> tuple[torch.Tensor, ...]:
    """Of each block of `rows` rows of each head: its segment's start and length, head, number in the segment, and how many."""
    starts, lengths = cu_seqlens[:-1].long(), cu_seqlens.diff().long()
    order = lengths.argsort(descending=True, stable=True)
    starts, lengths = starts[order], lengths[order]
    blocks = (lengths + rows - 1) // rows
    index, segment = _local_index(blocks * heads)
    return starts[segment], lengths[segment], index // blocks[segment], index % blocks[segment], blocks[segment]


def dealt_tiles(tiles: torch.Tensor, workers: int) -> torch.Tensor:
    """The list [M, 8] in an order for `workers` resident blocks, of which block b takes entries b, b + workers, ...

    As it comes, longest first, the list gives as many short tiles to a block that has one long tile more as to its neighbours.
    Here each tile goes to the block that is free first (longest processing time first); entries of no rows fill the rounds.
    A tile costs 16 and 13 for each block of 96 keys (_hopper_microseconds, in tenths), so tiles of one length are dealt at
    once. A list that is within a twentieth of the best that any order can do stays as it is.
    """
    cost = 16 + 13 * -(-tiles[:, 3].long() // 96)
    turns = torch.zeros(workers, dtype=torch.int64).index_add(0, torch.arange(len(cost)) % workers, cost)
    longest = cost[:1].sum()  # the first, or 0
    best = max(int(cost.sum()) // workers, int(-(-(cost == longest).sum() // workers) * longest))
    if 20 * int(turns.max()) <= 21 * best:
        return tiles
    worker, loads = torch.empty_like(cost), torch.zeros_like(turns)
    end = 0
    for price, count in zip(*(x.tolist() for x in cost.unique_consecutive(return_counts=True)), strict=True):
        # Equal tiles start at the `count` earliest of loads + i * price; nobody gets `most` of them.
        most = (int(loads.sum()) + count * price) // workers - int(loads.min())
        most = most // price + 3
        begins = (loads[:, None] + price * torch.arange(most)).flatten()
        chosen = begins.argsort(stable=True)[:count] // most
        worker[end : end + count] = chosen
        loads += price * chosen.bincount(minlength=workers)
        end += count
    order = worker.argsort(stable=True)
    turn, owner = _local_index(worker.bincount(minlength=workers))
    dealt = tiles.new_zeros(((int(turn.max()) + 1) * workers, 8))
    dealt[turn * workers + owner] = tiles[order]
    return dealt


def check_tensor(name: str, x: torch.Tensor) -> torch.Tensor:
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
    return x


def check_integer(name: str, x: int, least: int | None = None) -> None:
    if isinstance(x, bool) or not isinstance(x, Integral):
        raise TypeError(f"{name}: expected an integer, got {type(x).__name__}")
    if least is not None and x < least:
        raise ValueError(f"{name}: expected at least {least}, got {x}")


def check_cu_seqlens(name: str, cu_seqlens: torch.Tensor, total: int | None = None) -> torch.Tensor:
    """Returns cu_seqlens; checks shape and dtype always, its values on the host and outside torch.compile."""
    if check_tensor(name, cu_seqlens).dtype != torch.int32:
        raise TypeError(f"{name}: expected int32, got {cu_seqlens.dtype}; cast with .to(torch.int32)")
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() == 0:
        raise ValueError(f"{name}: expected [N + 1] boundaries, got shape {list(cu_seqlens.shape)}")
    if cu_seqlens.device.type != "cpu" or torch.compiler.is_compiling():
        return cu_seqlens
    if cu_seqlens[0] != 0:
        raise ValueError(f"{name}: expected to start at 0, got {int(cu_seqlens[0])}")
    steps = cu_seqlens.diff()
    if (steps < 0).any():
        index = int((steps < 0).nonzero()[0])
        raise ValueError(
            f"{name}: expected non-decreasing boundaries, got {int(cu_seqlens[index])} then {int(cu_seqlens[index + 1])} "
            f"at index {index + 1}"
        )
    if total is not None and cu_seqlens[-1] != total:
        raise ValueError(f"{name}: expected to end at the number of tokens {total}, got {int(cu_seqlens[-1])}")
    return cu_seqlens


def check_grid(grid_thw: torch.Tensor, merge_size: int) -> torch.Tensor:
    """The grid as int64 on the host, checked."""
    check_grid_shape("grid_thw", grid_thw)
    check_integer("merge_size", merge_size, 1)
    grid = grid_thw.to(device="cpu", dtype=torch.int64)
    if (grid < 1).any():
        index = int((grid < 1).any(1).nonzero()[0])
        raise ValueError(f"grid_thw[{index}]: expected positive t, h, w, got {grid[index].tolist()}")
    huge = grid.double().prod(1) > _MAX_PATCHES  # int64 would wrap
    if huge.any():
        index = int(huge.nonzero()[0])
        row = grid[index].tolist()
        raise ValueError(f"grid_thw[{index}]: expected at most {_MAX_PATCHES} patches, got {row}, that is {math.prod(row)}")
    ragged = (grid[:, 1:] % merge_size != 0).any(1)
    if ragged.any():
        index = int(ragged.nonzero()[0])
        raise ValueError(
            f"grid_thw[{index}]: expected h and w to be multiples of the merge size {merge_size}, got {grid[index].tolist()}"
        )
    return grid


def check_grid_shape(name: str, grid_thw: torch.Tensor) -> None:
    if check_tensor(name, grid_thw).is_floating_point() or grid_thw.is_complex() or grid_thw.dtype == torch.bool:
        raise TypeError(f"{name}: expected integers, got {grid_thw.dtype}")
    if grid_thw.dim() != 2 or grid_thw.shape[1] != 3:
        raise ValueError(f"{name}: expected [N, 3] rows of (t, h, w), got shape {list(grid_thw.shape)}")


def _local_index(lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """For segments of these lengths: the index of each element in its segment, and the segment of each element."""
    segment = torch.arange(lengths.numel()).repeat_interleave(lengths)
    start = lengths.cumsum(0) - lengths
    return torch.arange(segment.numel()) - start[segment], segment
