"""Imports point one way, the optional dependencies are imported lazily, and importing the package touches no GPU."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "qwen2vl_fast"

# A unit is a module or a subpackage. It imports units of the layers above it in this list alone: so there is no circle,
# and generate and chat import neither the model nor each other.
LAYERS = (
    ("version", "reference", "kernels", "_C"),
    ("positions", "config", "media", "tokenizer"),
    ("ops", "video", "template"),
    ("cache", "modules", "inputs", "weights"),
    ("vision", "text", "generate", "chat"),
    ("model",),
    ("__init__",),
    ("patch", "doctor"),
    ("training",),
    ("demo",),
    ("cli", "assets"),
)
RANKS = {unit: rank for rank, layer in enumerate(LAYERS) for unit in layer}

CORE = {"torch", "triton", "numpy", "safetensors", "tokenizers", "jinja2", "PIL"}
ONLY = {
    "reference": {"torch"},
    "kernels": {"torch", "triton"},
    "media": {"torch", "numpy", "PIL"},
    "video": {"torch", "numpy", "PIL"},
}
# Imported inside functions alone, and by these units alone.
LAZY = {
    "transformers": {"model", "patch", "training"},
    "huggingface_hub": {"model"},
    "av": {"video"},
    "flash_attn": {"ops"},
    "matplotlib": {"training"},
}


def sources() -> dict[str, str]:
    """{path in the package without suffix: source}, each file of kernels/ once."""
    folder = ROOT / PACKAGE
    files = {str(path.relative_to(folder).with_suffix("")): path for path in sorted(folder.rglob("*.py"))}
    files |= {f"kernels/{path.stem}": path for path in sorted((ROOT / "kernels").glob("*.py"))}
    return {name: path.read_text(encoding="utf-8") for name, path in files.items()}


def imports(name: str, source: str) -> list[tuple[str, bool]]:
    """(absolute dotted name, whether inside a function) of every import; `from a import b` gives a.b."""
    package = [PACKAGE, *name.split("/")][:-1]
    found = []

    def visit(node: ast.AST, lazy: bool) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                found.extend((alias.name, lazy) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                base = package[: len(package) - child.level + 1] if child.level else []
                base = [*base, *([child.module] if child.module else [])]
                found.extend((".".join([*base, alias.name]), lazy) for alias in child.names)
            visit(child, lazy or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda))

    visit(ast.parse(source), False)
    return found


def violations(files: dict[str, str]) -> list[str]:
    """Every import that the rules forbid, as 'file: import'."""
    found = []
    for name, source in files.items():
        unit = name.split("/")[0]
        if unit not in RANKS:
            found.append(f"{name}: give it a place in LAYERS")
            continue
        for imported, lazy in imports(name, source):
            top, *rest = imported.split(".")
            if top == PACKAGE:
                target = rest[0] if rest and rest[0] in RANKS else "__init__"
                allowed = target == unit or RANKS[target] < RANKS[unit]
            elif top in LAZY:
                allowed = lazy and unit in LAZY[top]
            elif top in sys.stdlib_module_names:
                allowed = True
            else:
                allowed = top in ONLY.get(unit, CORE)
            if not allowed:
                found.append(f"{name}: {imported}")
    return found


def test_imports_point_one_way():
    files = sources()
    assert {"__init__", "reference", "ops/__init__", "model"} <= set(files)
    assert violations(files) == []


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("reference", "import numpy"),
        ("reference", "from .ops import mrope"),
        ("kernels/rope", "from qwen2vl_fast.ops import checks"),
        ("kernels/rope", "import numpy"),
        ("ops/rope", "from ..text import Decoder"),
        ("ops/rope", "from .. import cache"),
        ("vision", "def f():\n    from .model import Qwen2VL"),
        ("vision", "from . import Qwen2VL"),
        ("vision", "from .text import Decoder"),
        ("generate", "from . import chat"),
        ("chat", "from .generate import generate"),
        ("chat", "from qwen2vl_fast.model import Qwen2VL"),
        ("media", "import jinja2"),
        ("video", "import av"),
        ("media", "def f():\n    import av"),
        ("model", "import transformers"),
        ("model", "class A:\n    import transformers"),
        ("chat", "def f():\n    from transformers import AutoProcessor"),
        ("weights", "def f():\n    import huggingface_hub"),
        ("training/nano", "import matplotlib.pyplot as plt"),
        ("training/nano", "from tests import compare"),
        ("cli", "def f():\n    import bench.timing"),
        ("model", "import scipy"),
        ("extra", "import torch"),
    ],
)
def test_forbidden_imports_are_found(name, source):
    assert len(violations({name: source})) == 1


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("kernels/rope", "import math\nimport torch\nimport triton.language as tl\nfrom .offsets import at"),
        ("ops/rope", "from . import checks\nfrom .. import kernels\nfrom ..positions import check_grid"),
        ("model", "def f():\n    import transformers"),
        ("patch/vision", "def f():\n    from transformers import models"),
        ("video", "def f():\n    import av"),
        ("cli", "from . import Qwen2VL, doctor"),
    ],
)
def test_permitted_imports_are_not_found(name, source):
    assert violations({name: source}) == []


def test_importing_the_package_touches_no_gpu_and_no_optional_dependency():
    script = """
import sys, torch

def refuse(*args, **kwargs):
    raise SystemExit("a CUDA call while importing")

for name in ("_lazy_init", "init", "is_available", "device_count", "current_device", "get_device_properties"):
    setattr(torch.cuda, name, refuse)
if hasattr(torch._C, '_cuda_getDeviceCount'):  # torch takes its presence for a CUDA build
    torch._C._cuda_getDeviceCount = refuse
before = set(sys.modules)
import qwen2vl_fast
optional = {"transformers", "av", "matplotlib", "huggingface_hub", "flash_attn", "qwen2vl_fast._C"}
print(sorted(optional & (set(sys.modules) - before)))
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert (result.returncode, result.stdout.strip()) == (0, "[]"), result.stderr
