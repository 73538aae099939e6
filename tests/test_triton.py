"""Runs tests/interpreted/ where Triton interprets its kernels: the variable must be set before triton is imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def run(*arguments: str) -> str:
    """Runs pytest on the folder; raises with its report when a test fails or none ran."""
    command = [sys.executable, "-m", "pytest", "tests/interpreted", "-q", "-p", "no:cacheprovider", *arguments]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-20000:] + result.stderr[-5000:]
    return result.stdout


def test_kernels_under_the_interpreter():
    output = run("-m", "not full and not gpu")
    assert "passed" in output and "skipped" not in output, output


@pytest.mark.full
def test_many_cases_under_the_interpreter():
    """21 400 cases, in a quarter of an hour."""
    output = run("-m", "full and not gpu")
    assert "24 passed" in output, output
