"""The CUDA extension's attention: work list and checks of the bindings without a GPU; on one, what every op must hold."""

from __future__ import annotations

import functools
import heapq
import random
import re
import sys
from itertools import pairwise

import pytest
import torch

from qwen2vl_fast import ops, positions, reference
from qwen2vl_fast.ops import attention_cuda
from qwen2vl_fast.ops.backends import extension_error
from tests.compare import Call, bounds_of, evaluate, judge, same_bits, upstream_of
from tests.samples import PEERS, enough_rows
from tests.test_ops_rope import randn

pytestmark = pytest.mark.usefixtures("poison")
backends = sys.modules["qwen2vl_fast.ops.backends"]  # qwen2vl_fast.ops offers a function of that name
EDGES = (0, 1, 2, 15, 16, 63, 64, 65, 127, 128, 129, 191, 192, 193)


def check_tiles(lengths: list[int], heads: int, rows: int, causal: bool, tiles: torch.Tensor) -> None:
    """Every query row of every head in one tile, with its segment's keys; longest segments first."""
    starts, seen = bounds_of(lengths), []
    for q_row, count, k_row, keys, head, diagonal, *_ in tiles.tolist():
        segment = next(i for i, (a, b) in enumerate(pairwise(starts)) if a <= q_row < b)
        assert 0 < count <= rows and q_row + count <= starts[segment + 1] and k_row == starts[segment]
        first = q_row - starts[segment]
        assert first % rows == 0 and diagonal == first
        assert keys == (first + count if causal else lengths[segment])
        seen += [(head, row) for row in range(q_row, q_row + count)]
    assert sorted(seen) == [(head, row) for head in range(heads) for row in range(sum(lengths))]
    if not causal:
        assert tiles[:, 3].tolist() == sorted(tiles[:, 3].tolist(), reverse=True)


@pytest.mark.parametrize("causal", [False, True])
def test_tiles(causal):
    rng = random.Random(0)
    for lengths in ([], [0, 0], [1], [4096], list(EDGES), *([rng.randint(0, 400) for _ in range(9)] for _ in range(5))):
        bounds = torch.tensor(bounds_of(lengths), dtype=torch.int32)
        for rows in (64, 128, 192):
            tiles = positions.attention_tiles(bounds, 3, rows, causal)
            assert tiles.dtype == torch.int32 and tiles.shape[1:] == (8,)
            check_tiles(lengths, 3, rows, causal, tiles)


