"""float32 matrix products of the tower on the CPU: torch's default against the one that ops.linear takes.

qwen2vl-fast bench linear [--peers NAME ...] [--repeats 5] [--json] [--save]
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F

from bench.timing import measure, parser, publish, say, taking_part
from qwen2vl_fast.ops.linear import linear

TOKENS = (1, 16, 2048)  # a decoded token, a batch of them, a prefill
PEERS = ("torch.nn.functional.linear",)
PRODUCTS = {"qkv": (1280, 3840), "proj": (1280, 1280), "fc1": (1280, 5120), "fc2": (5120, 1280)}


def main(argv: list[str] | None = None) -> None:
    options = parser("linear", __doc__, repeats=5, peers=PEERS).parse_args(argv)
    rows = []
    torch.manual_seed(0)
    with torch.inference_mode():
        for tokens, (name, (inputs, outputs)) in itertools.product(TOKENS, PRODUCTS.items()):
            x, weight, bias = torch.randn(tokens, inputs), torch.randn(outputs, inputs), torch.randn(outputs)
            contenders = {
                "torch.nn.functional.linear": lambda: F.linear(x, weight, bias),  # noqa: B023 -- called in this round
                "qwen2vl_fast": lambda: linear(x, weight, bias),  # noqa: B023
            }
            exact = F.linear(x.double(), weight.double(), bias.double())
            errors = {name: float((run() - exact).norm() / exact.norm()) for name, run in contenders.items()}
            if not max(errors.values()) < 1e-5:
                raise RuntimeError(f"{name}, {tokens} rows: relative errors {errors}")
            seconds = measure(taking_part(options, contenders, PEERS), repeats=options.repeats, device="cpu")
            operations = 2 * tokens * inputs * outputs
            gflops = {contender: operations / value["median"] / 1e9 for contender, value in seconds.items()}
            facts = {"seconds": seconds, "gflops": gflops, "errors": errors}
            rows.append({"product": name, "shape": [tokens, inputs, outputs], **facts})
            speeds = ", ".join(f"{contender} {value:.0f} GFLOP/s" for contender, value in gflops.items())
            say(options, f"{name:<5} {tokens:5d} rows: {speeds}")
    publish("linear_cpu", options, rows)


if __name__ == "__main__":
    main()
