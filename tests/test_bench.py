"""bench/: timing, the judging of peers, the static model, and that the report says what the results say."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from bench import attention, peers, plots, report, static_model, timing
from bench.peers import Missing, Problem


class Device:
    """Stands for torch.cuda where there is none: counts what was timed, and how."""

    def __init__(self, capturable: bool):
        self.capturable, self.flushes, self.replays = capturable, 0, 0

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        device = self

        class Event:
            def __init__(self, enable_timing: bool):
                pass

            def record(self) -> None:
                self.when = time.perf_counter()

            def synchronize(self) -> None:
                pass

            def elapsed_time(self, end: Event) -> float:
                return 1e3 * (end.when - self.when)

        class Stream:
            def __init__(self, *_: object):
                pass

            def __enter__(self) -> None:
                if not device.capturable and isinstance(self, Capture):
                    raise RuntimeError("operation not permitted when stream is capturing")

            def __exit__(self, *_: object) -> bool:
                return False

            def wait_stream(self, other: object) -> None:
                pass

        class Capture(Stream):
            pass

        class Graph:
            def replay(self) -> None:
                device.replays += 1

        class Buffer:
            def fill_(self, value: int) -> None:
                device.flushes += 1

        for name, value in {"Event": Event, "Stream": Stream, "stream": Stream, "graph": Capture, "CUDAGraph": Graph}.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(torch.cuda, "current_stream", Stream)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
        monkeypatch.setattr(timing.torch, "empty", lambda *_, **__: Buffer())


def test_contenders_take_turns_and_the_median_is_told():
    order = []
    contenders = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
    found = timing.measure(contenders, repeats=3, device="cpu", clock=time.perf_counter)
    assert order == ["a", "b"] * 4  # the first round warms up
    assert all(row["min"] <= row["median"] <= row["max"] and row["method"] == "clock" for row in found.values())



def test_one_thread_is_timed_by_what_the_processor_did_for_it(monkeypatch):
    """Other work on the machine, here a sleep, is no part of it; with more threads it is wall time."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for threads, method in ((1, "processor time"), (2, "clock")):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        found = timing.measure({"a": lambda: time.sleep(0.05)}, repeats=1, device="cpu")["a"]
        assert found["method"] == method and (found["median"] < 0.04) == (threads == 1)


def test_a_graph_of_several_calls_is_replayed(monkeypatch):
    device = Device(capturable=True)
    device.install(monkeypatch)
    found = timing.measure({"a": lambda: None}, repeats=5, device="cuda")
    assert found["a"]["method"] == "graph" and found["a"]["calls"] == timing.MAX_LAUNCHES
    assert device.replays == 5 + 2  # after the capture, and to warm up


def test_what_cannot_be_captured_is_timed_plainly_and_says_so(monkeypatch):
    device = Device(capturable=False)
    device.install(monkeypatch)
    found = timing.measure({"a": lambda: None}, repeats=5, device="cuda")
    assert found["a"]["method"] == "events" and "not permitted" in found["a"]["why"] and device.replays == 0


def test_cold_writes_the_buffer_before_every_call(monkeypatch):
    device = Device(capturable=True)
    device.install(monkeypatch)
    found = timing.measure({"a": lambda: None, "b": lambda: None}, repeats=5, device="cuda", cold=True)
    assert device.flushes == 2 * 6 and found["a"]["calls"] == 1


def test_the_command_of_a_result_measures_it_again(tmp_path):
    arguments = timing.parser("attention", "x", peers=("torch varlen_attn", "cuDNN"))
    arguments.add_argument("--cases", nargs="*")
    arguments.add_argument("--backward", action="store_true")
    options = arguments.parse_args(["--cases", "a", "b", "--save", str(tmp_path), "--backward", "--peers", "torch varlen_attn"])
    result = timing.publish("attention_backward_cpu", options, [])
    assert result["command"] == "qwen2vl-fast bench attention --repeats 30 --peers 'torch varlen_attn' --cases a b --backward"
    assert vars(arguments.parse_args(shlex.split(result["command"])[3:])) == vars(options) | {"save": None}
    assert json.loads((tmp_path / "attention_backward_cpu.json").read_text()) == result
    assert {"date", "device", "torch", "commit", "sources"} <= set(result["environment"])


