"""How everything here is timed: contenders interleaved in one process, medians, and the environment beside every number."""

from __future__ import annotations

import datetime
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def interleave(contenders: dict[str, Callable[[], Any]], repeats: int, device: str = "cpu") -> dict[str, dict[str, float]]:
    """Seconds of each contender: minimum, median and maximum over `repeats` rounds in which every one runs once."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for run in contenders.values():  # warm-up
        run()
    for _ in range(repeats):
        for name, run in contenders.items():
            _synchronise(device)
            start = time.perf_counter()
            run()
            _synchronise(device)
            seconds[name].append(time.perf_counter() - start)
    return {
        name: {"min": min(times), "median": statistics.median(times), "max": max(times)} for name, times in seconds.items()
    }


def _synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def environment() -> dict[str, Any]:
    """What a reader needs to judge a number: device, versions, commit, date."""
    import transformers

    return {
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": _git("rev-parse", "--short", "HEAD") + ("+changes" if _git("status", "--porcelain", "-uno") else ""),
    }


def processor() -> str:
    """The processor's name, and the vector extension that decides its speed."""
    name, capability = platform.machine(), torch.backends.cpu.get_cpu_capability()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        name = names[0] if names else name
    return f"{name} ({capability})"


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=Path(__file__).parent, check=False)
    return done.stdout.strip()


def save(subject: str, command: str, rows: list[dict[str, Any]]) -> Path:
    """Writes bench/results/<subject>.json: environment, command, rows."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{subject}.json"
    path.write_text(json.dumps({"environment": environment(), "command": command, "rows": rows}, indent=2) + "\n")
    return path
