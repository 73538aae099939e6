"""What tests/upstream.sh runs: transformers' tests from the current folder, with or without patch, and the comparison.

    python tests/upstream.py plain|patched OUTCOMES.json [arguments of pytest]
    python tests/upstream.py compare PLAIN.json PATCHED.json
"""

from __future__ import annotations

import functools
import json
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

TESTS = "tests/models/qwen2_vl/test_modeling_qwen2_vl.py"
SHARED = Path(__file__).resolve().parent / "upstream_model.py"  # where the checkout is a source distribution


class Outcomes:
    """A pytest plugin: {test: outcome}, the worst of its phases."""

    def __init__(self) -> None:
        self.found: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or report.outcome != "passed":
            before = self.found.get(report.nodeid)
            self.found[report.nodeid] = "failed" if "failed" in (before, report.outcome) else report.outcome


def patch_everything() -> list[int]:
    """From here on every Qwen2-VL model is patched when its constructor is done. Returns where they are counted."""
    from transformers.models.qwen2_vl import modeling_qwen2_vl as modeling

    import qwen2vl_fast
    from qwen2vl_fast.patch.install import TARGETS

    depth, count = [0], [0]

    def patched(init):
        @functools.wraps(init)
        def __init__(self, *args, **kwargs):
            depth[0] += 1
            try:
                init(self, *args, **kwargs)
            finally:
                depth[0] -= 1
            if depth[0] == 0:  # the outermost of nested models
                qwen2vl_fast.patch(self)
                count[0] += 1

        return __init__

    for name in TARGETS:
        cls = getattr(modeling, name)
        cls.__init__ = patched(cls.__init__)
    return count


def run(mode: str, outcomes: Path, arguments: list[str]) -> int:
    # The script's own folder goes, since its modules would shadow others; the current one comes, for the checkout's `tests`.
    sys.path[0] = str(Path.cwd())
    sys.path.append(str(Path(__file__).resolve().parent.parent))
    import pytest

    plugin = Outcomes()
    count = patch_everything() if mode == "patched" else [0]
    options = ["-q", "-p", "no:cacheprovider", "--tb=short"]
    if not Path(TESTS).exists():
        sys.modules["tests"] = folder = ModuleType("tests")  # without an __init__.py this repository's would go first
        folder.__path__ = [str(Path.cwd() / "tests")]
        options += ["--import-mode=importlib", "--noconftest", "-c", os.devnull, "--rootdir", str(Path.cwd()), str(SHARED)]
    elif not arguments:
        options.append(TESTS)
    code = pytest.main([*options, *arguments], plugins=[plugin])
    outcomes.write_text(json.dumps(plugin.found, indent=2) + "\n", encoding="utf-8")
    if mode == "patched":
        print(f"{count[0]} models were patched")
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED) or not plugin.found:
        raise SystemExit(f"{mode}: pytest ended with {code!r} and ran {len(plugin.found)} tests")
    return 0


def compare(plain: Path, patched: Path) -> int:
    before, after = (json.loads(path.read_text(encoding="utf-8")) for path in (plain, patched))
    worse = sorted(name for name, outcome in before.items() if outcome != "failed" and after.get(name, "failed") == "failed")
    passed = sum(outcome == "passed" for outcome in after.values())
    print(f"{len(after)} tests with patch, {passed} passed; {list(before.values()).count('failed')} fail without it")
    for name in worse:
        print(f"fails with patch alone: {name}")
    return int(bool(worse))


if __name__ == "__main__":
    mode, first, *rest = sys.argv[1:]
    if mode == "compare":
        sys.exit(compare(Path(first), Path(rest[0])))
    sys.exit(run(mode, Path(first), rest))