def test_a_result_that_was_written_before_is_no_change(tmp_path, monkeypatch):
    """All subjects of a run are of one commit, though each writes its JSON into the checkout."""
    monkeypatch.setattr(timing, "ROOT", tmp_path)
    assert timing.commit() == "no git checkout"
    for path in ("bench/results/rope_cuda.json", "bench/rope.py", "README.md"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text("before")
    who = ("-c", "user.name=x", "-c", "user.email=x@example.com", "-c", "commit.gpgsign=false")
    for command in (("init", "-q"), ("add", "-A"), (*who, "commit", "-qm", "x")):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    plain = timing.commit()
    for path in ("bench/results/rope_cuda.json", "README.md"):
        (tmp_path / path).write_text("after")
    assert re.fullmatch("[0-9a-f]{7,}", plain) and timing.commit() == plain
    (tmp_path / "bench/rope.py").write_text("after")
    assert timing.commit() == f"{plain}+changes"


def test_an_unknown_peer_is_an_error_that_names_the_known_ones(capsys):
    arguments = timing.parser("x", "x", peers=("torch", "Liger"), on_request=("slow",))
    for asked, expected in (([], ["torch", "Liger"]), (["--peers"], []), (["--peers", "slow"], ["slow"])):
        assert timing.chosen(arguments.parse_args(asked), ("torch", "Liger")) == expected
    with pytest.raises(SystemExit) as stop:
        arguments.parse_args(["--peers", "Liger", "liger"])
    assert stop.value.code == 2 and "--peers: expected torch, Liger, slow, got 'liger'" in capsys.readouterr().err


def test_json_alone_is_on_standard_output(capsys):
    options = timing.parser("linear", "x").parse_args(["--json"])
    timing.say(options, "a line")
    timing.publish("linear_cpu", options, [{"product": "qkv"}])
    captured = capsys.readouterr()
    assert json.loads(captured.out)["rows"] == [{"product": "qkv"}] and captured.err == "a line\n"


@pytest.mark.parametrize("count", ["0", "-1", "many"])
def test_a_number_of_rounds_that_is_none(count, capsys):
    with pytest.raises(SystemExit):
        timing.parser("linear", "x").parse_args(["--repeats", count])
    assert "expected a number of 1 or more" in capsys.readouterr().err


LENGTHS = (5, 64, 1, 33)


def problem(**options) -> Problem:
    return Problem.random(LENGTHS, device="cpu", dtype=torch.float32, **options)


def test_a_right_contender_passes():
    _, error = peers.prepare("SDPA flash", problem(), 1e-5)
    assert error < 1e-6


def across(task: Problem) -> torch.Tensor:
    """Attention that does not stop at the segments' ends."""
    q, k, v = (x.transpose(0, 1) for x in task.views)
    return F.scaled_dot_product_attention(q, k, v).transpose(0, 1)


def last_key_missing(task: Problem) -> torch.Tensor:
    parts = []
    for q, k, v in zip(*(x.split(LENGTHS) for x in task.views), strict=True):
        keys = max(1, len(k) - 1)
        parts.append(F.scaled_dot_product_attention(*(x.transpose(0, 1) for x in (q, k[:keys], v[:keys]))).transpose(0, 1))
    return torch.cat(parts)


def other_scale(task: Problem) -> torch.Tensor:
    parts = []
    for parts_of in zip(*(x.split(LENGTHS) for x in task.views), strict=True):
        parts.append(F.scaled_dot_product_attention(*(x.transpose(0, 1) for x in parts_of), scale=0.1).transpose(0, 1))
    return torch.cat(parts)


def heads_mixed(task: Problem) -> torch.Tensor:
    return peers.sdpa(torch.nn.attention.SDPBackend.MATH)(task)().flip(1)


@pytest.mark.parametrize("wrong", [across, last_key_missing, other_scale, heads_mixed, lambda task: task.views[2][:-1]])
def test_a_contender_that_computes_something_else_is_no_contender(monkeypatch, wrong):
    monkeypatch.setitem(peers.PEERS, "wrong", lambda task: lambda: wrong(task))
    with pytest.raises(Missing, match="computes something else"):
        peers.prepare("wrong", problem(), max(attention.BOUNDS.values()))


def with_gradient_of(task: Problem, wrong) -> torch.Tensor:
    """The right output with other gradients."""
    right = peers.sdpa(torch.nn.attention.SDPBackend.MATH)(task)()
    other = wrong(task)
    return other + (right - other).detach()


@pytest.mark.parametrize("wrong", [across, last_key_missing, other_scale, heads_mixed])
def test_gradients_are_judged_too(monkeypatch, wrong):
    """A peer whose backward is wrong takes no part in the backward pass; its outputs alone would not tell."""
    monkeypatch.setitem(peers.PEERS, "wrong", lambda task: lambda: with_gradient_of(task, wrong))
    peers.prepare("wrong", problem(grad=True), 1e-5)
    with pytest.raises(Missing, match="gradients are something else"):
        peers.prepare("wrong", problem(grad=True), 1e-5, max(attention.GRADIENT_BOUNDS.values()))
    for right in ("SDPA flash", peers.OURS, peers.REPEATABLE):
        peers.prepare(right, problem(grad=True), 1e-5, attention.GRADIENT_BOUNDS[torch.float32])


def test_a_peer_that_fails_is_a_row(monkeypatch):
    def fails(task: Problem):
        raise ValueError("head_dim 80")

    monkeypatch.setitem(peers.PEERS, "fails", lambda task: lambda: fails(task))
    with pytest.raises(Missing, match="fails: ValueError: head_dim 80"):
        peers.prepare("fails", problem(), 1.0)


def test_a_peer_that_is_not_installed_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "no_such_package", None)
    with pytest.raises(Missing, match="pip install something"):
        peers._function("no_such_package", "f", "something", SimpleNamespace(qkv=SimpleNamespace(is_cuda=True)))


