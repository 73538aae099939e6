"""Writes the tables of README.md from bench/results/*.json and nano's eval.json.

    python -m bench.report [--check]

A table stands between `<!-- table NAME -->` and `<!-- end -->`; --check changes nothing and fails when one is out of date.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"
NANO = ROOT / "qwen2vl_fast" / "assets" / "nano"


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def _source(result: dict[str, Any]) -> str:
    env = result["environment"]
    return (
        f"{env['device']}, {env['threads']} threads, torch {env['torch']}, transformers {env['transformers']}, "
        f"{env['date']}, commit {env['commit']}: `{result['command']}`"
    )


def _tower(name: str) -> str:
    result = _read(RESULTS / f"{name}.json")
    lines = ["| patches of the images | transformers sdpa | qwen2vl_fast | ratio |", "| --- | --- | --- | --- |"]
    for row in result["rows"]:
        patches = " + ".join(str(t * h * w) for t, h, w in row["grids"])
        theirs, ours = (row["seconds"][key]["median"] * 1e3 for key in ("transformers sdpa", "qwen2vl_fast"))
        lines.append(f"| {patches} | {theirs:.0f} ms | {ours:.0f} ms | {row['speedup']:.2f}x |")
    return "\n".join([*lines, "", _source(result)])


def _nano() -> str:
    result, facts = _read(NANO / "eval.json"), _read(NANO / "training.json")
    dtypes = list(next(iter(result["tasks"].values())))
    lines = [f"| task | {' | '.join(dtypes)} |", f"| --- |{' --- |' * len(dtypes)}"]
    for task, scores in result["tasks"].items():
        lines.append("| " + " | ".join([task, *(f"{100 * scores[dtype]['accuracy']:.1f} %" for dtype in dtypes)]) + " |")
    source = f"CPU, torch {result['torch']}: `{result['command']}`, after {facts['pictures']} training pictures"
    return "\n".join([*lines, "", source])


TABLES: dict[str, Callable[[], str]] = {"tower_cpu_float32": lambda: _tower("tower_cpu_float32"), "nano": _nano}


def render(text: str) -> str:
    """README's text with every table written anew. Raises ValueError for a table that nobody makes, or one that is missing."""
    names = re.findall(r"<!-- table (\w+) -->", text)
    if sorted(names) != sorted(TABLES):
        raise ValueError(f"README.md: expected the tables {sorted(TABLES)}, got {sorted(names)}")
    for name in names:
        block = re.compile(rf"(<!-- table {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        text = block.sub(lambda match, name=name: match[1] + TABLES[name]() + "\n" + match[2], text)
    return text


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="fail when README.md is out of date, and change nothing")
    options = parser.parse_args(argv)
    readme = ROOT / "README.md"
    before = readme.read_text(encoding="utf-8")
    after = render(before)
    if options.check:
        if before != after:
            print("README.md does not agree with the results; run python -m bench.report", file=sys.stderr)
        return int(before != after)
    readme.write_text(after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
