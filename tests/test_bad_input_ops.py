"""Bad input to ops and positions: a typed error that names the argument, what was expected and what came.

The table is run by pytest, and again under python -O, where assert statements are gone.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from qwen2vl_fast import ops, positions
from qwen2vl_fast.ops.gated import gated

ROOT = Path(__file__).resolve().parents[1]


class Bad(NamedTuple):
    name: str
    call: Callable[[], object]
    error: type[Exception]
    message: str


def f(*size: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> torch.Tensor:
    return torch.ones(size, dtype=dtype, device=device)


def i(*size: int, dtype: torch.dtype = torch.int64, device: str = "cpu") -> torch.Tensor:
    return torch.ones(size, dtype=dtype, device=device)


def bounds(*values: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype)


def gaps(*size: int) -> torch.Tensor:
    return f(*size[:-1], 2 * size[-1])[..., ::2]


def rotary() -> Iterator[Bad]:
    def mrope(q=None, k=None, p=None, **options):
        q = f(4, 2, 128) if q is None else q
        return lambda: ops.mrope(q, f(4, 1, 128) if k is None else k, i(3, 4) if p is None else p, **options)

    def vision(q=None, k=None, p=None, **options):
        q = f(4, 2, 80) if q is None else q
        return lambda: ops.vision_rope(q, f(4, 1, 80) if k is None else k, i(2, 4) if p is None else p, **options)

    yield Bad("q is a list", mrope(q=[1.0]), TypeError, "q: expected a tensor, got list")
    yield Bad("k is None", lambda: ops.mrope(f(4, 2, 128), None, i(3, 4)), TypeError, "k: expected a tensor, got NoneType")
    yield Bad("q of integers", mrope(q=i(4, 2, 128)), TypeError, "q: expected float16, .*, got torch.int64")
    yield Bad("k of another dtype", mrope(k=f(4, 1, 128).half()), TypeError, "k: expected the dtype of q, .*32, got .*16")
    yield Bad("k elsewhere", mrope(k=f(4, 1, 128, device="meta")), ValueError, "k: expected the device of q, cpu, got meta")
    yield Bad("q without heads", mrope(q=f(4, 128)), ValueError, r"q: expected rank 3 or 4, got shape \[4, 128\]")
    yield Bad("vision q in batches", vision(q=f(1, 4, 2, 80)), ValueError, r"q: expected rank 3, got shape \[1, 4, 2, 80\]")
    yield Bad("k of other tokens", mrope(k=f(5, 1, 128)), ValueError, r"k: expected q's shape \[4, 2, 128\].*got \[5, 1, 128\]")
    yield Bad("k of another width", mrope(k=f(4, 1, 64)), ValueError, r"k: expected q's shape \[4, 2, 128\].*got \[4, 1, 64\]")
    yield Bad("odd head dim", mrope(f(4, 2, 5), f(4, 2, 5)), ValueError, "q: .*positive multiple of 2, got 5")
    yield Bad("vision head dim 6", vision(f(4, 2, 6), f(4, 2, 6)), ValueError, "q: .*positive multiple of 4, got 6")
    yield Bad("head dim 0", vision(f(4, 2, 0), f(4, 2, 0)), ValueError, "q: .*positive multiple of 4, got 0")
    yield Bad("q with gaps", mrope(q=gaps(4, 2, 128)), ValueError, "q: expected a contiguous last dim.*use .contiguous")
    yield Bad("k with gaps", vision(k=gaps(4, 1, 80)), ValueError, "k: expected a contiguous last dim.*use .contiguous")
    yield Bad("positions are a list", mrope(p=[[0] * 4] * 3), TypeError, "position_ids: expected a tensor, got list")
    yield Bad("float positions", mrope(p=f(3, 4)), TypeError, "position_ids: expected int32 or int64, got torch.float32")
    yield Bad("two axes for mrope", mrope(p=i(2, 4)), ValueError, r"position_ids: .*\[3, T\] = \[3, 4\], got shape \[2, 4\]")
    yield Bad("three for vision", vision(p=i(3, 4)), ValueError, r"position_ids: .*\[2, T\] = \[2, 4\], got shape \[3, 4\]")
    yield Bad("positions of fewer tokens", mrope(p=i(3, 3)), ValueError, r"position_ids: .*got shape \[3, 3\]")
    yield Bad("positions elsewhere", mrope(p=i(3, 4, device="meta")), ValueError, "position_ids: expected the device of q")
    yield Bad("negative position", vision(p=-i(2, 4)), ValueError, "position_ids: expected 0..16777215.*, got -1")
    yield Bad("position 2^24", mrope(p=i(3, 4) * 2**24), ValueError, "position_ids: expected 0..16777215.*, got 16777216")
    yield Bad("sections of another sum", mrope(sections=(16, 24, 20)), ValueError, r"sections: .*D/2 = 64, got \(16, 24, 20\)")
    yield Bad("two sections", mrope(sections=(32, 32)), ValueError, r"sections: expected three numbers.*got \(32, 32\)")
    yield Bad("negative section", mrope(sections=(-1, 32, 33)), ValueError, r"sections: expected three.*got \(-1, 32, 33\)")
    yield Bad("one section", mrope(sections=64), TypeError, "sections: expected three integers, got 64")
    yield Bad("no sections", mrope(sections=None), TypeError, "sections: expected three integers, got None")
    floats = mrope(sections=(16.0, 24.0, 24.0))
    yield Bad("float sections", floats, TypeError, r"sections: expected three integers, got \(16.0, 24.0, 24.0\)")
    yield Bad("no scaling", mrope(attention_scaling=None), TypeError, "attention_scaling: expected a number, got NoneType")
    yield Bad("no theta", vision(theta=None), TypeError, "theta: expected a number, got NoneType")
    yield Bad("bf16 table", mrope(inv_freq=f(64).bfloat16()), TypeError, "inv_freq: expected float32.*got torch.bfloat16")
    yield Bad("float64 table", vision(inv_freq=f(20).double()), TypeError, "inv_freq: expected float32.*got torch.float64")
    yield Bad("short table", vision(inv_freq=f(40)), ValueError, r"inv_freq: expected \[20\] = \[20\], got shape \[40\]")
    yield Bad("table is a list", mrope(inv_freq=[1.0] * 64), TypeError, "inv_freq: expected a tensor, got list")


def rows() -> Iterator[Bad]:
    x, w = f(8, 6), f(6)
    for op, arguments in (
        ("rms_norm", {"weight": w, "eps": 1e-6}),
        ("layer_norm", {"weight": w, "bias": w, "eps": 1e-6}),
        ("quick_gelu", {"bias": w}),
        ("gelu", {"bias": w}),
    ):

        def call(x=x, op=op, arguments=arguments, **changes):
            return lambda: getattr(ops, op)(x, **{**arguments, **changes})

        yield Bad(f"{op}: integers", call(i(8, 6)), TypeError, "x: expected float16, .*, got torch.int64")
        yield Bad(f"{op}: a scalar", call(torch.tensor(1.0)), ValueError, r"x: expected \[..., width\].*got shape \[\]")
        yield Bad(f"{op}: no width", call(f(8, 0)), ValueError, r"x: expected \[..., width\].*got shape \[8, 0\]")
        for name in set(arguments) - {"eps"}:
            wrong = {"short": f(5), "twice": f(1, 6), "double": w.double(), "away": f(6, device="meta"), "none": [1.0]}
            yield Bad(f"{op}: short {name}", call(**{name: wrong["short"]}), ValueError, rf"{name}: .*\[6\], got shape \[5\]")
            yield Bad(f"{op}: 2-D {name}", call(**{name: wrong["twice"]}), ValueError, rf"{name}: .*got shape \[1, 6\]")
            yield Bad(f"{op}: double {name}", call(**{name: wrong["double"]}), TypeError, f"{name}: expected the dtype of x")
            yield Bad(f"{op}: {name} elsewhere", call(**{name: wrong["away"]}), ValueError, f"{name}: expected the device of x")
            yield Bad(f"{op}: list {name}", call(**{name: wrong["none"]}), TypeError, f"{name}: expected a tensor, got list")
        if "norm" in op:
            yield Bad(f"{op}: no eps", call(eps=None), TypeError, "eps: expected a number, got NoneType")
            broadcast, half = call(residual=f(1, 6)), call(residual=x.half())
            yield Bad(f"{op}: broadcast residual", broadcast, ValueError, r"residual: .*\[8, 6\], got shape \[1, 6\]")
            yield Bad(f"{op}: half residual", half, TypeError, "residual: expected the dtype of x")
            away = call(residual=f(8, 6, device="meta"))
            yield Bad(f"{op}: residual elsewhere", away, ValueError, "residual: expected the device of x, cpu, got meta")
    yield Bad("swiglu: odd", lambda: ops.swiglu(f(3, 7)), ValueError, r"gate_up: expected an even last dim .*shape \[3, 7\]")
    for up, error, message in (
        (f(3, 6, device="meta"), ValueError, "up: expected the device of gate, cpu, got meta"),
        (f(3, 4), ValueError, r"up: expected gate's shape = \[3, 6\], got shape \[3, 4\]"),
    ):
        yield Bad(f"gated: up {up.device}", lambda up=up: gated(f(3, 6), up), error, message)
    yield Bad("swiglu: complex", lambda: ops.swiglu(f(3, 6).cfloat()), TypeError, "gate_up: expected float16.*complex64")

    def merge(x=x, weight=w, bias=w, **options):
        return lambda: ops.merge_patches(x, weight, bias, **options)

    grid = torch.tensor([[1, 2, 4]])
    yield Bad("merge: 6 rows", merge(f(6, 6)), ValueError, r"x: expected \[T, D\] with T a multiple of 4, got shape \[6, 6\]")
    yield Bad("merge: batches", merge(f(2, 4, 6)), ValueError, r"x: expected \[T, D\].*got shape \[2, 4, 6\]")
    yield Bad("merge: no width", merge(f(4, 0), f(0), f(0)), ValueError, r"x: .*width.*got shape \[4, 0\]")
    yield Bad("merge: short bias", merge(bias=f(5)), ValueError, r"bias: expected \[D\] = \[6\], got shape \[5\]")
    yield Bad("merge: grid of more", merge(grid_thw=grid * 2), ValueError, "grid_thw: holds 64 patches, but x has 8 rows")
    yield Bad("merge: flat grid", merge(grid_thw=grid[0]), ValueError, r"grid_thw: expected \[N, 3\].*got shape \[3\]")
    yield Bad("merge: odd sides", merge(grid_thw=torch.tensor([[1, 1, 8]])), ValueError, r"grid_thw\[0\]: .*got \[1, 1, 8\]")
    yield Bad("merge: no eps", merge(eps=None), TypeError, "eps: expected a number, got NoneType")
    wraps = merge(f(0, 6), grid_thw=torch.tensor([[1, 2**32, 2**32]]))
    yield Bad("merge: grid past int64", wraps, ValueError, r"grid_thw\[0\]: expected at most 2147483647 patches")
    yield Bad("merge: list", merge(grid_thw=[[1, 2, 4]]), TypeError, "grid_thw: expected a tensor, got list")


def attention() -> Iterator[Bad]:
    def call(q=None, k=None, v=None, cu=None, **options):
        tensors = [f(6, 4, 8) if q is None else q, f(6, 2, 8) if k is None else k, f(6, 2, 8) if v is None else v]
        return lambda: ops.varlen_attention(*tensors, bounds(0, 2, 6) if cu is None else cu, **options)

    yield Bad("q is a list", call(q=[1.0]), TypeError, "q: expected a tensor, got list")
    yield Bad("q rank 2", call(q=f(6, 8)), ValueError, r"q: expected \[T, H, D\], got shape \[6, 8\]")
    yield Bad("k rank 4", call(k=f(1, 6, 2, 8)), ValueError, r"k: expected \[T, H, D\], got shape \[1, 6, 2, 8\]")
    yield Bad("v in half", call(v=f(6, 2, 8).half()), TypeError, "v: expected the dtype of q, .*32, got torch.float16")
    yield Bad("v elsewhere", call(v=f(6, 2, 8, device="meta")), ValueError, "v: expected the device of q, cpu, got meta")
    yield Bad("q with gaps", call(q=gaps(6, 4, 8)), ValueError, "q: expected a contiguous last dim")
    yield Bad("v of other heads", call(v=f(6, 4, 8)), ValueError, r"v: expected k's shape = \[6, 2, 8\], got shape \[6, 4, 8\]")
    yield Bad("heads that don't divide", call(f(6, 3, 8)), ValueError, r"k: .*divides 3, got shape \[6, 2, 8\]")
    yield Bad("no key heads", call(None, f(6, 0, 8), f(6, 0, 8)), ValueError, r"k: .*got shape \[6, 0, 8\]")
    narrow = call(None, f(6, 2, 4), f(6, 2, 4))
    yield Bad("other head dim", narrow, ValueError, r"k: expected head dim 8 .*got shape \[6, 2, 4\]")
    yield Bad("head dim 0", call(f(6, 2, 0), f(6, 2, 0), f(6, 2, 0)), ValueError, r"q: .*head dim.*got shape \[6, 2, 0\]")
    yield Bad("q with no head", call(f(6, 0, 8), f(6, 1, 8), f(6, 1, 8)), ValueError, r"q: .*one head.*got shape \[6, 0, 8\]")
    other = call(None, f(7, 2, 8), f(7, 2, 8))
    yield Bad("more keys without boundaries", other, ValueError, "k: expected 6 tokens like q, got 7; pass cu_seqlens_k")
    for name, keyword in (("cu_seqlens", "cu"), ("cu_seqlens_k", "cu_seqlens_k")):

        def cut(value, keyword=keyword):
            return call(**{keyword: value})

        yield Bad(f"{name} is a list", cut([0, 2, 6]), TypeError, f"{name}: expected a tensor, got list")
        yield Bad(f"{name} int64", cut(bounds(0, 2, 6).long()), TypeError, f"{name}: expected int32, got torch.int64")
        yield Bad(f"{name} 2-D", cut(bounds(0, 2, 6)[None]), ValueError, rf"{name}: .*\[N \+ 1\].*got shape \[1, 3\]")
        yield Bad(f"{name} empty", cut(bounds()), ValueError, rf"{name}: .*\[N \+ 1\].*got shape \[0\]")
        yield Bad(f"{name} from 1", cut(bounds(1, 2, 6)), ValueError, f"{name}: expected to start at 0, got 1")
        falling = f"{name}: expected non-decreasing boundaries, got 4 then 2 at index 2"
        yield Bad(f"{name} decreasing", cut(bounds(0, 4, 2, 6)), ValueError, falling)
        yield Bad(f"{name} short", cut(bounds(0, 2, 5)), ValueError, f"{name}: expected to end at .* 6, got 5")
        yield Bad(f"{name} long", cut(bounds(0, 2, 7)), ValueError, f"{name}: expected to end at .* 6, got 7")
    more = call(cu_seqlens_k=bounds(0, 2, 4, 6))
    yield Bad("other number of segments", more, ValueError, r"cu_seqlens_k: expected \[N \+ 1\] = \[3\], got shape \[4\]")
    away = call(cu=bounds(0, 2, 6).to("meta"))
    yield Bad("boundaries elsewhere", away, ValueError, "cu_seqlens: expected the device of q, cpu, got meta")
    schedule = positions.attention_schedule(bounds(0, 5), heads=4, device="cpu")
    yield Bad("schedule of another pack", call(schedule=schedule), ValueError, "schedule: made for 5 tokens, but q has 6")
    moved = call(schedule=positions.attention_schedule(bounds(0, 3, 6), heads=4, device="cpu"))
    yield Bad("schedule of other boundaries", moved, ValueError, "schedule: made for other boundaries than cu_seqlens")
    yield Bad("schedule is a number", call(schedule=5), TypeError, "schedule: expected what .*attention_schedule.*, got int")
    yield Bad("scale is text", call(scale="a"), TypeError, "scale: expected a number, got str")
    yield Bad("scale is NaN", call(scale=float("nan")), ValueError, "scale: expected a finite number, got nan")
    yield Bad("scale is infinite", call(scale=float("inf")), ValueError, "scale: expected a finite number, got inf")


def pixels_and_loss() -> Iterator[Bad]:
    def patchify(*size: int, frames=torch.uint8, **options):
        return lambda: ops.patchify(torch.zeros(size, dtype=frames), **options)

    floats = patchify(2, 28, 28, 3, frames=torch.float32)
    yield Bad("float frames", floats, TypeError, "frames: expected uint8, got torch.float32")
    yield Bad("frames are None", lambda: ops.patchify(None), TypeError, "frames: expected a tensor, got NoneType")
    for size in ((28, 28, 3), (3, 28, 28, 3), (2, 27, 28, 3), (2, 28, 42, 3), (2, 28, 28, 4), (2, 3, 28, 28)):
        message = r"frames: expected \[N, H, W, 3\].*" + re.escape(str(list(size)))
        yield Bad(f"frames {size}", patchify(*size), ValueError, message)
    integers = patchify(2, 28, 28, 3, dtype=torch.int32)
    yield Bad("rows of integers", integers, TypeError, "dtype: expected a floating dtype, got torch.int32")

    def loss(hidden=None, weight=None, labels=None, **options):
        tensors = [f(4, 3) if hidden is None else hidden, f(5, 3) if weight is None else weight]
        return lambda: ops.linear_cross_entropy(*tensors, i(4) if labels is None else labels, **options)

    yield Bad("hidden in batches", loss(f(2, 4, 3)), ValueError, r"hidden: expected \[T, E\], got shape \[2, 4, 3\]")
    yield Bad("hidden of integers", loss(i(4, 3)), TypeError, "hidden: expected float16.*got torch.int64")
    yield Bad("weight of another width", loss(weight=f(5, 4)), ValueError, r"weight: expected \[V, 3\].*, got shape \[5, 4\]")
    yield Bad("weight transposed", loss(weight=f(3, 5)), ValueError, r"weight: expected \[V, 3\].*, got shape \[3, 5\]")
    yield Bad("no words", loss(weight=f(0, 3)), ValueError, r"weight: .*got shape \[0, 3\]")
    yield Bad("weight in half", loss(weight=f(5, 3).half()), TypeError, "weight: expected the dtype of hidden")
    yield Bad("int32 labels", loss(labels=i(4).int()), TypeError, "labels: expected int64, got torch.int32")
    yield Bad("labels are a list", loss(labels=[1] * 4), TypeError, "labels: expected a tensor, got list")
    yield Bad("fewer labels", loss(labels=i(3)), ValueError, r"labels: expected \[T\] = \[4\], got shape \[3\]")
    yield Bad("labels elsewhere", loss(labels=i(4, device="meta")), ValueError, "labels: expected the device of hidden")
    past = loss(labels=torch.tensor([0, 4, 5, 1]))
    yield Bad("label V", past, ValueError, r"labels\[2\]: expected -100 or 0..4, got 5")
    other = loss(labels=torch.tensor([0, -100, 1, 1]), ignore_index=-1)
    yield Bad("ignored label is text", loss(ignore_index="a"), TypeError, "ignore_index: expected an integer, got str")
    yield Bad("another ignored label", other, ValueError, r"labels\[1\]: expected -1 or 0..4, got -100")


def places() -> Iterator[Bad]:
    grid = torch.tensor([[1, 4, 4]])
    for name, function in (
        ("vision_position_ids", positions.vision_position_ids),
        ("vision_cu_seqlens", positions.vision_cu_seqlens),
        ("attention_schedule", lambda g: positions.attention_schedule(g, heads=2, device="cpu")),
    ):

        def call(value, function=function):
            return lambda: function(value)

        yield Bad(f"{name}: list", call([[1, 4, 4]]), TypeError, r"(grid_thw|cu_seqlens\S*): expected a tensor, got list")
        yield Bad(f"{name}: float", call(grid.float()), TypeError, "grid_thw: expected integers, got torch.float32")
        yield Bad(f"{name}: two columns", call(grid[:, 1:]), ValueError, r"grid_thw: expected \[N, 3\].*got shape \[1, 2\]")
        worst = torch.cat((grid, -grid))
        yield Bad(f"{name}: negative", call(worst), ValueError, r"grid_thw\[1\]: expected positive t, h, w, got \[-1, -4, -4\]")
        yield Bad(f"{name}: no frames", call(grid * torch.tensor([0, 1, 1])), ValueError, r"grid_thw\[0\]: expected positive")
    yield Bad("odd height", lambda: positions.vision_position_ids(torch.tensor([[1, 4, 4], [1, 3, 4]])), ValueError,
              r"grid_thw\[1\]: expected h and w to be multiples of the merge size 2, got \[1, 3, 4\]")  # fmt: skip
    yield Bad("no heads", lambda: positions.attention_schedule(grid, heads=0, device="cpu"), ValueError,
              "heads: expected at least 1, got 0")  # fmt: skip
    yield Bad("heads are text", lambda: positions.attention_schedule(grid, heads="2", device="cpu"), TypeError,
              "heads: expected an integer, got str")  # fmt: skip
    for value, error, message in (
        (0, ValueError, "at least 1, got 0"), (-2, ValueError, "at least 1, got -2"), (2.0, TypeError, "an integer, got float")
    ):  # fmt: skip
        yield Bad(f"merge size {value}", lambda m=value: positions.vision_position_ids(grid, m), error,
                  f"merge_size: expected {message}")  # fmt: skip
        yield Bad(f"merge size {value} of text", lambda m=value: positions.mrope_position_ids(i(1, 4), merge_size=m), error,
                  f"merge_size: expected {message}")  # fmt: skip
    yield Bad("int64 boundaries", lambda: positions.attention_schedule(bounds(0, 4).long(), heads=1, device="cpu"), TypeError,
              "cu_seqlens: expected int32, got torch.int64")  # fmt: skip

    ids = torch.tensor([[1, 9, 9, 9, 9, 2]])
    mask = torch.ones_like(ids)

    def mrope(input_ids=ids, image=grid, **options):
        return lambda: positions.mrope_position_ids(input_ids, image_grid_thw=image, image_token_id=9, **options)

    yield Bad("ids are a list", mrope(ids.tolist()), TypeError, "input_ids: expected a tensor, got list")
    yield Bad("float ids", mrope(ids.float()), TypeError, "input_ids: expected int32 or int64, got torch.float32")
    yield Bad("flat ids", mrope(ids[0]), ValueError, r"input_ids: expected \[B, S\], got shape \[6\]")
    wider = mrope(attention_mask=torch.ones(1, 7))
    yield Bad("wider mask", wider, ValueError, r"attention_mask: expected shape \[1, 6\], got \[1, 7\]")
    yield Bad("mask is a list", mrope(attention_mask=[[1] * 6]), TypeError, "attention_mask: expected a tensor, got list")
    yield Bad("no grid", mrope(image=None), ValueError, r"input_ids: 4 image placeholders \(9\) but no image_grid_thw")
    unmasked = mrope(attention_mask=mask.clone().index_fill_(1, torch.tensor([1]), 0))
    yield Bad("masked placeholder", unmasked, ValueError, "input_ids: 3 image placeholders .*asks for 4")
    yield Bad("larger grid", mrope(image=grid * 2), ValueError, "input_ids: 4 image placeholders .*asks for 32")
    yield Bad("grid twice", mrope(image=torch.cat((grid, grid))), ValueError, "input_ids: 4 image placeholders .*asks for 8")
    video = mrope(video_grid_thw=grid)
    yield Bad("grid without video", video, ValueError, "input_ids: 0 video placeholders .*asks for 4")
    yield Bad("odd grid", mrope(image=torch.tensor([[1, 3, 4]])), ValueError, r"grid_thw\[0\]: .*multiples of the merge size")
    yield Bad("grid is a list", mrope(image=[[1, 4, 4]]), TypeError, "image_grid_thw: expected a tensor, got list")
    scalar = mrope(image=torch.tensor(5))
    yield Bad("grid is a scalar", scalar, ValueError, r"image_grid_thw: expected \[N, 3\] .*, got shape \[\]")
    wraps = mrope(i(1, 6), image=torch.tensor([[1, 2**33, 2**33]]))
    yield Bad("grid past int64", wraps, ValueError, r"grid_thw\[0\]: expected at most 2147483647 patches")
    broken = torch.tensor([[1, 9, 9, 5, 9, 9]])
    yield Bad("text inside an image", mrope(broken), ValueError, "input_ids: 4 image placeholders")


TABLE = [*rotary(), *rows(), *attention(), *pixels_and_loss(), *places()]


def failures() -> list[str]:
    """What the table promises and does not hold; without assert, so that it works under python -O."""
    found = []
    for bad in TABLE:
        try:
            bad.call()
        except Exception as error:
            if type(error) is not bad.error or not re.match(bad.message, str(error)):
                found.append(f"{bad.name}: {type(error).__name__}: {error}")
        else:
            found.append(f"{bad.name}: no error")
    return found


@pytest.mark.parametrize("bad", TABLE, ids=lambda bad: bad.name)
def test_bad_input(bad):
    with pytest.raises(bad.error) as raised:
        bad.call()
    assert type(raised.value) is bad.error
    assert re.match(bad.message, str(raised.value)), str(raised.value)


def test_under_python_O():
    code = "from tests.test_bad_input_ops import failures, TABLE; print('\\n'.join(failures()) or len(TABLE))"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, "-O", "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.stdout.strip() == str(len(TABLE)), run.stdout + run.stderr


def test_enough_classes():
    assert len(TABLE) > 100


@pytest.mark.parametrize("op", ["mrope_", "vision_rope_"])
def test_nothing_is_written_before_the_checks(op):
    """In place: q keeps its bits when k, the positions or the table are refused."""
    dim, axes = (128, 3) if op == "mrope_" else (80, 2)
    q = torch.randn(4, 2, dim)
    before = q.clone()
    for arguments in (
        {"k": f(5, 1, dim)},
        {"position_ids": i(axes, 5)},
        {"position_ids": -i(axes, 4)},
        {"inv_freq": f(3)},
        {"backend": "flash"},
    ):
        with pytest.raises((ValueError, TypeError, RuntimeError)):
            getattr(ops, op)(**{"q": q, "k": f(4, 1, dim), "position_ids": i(axes, 4), **arguments})
        assert torch.equal(q, before)