def test_attention_runs_from_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(attention.CASES, "a", (32, 16, 16))
    attention.main(["--cases", "a", "--repeats", "1", "--save", str(tmp_path), "--backward"])
    result = json.loads((tmp_path / "attention_backward_cpu.json").read_text())
    (row,) = result["rows"]
    assert row["lengths"] == "1 x 32 + 2 x 16" and row["useful_flop"] == 2.5 * 4 * 80 * 16 * (32**2 + 2 * 16**2)
    assert row["contenders"]["qwen2vl_fast"]["error"] < 1e-5 and row["ratio_to_best_peer"] > 0
    assert row["contenders"]["qwen2vl_fast, deterministic"]["flops"] > 0 and row["best_peer"] in peers.PEERS
    assert row["contenders"]["FlashAttention-3"] == {"missing": "needs a CUDA device"}
    assert "device" not in result["command"]


def test_the_cases_are_those_of_the_plan():
    sums = {name: sum(lengths) for name, lengths in attention.CASES.items()}
    expected = {"a": 1024, "b": 4096, "c": 16384, "d": 16384, "e": 16384, "f": 5184 + 3 * 1296 + 8 * 640 + 16 * 256, "g": 32256}
    assert {name: sums[name] for name in expected} == expected
    spread = attention.CASES["h"]
    assert len(spread) == 500 and min(spread) >= 64 and max(spread) <= 8192 and not any(n % 4 for n in spread)
    assert 150 < sum(n < 724 for n in spread) < 350  # half of them below the geometric middle


def test_occupancy_by_hand():
    h100 = static_model.DEVICES["H100"]
    assert static_model.occupancy(168, 384, 200 << 10, h100) == 1  # 65536 / (168 * 384)
    assert static_model.occupancy(32, 256, 0, h100) == 8  # 2048 threads
    assert static_model.occupancy(128, 128, 0, h100) == 4  # 65536 / (128 * 128)
    assert static_model.occupancy(40, 128, 100 << 10, h100) == 2  # shared memory


def test_attention_is_predicted_from_its_tiles():
    h100 = static_model.DEVICES["H100"]
    one = static_model.attention_seconds((1024,), h100)
    assert static_model.attention_seconds((1024,) * 4, h100) < 4 * one  # one image leaves multiprocessors idle
    roof = 4 * 80 * 16 * 16384**2 / (h100.flops * h100.matmul)
    assert roof < static_model.attention_seconds((16384,), h100) < 2 * roof


def test_work_of_the_cuda_kernels_by_hand():
    """Of 4 x 4096 tokens, 16 heads: a product of L x L x D counts two operations, a tensor of 16 bits two bytes a value."""
    square, values = 4 * 4096**2 * 16 * 80, 4 * 4096 * 16 * 80
    assert static_model.cuda_work("ForwardSm90<true, 80, 192, 96, 4, false>") == (4 * square, 8 * values)
    assert static_model.cuda_work("BackwardKeys<true, 80, 1, 64, false, false>") == (8 * square, 12 * values)
    assert static_model.cuda_work("BackwardKeys<true, 80, 1, 64, true, false>") == (10 * square, 20 * values)
    assert static_model.cuda_work("BackwardQueries<true, 80, 1, 64>")[0] == 6 * square
    assert static_model.cuda_work("RoundDq<true, 80>") == (0, 6 * values) and static_model.cuda_work("BuildTiles") == (0, 0)


def test_shared_memory_comes_from_the_sources():
    """Two stages of K and V of 64 rows, padded by 16 bytes each: by hand."""
    if shutil.which("g++") is None:
        pytest.skip("no g++: the model leaves shared memory out and says so")
    assert static_model.shared_bytes(["ForwardSm80<true, 80, 1>", "BuildTiles"]) == {
        "ForwardSm80<true, 80, 1>": 2 * 2 * 64 * (2 * 80 + 16), "BuildTiles": 0,
    }  # fmt: skip


def test_names_of_kernels_are_read():
    mangled = "_ZN12qwen2vl_fast5entryINS_11ForwardSm80ILb1ELi80ELi2EEENS_15VarlenAttentionEEEvT0_"
    assert static_model.readable(mangled) == "ForwardSm80<true, 80, 2>"


