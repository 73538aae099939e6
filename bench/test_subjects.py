"""Attention and preprocessing under pytest-benchmark:  pytest bench --benchmark-only [-k attention]

A contender that can't take part is a skip that says why. Times here are of single calls from the host; bench/timing.py's
graphs and device events are what README shows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from bench import attention, peers, preprocess

CUDA = torch.cuda.is_available()


def timed(benchmark: Any, run: Callable[[], Any]) -> None:
    def call() -> None:
        run()
        if CUDA:
            torch.cuda.synchronize()

    benchmark.pedantic(call, rounds=5, warmup_rounds=1)


@pytest.mark.parametrize("contender", [peers.OURS, *peers.PEERS])
@pytest.mark.parametrize("case", list(attention.CASES) if CUDA else list(attention.ON_CPU[:1]))
def test_attention(benchmark: Any, case: str, contender: str) -> None:
    dtype = torch.bfloat16 if CUDA else torch.float32
    problem = peers.Problem.random(attention.CASES[case], device="cuda" if CUDA else "cpu", dtype=dtype)
    try:
        attend, benchmark.extra_info["error"] = peers.prepare(contender, problem, attention.BOUNDS[dtype])
    except peers.Missing as reason:
        pytest.skip(f"{contender}: {reason}")
    with torch.inference_mode():
        timed(benchmark, attend)
    benchmark.extra_info["useful_flops"] = problem.useful_flop / benchmark.stats.stats.median


@pytest.mark.parametrize("contender", [preprocess.OURS, preprocess.PIL, preprocess.VISION, preprocess.UTILS])
def test_preprocess(benchmark: Any, contender: str, tmp_path: Any) -> None:
    found, missing = preprocess.contenders(cuda=False)
    if contender in missing:
        pytest.skip(f"{contender}: {missing[contender]}")
    path = preprocess.pictures(tmp_path)["photo 1280 x 720"]
    facts = preprocess.compare(found[contender](path), found[preprocess.PIL](path))
    assert "missing" not in facts, facts
    timed(benchmark, lambda: found[contender](path))
