"""The definition of every op, in plain differentiable PyTorch, for any floating dtype up to float64.

Nothing here is fast. A backend of `qwen2vl_fast.ops` is right when it agrees with these functions in float64 by the rule of
tests/compare.py. Names and arguments are those of `qwen2vl_fast.ops`, less `backend` and what only steers speed.
Shape letters: T packed tokens, N segments, H/Hk query/key heads, D head dim, F MLP width, V vocabulary.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F


def inverse_frequencies(dim: int, theta: float) -> torch.Tensor:
    """[dim / 2] float32, theta^(-2i/dim): exactly this expression, since another one differs in the last bit."""
    return 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)


def rotate(x: torch.Tensor, angles: torch.Tensor, attention_scaling: float = 1.0) -> torch.Tensor:
    """Turns pair (j, j + D/2) of each head of x [..., H, D] by angles [..., D/2] (float32): (a cos - b sin, b cos + a sin)."""
    cos, sin = ((f(angles) * attention_scaling).unsqueeze(-2) for f in (torch.cos, torch.sin))
    compute = torch.promote_types(x.dtype, torch.float32)
    a, b = x.to(compute).chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)


def mrope_angles(position_ids: torch.Tensor, inv_freq: torch.Tensor, sections: tuple[int, ...]) -> torch.Tensor:
    """position_ids [3, ...], inv_freq [D/2] -> [..., D/2] float32: frequency i turns by the axis whose section holds i."""
    axis = torch.repeat_interleave(torch.arange(3), torch.tensor(sections)).to(position_ids.device)
    return position_ids.float()[axis].movedim(0, -1) * inv_freq.float().to(position_ids.device)


def vision_rope_angles(position_ids: torch.Tensor, inv_freq: torch.Tensor) -> torch.Tensor:
    """position_ids [2, T] = (row, column), inv_freq [D/4] -> [T, D/2] float32: first half by row, second half by column."""
    return (position_ids.float()[:, :, None] * inv_freq.float().to(position_ids.device)).movedim(0, 1).flatten(1)


def mrope(q, k, position_ids, *, theta=1e6, sections=(16, 24, 24), inv_freq=None, attention_scaling=1.0):
    """Three-axis rotary embedding; see `qwen2vl_fast.ops.mrope`."""
    table = inverse_frequencies(q.shape[-1], theta) if inv_freq is None else inv_freq
    angles = mrope_angles(position_ids, table, sections)
    return rotate(q, angles, attention_scaling), rotate(k, angles, attention_scaling)


def vision_rope(q, k, position_ids, *, theta=1e4, inv_freq=None):
    """Two-axis rotary embedding; see `qwen2vl_fast.ops.vision_rope`."""
    table = inverse_frequencies(q.shape[-1] // 2, theta) if inv_freq is None else inv_freq
    angles = vision_rope_angles(position_ids, table)
    return rotate(q, angles), rotate(k, angles)


def _layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
    compute = torch.promote_types(x.dtype, torch.float32)
    wide = x.to(compute)
    centred = wide - wide.mean(-1, keepdim=True)
    normed = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    return (normed * weight.to(compute) + bias.to(compute)).to(x.dtype)


def layer_norm(x, weight, bias, *, eps, residual=None):
    """(x - mean) / sqrt(var + eps) * weight + bias over the last dim; with residual: of the sum, and the sum."""
    if residual is None:
        return _layer_norm(x, weight, bias, eps)
    total = x + residual
    return _layer_norm(total, weight, bias, eps), total


def _rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    compute = torch.promote_types(x.dtype, torch.float32)
    wide = x.to(compute)
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (normed * weight.to(compute)).to(x.dtype)


def rms_norm(x, weight, *, eps, residual=None):
    """x / sqrt(mean(x^2) + eps) * weight over the last dim; with residual: of the sum, and the sum."""
    if residual is None:
        return _rms_norm(x, weight, eps)
    total = x + residual
    return _rms_norm(total, weight, eps), total


def raster_to_merge_order(grid_thw: torch.Tensor) -> torch.Tensor:
    """[T] int64: for each row in merge order (t, h/2, w/2, 2, 2), its row in raster order (t, h, w)."""
    order, start = [], 0
    for t, h, w in grid_thw.tolist():
        raster = torch.arange(start, start + t * h * w).view(t, h // 2, 2, w // 2, 2)
        order.append(raster.permute(0, 1, 3, 2, 4).flatten())
        start += t * h * w
    return torch.cat(order) if order else torch.zeros(0, dtype=torch.int64)


def merge_patches(x, weight, bias, *, eps=1e-6, grid_thw=None):
    """LayerNorm of every row, then four rows of a 2x2 square side by side: [T, D] -> [T/4, 4D]."""
    if grid_thw is not None:
        x = x[raster_to_merge_order(grid_thw).to(x.device)]
    return _layer_norm(x, weight, bias, eps).reshape(-1, 4 * x.shape[-1])


def varlen_attention(q, k, v, cu_seqlens, *, cu_seqlens_k=None, scale=None, causal=False, return_lse=False):
    """softmax(scale q k^T) v inside each segment; causal is aligned bottom-right. A row without keys: o = 0, lse = -inf."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    compute = torch.promote_types(q.dtype, torch.float32)
    group = q.shape[1] // k.shape[1]
    bounds, bounds_k = cu_seqlens.tolist(), (cu_seqlens if cu_seqlens_k is None else cu_seqlens_k).tolist()
    outputs, lses = [q.new_zeros((0, *q.shape[1:-1], v.shape[-1]))], [q.new_zeros((q.shape[1], 0), dtype=compute)]
    for start, end, start_k, end_k in zip(bounds, bounds[1:], bounds_k, bounds_k[1:], strict=False):
        qs = q[start:end].to(compute)
        ks, vs = (x[start_k:end_k].to(compute).repeat_interleave(group, 1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", qs, ks) * scale
        if causal:
            rows, columns = torch.arange(end - start), torch.arange(end_k - start_k)
            visible = columns[None] <= rows[:, None] + (end_k - start_k) - (end - start)
            scores = scores.masked_fill(~visible.to(q.device), -math.inf)
        lse = torch.logsumexp(scores, -1)
        weights = torch.exp(scores - lse.masked_fill(lse == -math.inf, 0.0)[..., None])
        outputs.append(torch.einsum("hqk,khd->qhd", weights, vs).to(q.dtype))
        lses.append(lse)
    output = torch.cat(outputs)
    return (output, torch.cat(lses, 1).float()) if return_lse else output


def quick_gelu(x, bias=None):
    """y sigmoid(1.702 y) with y = x + bias."""
    y = x.to(torch.promote_types(x.dtype, torch.float32))
    y = y if bias is None else y + bias.to(y.dtype)
    return (y * torch.sigmoid(1.702 * y)).to(x.dtype)


def gelu(x, bias=None):
    """y (1 + erf(y / sqrt 2)) / 2 with y = x + bias."""
    y = x.to(torch.promote_types(x.dtype, torch.float32))
    y = y if bias is None else y + bias.to(y.dtype)
    return (y * 0.5 * (1 + torch.erf(y * math.sqrt(0.5)))).to(x.dtype)


def swiglu(gate_up):
    """silu(gate) * up, where the last dim holds gate then up: [..., 2F] -> [..., F]."""
    gate, up = gate_up.to(torch.promote_types(gate_up.dtype, torch.float32)).chunk(2, -1)
    return (gate * torch.sigmoid(gate) * up).to(gate_up.dtype)


IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)


def patchify(frames, *, dtype=torch.float32):
    """uint8 frames [N, H, W, 3] -> normalised rows [N/2 * H/14 * W/14, 1176] in merge order; a row is (3, 2, 14, 14)."""
    n, height, width, _ = frames.shape
    compute = torch.promote_types(dtype, torch.float32)
    mean, std = (torch.tensor(c, dtype=compute, device=frames.device) for c in (IMAGE_MEAN, IMAGE_STD))
    pixels = (frames.to(compute) / 255 - mean) / std
    blocks = pixels.view(n // 2, 2, height // 28, 2, 14, width // 28, 2, 14, 3)
    #                    t       f  h/2           m  y   w/2          m  x   c -> t h/2 w/2 m m c f y x
    return blocks.permute(0, 2, 5, 3, 6, 8, 1, 4, 7).reshape(-1, 3 * 2 * 14 * 14).to(dtype)


def linear_cross_entropy(hidden, weight, labels, *, ignore_index=-100):
    """Mean over the rows whose label is not ignore_index of logsumexp(h W^T) - (h W^T)[label]; nan if there is none."""
    logits = (hidden @ weight.t()).to(torch.promote_types(hidden.dtype, torch.float32))
    return F.cross_entropy(logits, labels, ignore_index=ignore_index)
