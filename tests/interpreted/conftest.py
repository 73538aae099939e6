"""The Triton kernels on the CPU: tests/test_triton.py runs this folder in a process with TRITON_INTERPRET=1.

Elsewhere only the cases for a CUDA device are left here. bf16 stays on the device: the interpreter gets it wrong.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import triton

from tests import test_ops_every
from tests.compare import poisoned

HERE = Path(__file__).parent


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    kept, dropped = [], []
    for item in items:
        (kept if HERE not in item.path.parents or _runs_here(item) else dropped).append(item)
    config.hook.pytest_deselected(items=dropped)
    items[:] = kept


def _runs_here(item: pytest.Item) -> bool:
    """Interpreted kernels take CPU tensors, compiled ones CUDA ones. A dtype can mark a case as gpu whose device is the CPU."""
    on_device = item.get_closest_marker("gpu") is not None
    device = item.callspec.params.get("device") if hasattr(item, "callspec") else None
    return on_device != triton.knobs.runtime.interpret and not (on_device and device == "cpu")


@pytest.fixture(autouse=True)
def triton_alone(monkeypatch: pytest.MonkeyPatch):
    """The shared test bodies run this backend only, with torch.empty full of NaN."""
    monkeypatch.setattr(test_ops_every, "usable", lambda op, device: ["triton"])
    with poisoned():
        yield