def test_instructions_are_counted():
    code = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @!P0 LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0020*/                   HGMMA.64x80x16.F32.BF16 R24, gdesc[UR8], R24 ;
        /*0030*/                   MUFU.EX2 R5, R5 ;
        /*0040*/                   STG.E.128 desc[UR4][R2.64], R4 ;
    """
    found = static_model.instructions(code)
    assert (found["load"], found["store"], found["mma"], found["exp and the like"], found["all"]) == (1, 1, 1, 1, 5)


def test_every_kernel_has_its_bytes_and_operations():
    """But for sums of partial rows, the resize, and widths and dtypes that are compiled for their registers alone."""
    held = json.loads((report.ROOT / "docs" / "registers.json").read_text())["kernels"]
    assert set(static_model.BYTES) <= set(held) and set(static_model.MEASURED) <= set(static_model.BYTES)
    registers_alone = re.compile(r", sums$| fp(16|32|64)$|odd width")
    without = {name for name in held if name not in static_model.BYTES and not registers_alone.search(name)}
    assert without == {"add layer norm 160", "layer norm 160 backward", "mrope head 64", "mrope head 96", "resize"}
    for file in ("cuda_registers.json", "hopper_code.json"):
        names = json.loads((report.ROOT / "docs" / file).read_text())["kernels"]
        assert names and {name for name in names if not any(static_model.cuda_work(name))} <= {"BuildTiles"}


def test_work_of_the_passes_by_hand():
    """A token of vision RoPE: 16 heads of q and of k, 40 pairs of 6 operations; 40 angles. All are bound by what they move."""
    assert static_model.operations("vision rope") == 2 * 16 * 40 * 6 + 40 * 3
    assert static_model.operations("mrope 7B backward") == 32 * 64 * 6 + 64 * 3
    assert static_model.operations("add rms norm 1536") == 5 * 1536 and static_model.operations("merge") == 7 * 1280
    assert static_model.operations("gated 8960") == 5 * 8960 and static_model.operations("resize") is None
    assert static_model.operations("loss") == static_model.operations("loss backward") == 4 * 151936
    for kernel, size in static_model.BYTES.items():
        assert static_model.operations(kernel) > 0
        for device in static_model.DEVICES.values():
            floor = 32768 * size / (0.9 * device.bandwidth) + 2e-6
            assert static_model.pass_seconds(kernel, 32768, device) == pytest.approx(floor)
    slow = dataclasses.replace(static_model.DEVICES["H100"], clock=1e6)
    assert static_model.pass_seconds("merge", 1000, slow) == pytest.approx(2e-6 + 1000 * 7 * 1280 / (128 * 132 * 1e6))


def test_the_static_model_has_the_registers_of_the_table():
    """Both are written by commands; a kernel that changed needs both."""
    held = json.loads((report.ROOT / "docs" / "registers.json").read_text())["kernels"]
    rows = json.loads((report.ROOT / "bench" / "results" / "static_model.json").read_text())["rows"]
    found = {row["kernel"]: row for row in rows if row["kind"] == "Triton"}
    assert found.keys() == held.keys(), "run qwen2vl-fast bench static_model --save"
    for name, row in found.items():
        for arch, code in held[name].items():
            assert row[arch]["registers"] == code["registers"], f"{name} {arch}: run qwen2vl-fast bench static_model --save"


# ---- the report ----


def environment() -> dict:
    return {
        "date": "2026-11-23", "device": "NVIDIA H100 80GB HBM3", "driver": ["580.1"], "cuda": "13.0", "torch": "2.11.0",
        "transformers": "5.17.0", "triton": "3.6.0", "threads": 16, "commit": "no git checkout", "sources": "0123456789ab",
    }  # fmt: skip


def seconds(median: float) -> dict:
    return {"min": median, "median": median, "max": median, "method": "graph", "calls": 1}


def results() -> dict[str, dict]:
    """A result of each kind, small, with numbers that appear nowhere else."""
    ceilings = {"copy_bytes_per_s": 3e12, "matmul_flops": 800e12, "matmul": "8192^3 bfloat16"}
    contenders = {
        "qwen2vl_fast": {"seconds": seconds(1e-3), "flops": 612e12, "share_of_matmul": 0.765, "error": 1e-3},
        "FlashAttention-3": {"seconds": seconds(2e-3), "flops": 509e12, "share_of_matmul": 0.64, "error": 1e-3},
        "FlashAttention-4": {"missing": "not installed; pip install --pre flash-attn-4"},
    }
    grids = [[1, 32, 32]]
    parts = {
        name: {"seconds": 1e-4, "flop": 1e9 * flop, "bytes": 1e6 * (1 - flop)}
        for name, flop in (("patch embedding", 1), ("qkv and projection", 1), ("MLP products", 1), ("attention", 1),
                           ("rotation", 0), ("norms and residuals", 0), ("QuickGELU", 0), ("merger", 1))
    }  # fmt: skip
    times = {"transformers sdpa": seconds(9e-3), "qwen2vl_fast": seconds(4e-3), "qwen2vl_fast in a CUDA graph": seconds(3e-3)}
    decoded = {"tokens_per_second": 512.5, "share_of_limit": 0.53, "prefill_seconds": seconds(0.02)}
    rows = {
        "attention_cuda": [{
            "case": case, "lengths": "4 x 1024", "tokens": 4096, "useful_flop": 1e12, "contenders": contenders,
            "best_peer": "FlashAttention-3", "ratio_to_best_peer": 1.2,
        } for case in "ab"],
        "tower_cuda_bfloat16": [{
            "case": "a", "grids": grids, "depth": 32, "seconds": times,
            "parts": parts, "floor_seconds": 2e-3, "share_of_floor": 0.67, "speedup": 2.25, "error": 1e-2,
        }],
        "generate_2B_cuda_bfloat16": [{
            "size": "2B", "layers": 28, "batch": 1, "context": 1024, "limit_tokens_per_second": 971.0,
            "contenders": {"qwen2vl_fast": decoded},
        }],
        "rope_cuda": [{"op": "vision RoPE", "tokens": 32768, "bytes": 1, "contenders": {
            "qwen2vl_fast": {"seconds": seconds(129e-6), "share_of_copy": 0.93},
            "torch.compile": {"seconds": seconds(162e-6), "share_of_copy": 0.7}}}],
        "preprocess_cuda": [{"picture": "photo", "rows": 1024, "contenders": {
            "qwen2vl_fast": {"seconds": seconds(0.01), "images_per_second": 101.5},
            "transformers PIL": {"seconds": seconds(0.02), "images_per_second": 50.5},
            "qwen2vl_fast, rows on the GPU": {"seconds": seconds(0.001), "images_per_second": 1010.0},
            "transformers torchvision, on the GPU": {"seconds": seconds(0.004), "images_per_second": 250.0},
            "qwen-vl-utils": {"missing": "No module named 'qwen_vl_utils'"}}}],
        "train_cuda": [{"patches": 5184, "tokens": 3344, "dtype": "bfloat16", "contenders": {
            "transformers sdpa": {"seconds": seconds(0.333), "peak_bytes": 7 << 30},
            "qwen2vl_fast": {"seconds": seconds(0.2), "peak_bytes": 5 << 30},
            "transformers flash-attn": {"missing": "not installed; pip install flash-attn"}}}],
        "variants_cuda": [{"case": case, "lengths": "4 x 1024", "useful_flop": 1e12, "variants": [
            {"name": name, "rows": rows, "seconds": seconds(1e12 / flops), "flops": flops}
            for name, rows, flops in (("chosen", 128, 500e12), ("chosen", 192, 600e12), ("no turns", 192, 451e12))
        ] + [{"name": "no turns", "rows": 128, "missing": "relative error 1.0e+00"}]} for case in "ab"],
        "linear_cpu": [{"product": "fc1", "shape": [2048, 1280, 5120],
                        "seconds": {"torch.nn.functional.linear": seconds(0.4), "qwen2vl_fast": seconds(0.25)},
                        "gflops": {"torch.nn.functional.linear": 67.1, "qwen2vl_fast": 107.4}}],
    }  # fmt: skip
    return {
        name: {"environment": environment(), "command": f"qwen2vl-fast bench {name}", "ceilings": ceilings, "rows": value}
        for name, value in rows.items()
    }


@pytest.fixture
def made_up(tmp_path, monkeypatch) -> dict[str, dict]:
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(plots, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(plots, "ROOT", tmp_path)
    monkeypatch.setattr(plots, "FOLDER", tmp_path / "docs" / "plots")
    (tmp_path / "from").mkdir()
    held = results()
    for name in list(held)[:2]:
        (tmp_path / "from" / f"{name}.json").write_text(json.dumps(held[name]))
    (tmp_path / "from" / "several.json").write_text(json.dumps({name: held[name] for name in list(held)[2:]}))
    report.take_over(tmp_path / "from")
    return held


def test_every_kind_of_result_has_its_table(made_up):
    known = report.tables()
    assert set(known) == {"nano", "summary", "passes_cuda", "hopper", *made_up} - {"rope_cuda"}
    text = report.render({"README.md": "".join(f"<!-- table {name} -->\n<!-- end -->\n" for name in known)})["README.md"]
    for figure in (
        "| 612 |",
        "| 509 |",
        "1.20x",
        "FlashAttention-4: not installed",
        "512.5",
        "| 101.5 | 50.5 | 1010.0 | 250.0 | 2.01x | 20.00x |",
        "129.0 us",
        "1.26x",
        "3.00x",
        "| 5184 patches, 3344 tokens, bfloat16 | qwen2vl_fast | 200 ms | 1.67x | 5.00 GiB |",
        "transformers flash-attn: not installed",
        "| fc1, 2048 x 1280 x 5120 | 67 | 107 | 1.60x |",
        "| chosen, 192 rows | 600 | 600 | 1.000 |",
        "| no turns, 128 rows | no | no | 0.752 |",
    ):
        assert figure in text, figure
    assert "sources 0123456789ab" in text and "matrix product 8192^3 bfloat16 800 TFLOP/s" in text
    assert text.count("docs/plots/") == 5


def test_a_result_that_no_document_shows_gets_a_place(made_up):
    texts = {"README.md": "<!-- table nano -->\n<!-- end -->\n", "docs/bench.md": "x\n"}
    with pytest.raises(ValueError, match="expected the tables"):
        report.render(texts)
    found = report.render(report.place(texts))["docs/bench.md"]
    assert found.startswith("x\n") and "`generate_2B_cuda_bfloat16`:" in found and "512.5" in found
    assert "table nano" not in found


def test_the_summary_has_the_extremes_and_the_geometric_mean(made_up):
    path = report.RESULTS / "tower_cuda_bfloat16.json"
    result = json.loads(path.read_text())
    row = result["rows"][0]
    ours = {"qwen2vl_fast": {"median": 2.0}}
    rows = [{**row, "seconds": {"transformers sdpa": {"median": median}, **ours}} for median in (1.0, 16.0)]
    rows.append({**row, "seconds": ours})
    path.write_text(json.dumps({**result, "rows": rows}))
    device = result["environment"]["device"]
    lines = [line for line in report.summary().splitlines() if "whole tower (a)" in line]
    assert lines == [f"| {device} | whole tower (a) (a) | transformers sdpa | 0.50x | 2.00x | 8.00x |"]


def test_the_goals_of_the_forward_are_judged(made_up):
    """Each by its worst case; what took no part is no success and says why."""
    path = report.RESULTS / "attention_cuda.json"
    result = json.loads(path.read_text())

    def verdicts(ours: float, theirs: float) -> dict[str, str]:
        rows = []
        for case, flops in (("b", 401e12), ("d", 700e12), ("e", ours)):
            row = json.loads(json.dumps(result["rows"][0]))
            row["contenders"]["qwen2vl_fast"] |= {"flops": flops, "share_of_matmul": flops / 800e12}
            row["contenders"]["FlashAttention-3"]["flops"] = theirs
            rows.append(row | {"case": case, "ratio_to_best_peer": flops / theirs})
        path.write_text(json.dumps({**result, "rows": rows}))
        cells = [line.split(" | ") for line in report.hopper().splitlines() if line.startswith("| ")]
        return {line[0].removeprefix("| "): " ".join(line[1:]).removesuffix(" |") for line in cells if len(line) == 3}

    good = verdicts(625e12, 399e12)
    assert good["620 useful TFLOP/s from 4096 patches on"] == "(d) 700, (e) 625 reached"
    assert good["78 % of the same run's matrix product there"] == "(d) 88 %, (e) 78 % reached"
    assert good["1.25 times FlashAttention-3 there"] == "(d) 1.75, (e) 1.57 reached"
    assert good["1.4 times FlashAttention-3, geometric mean of all cases"] == "1.40 reached"
    assert good["1.15 times FlashAttention-4 there"] == " not measured"
    assert good["never under the best peer"] == "(b) 1.01 at the least reached"
    bad = verdicts(619e12, 520e12)
    assert {goal for goal, told in bad.items() if "missed" in told} == set(good) - {
        "goal", "---", "400 useful TFLOP/s on (b)", "1.15 times FlashAttention-4 there", "1.15 times cuDNN there"
    }  # fmt: skip
    assert "FlashAttention-4: not installed" in report.hopper() and "cuDNN: took no part" in report.hopper()


@pytest.mark.parametrize(
    ("name", "peer"),
    [("tower_cuda_bfloat16", "transformers sdpa"), ("rope_cuda", "torch.compile"), ("preprocess_cuda", "transformers PIL")],
)
def test_results_without_a_peer_have_a_table_too(name, peer):
    result = results()[name]
    for row in result["rows"]:
        row.get("contenders", row["seconds"] if "seconds" in row else {}).pop(peer)
        row["speedup"] = None
    renders = {"tower": report.tower, "rope": lambda one: report.passes([one]), "preprocess": report.preprocess}
    lines = renders[name.split("_")[0]](result)
    assert lines[2].count("|") == lines[0].count("|") and "x |" not in lines[2]


def test_what_is_no_result_is_refused(made_up, tmp_path):
    (tmp_path / "from" / "other.json").write_text('{"rows": []}')
    with pytest.raises(ValueError, match="no result of bench"):
        report.take_over(tmp_path / "from")


def test_plots_are_drawn_and_age_with_their_results(made_up, tmp_path):
    missing = plots.stale()
    assert len(missing) == 5
    plots.write(missing)
    assert plots.stale() == []
    path = tmp_path / "results" / "attention_cuda.json"
    changed = json.loads(path.read_text())
    changed["rows"][0]["contenders"]["qwen2vl_fast"]["flops"] += 1e12
    path.write_text(json.dumps(changed))
    assert [file.name for file in plots.stale()] == ["attention_cuda.png"]


def test_the_plots_of_the_repository_agree_with_the_results():
    assert plots.stale() == [], "run python -m bench.report"


def test_gpu_sh_says_what_it_can_do_and_what_is_missing(tmp_path):
    script = report.ROOT / "bench" / "gpu.sh"
    done = subprocess.run(
        ["bash", script, "everything"], capture_output=True, text=True, env={"PATH": os.environ["PATH"], "OUT": str(tmp_path)}
    )
    assert done.returncode == 2 and "build | test | sanitize | micro | variants | profile | bench" in done.stdout
    if torch.cuda.is_available():
        return
    environment = {"PATH": os.environ["PATH"], "OUT": str(tmp_path), "PYTHON": sys.executable}
    done = subprocess.run(["bash", script, "test"], capture_output=True, text=True, env=environment)
    assert done.returncode == 1 and "needs a CUDA device" in done.stdout
    assert "needs a CUDA device" in (tmp_path / "gpu_test.log").read_text()


STUB = """#!/usr/bin/env bash
echo "$@" >>"$CALLS"
case "$*" in *"${HANGS:-nothing hangs}"*) sleep 60 ;; esac
case "$*" in
  *"bench tower"*) [ ! -e "$CALLS.broken" ] || exit 5 ;;
  *--collect-only*) printf 'tests/a.py::test_%s\\n' 1 2 3 int32 ;;
  *"-m pytest"*) echo "1 passed" ;;
