"""Independent, slow re-derivations of the trickiest parts: Python loops and the math module, one number at a time.

Written from MODEL.md, not from the code under test. Angles, cos and sin are float32 as MODEL.md demands; everything else is
Python's float64. Tensors appear only as the first and the last step.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def float32(x: float) -> float:
    """x rounded to float32."""
    return torch.tensor(x, dtype=torch.float64).to(torch.float32).item()


def vision_positions(grids: list[list[int]], merge: int = 2) -> list[tuple[int, int]]:
    """(row, column) of every patch, in the order of the pixel rows."""
    found = []
    for t, h, w in grids:
        for _ in range(t):
            for block_row in range(h // merge):
                for block_column in range(w // merge):
                    for y in range(merge):
                        for x in range(merge):
                            found.append((block_row * merge + y, block_column * merge + x))
    return found


def merge_order(grids: list[list[int]], merge: int = 2) -> list[int]:
    """For each row in merge order, where it stands in raster order (t, h, w)."""
    order, start = [], 0
    for t, h, w in grids:
        frames = [vision_positions([[1, h, w]], merge)] * t
        for frame, positions in enumerate(frames):
            order += [start + (frame * h + row) * w + column for row, column in positions]
        start += t * h * w
    return order


def cu_seqlens(grids: list[list[int]]) -> list[int]:
    """Boundaries of the attention segments: each frame pair of each medium is one."""
    bounds = [0]
    for t, h, w in grids:
        for _ in range(t):
            bounds.append(bounds[-1] + h * w)
    return bounds


def mrope_positions(
    ids: list[list[int]],
    images: list[list[int]],
    videos: list[list[int]],
    mask: list[list[int]] | None = None,
    *,
    image_token: int,
    video_token: int,
    merge: int = 2,
    largest_axis: str = "all",
) -> tuple[list[list[list[int]]], list[int]]:
    """([B][S][3] ids, [B] deltas); grids are used up in the order of the flattened batch. Padding gets (0, 0, 0).

    largest_axis: "all" is the rule of MODEL.md (the next modality starts at the largest id + 1); "sides" is what
    transformers 5.x does, which advances by the larger side of the merged grid whatever the number of frame pairs.
    """
    images, videos = list(images), list(videos)
    positions, deltas = [], []
    for b, row in enumerate(ids):
        found = [[0, 0, 0] for _ in row]
        real = [s for s in range(len(row)) if mask is None or mask[b][s]]
        start, largest, at = 0, -1, 0
        while at < len(real):
            token = row[real[at]]
            if token not in (image_token, video_token):
                found[real[at]] = [start] * 3
                largest, start, at = max(largest, start), start + 1, at + 1
                continue
            t, h, w = (images if token == image_token else videos).pop(0)
            for frame in range(t):
                for y in range(h // merge):
                    for x in range(w // merge):
                        assert row[real[at]] == token, "a medium's tokens are contiguous"
                        found[real[at]] = [start + frame, start + y, start + x]
                        largest, at = max(largest, *found[real[at]]), at + 1
            start += max(t if largest_axis == "all" else 0, h // merge, w // merge)
        positions.append(found)
        deltas.append(largest + 1 - len(real))
    assert not images and not videos, "grids left over"
    return positions, deltas


def rotate_head(x: list[float], angles: list[float], scaling: float = 1.0) -> list[float]:
    """One head: pair (j, j + D/2) turned by angles[j] (already float32)."""
    half = len(angles)
    out = [0.0] * (2 * half)
    for j, angle in enumerate(angles):
        cos, sin = (float32(float32(f(angle)) * float32(scaling)) for f in (math.cos, math.sin))
        a, b = x[j], x[j + half]
        out[j], out[j + half] = a * cos - b * sin, b * cos + a * sin
    return out


def mrope(x: Tensor, position_ids: Tensor, inv_freq: list[float], sections: tuple[int, ...], scaling: float = 1.0) -> Tensor:
    """x [T, H, D] -> float64."""
    axes = [axis for axis, count in enumerate(sections) for _ in range(count)]
    positions = position_ids.tolist()
    out = []
    for t, heads in enumerate(x.double().tolist()):
        angles = [float32(positions[axis][t] * freq) for axis, freq in zip(axes, inv_freq, strict=True)]
        out.append([rotate_head(head, angles, scaling) for head in heads])
    return torch.tensor(out, dtype=torch.float64)


def vision_rope(x: Tensor, position_ids: Tensor, inv_freq: list[float]) -> Tensor:
    """x [T, H, D] -> float64; the first half of the pairs turns by the row, the second by the column."""
    rows, columns = position_ids.tolist()
    out = []
    for t, heads in enumerate(x.double().tolist()):
        angles = [float32(rows[t] * freq) for freq in inv_freq] + [float32(columns[t] * freq) for freq in inv_freq]
        out.append([rotate_head(head, angles) for head in heads])
    return torch.tensor(out, dtype=torch.float64)


def attention(
    q: Tensor, k: Tensor, v: Tensor, bounds: list[int], bounds_k: list[int], scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    """(o [T, H, D], lse [H, T]) in float64. Query i of a segment sees key j when j - Lk <= i - Lq, if causal."""
    queries, keys, values = (x.double().tolist() for x in (q, k, v))
    heads, group, width = q.shape[1], q.shape[1] // k.shape[1], v.shape[2]
    out = [[[0.0] * width for _ in range(heads)] for _ in queries]
    lse = [[-math.inf] * len(queries) for _ in range(heads)]
    for n in range(len(bounds) - 1):
        rows, columns = range(bounds[n], bounds[n + 1]), range(bounds_k[n], bounds_k[n + 1])
        for i in rows:
            for h in range(heads):
                seen = [j for j in columns if not causal or j - columns.stop <= i - rows.stop]
                if not seen:
                    continue
                pairs = [zip(queries[i][h], keys[j][h // group], strict=True) for j in seen]
                scores = [scale * math.fsum(a * b for a, b in pair) for pair in pairs]
                top = max(scores)
                weights = [math.exp(s - top) for s in scores]
                total = math.fsum(weights)
                lse[h][i] = top + math.log(total)
                for d in range(width):
                    out[i][h][d] = math.fsum(p * values[j][h // group][d] for p, j in zip(weights, seen, strict=True)) / total
    return torch.tensor(out, dtype=torch.float64).reshape(q.shape), torch.tensor(lse, dtype=torch.float64)


def layer_norm(row: list[float], weight: list[float], bias: list[float], eps: float) -> list[float]:
    mean = math.fsum(row) / len(row)
    deviation = math.sqrt(math.fsum((x - mean) ** 2 for x in row) / len(row) + eps)
    return [(x - mean) / deviation * w + b for x, w, b in zip(row, weight, bias, strict=True)]


def rms_norm(row: list[float], weight: list[float], eps: float) -> list[float]:
    size = math.sqrt(math.fsum(x * x for x in row) / len(row) + eps)
    return [x / size * w for x, w in zip(row, weight, strict=True)]


def quick_gelu(x: float) -> float:
    return x / (1 + math.exp(-1.702 * x))


def gelu(x: float) -> float:
    return x * math.erfc(-x / math.sqrt(2)) / 2


def silu(x: float) -> float:
    return x / (1 + math.exp(-x))


def patch_rows(frames: Tensor) -> Tensor:
    """uint8 [N, H, W, 3] -> float64 [T, 1176], pixel by pixel."""
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    pixels = frames.tolist()
    n, height, width = frames.shape[:3]
    rows = []
    for pair in range(n // 2):
        for row, column in vision_positions([[1, height // 14, width // 14]]):
            values = []
            for channel in range(3):
                for frame in range(2):
                    for y in range(14):
                        line = pixels[2 * pair + frame][row * 14 + y]
                        values += [(line[column * 14 + x][channel] / 255 - mean[channel]) / std[channel] for x in range(14)]
            rows.append(values)
    return torch.tensor(rows, dtype=torch.float64).reshape(-1, 1176)


def cross_entropy(hidden: Tensor, weight: Tensor, labels: list[int], ignore: int) -> float:
    """Mean over the rows that count; nan if none does."""
    losses = []
    for row, label in zip(hidden.double().tolist(), labels, strict=True):
        if label == ignore:
            continue
        logits = [math.fsum(a * b for a, b in zip(row, word, strict=True)) for word in weight.double().tolist()]
        top = max(logits)
        losses.append(top + math.log(math.fsum(math.exp(x - top) for x in logits)) - logits[label])
    return math.fsum(losses) / len(losses) if losses else math.nan
