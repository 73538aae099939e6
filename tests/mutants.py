"""Altered copies of the package's source: one substitution each, imported under a name of its own.

A copy holds reference.py, positions.py, config.py, ops/ and kernels/, and registers its ops in a torch.library namespace of
its own, so that copies and original live side by side in one process.
"""

from __future__ import annotations

import importlib
import itertools
import sys
import tempfile
from pathlib import Path
from types import ModuleType, SimpleNamespace

SOURCE = Path(__file__).resolve().parents[1] / "qwen2vl_fast"
MODULES = ("reference", "positions", "config", "ops", "ops.loss", "ops.checks", "ops.backends")
_names = (f"altered_copy_{i}" for i in itertools.count())


def copied_files() -> list[Path]:
    return [SOURCE / f"{name}.py" for name in ("reference", "positions", "config")] + [
        path for folder in ("ops", "kernels") for path in sorted((SOURCE / folder).glob("*.py"))
    ]


def altered(file: str = "", old: str = "", new: str = "") -> SimpleNamespace:
    """The modules of a copy in which `old`, found once in `file`, reads `new`; without arguments a faithful copy.

    Raises AssertionError if `old` is not there once: the source changed, and the mutant must follow it.
    """
    name = next(_names)
    with tempfile.TemporaryDirectory() as folder:
        for path in copied_files():
            text = path.read_text()
            relative = path.relative_to(SOURCE)
            if str(relative) == file:
                assert text.count(old) == 1, f"{file} holds {text.count(old)} times, not once:\n{old}"
                text = text.replace(old, new)
            target = Path(folder, name, relative)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text.replace("qwen2vl_fast", name))
        Path(folder, name, "__init__.py").touch()
        sys.path.insert(0, folder)
        importlib.invalidate_caches()
        try:
            modules = {module: importlib.import_module(f"{name}.{module}") for module in MODULES}
        finally:
            sys.path.remove(folder)
    assert all(isinstance(module, ModuleType) for module in modules.values())
    return SimpleNamespace(**{module.replace(".", "_"): found for module, found in modules.items()})