esac
"""


@pytest.fixture
def gpu_sh(tmp_path):
    """Runs a copy of bench/gpu.sh in a small tree with a Python that only notes what it is asked."""
    tree = tmp_path / "tree"
    for folder in ("kernels", "qwen2vl_fast", "csrc", "tests", "bench"):
        (tree / folder).mkdir(parents=True)
        (tree / folder / "a.py").write_text(folder)
    (tree / "bench" / "gpu.sh").write_text((report.ROOT / "bench" / "gpu.sh").read_text())
    python, calls = tmp_path / "python", tmp_path / "calls"
    python.write_text(STUB)
    python.chmod(0o755)

    def run(*arguments: str, **environment: str) -> tuple[int, list[str], list[str]]:
        """(exit status, the summary's or output's lines, what Python was asked)."""
        calls.write_text("")
        names = {"PATH": os.environ["PATH"], "OUT": str(tmp_path / "out"), "PYTHON": str(python), "CALLS": str(calls)}
        command = ["bash", tree / "bench" / "gpu.sh", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=names | environment)
        return done.returncode, done.stdout.splitlines(), calls.read_text().splitlines()

    run.calls, run.tree, run.out = calls, tree, tmp_path / "out"
    return run


def test_gpu_sh_takes_its_steps_in_order_and_goes_on_where_it_stopped(gpu_sh):
    (gpu_sh.calls.parent / "calls.broken").touch()
    status, lines, calls = gpu_sh("all", "merge", "tower", "rope")
    asked = [call.split("bench ")[1].split()[0] for call in calls]
    assert status == 1 and asked == ["rope", "tower", "merge"], "a failure ends nothing, and worth decides the order"
    assert [line.split(" in ")[0] for line in lines[-3:]] == ["rope passed", "tower FAILED", "merge passed"]
    assert all(call.endswith(f"--save {gpu_sh.out}") for call in calls)
    (gpu_sh.calls.parent / "calls.broken").unlink()
    status, lines, calls = gpu_sh("all", "merge", "tower", "rope")
    assert status == 0 and len(calls) == 1 and lines[-3] == "rope passed before"
    (gpu_sh.tree / "kernels" / "a.py").write_text("changed")
    status, _, calls = gpu_sh("all", "merge", "rope")
    assert status == 0 and len(calls) == 2, "results of other sources are no results"


def test_gpu_sh_keeps_to_its_budget(gpu_sh):
    status, lines, calls = gpu_sh("all", "merge", "rope", BUDGET="25")
    assert status == 3 and calls == [] and lines[-2:] == ["rope not reached", "merge not reached"]
    status, lines, calls = gpu_sh("all", "merge", "rope", BUDGET="60")
    assert status == 0 and len(calls) == 2


def test_gpu_sh_stops_what_hangs(gpu_sh):
    """Collecting the tests, and the program that the sanitizers look at, before any of them looks."""
    compute_sanitizer = gpu_sh.calls.parent / "compute-sanitizer"
    compute_sanitizer.write_text("#!/bin/sh\nexit 0\n")
    compute_sanitizer.chmod(0o755)
    path = f"{compute_sanitizer.parent}:{os.environ['PATH']}"
    cases = ("test_rest", "--collect-only", "took more than 4 s"), ("sanitize", "bench.sanitize", "without a tool")
    for step, hangs, told in cases:
        began = time.monotonic()
        status, lines, _ = gpu_sh("all", step, BUDGET="32", HANGS=hangs, PATH=path)
        assert status == 1 and any(told in line for line in lines) and lines[-1].startswith(f"{step} FAILED"), lines
        assert time.monotonic() - began < 20


def test_every_python_of_gpu_sh_has_a_limit():
    text = (report.ROOT / "bench" / "gpu.sh").read_text().replace("\\\n", " ")
    lines = [line for line in text.splitlines() if '"$PYTHON" ' in line]
    assert len(lines) == 14 and all(re.search(r'\bwithin \S.* "\$PYTHON" ', line) for line in lines)


def test_gpu_sh_runs_all_that_it_has(gpu_sh):
    """Every step to its last line; what is missing here (compute-sanitizer, ncu, nvcc) is said."""
    status, lines, calls = gpu_sh("all", JOBS="2")
    steps = [line.split()[0] for line in lines[lines.index("=== build") :] if " passed in " in line or " FAILED in " in line]
    assert steps[:3] == ["build", "test_attention", "test_rest"] and len(steps) == 24
    assert {line.split()[0] for line in lines if "FAILED" in line} <= {"sanitize", "profile", "micro", "variants"}
    tests = [call for call in calls if "--tb=short" in call]
    assert sum(call.count("::") for call in tests) == 8 and "int32" in tests[-1], "those that fill the memory come last, alone"
    collected = [call.split() for call in calls if "--collect-only" in call]
    files = [word for word in collected[0] if word.startswith("tests/")]
    assert files and all((report.ROOT / file).exists() for file in files)
    assert {f"--ignore={file}" for file in files} <= set(collected[1]), "what the first of them ran the second leaves out"
    assert any("attention --backward" in call for call in calls) and any("--size 7B" in call for call in calls)
    status, lines, _ = gpu_sh("all", "no_such_step")
    assert status == 2 and "there are: build test_attention test_rest rope" in lines[0]


def tool(folder: Path, name: str) -> str:
    """A program that only notes what it is asked, in the place of one of the CUDA toolkit's; the PATH that finds it."""
    path = folder / name
    path.write_text('#!/bin/sh\necho "${0##*/} $@" >>"$CALLS"\n')
    path.chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


