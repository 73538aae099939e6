"""float32 matrix products of the tower on the CPU: torch's default against the one that ops.linear takes.

    python -m bench.linear [--repeats 5] [--save]
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F

from bench.timing import interleave, save
from qwen2vl_fast.ops.linear import linear

TOKENS = 2048
PRODUCTS = {"qkv": (1280, 3840), "proj": (1280, 1280), "fc1": (1280, 5120), "fc2": (5120, 1280)}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.linear", description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--save", action="store_true", help="write bench/results/linear_cpu.json")
    options = parser.parse_args(argv)
    rows = []
    torch.manual_seed(0)
    with torch.inference_mode():
        for name, (inputs, outputs) in PRODUCTS.items():
            x, weight, bias = torch.randn(TOKENS, inputs), torch.randn(outputs, inputs), torch.randn(outputs)
            seconds = interleave(
                {
                    "torch.nn.functional.linear": lambda: F.linear(x, weight, bias),  # noqa: B023 -- called in this round
                    "qwen2vl_fast": lambda: linear(x, weight, bias),  # noqa: B023
                },
                options.repeats,
            )
            operations = 2 * TOKENS * inputs * outputs
            gflops = {contender: operations / value["median"] / 1e9 for contender, value in seconds.items()}
            rows.append({"product": name, "shape": [TOKENS, inputs, outputs], "seconds": seconds, "gflops": gflops})
            print(f"{name:<5} " + ", ".join(f"{contender} {value:.0f} GFLOP/s" for contender, value in gflops.items()))
    if options.save:
        print(save("linear_cpu", f"python -m bench.linear --repeats {options.repeats} --save", rows))


if __name__ == "__main__":
    main()