def spans(tiles: torch.Tensor, workers: int) -> torch.Tensor:
    """What each of the workers takes, in the units of positions.dealt_tiles."""
    cost = torch.where(tiles[:, 1] > 0, 16 + 13 * -(-tiles[:, 3].long() // 96), 0)
    return torch.zeros(workers, dtype=torch.int64).index_add(0, torch.arange(len(cost)) % workers, cost)


@pytest.mark.parametrize("workers", [1, 50, 132])
def test_dealt_tiles_go_to_whoever_is_free_first(workers):
    """The same tiles, as even as dealing them one by one (a heap is the judge) wherever the order that comes is not."""
    rng = random.Random(workers)
    packs = [(5184, *3 * (1296,), *8 * (640,), *16 * (256,)), (), (0, 0), (1,), (4096, 64), (900,) * 30]
    packs += [[rng.choice((1, 95, 200, 640, 1500, 9000)) for _ in range(rng.randint(1, 60))] for _ in range(20)]
    uneven = 0
    for lengths in packs:
        tiles = positions.attention_tiles(torch.tensor(bounds_of(lengths), dtype=torch.int32), 4, 192, False)
        dealt = positions.dealt_tiles(tiles, workers)
        if dealt is not tiles:
            uneven += 1
            assert dealt.dtype == torch.int32 and len(dealt) % workers == 0
            heap = [0] * workers
            for cost in (16 + 13 * -(-tiles[:, 3].long() // 96)).tolist():
                heapq.heapreplace(heap, heap[0] + cost)
            assert sorted(spans(dealt, workers).tolist()) == sorted(heap)
            # Every worker has its tiles longest first, the empty ones last.
            keys = torch.where(dealt[:, 1] > 0, dealt[:, 3], -1).view(-1, workers)
            assert (keys.diff(dim=0) <= 0).all()
        real = dealt[dealt[:, 1] > 0]
        assert sorted(real.tolist()) == sorted(tiles.tolist())
    assert (uneven > 0) == (workers > 1)


def test_the_mixed_pack_is_even_on_a_hopper():
    lengths = (5184, *3 * (1296,), *8 * (640,), *16 * (256,))  # case (f)
    tiles = positions.attention_tiles(torch.tensor(bounds_of(lengths), dtype=torch.int32), 16, 192, False)
    before, after = (int(spans(x, 132).max()) for x in (tiles, positions.dealt_tiles(tiles, 132)))
    assert before > 1.1 * after and after < 1.01 * int(spans(tiles, 1).sum()) / 132


def test_block_rows_depend_on_the_work():
    rows = functools.partial(positions.block_rows, heads=16, head_dim=80, capability=(8, 0), causal=False)
    assert rows((1024,)) == 64  # 128 blocks of 128 rows: half of an A100 would stay idle
    assert rows((4096,) * 4) == rows((256,) * 64) == 128
    assert rows((64,) * 600) == rows((160,) * 600) == 64  # 128 rows would compute twice and 1.3 times as much


def test_block_rows_on_a_hopper():
    """Blocks of 64 rows, two on a multiprocessor, are for many short segments; their list is dealt to twice as many blocks."""
    rows = functools.partial(positions.block_rows, heads=16, head_dim=80, capability=(9, 0), causal=False)
    assert rows((16384,)) == rows((4096,) * 4) == rows((160,) * 600) == 192
    assert rows((1024,)) == rows((256,) * 64) == rows((65,) * 600) == rows((64,) * 4) == rows(()) == 128
    assert rows((64,) * 600) == rows((16,) * 4000) == rows((4096, *2000 * (64,))) == 64
    assert {positions.block_rows((64,) * 600, 16, dim, (9, 0), False) for dim in (64, 128)} == {128}
    bounds = torch.tensor(bounds_of((800, 800, *300 * (64,))), dtype=torch.int32)
    plain = positions.attention_schedule(bounds, heads=16, device="cpu")
    schedule = positions.with_lists(plain, (9, 0), 132, backward=False)
    expected = positions.dealt_tiles(positions.attention_tiles(bounds, 16, 64, False), 264)
    assert schedule.block_m == 64 and torch.equal(schedule.tiles, expected)
    assert not torch.equal(expected, positions.dealt_tiles(positions.attention_tiles(bounds, 16, 64, False), 132))


extension = pytest.mark.skipif(extension_error() is not None, reason=f"{extension_error()}; test_package judges that")


def problem(**changed):
    from qwen2vl_fast import _C

    pointers = dict.fromkeys(("q", "k", "v", "o", "lse", "tiles"), 4096)
    sizes = {"tile_count": 1, "T": 8, "Tk": 8, "H": 4, "Hk": 2, "D": 80}
    strides = {f"{n}_strides": (80 * heads, 80) for n, heads in (("q", 4), ("k", 2), ("v", 2), ("o", 4))}
    rest = {"scale": 0.1, "causal": False, "bfloat16": True}
    return _C.VarlenAttention(**{**pointers, **sizes, **strides, **rest, **changed})


BAD = {
    "head dim": ({"D": 96}, "D: expected 64, 80 or 128, got 96"),
    "heads": ({"H": 3}, "H: expected a multiple of Hk, got 3 and 2"),
    "no heads": ({"H": 0, "Hk": 0}, "H: expected a multiple of Hk, got 0 and 0"),
    "negative tokens": ({"T": -1}, "expected no negative number"),
    "no q": ({"q": 0}, "q: null pointer"),
    "no lse": ({"lse": 0}, "lse: null pointer"),
    "no tiles": ({"tiles": 0}, "tiles: null pointer"),
    "misaligned v": ({"v": 4104}, "v: expected an address that is a multiple of 16"),
    "misaligned heads": ({"k_strides": (160, 84)}, "k: expected strides that are multiples of 8 elements, got 160 and 84"),
    "negative stride": ({"o_strides": (-320, 80)}, "o: expected strides that are multiples of 8"),
    "scale 0": ({"scale": 0.0}, "scale: expected a finite positive number"),
    "scale NaN": ({"scale": float("nan")}, "scale: expected a finite positive number"),
}


@extension
@pytest.mark.parametrize("name", BAD)
def test_the_boundary_checks_without_a_device(name):
    from qwen2vl_fast import _C

    changed, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        _C.varlen_attention_forward(problem(**changed), "sm_80", 64, 0, 0)
    with pytest.raises(ValueError, match=message):
        backward(problem(**changed))


def backward(of, **changed) -> None:
    from qwen2vl_fast import _C

    pointers = dict.fromkeys(("key_tiles", "grad", "dq", "dk", "dv", "shift", "delta", "dq_sum", "turns"), 4096)
    strides = {f"{n}_strides": (320, 80) for n in ("grad", "dq", "dk", "dv")}
    rest = {"key_tile_count": 1, "rows": 64, "key_rows": 64, "device": 0, "stream": 0}
    _C.varlen_attention_backward(of, **{**pointers, **strides, **rest, **changed})


@extension
def test_more_checks_of_the_boundary():
    from qwen2vl_fast import _C

    with pytest.raises(ValueError, match="kernel: expected .*sm_80.*, got sm_12"):
        _C.varlen_attention_forward(problem(), "sm_12", 64, 0, 0)
    with pytest.raises(ValueError, match="rows: expected a positive number, got 0"):
        _C.varlen_attention_forward(problem(), "sm_80", 0, 0, 0)
    for name in ("grad", "dq", "dk", "dv"):
        with pytest.raises(ValueError, match=f"{name}: null pointer"):
            backward(problem(), **{name: 0})
        with pytest.raises(ValueError, match=f"{name}: expected strides that are multiples of 8"):
            backward(problem(), **{f"{name}_strides": (321, 80)})
    with pytest.raises(ValueError, match="shift, delta: null pointer"):
        backward(problem(), shift=0)
    with pytest.raises(ValueError, match="key_tiles: null pointer"):
        backward(problem(), key_tiles=0)
    for changed in ({"causal": True}, {}):
        with pytest.raises(ValueError, match="turns: expected dq_sum, and no causal mask"):
            backward(problem(**changed), dq_sum=0 if not changed else 4096)
    with pytest.raises(ValueError, match="bounds, bounds_k, tiles: null pointer"):
        _C.varlen_attention_tiles(0, 4096, 4096, 1, 8, 8, 2, 64, False, False, 0, 0)
    with pytest.raises(ValueError, match="at least one head and one row"):
        _C.varlen_attention_tiles(4096, 4096, 4096, 1, 8, 8, 2, 0, False, False, 0, 0)
    with pytest.raises(TypeError):
        _C.varlen_attention_forward(None, "sm_80", 64, 0, 0)
    _C.varlen_attention_forward(problem(tile_count=0, T=0), "sm_80", 64, 0, 0)  # nothing to do: no device is asked for


@extension
@pytest.mark.skipif(torch.cuda.is_available(), reason="for a machine without a device")
def test_no_device_is_an_error_with_the_kernels_name():
    from qwen2vl_fast import _C

    with pytest.raises(RuntimeError, match=r"varlen_attention_forward_sm_80: cuda\w+: .+ \(cudaError\w+\)"):
        _C.varlen_attention_forward(problem(), "sm_80", 64, 0, 0)
    with pytest.raises(RuntimeError, match=r"varlen_attention_backward: cuda\w+: .+ \(cudaError\w+\)"):
        backward(problem())


@extension
@pytest.mark.skipif(torch.cuda.is_available(), reason="for a machine without a device")
def test_a_driver_that_is_too_old_is_a_reason():
    """The automatic choice goes on to the next backend, and an explicit one says what is wrong."""
    backends.driver_error.cache_clear()
    assert re.match(r"the extension was built with CUDA \d+\.\d+: cudaGetDeviceCount: ", backends.driver_error())


def test_what_the_kernels_refuse():
    for dtype, dim, message in (
        (torch.float32, 80, "float16 and bfloat16, not float32"),
        (torch.bfloat16, 96, "head dims 64, 80 and 128, not 96"),
        (torch.float16, 64, None),
    ):
        found = attention_cuda.refuses(torch.empty(2, 1, dim, dtype=dtype))
        assert found is None if message is None else message in found


# From here on a device.


@pytest.fixture(params=["the device's own", "sm_80"])
def kernel(request, monkeypatch) -> str:
    """The kernel that the device gets, and on a newer device the one for sm_80 too."""
    if request.param == "sm_80":
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    return request.param


def packed(lengths, *, keys=None, heads=4, heads_k=2, dim=80, dtype=torch.bfloat16, seed=0, causal=False):
    total, total_k = sum(lengths), sum(lengths if keys is None else keys)
    if keys is None:
        qkv = randn(total, heads + 2 * heads_k, dim, seed=seed, device="cuda", dtype=dtype)
        q, k, v = qkv.split((heads, heads_k, heads_k), 1)
    else:
        q = randn(total, heads, dim, seed=seed, device="cuda", dtype=dtype)
        k, v = (randn(total_k, heads_k, dim, seed=seed + i, device="cuda", dtype=dtype) for i in (1, 2))
    rest = {"cu_seqlens": cu(lengths), "causal": causal} | ({} if keys is None else {"cu_seqlens_k": cu(keys)})
    return {"q": q, "k": k, "v": v}, rest


def cu(lengths) -> torch.Tensor:
    return torch.tensor(bounds_of(lengths), dtype=torch.int32, device="cuda")


def op(**arguments):
    return ops.varlen_attention(**arguments, backend="cuda")


def hold(lengths, *, keys=None, deterministic=False, name="", **options) -> None:
    tensors, rest = packed(lengths, keys=keys, **options)
    bounds, bounds_k = bounds_of(lengths), bounds_of(lengths if keys is None else keys)
    segments = {"0": (0, bounds), "1": (1, bounds), "q": (0, bounds), "k": (0, bounds_k), "v": (0, bounds_k)}
    call = Call(tensors, {**rest, "return_lse": True}, segments)
    function = functools.partial(op, deterministic=deterministic)
    label = f"{name} {lengths} {keys} {options}"
    judge(function, reference.varlen_attention, call, peers=PEERS["varlen_attention"], without=(1,), rms=enough_rows(tensors),
          name=label)  # fmt: skip


@pytest.fixture(params=[64, 128])
def blocks(request, monkeypatch) -> int:
    """Rows of the backward's blocks, whatever the lengths."""
    for module in (positions, attention_cuda):
        monkeypatch.setattr(module, "backward_rows", lambda *arguments: request.param if arguments[2] <= 80 else 64)
    return request.param


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(60))
def test_random_lengths(seed, kernel, blocks):
    rng = random.Random(seed)
    heads_k, count = rng.choice((1, 2, 3)), rng.randint(1, 6)

    def lengths() -> list[int]:
        return [rng.choice((*EDGES, rng.randint(1, 300), rng.randint(300, 1500))) for _ in range(count)]

    hold(
        lengths(), keys=None if rng.random() < 0.6 else lengths(), heads=heads_k * rng.choice((1, 2, 4)), heads_k=heads_k,
        dim=rng.choice((64, 80, 128)), dtype=rng.choice((torch.bfloat16, torch.float16)), causal=rng.random() < 0.4,
        deterministic=rng.random() < 0.5, seed=seed, name=f"seed {seed}",
    )  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("causal", [False, True])
def test_isolation(causal, kernel, blocks):
    """Alone, in a pack, beside NaN: the same bits, outputs and (deterministic) gradients; with and without a schedule."""
    lengths = [70, 1, 300, 129]
    tensors, rest = packed(lengths, causal=causal)
    starts = bounds_of(lengths)
    function = functools.partial(op, deterministic=True)
    upstream = upstream_of((tensors["q"],), 0)
    (expected,), grads = evaluate(function, Call(tensors, rest), upstream)
    for i, (start, end) in enumerate(pairwise(starts)):
        alone = {n: x[start:end] for n, x in tensors.items()}
        (o,), found = evaluate(function, Call(alone, {**rest, "cu_seqlens": cu([end - start])}), [upstream[0][start:end]])
        assert same_bits(o, expected[start:end]) and all(same_bits(found[n], g[start:end]) for n, g in grads.items()), i
        ill = {n: x.clone() for n, x in tensors.items()}
        for x in ill.values():
            x[start:end] = torch.nan
        (o,), found = evaluate(function, Call(ill, rest), upstream)
        for a, b in (pair for j, pair in enumerate(pairwise(starts)) if j != i):
            assert same_bits(o[a:b], expected[a:b]) and all(same_bits(found[n][a:b], g[a:b]) for n, g in grads.items())
    schedule = positions.attention_schedule(rest["cu_seqlens"].cpu(), heads=4, heads_k=2, device="cuda", causal=causal)
    (o,), found = evaluate(function, Call(tensors, {**rest, "schedule": schedule}), upstream)
    assert same_bits(o, expected) and all(same_bits(found[n], g) for n, g in grads.items())


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [64, 80])
@pytest.mark.parametrize("causal", [False, True])
def test_block_sizes_change_no_bit(dim, causal, monkeypatch):
    """What the lengths choose, here 64 and 128 with a schedule, and what is taken without one: the same gradients, but for dq
    where it is added. (In turn, deterministic and not causal, they differ.)"""
    processors = torch.cuda.get_device_properties("cuda").multi_processor_count
    for lengths, rows in ([64] * 600, 64), ([1024] * 16 + [9, 300, 129], 128):
        assert positions.backward_rows(lengths, 16, dim, processors, False) == rows
        tensors, rest = packed(lengths, heads=16, heads_k=16, dim=dim, causal=causal)
        upstream = upstream_of((tensors["q"],), 0)
        for deterministic in (True, False) if causal else (False,):
            found = []
            for size in (None, 64, 128):
                with monkeypatch.context() as patch:
                    for module in (positions, attention_cuda) if size else ():
                        patch.setattr(module, "backward_rows", lambda *_, size=size: size)
                    schedule = positions.attention_schedule(
                        rest["cu_seqlens"].cpu(), heads=16, head_dim=dim, device="cuda", causal=causal, backward=True
                    )
                    assert schedule.backward_m == size or size is None
                    for extra in ({}, {"schedule": schedule}):
                        function = functools.partial(op, deterministic=deterministic, **extra)
                        found.append(evaluate(function, Call(tensors, rest), upstream)[1])
            for grads in found[1:]:
                assert all(same_bits(grads[n], found[0][n]) for n in grads if deterministic or n != "q")


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [64, 80, 128])
def test_no_races(dim, kernel, blocks):
    """The same bits 250 times, forward; 1000 times, the deterministic gradients, and those of k and v where dq is added."""
    tensors, rest = packed([1024, 300, 77], heads=16, heads_k=16, dim=dim)
    first = op(**tensors, **rest, return_lse=True)
    assert all(all(map(torch.equal, first, op(**tensors, **rest, return_lse=True))) for _ in range(250))
    leaves = [x.detach().requires_grad_() for x in tensors.values()]
    for deterministic, same in ((True, leaves), (False, leaves[1:])):
        o = op(**dict(zip("qkv", leaves, strict=True)), **rest, deterministic=deterministic)
        gradients = functools.partial(torch.autograd.grad, o, same, torch.ones_like(o), retain_graph=True)
        expected = gradients()
        assert all(all(map(torch.equal, expected, gradients())) for _ in range(1000))


@pytest.mark.gpu
def test_turns_of_a_segment_with_more_blocks_than_run_at_once(blocks):
    """There blocks follow one another instead of going around; the gradients are those of dq added as blocks come."""
    tensors, rest = packed([330 * blocks, 300], heads=2, heads_k=1)
    leaves = [x.detach().requires_grad_() for x in tensors.values()]
    found = []
    for deterministic in (False, *[True] * 20):
        o = op(**dict(zip("qkv", leaves, strict=True)), **rest, deterministic=deterministic)
        found.append(torch.autograd.grad(o, leaves, torch.ones_like(o)))
    assert all(all(map(torch.equal, found[1], x)) for x in found[2:])
    for x, y in zip(found[0], found[1], strict=True):
        assert (x.double() - y.double()).norm() < 3e-3 * x.double().norm()


@pytest.mark.gpu
def test_turns_on_two_streams(blocks):
    """Launches whose blocks wait for one another, side by side: neither keeps the other's from starting for ever."""
    tensors, rest = packed([4096, 1000, 77], heads=16, heads_k=16)
    leaves = [x.detach().requires_grad_() for x in tensors.values()]
    streams, found = [torch.cuda.Stream() for _ in range(2)], []
    torch.cuda.synchronize()
    for turn in range(100):
        with torch.cuda.stream(streams[turn % 2]):
            o = op(**dict(zip("qkv", leaves, strict=True)), **rest, deterministic=True)
            found.append(torch.autograd.grad(o, leaves, torch.ones_like(o)))
    torch.cuda.synchronize()
    assert all(all(map(torch.equal, found[0], x)) for x in found[1:])


@pytest.mark.gpu
def test_more_than_65535_segments():
    lengths = [1] * 70_000 + [3, 4]
    tensors, rest = packed(lengths, heads=1, heads_k=1, dim=64)
    o = op(**tensors, **rest)
    assert torch.equal(o[:70_000], tensors["v"][:70_000])
    tail = {n: x[70_000:] for n, x in tensors.items()}
    assert same_bits(o[70_000:], op(**tail, cu_seqlens=cu([3, 4])))


@pytest.mark.gpu
def test_beyond_2_31_elements(kernel):
    """Offsets past int32: the last segment of a long pack has the bits that it has alone."""
    total, heads, dim = 2**31 // (16 * 80 * 3) + 3000, 16, 80
    qkv = torch.zeros(total, 3, heads, dim, device="cuda", dtype=torch.bfloat16)
    assert qkv.numel() > 2**31
    qkv[-500:] = randn(500, 3, heads, dim, device="cuda", dtype=torch.bfloat16)
    lengths = [1000] * ((total - 500) // 1000) + [(total - 500) % 1000, 500]
    whole, alone = qkv.unbind(1), qkv[-500:].clone().unbind(1)
    o = ops.varlen_attention(*whole, cu(lengths), backend="cuda")
    assert same_bits(o[-500:], ops.varlen_attention(*alone, cu([500]), backend="cuda"))
    leaves = [x.detach().requires_grad_() for x in whole]
    few = [x.detach().requires_grad_() for x in alone]
    run = functools.partial(ops.varlen_attention, backend="cuda", deterministic=True)
    outputs = [run(*leaves, cu(lengths)), run(*few, cu([500]))]
    grads = [torch.autograd.grad(o.square().sum(), x) for o, x in zip(outputs, (leaves, few), strict=True)]
    assert all(same_bits(a[-500:], b) for a, b in zip(*grads, strict=True))


@pytest.mark.gpu
def test_graph_capture_and_no_sync(kernel, deterministic, blocks):
    tensors, rest = packed([256, 100])

    def run() -> dict[str, torch.Tensor]:
        leaves = {n: x.detach().requires_grad_() for n, x in tensors.items()}
        o = op(**leaves, **rest)
        grads = torch.autograd.grad(o, list(leaves.values()), torch.ones_like(o))
        return {"o": o.detach(), **dict(zip(leaves, grads, strict=True))}

    expected = run()
    torch.cuda.set_sync_debug_mode("error")
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for _ in range(2):  # the second time on the workspace that the first has left
        for x in results.values():
            x.zero_()
        graph.replay()
    for name, x in results.items():
        if deterministic or name != "q":
            assert same_bits(x, expected[name]), name
        else:  # added in any order
            assert (x - expected[name]).float().norm() <= 1e-3 * expected[name].float().norm()


@pytest.mark.gpu
@pytest.mark.parametrize("scale", [-0.2, 0.0, 3.0])
def test_any_scale(scale):
    tensors, rest = packed([90, 33])
    call = Call(tensors, {**rest, "scale": scale})
    judge(op, reference.varlen_attention, call, peers=PEERS["varlen_attention"], name=f"scale {scale}")


@pytest.mark.gpu
def test_explicit_backend_refuses_and_says_why():
    tensors, rest = packed([9], dtype=torch.float32)
    with pytest.raises(RuntimeError, match="backend 'cuda' can't run varlen_attention: .*not float32"):
        op(**tensors, **rest)
    ops.varlen_attention(**tensors, **rest)  # the automatic choice goes on to a backend that can


@pytest.mark.gpu
def test_no_second_derivative():
    tensors, rest = packed([9])
    leaves = {n: x.detach().requires_grad_() for n, x in tensors.items()}
    (grad,) = torch.autograd.grad(op(**leaves, **rest).float().square().sum(), leaves["q"], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.float().sum().backward()


@pytest.mark.gpu
def test_activation_checkpointing():
    tensors, rest = packed([90, 33])

    def run(wrapped: bool) -> list[torch.Tensor]:
        leaves = {n: x.detach().requires_grad_() for n, x in tensors.items()}

        def call(q, k, v):
            return op(q=q, k=k, v=v, deterministic=True, **rest)

        o = torch.utils.checkpoint.checkpoint(call, *leaves.values(), use_reentrant=False) if wrapped else call(**leaves)
        return list(torch.autograd.grad(o.float().square().sum(), list(leaves.values())))

    assert all(map(same_bits, run(False), run(True)))


def training_curve(backend: str, device: str, steps: int) -> torch.Tensor:
    """Losses of steps that teach nano's tower, in bf16 with weights kept in float32, fixed random features."""
    from qwen2vl_fast.training.nano import initial_model

    with backends.using(backend):
        tower = initial_model(0).visual.to(device, torch.bfloat16)
        grid = torch.tensor([[1, 12, 8], [2, 6, 6], [1, 20, 14]])
        pixels = randn(int(grid.prod(1).sum()), 1176, device=device, dtype=torch.bfloat16)
        target = randn(*tower(pixels, grid).shape, seed=1, device=device)
        masters = [p.detach().float() for p in tower.parameters()]
        optimizer = torch.optim.AdamW(masters, lr=1e-4)
        losses = []
        for _ in range(steps):
            tower.zero_grad()
            loss = (tower(pixels, grid).float() - target).square().mean()
            loss.backward()
            for master, p in zip(masters, tower.parameters(), strict=True):
                master.grad = p.grad.float()
            optimizer.step()
            with torch.no_grad():
                for master, p in zip(masters, tower.parameters(), strict=True):
                    p.copy_(master)
            losses.append(loss.detach())
    return torch.stack(losses)


def check_training(device: str, steps: int, least: float = 0.9) -> None:
    """Every loss is that of the torch backend within a thousandth."""
    ours, theirs = (training_curve(backend, device, steps) for backend in ("cuda", "torch"))
    assert theirs[-1] < least * theirs[0], "nothing was learned"
    assert ((ours - theirs).abs() <= 1e-3 * theirs).all(), ((ours - theirs).abs() / theirs).max()


@pytest.mark.gpu
def test_training_goes_as_with_torch(deterministic):
    check_training("cuda", 200)
