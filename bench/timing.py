"""How everything here is timed: contenders interleaved in one process, events or CUDA graphs, the card's own ceilings."""

from __future__ import annotations

import argparse
import datetime
import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
FLUSH_BYTES = 256 << 20  # five times the L2 of an H100
WARM_SECONDS = 1e-3  # one timed graph holds launches of about this long together, so that its own start is lost in them
MAX_LAUNCHES = 64

Run = Callable[[], Any]


def measure(
    contenders: dict[str, Run],
    *,
    repeats: int = 30,
    device: str,
    cold: bool = False,
    graph: bool = True,
    clock: Callable[[], float] | None = None,
) -> dict[str, dict[str, Any]]:
    """Seconds a call of each contender: minimum, median, maximum over rounds in which every one is timed once.

    On CUDA, warm: device events around the replay of a graph of several calls; cold: FLUSH_BYTES are written before each
    single call. A contender that cannot be captured (or graph=False) is called plainly between the events instead; "method"
    says which it was ("graph", "events", or on the CPU the clock) and "why" the reason why it is not a graph. clock: on the
    CPU (default: cpu_clock()).

    Returns: {contender: {"min", "median", "max", "method", "calls", perhaps "why"}}.
    """
    if not device.startswith("cuda"):
        return _measure_cpu(contenders, repeats, clock or cpu_clock())
    flush = torch.empty(FLUSH_BYTES // 4, dtype=torch.int32, device=device) if cold else None
    prepared = {name: _prepare(run, 1 if cold else None, graph) for name, run in contenders.items()}
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(repeats + 1):
        for name, (run, calls, _, _) in prepared.items():
            if flush is not None:
                flush.fill_(turn)
            elapsed = _events(run)
            if turn:  # the first round warms up
                seconds[name].append(elapsed / calls)
    rows = {}
    for name, (_, calls, method, why) in prepared.items():
        rows[name] = _spread(seconds[name]) | {"method": method, "calls": calls} | ({"why": why} if why else {})
    return rows


def cpu_clock() -> Callable[[], float]:
    """Processor time where one thread works, which other work on the machine hardly lengthens; else wall time."""
    alone = torch.get_num_threads() == 1 and not torch.cuda.is_available()
    return time.process_time if alone else time.perf_counter


def _measure_cpu(contenders: dict[str, Run], repeats: int, clock: Callable[[], float]) -> dict[str, dict[str, Any]]:
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(repeats + 1):
        for name, run in contenders.items():
            start = clock()
            run()
            if turn:
                seconds[name].append(clock() - start)
    method = "clock" if clock is time.perf_counter else "processor time"
    return {name: _spread(times) | {"method": method, "calls": 1} for name, times in seconds.items()}


def _spread(times: list[float]) -> dict[str, float]:
    return {"min": min(times), "median": statistics.median(times), "max": max(times)}


def _events(run: Run) -> float:
    """Seconds between device events on either side of one call."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e-3


def _prepare(run: Run, calls: int | None, graph: bool) -> tuple[Run, int, str, str]:
    """(what to time, calls it makes, method, why it is not a graph). calls None: as many as fill WARM_SECONDS."""
    warm_up(run)
    if calls is None:
        once = min(_events(run) for _ in range(3))
        calls = max(1, min(MAX_LAUNCHES, round(WARM_SECONDS / max(once, 1e-7))))

    def plain() -> None:
        for _ in range(calls):
            run()

    if not graph:
        return plain, calls, "events", ""
    try:
        return capture(plain), calls, "graph", ""
    except Exception as error:  # whatever a peer does under capture, its row tells it and it is timed plainly
        torch.cuda.synchronize()
        return plain, calls, "events", "no graph: " + " ".join(str(error).split())[:160]


def warm_up(run: Run) -> None:
    """Compiles and allocates outside a capture, on a stream like the capture's."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()


def capture(run: Run) -> Run:
    """The replay of a CUDA graph of one call of `run`, which has been warmed up."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    graph.replay()
    torch.cuda.synchronize()
    return graph.replay


def ceilings(device: str | None = None) -> dict[str, Any]:
    """What this device does in this run: bytes/s of a large copy (read + written), FLOP/s of a product of random matrices."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    cuda = device.startswith("cuda")
    side, dtype = (8192, torch.bfloat16) if cuda else (2048, torch.float32)
    size = (1 << 30) if cuda else (1 << 28)
    source = torch.randint(256, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    c = torch.empty_like(a)
    runs = {"copy": lambda: target.copy_(source), "matmul": lambda: torch.mm(a, b, out=c)}
    if cuda:  # the driver's copy is not always the fastest way to move bytes
        words, there = source.view(torch.int32), target.view(torch.int32)
        runs["copy by a kernel"] = lambda: torch.bitwise_not(words, out=there)
    seconds = measure(runs, repeats=20 if cuda else 5, device=device)
    copies = {name: 2 * size / value["median"] for name, value in seconds.items() if name.startswith("copy")}
    return {
        "copy_bytes_per_s": max(copies.values()),
        "copies": copies,
        "matmul_flops": 2 * side**3 / seconds["matmul"]["median"],
        "matmul": f"{side}^3 {str(dtype).removeprefix('torch.')}",
    }


@functools.cache
def environment() -> dict[str, Any]:
    """What a reader needs to judge a number: device, versions, commit, date."""
    cuda = torch.cuda.is_available()
    facts = {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "device": torch.cuda.get_device_name() if cuda else processor(),
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "triton": version("triton"),
        "commit": commit(),
        "sources": sources(),
    }
    if cuda:
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        facts |= {
            "processor": processor(),
            "driver": _run("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").splitlines()[:1],
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
        }
    return facts


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def processor() -> str:
    """The processor's name, and the vector extension that decides its speed."""
    name, capability = platform.machine(), torch.backends.cpu.get_cpu_capability()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        name = names[0] if names else name
    return f"{name} ({capability})"


def commit() -> str:
    """With +changes if files differ, those aside that a run itself writes and those that tell of it."""
    name = _run("git", "rev-parse", "--short", "HEAD")
    if not name:
        return "no git checkout"
    told = [f":(exclude){path}" for path in ("bench/results", "docs", "README.md")]
    return name + ("+changes" if _run("git", "status", "--porcelain", "-uno", "--", ".", *told) else "")


def sources() -> str:
    """A short hash of the code that was measured: it names the state of a copy without .git, and of one with changes."""
    digest = hashlib.sha256()
    for folder, suffixes in (("kernels", (".py",)), ("qwen2vl_fast", (".py",)), ("csrc", (".cu", ".cuh", ".cpp", ".h"))):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in suffixes:
                digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def _run(*command: str) -> str:
    """What a command prints, or nothing when it fails or is not there."""
    try:
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def positive(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"expected a number of 1 or more, got {text!r}")
    return int(text)


def parser(
    subject: str, description: str, *, repeats: int = 30, peers: Sequence[str] = (), on_request: Sequence[str] = ()
) -> argparse.ArgumentParser:
    """The arguments that every subject takes; with peers, --peers too. on_request: peers that take part when they are named."""
    arguments = argparse.ArgumentParser(prog=f"qwen2vl-fast bench {subject}", description=description.splitlines()[0])
    arguments.add_argument("--repeats", type=positive, default=repeats, help=f"rounds of each timing (default: {repeats})")
    arguments.add_argument("--json", action="store_true", help="JSON on standard output, the rest on standard error")
    arguments.add_argument(
        "--save", nargs="?", type=Path, const=RESULTS, metavar="FOLDER", help="write a JSON file there (default: bench/results)"
    )
    known = (*peers, *on_request)

    def peer(name: str) -> str:
        if name not in known:
            raise argparse.ArgumentTypeError(f"expected {', '.join(known)}, got {name!r}")
        return name

    if known:
        text = f"of {', '.join(known)} (default: {', '.join(peers) if on_request else 'all'}); no name: ours alone"
        arguments.add_argument("--peers", nargs="*", type=peer, metavar="NAME", help=text)
    return arguments


def chosen(options: argparse.Namespace, peers: Sequence[str]) -> list[str]:
    """The peers that were asked for, by default these."""
    return list(peers if options.peers is None else options.peers)


def taking_part(options: argparse.Namespace, contenders: dict[str, Any], peers: Sequence[str]) -> dict[str, Any]:
    """The contenders without those of these peers that were not asked for."""
    wanted = chosen(options, peers)
    return {name: run for name, run in contenders.items() if name not in peers or name in wanted}


def peak(run: Run) -> int:
    """Bytes that a call on the current CUDA device has at most above what was there before it, what it returns among them."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def speedup(seconds: dict[str, dict[str, float]], theirs: str, ours: str) -> float | None:
    """Their median time over ours; None where they took no part."""
    return seconds[theirs]["median"] / seconds[ours]["median"] if theirs in seconds else None


def times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}x"


def failed(error: Exception) -> str:
    """Why a peer takes no part. Its own failure is its row and not the end of the others."""
    return "fails: " + " ".join(f"{type(error).__name__}: {error}".split())[:200]


def say(options: argparse.Namespace, text: str) -> None:
    """A line for a person: on standard output, unless that carries JSON."""
    print(text, file=sys.stderr if options.json else sys.stdout, flush=True)


def command(subject: str, options: argparse.Namespace) -> str:
    """The command line that measures this again; where the result went is no part of it."""
    words = ["qwen2vl-fast", "bench", subject]
    for key, value in vars(options).items():
        if key in ("subjects", "json", "save", "device") or value is None or value is False:
            continue
        words.append("--" + key.replace("_", "-"))
        words += [] if value is True else [str(item) for item in value] if isinstance(value, list | tuple) else [str(value)]
    return shlex.join(words)


def subject_of(name: str) -> str:
    """The module of bench/ whose name a result's name begins with."""
    modules = [path.stem for path in (ROOT / "bench").glob("*.py")]
    return max((m for m in modules if name == m or name.startswith(m + "_")), key=len, default=name)


def keep(name: str, options: argparse.Namespace, rows: list[dict[str, Any]], **more: Any) -> None:
    """Writes NAME.json as far as it has come, marked as partial: a run that is cut short leaves what it has measured."""
    if options.save:
        _write(name, options, _result(name, options, rows, more) | {"partial": True})


def publish(name: str, options: argparse.Namespace, rows: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    """Prints and writes NAME.json as asked: environment, command, rows and whatever else (ceilings=...). Returns it.

    NAME is the subject, then perhaps _ and what tells its results apart.
    """
    result = _result(name, options, rows, more)
    if options.json:
        print(_text(result), end="")
    if options.save:
        _write(name, options, result)
        say(options, f"wrote {options.save / name}.json")
    return result


def _result(name: str, options: argparse.Namespace, rows: list[dict[str, Any]], more: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "environment": environment(), "command": command(subject_of(name), options), **more, "rows": rows}


def _text(result: dict[str, Any]) -> str:
    return json.dumps(result, indent=2) + "\n"


def _write(name: str, options: argparse.Namespace, result: dict[str, Any]) -> None:
    """By way of another file: whoever is stopped here leaves the old one or the new one, not half of it."""
    options.save.mkdir(parents=True, exist_ok=True)
    path = options.save / f"{name}.json"
    path.with_suffix(".part").write_text(_text(result), encoding="utf-8")
    path.with_suffix(".part").replace(path)
