"""One launch of the attention forward, for a profiler to look at: `bench/gpu.sh profile` runs it under Nsight Compute.

    ncu --kernel-name regex:Forward --launch-skip 2 --launch-count 1 python -m bench.profile [--case e]
"""

from __future__ import annotations

import argparse

import torch

from bench import peers
from bench.attention import CASES
from bench.peers import OURS, Problem

LAUNCHES = 3  # the first two pay for what a process does once


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.profile", description=__doc__.splitlines()[0])
    parser.add_argument("--case", choices=tuple(CASES), default="e")
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        raise SystemExit("bench.profile needs a CUDA device")
    problem = Problem.random(CASES[options.case], device="cuda", dtype=torch.bfloat16)
    attend = peers.ours(problem)
    with torch.no_grad():
        for _ in range(LAUNCHES):
            attend()
    torch.cuda.synchronize()
    print(f"{OURS}: {LAUNCHES} launches of case ({options.case}), {problem.useful_flop / 1e12:.3f} TFLOP each")


if __name__ == "__main__":
    main()
