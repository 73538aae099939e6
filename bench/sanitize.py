"""Every kernel of ours once at small awkward sizes, forward and backward: a program to run under compute-sanitizer.

compute-sanitizer --tool memcheck python -m bench.sanitize
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from typing import Any

import torch

from qwen2vl_fast import ops
from qwen2vl_fast.ops.backends import unusable
from qwen2vl_fast.ops.gated import gated
from qwen2vl_fast.positions import attention_schedule

TOKENS, LENGTHS = 148, (1, 64, 0, 83)  # no multiple of a tile, an empty segment


def calls(dtype: torch.dtype, device: str = "cuda", kernels: str = "triton") -> Iterator[tuple[str, str, Callable[[], Any]]]:
    """(op, backend, call) of each kernel that can run on the device; kernels: the backend of the passes."""
    hidden = torch.randn(TOKENS, 1280, device=device, dtype=dtype, requires_grad=True)
    other = torch.randn(TOKENS, 1280, device=device, dtype=dtype, requires_grad=True)
    weight, bias = (torch.randn(1280, device=device, dtype=dtype, requires_grad=True) for _ in range(2))
    wide = torch.randn(TOKENS, 5120, device=device, dtype=dtype, requires_grad=True)
    wide_bias = torch.randn(5120, device=device, dtype=dtype, requires_grad=True)
    qkv = torch.randn(TOKENS, 3, 16, 80, device=device, dtype=dtype, requires_grad=True)
    text_q = torch.randn(TOKENS, 12, 128, device=device, dtype=dtype, requires_grad=True)
    text_k, text_v = (torch.randn(TOKENS, 2, 128, device=device, dtype=dtype, requires_grad=True) for _ in range(2))
    places = torch.arange(TOKENS, device=device).expand(3, -1).contiguous()
    head = torch.randn(520, 1280, device=device, dtype=dtype, requires_grad=True)
    labels = torch.arange(TOKENS, device=device) % 520
    frames = torch.randint(256, (2, 56, 84, 3), device=device, dtype=torch.uint8)
    own, own_q, own_k = (x.detach().clone() for x in (qkv, text_q, text_k))  # turned in place
    grid = torch.tensor([[1, 2, TOKENS // 2]])
    bounds = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0).tolist()], dtype=torch.int32)
    schedule = attention_schedule(bounds, heads=16, device=device)
    short = torch.arange(0, TOKENS + 3, 3).clamp(max=TOKENS).to(device, torch.int32)  # on Hopper, blocks of 64 rows
    text_schedule = attention_schedule(bounds, heads=12, heads_k=2, head_dim=128, causal=True, device=device)

    def vision_attention(backend: str, deterministic: bool = False) -> Any:
        return ops.varlen_attention(
            *qkv.unbind(1), schedule.cu_seqlens, schedule=schedule, deterministic=deterministic, backend=backend
        )

    def text_attention(backend: str) -> Any:
        return ops.varlen_attention(
            text_q, text_k, text_v, text_schedule.cu_seqlens, schedule=text_schedule, causal=True, backend=backend
        )

    work = {
        "vision_rope": lambda backend: ops.vision_rope(*qkv.unbind(1)[:2], places[:2], backend=backend),
        "mrope": lambda backend: ops.mrope(text_q, text_k, places, backend=backend),
        "merge_patches": lambda backend: ops.merge_patches(hidden, weight, bias, backend=backend),
        "layer_norm": lambda backend: ops.layer_norm(hidden, weight, bias, eps=1e-6, residual=other, backend=backend),
        "rms_norm": lambda backend: ops.rms_norm(hidden, weight, eps=1e-6, residual=other, backend=backend),
        "quick_gelu": lambda backend: ops.quick_gelu(wide, wide_bias, backend=backend),
        "gelu": lambda backend: ops.gelu(wide, wide_bias, backend=backend),
        "swiglu": lambda backend: ops.swiglu(wide, backend=backend),
        "swiglu of two": lambda backend: gated(wide[:, :2560], wide[:, 2560:], backend=backend),
        "merge_patches from raster order": lambda backend: ops.merge_patches(
            hidden, weight, bias, grid_thw=grid, backend=backend
        ),
        "mrope_": lambda backend: ops.mrope_(own_q, own_k, places, backend=backend),
        "vision_rope_": lambda backend: ops.vision_rope_(own[:, 0], own[:, 1], places[:2], backend=backend),
        "linear_cross_entropy": lambda backend: ops.linear_cross_entropy(hidden, head, labels, backend=backend),
        "patchify": lambda backend: ops.patchify(frames, dtype=dtype, backend=backend),
        "patchify and resize": lambda backend: ops.patchify(frames, dtype=dtype, size=(28, 112), backend=backend),
    }
    for op, run in work.items():
        if unusable(op.split(" ")[0], kernels, device) is None:
            yield op, kernels, lambda run=run: run(kernels)
    if unusable("varlen_attention", "cuda", device) is None:
        yield "varlen_attention", "cuda", lambda: vision_attention("cuda")
        yield "deterministic varlen_attention", "cuda", lambda: vision_attention("cuda", True)
        yield "causal varlen_attention", "cuda", lambda: text_attention("cuda")
        yield "varlen_attention of short segments", "cuda", lambda: ops.varlen_attention(*qkv.unbind(1), short, backend="cuda")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.sanitize", description=__doc__.splitlines()[0])
    parser.add_argument("--tool", default="none", help="the sanitizer around it, for the report")
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        raise SystemExit("bench.sanitize needs a CUDA device")
    for dtype in (torch.bfloat16, torch.float16):
        for op, backend, call in calls(dtype):
            results = call()
            results = results if isinstance(results, tuple) else (results,)
            differentiable = [x for x in results if x is not None and x.requires_grad]
            passes = "forward"
            if differentiable:
                try:
                    torch.autograd.backward(differentiable, [torch.randn_like(x) for x in differentiable])
                    passes = "forward, backward"
                except NotImplementedError as error:
                    passes = f"forward; no backward: {' '.join(str(error).split())[:100]}"
            torch.cuda.synchronize()
            print(f"{options.tool}: {op} ({backend}, {str(dtype).removeprefix('torch.')}): {passes}", flush=True)


if __name__ == "__main__":
    main()