def test_the_hopper_forward_takes_one_command_of_ten_minutes(gpu_sh):
    """Built, confirmed, profiled and timed, the forms last; a step that hangs leaves the others their time."""
    for name in ("ncu", "nvcc"):
        path = tool(gpu_sh.calls.parent, name)
    status, lines, calls = gpu_sh("hopper", JOBS="2", PATH=path)
    asked = ["build", "test_attention", "attention", "profile", "variants"]
    assert status == 0 and [line.split()[0] for line in lines[-5:]] == asked
    (profiled,) = [call for call in calls if call.startswith("ncu ")]
    assert "--print-details all" in profiled, "without it ncu prints no pipe's utilisation"
    assert "--section ComputeWorkloadAnalysis" in profiled and profiled.endswith("-m bench.profile")
    text = (gpu_sh.tree / "bench" / "gpu.sh").read_text()
    assert int(re.search(r"hopper\) BUDGET=\$\{BUDGET:-(\d+)\}", text)[1]) < 600
    (gpu_sh.out / "done" / "build").unlink()
    status, lines, _ = gpu_sh("hopper", BUDGET="32", HANGS="build_ext", PATH=path)
    assert status == 1 and lines[-5].startswith("build FAILED") and lines[-4] == "test_attention passed before"


def test_every_step_of_gpu_sh_is_a_subject():
    text = (report.ROOT / "bench" / "gpu.sh").read_text()
    named = set(re.findall(r" subject (\w+)", text))
    subjects = {path.stem for path in (report.ROOT / "bench").glob("*.py")}
    assert named <= subjects and {"attention", "rope", "mrope", "merge", "norms", "activations", "patchify", "tower", "patch",
                                  "generate", "train", "preprocess"} <= named  # fmt: skip
