"""The vision tower at its real widths (depth 4) against transformers with sdpa: same weights, same process, interleaved.

qwen2vl-fast bench tower [--repeats 5] [--dtype float32] [--json] [--save]
"""

from __future__ import annotations

import argparse

import torch
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel

from bench.timing import measure, parser, publish, say
from qwen2vl_fast.config import VisionConfig
from qwen2vl_fast.vision import VisionTower
from qwen2vl_fast.weights import share_parameters

GRIDS = ((1, 16, 16), (1, 24, 32), (1, 22, 40), (1, 48, 64))  # 256, 768, 880 and 3072 patches
DEPTH = 4


def towers(dtype: torch.dtype, device: str) -> tuple[torch.nn.Module, VisionTower]:
    """transformers' tower and ours on the same weights."""
    torch.manual_seed(0)
    theirs = Qwen2VisionTransformerPretrainedModel._from_config(
        Qwen2VLVisionConfig(depth=DEPTH, hidden_size=1536), attn_implementation="sdpa"
    )
    theirs = theirs.to(device, dtype).eval()
    with torch.device("meta"):
        ours = VisionTower(VisionConfig(depth=DEPTH, embed_dim=1280, num_heads=16, hidden_size=1536))
    share_parameters(ours, theirs.named_parameters(), tied=False)
    return theirs, ours.eval()


def race(options: argparse.Namespace, dtype: torch.dtype, device: str) -> list[dict]:
    theirs, ours = towers(dtype, device)
    rows = []
    with torch.inference_mode():
        for grids in [*((grid,) for grid in GRIDS), GRIDS]:
            grid = torch.tensor(grids)
            pixels = torch.randn(int(grid.prod(1).sum()), 1176, device=device, dtype=dtype)
            device_grid = grid.to(device)
            expected = theirs(pixels, device_grid).pooler_output
            error = float((ours(pixels, grid) - expected).norm() / expected.norm())
            if error > (1e-4 if dtype == torch.float32 else 3e-2):
                raise RuntimeError(f"the towers disagree: relative error {error:.1e} on {grids}")
            seconds = measure(
                {
                    "transformers sdpa": lambda p=pixels, g=device_grid: theirs(p, g),
                    "qwen2vl_fast": lambda p=pixels, g=grid: ours(p, g),
                },
                repeats=options.repeats,
                device=device,
            )
            ratio = seconds["transformers sdpa"]["median"] / seconds["qwen2vl_fast"]["median"]
            rows.append({"grids": grids, "dtype": str(dtype).removeprefix("torch."), "seconds": seconds, "speedup": ratio})
            patches = " + ".join(str(h * w * t) for t, h, w in grids)
            times = ", ".join(f"{name} {value['median'] * 1e3:.0f} ms" for name, value in seconds.items())
            say(options, f"{patches} patches: {times}, {ratio:.2f}x (relative error {error:.1e})")
    return rows


def main(argv: list[str] | None = None) -> None:
    arguments = parser("tower", __doc__, repeats=5)
    arguments.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    options = arguments.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = race(options, getattr(torch, options.dtype), device)
    publish(f"tower_{device}_{options.dtype}", options, rows)


if __name__ == "__main__":
    main()
