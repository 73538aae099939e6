"""The memory-bound subjects under pytest-benchmark: `pytest bench --benchmark-only`. The device's work is part of a call."""

from __future__ import annotations

import functools
import importlib
from typing import Any

import pytest
import torch

from bench.passes import SUBJECTS, Case, device, judge


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    found = []
    for subject in SUBJECTS:
        for case in importlib.import_module(f"bench.{subject}").cases():
            for contender in case.contenders:
                name = f"{case.name}, {case.tokens} tokens: {contender}"
                found.append(pytest.param(subject, case.name, case.tokens, contender, id=name))
    metafunc.parametrize(("subject", "name", "tokens", "contender"), found)


@functools.lru_cache(1)
def case_of(subject: str, name: str, tokens: int) -> Case:
    cases = importlib.import_module(f"bench.{subject}").cases()
    return next(case for case in cases if (case.name, case.tokens) == (name, tokens))


def test_pass(benchmark: Any, subject: str, name: str, tokens: int, contender: str) -> None:
    benchmark.group = f"{name}, {tokens} tokens"
    case = case_of(subject, name, tokens)
    run = case.contenders[contender]
    judge(case, contender, run())

    def synchronised() -> None:
        run()
        if device() == "cuda":
            torch.cuda.synchronize()

    benchmark(synchronised)
