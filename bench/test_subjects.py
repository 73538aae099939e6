"""Attention, preprocessing and whole models under pytest-benchmark:  pytest bench --benchmark-only [-k attention]

A contender that can't take part is a skip that says why, and each is judged before it is timed. Times here are of single calls
from the host; bench/timing.py's graphs and device events are what README shows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch

import qwen2vl_fast
from bench import attention, generate, patch, peers, preprocess, tower, train

CUDA = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if CUDA else ("cpu", torch.float32)


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


@functools.lru_cache(1)
def towers() -> tuple[dict[str, Callable[[], Any]], dict[str, float]]:
    with torch.inference_mode():
        return tower.contenders(*tower.towers(DTYPE, DEVICE, 32 if CUDA else 1), "a" if CUDA else "1", DTYPE, DEVICE)


@pytest.mark.parametrize("contender", [tower.THEIRS, tower.OURS, tower.GRAPH])
def test_tower(benchmark: Any, contender: str) -> None:
    runs, errors = towers()
    if contender not in runs:
        pytest.skip(f"{contender}: needs a CUDA device")
    benchmark.extra_info["error"] = errors[contender]
    with torch.inference_mode():
        timed(benchmark, runs[contender])


@functools.lru_cache(1)
def generators() -> dict[str, Callable[[int], Any]]:
    with torch.inference_mode():
        theirs, ours = generate.models("2B", None if CUDA else 1, DTYPE, DEVICE)
        return generate.contenders(theirs, ours, 1, 1024 if CUDA else 64, [generate.THEIRS])[0]


@pytest.mark.parametrize("contender", [generate.THEIRS, generate.OURS])
@pytest.mark.parametrize("tokens", [1, 9])
def test_generate(benchmark: Any, tokens: int, contender: str) -> None:
    """One token is the prefill; eight more are decoded."""
    run = generators()[contender]
    with torch.inference_mode():
        timed(benchmark, lambda: run(tokens))


@functools.lru_cache(1)
def model() -> torch.nn.Module:
    return patch.build(None if CUDA else 1)


@functools.lru_cache(1)
def forwards() -> dict[str, Callable[[], Any]]:
    patched = patch.twin(model())
    qwen2vl_fast.patch(patched)
    own = qwen2vl_fast.Qwen2VL.from_transformers(model())
    with torch.no_grad():
        return patch.contenders(model(), patched, own, patch.batch(patch.CASES["a"], patch.TEXT, DTYPE))[0]


@pytest.mark.parametrize("contender", [patch.THEIRS, "patched", "Qwen2VL"])
def test_patch(benchmark: Any, contender: str) -> None:
    run = forwards()[contender]
    with torch.no_grad():
        timed(benchmark, run)


@functools.lru_cache(1)
def training() -> tuple[dict[str, Callable[[], Any]], dict[str, dict[str, Any]]]:
    inputs = patch.batch(patch.TRAIN[0][:1], patch.TRAIN[1] if CUDA else 64, DTYPE)
    return train.judged(patch.build(None if CUDA else 1), inputs, list(train.PEERS))


@pytest.mark.parametrize("contender", [*train.PEERS, train.PATCHED, train.OURS])
def test_train(benchmark: Any, contender: str) -> None:
    runs, facts = training()
    if contender not in runs:
        pytest.skip(f"{contender}: {facts[contender]['missing']}")
    timed(benchmark, runs[contender])
