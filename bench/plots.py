"""The plots of the results, PNG files in docs/plots. Each carries the digest of the results that it shows.

Only writing needs matplotlib; whether a plot is out of date is read from the file.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.timing import RESULTS, ROOT

FOLDER = ROOT / "docs" / "plots"
OURS = "qwen2vl_fast"
COLOURS = ("#c0392b", "#2c3e50", "#2980b9", "#16a085", "#8e44ad", "#f39c12", "#7f8c8d", "#f1948a")


def colours(names: list[str]) -> dict[str, str]:
    """Ours is the first colour in every plot."""
    others = [name for name in names if name != OURS]
    return {name: COLOURS[0] if name == OURS else COLOURS[1 + others.index(name) % (len(COLOURS) - 1)] for name in names}


def attention_bars(axes: Any, result: dict[str, Any]) -> None:
    """Useful TFLOP/s of every contender by case; the line is the same run's matrix product."""
    rows = result["rows"]
    names = [n for n in rows[0]["contenders"] if any("flops" in row["contenders"][n] for row in rows)]
    width = 0.8 / len(names)
    for i, name in enumerate(names):
        heights = [row["contenders"][name].get("flops", 0) / 1e12 for row in rows]
        places = [x + (i - (len(names) - 1) / 2) * width for x in range(len(rows))]
        axes.bar(places, heights, width, label=name, color=colours(names)[name])
    axes.axhline(result["ceilings"]["matmul_flops"] / 1e12, color="black", linestyle="--", linewidth=1)
    axes.annotate(f"matrix product {result['ceilings']['matmul']}", (0, result["ceilings"]["matmul_flops"] / 1e12),
                  xytext=(2, 3), textcoords="offset points", fontsize=8)  # fmt: skip
    labels = [f"({row['case']})\n" + row["lengths"].replace(" + ", "\n+ ") for row in rows]
    axes.set_xticks(range(len(rows)), labels, fontsize=7)
    axes.set_ylabel("useful TFLOP/s")
    axes.set_ylim(top=1.3 * result["ceilings"]["matmul_flops"] / 1e12)
    axes.legend(fontsize=8, ncols=4, loc="upper right")


def tower_parts(axes: Any, result: dict[str, Any]) -> None:
    """Where the time of the tower goes: parts measured one by one, stacked, beside the whole."""
    rows = [row for row in result["rows"] if "parts" in row]
    tokens = [sum(t * h * w for t, h, w in row["grids"]) for row in rows]
    bottoms = [0.0] * len(rows)
    for i, part in enumerate(rows[0]["parts"]):
        heights = [row["parts"][part]["seconds"] / count * 1e9 for row, count in zip(rows, tokens, strict=True)]
        axes.bar(range(len(rows)), heights, 0.6, bottoms, label=part, color=COLOURS[i % len(COLOURS)])
        bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]
    whole = f"{OURS} in a CUDA graph"
    times = [row["seconds"][whole]["median"] / count * 1e9 for row, count in zip(rows, tokens, strict=True)]
    axes.scatter(range(len(rows)), times, marker="_", color="black", s=80, label=f"the whole, {whole}", zorder=3)
    floors = [row["floor_seconds"] / count * 1e9 for row, count in zip(rows, tokens, strict=True)]
    axes.scatter(range(len(rows)), floors, marker="_", s=600, color="#ffe14d", label="floor", zorder=3)
    axes.set_xticks(range(len(rows)), [f"({row['case']})\n{count} patches" for row, count in zip(rows, tokens, strict=True)])
    axes.set_ylabel("ns a patch, whole tower")
    axes.legend(fontsize=7, ncols=3, loc="upper left")
    axes.set_ylim(top=1.3 * axes.get_ylim()[1])


def roofline(axes: Any, result: dict[str, Any]) -> None:
    """The parts of the tower under the roof of the same run's copy and matrix product, by operations a byte."""
    peak, bandwidth = result["ceilings"]["matmul_flops"], result["ceilings"]["copy_bytes_per_s"]
    knee = peak / bandwidth
    axes.plot([0.1, knee, 1e5], [0.1 * bandwidth / 1e12, peak / 1e12, peak / 1e12], color="black", linewidth=1.5)
    for i, name in enumerate(result["rows"][0]["parts"]):
        for row in result["rows"]:
            part = row["parts"][name]
            flop, moved = work(name, part, sum(t * h * w for t, h, w in row["grids"]), row["depth"])
            x, y = flop / moved, flop / part["seconds"] / 1e12
            label = name if row is result["rows"][0] else None
            axes.scatter(x, y, s=12, color=COLOURS[i % len(COLOURS)], label=label)
            axes.annotate(row["case"], (x, y), xytext=(3, -3), textcoords="offset points", fontsize=6)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("operations a byte that must move")
    axes.set_ylabel("TFLOP/s")
    axes.legend(fontsize=7, ncols=2, loc="lower right")


def work(name: str, part: dict[str, float], tokens: int, depth: int) -> tuple[float, float]:
    """(operations, bytes) of a part in bf16. A pass is given one operation an element read, which places it by its bytes."""
    if part["flop"] == 0:
        return part["bytes"] / 4, part["bytes"]
    wide, mlp, weights = 1280, 5120, 2 * 1280 * 1280
    moved = {
        "patch embedding": 2 * tokens * (1176 + wide) + 2 * 1176 * wide,
        "qkv and projection": depth * (2 * tokens * 6 * wide + 4 * weights),
        "MLP products": depth * (2 * tokens * 2 * (wide + mlp) + 8 * weights),
        "attention": depth * 2 * tokens * 4 * wide,
        "merger": 2 * tokens // 4 * (5120 + 2 * 5120 + 1536) + 2 * 5120 * (5120 + 1536),
    }
    return part["flop"], moved[name]


def decode(axes: Any, result: dict[str, Any]) -> None:
    """Tokens a second against what the copy bandwidth allows."""
    rows = result["rows"]
    names = list(rows[0]["contenders"])
    width = 0.8 / (len(names) + 1)
    for i, name in enumerate([*names, "limit"]):
        speeds = [
            row["limit_tokens_per_second"] if name == "limit" else row["contenders"][name]["tokens_per_second"] for row in rows
        ]
        places = [x + (i - len(names) / 2) * width for x in range(len(rows))]
        colour = colours([*names, "limit"])[name]
        bars = axes.bar(places, speeds, width, label=name if name != "limit" else "copy limit", color=colour)
        axes.bar_label(bars, fmt="%.3g", fontsize=8)
    axes.set_xticks(range(len(rows)), [f"{row['size']}, batch {row['batch']}, context {row['context']}" for row in rows])
    axes.set_ylabel("tokens/s")
    axes.legend(fontsize=8)


def preprocess(axes: Any, result: dict[str, Any]) -> None:
    """Images a second from a JPEG file to pixel rows."""
    rows = result["rows"]
    names = [name for name, facts in rows[0]["contenders"].items() if "seconds" in facts]
    width = 0.8 / len(names)
    for i, name in enumerate(names):
        places = [x + (i - (len(names) - 1) / 2) * width for x in range(len(rows))]
        speeds = [row["contenders"][name]["images_per_second"] for row in rows]
        bars = axes.bar(places, speeds, width, label=name, color=colours(names)[name])
        axes.bar_label(bars, fmt="%.3g", fontsize=7)
    axes.set_xticks(range(len(rows)), [row["picture"] for row in rows], fontsize=8)
    axes.set_yscale("log")
    axes.set_ylabel("images/s")
    axes.legend(fontsize=8)


# result -> (what the file is called besides, caption, drawing)
DRAWINGS: dict[str, list[tuple[str, str, Callable[[Any, dict[str, Any]], None]]]] = {
    "attention_cuda": [("", "Attention against its peers", attention_bars)],
    "attention_backward_cuda": [("", "The backward pass of attention against its peers", attention_bars)],
    "tower_cuda_bfloat16": [
        ("_parts", "Where the tower's time goes", tower_parts),
        ("_roofline", "The tower's parts under the roofline of the same run", roofline),
    ],
    "generate_2B_cuda_bfloat16": [("", "Decoding against the copy limit", decode)],
    "generate_2B_cpu_float32": [("", "Decoding on the CPU against the copy limit", decode)],
    "preprocess_cpu": [("", "JPEG files to pixel rows on the CPU", preprocess)],
    "preprocess_cuda": [("", "JPEG files to pixel rows on the machine of the GPU", preprocess)],
}


def case_name(row: dict[str, Any]) -> str:
    """'(f) 5184 + 3 x 1296' of a tower's row."""
    counts: dict[int, int] = {}
    for t, h, w in row["grids"]:
        counts[h * w] = counts.get(h * w, 0) + t
    return f"({row['case']}) " + " + ".join(f"{n} x {size}" if n > 1 else str(size) for size, n in counts.items())


def figures(name: str) -> list[tuple[str, str]]:
    """(path from the root, caption) of the plots of a result."""
    return [
        ((FOLDER / f"{name}{more}.png").relative_to(ROOT).as_posix(), caption) for more, caption, _ in DRAWINGS.get(name, ())
    ]


def digest(result: dict[str, Any], draw: Callable[..., Any]) -> str:
    """Of what a plot shows and of the function that draws it."""
    return hashlib.sha256((json.dumps(result, sort_keys=True) + inspect.getsource(draw)).encode()).hexdigest()


def stale() -> list[Path]:
    """Plots that are missing or show other results than those at hand."""
    return [path for path, result, draw, _ in _wanted() if shown(path) != digest(result, draw)]


def _wanted() -> list[tuple[Path, dict[str, Any], Callable[..., None], str]]:
    found = []
    for name, drawings in DRAWINGS.items():
        path = RESULTS / f"{name}.json"
        if path.exists():
            result = json.loads(path.read_text(encoding="utf-8"))
            found += [(FOLDER / f"{name}{more}.png", result, draw, caption) for more, caption, draw in drawings]
    return found


def shown(path: Path) -> str | None:
    """The digest of the results that a plot was made of: the text chunk 'Results' of the PNG."""
    if not path.exists():
        return None
    data, at = path.read_bytes(), 8
    while at < len(data):
        length, kind = struct.unpack(">I4s", data[at : at + 8])
        if kind == b"tEXt" and data[at + 8 : at + 16] == b"Results\0":
            return data[at + 16 : at + 8 + length].decode()
        at += 12 + length
    return None


def write(paths: list[Path]) -> list[Path]:
    """Draws these plots. Raises ImportError without matplotlib."""
    if not paths:
        return []
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    FOLDER.mkdir(parents=True, exist_ok=True)
    for path, result, draw, caption in _wanted():
        if path not in paths:
            continue
        figure = Figure(figsize=(10, 5), dpi=100, layout="constrained")
        axes = figure.subplots()
        draw(axes, result)
        env = result["environment"]
        axes.set_title(f"{caption}\n{env['device']}, {env['date']}, torch {env['torch']}", fontsize=10)
        axes.grid(axis="y", linewidth=0.3)
        axes.set_axisbelow(True)
        figure.savefig(path, metadata={"Results": digest(result, draw), "Software": None})
    return paths
