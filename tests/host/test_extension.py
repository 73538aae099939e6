"""The cuda backend's Python on the CPU: what autograd, schedules and the tower make of the kernels."""

from __future__ import annotations

import functools
import inspect
import itertools
import random
import re
from dataclasses import replace

import pytest
import torch

from qwen2vl_fast import ops, positions, reference
from qwen2vl_fast.ops import attention_cuda
from qwen2vl_fast.ops.backends import extension_error
from qwen2vl_fast.ops.vision_attention import vision_attention
from tests.compare import Call, bounds_of, evaluate, guard, judge, same_bits, upstream_of
from tests.host import extension as host
from tests.host.backward import key_tiles
from tests.host.runner import packed_bounds
from tests.host.test_bwd_sm80 import EDGES, random_case, sample
from tests.samples import PEERS, enough_rows
from tests.test_extension_attention import check_training
from tests.test_ops_vision_attention import pack, two_ops, with_gradient

op = functools.partial(ops.varlen_attention, backend="cuda")


@pytest.fixture
def extension(monkeypatch) -> host.Extension:
    return host.install(monkeypatch)


@pytest.mark.skipif(extension_error() is not None, reason=f"{extension_error()}; test_package judges that")
def test_it_has_the_signatures_of_the_extension():
    from qwen2vl_fast import _C

    for name in ("VarlenAttention", "varlen_attention_forward", "varlen_attention_backward", "varlen_attention_tiles"):
        real = getattr(_C, name)
        text = (real.__init__ if isinstance(real, type) else real).__doc__.splitlines()[0]
        theirs = [word for word in re.findall(r"(\w+): ", text) if word != "self"]
        assert theirs == list(inspect.signature(getattr(host.Extension(), name)).parameters), name


def hold(lengths, *, keys=None, deterministic=False, processors=None, name="", **case) -> None:
    """Outputs and gradients by the rule; processors: with the schedule of a device of so many, None: without one."""
    tensors, rest = sample(lengths, keys=keys, **case)
    bounds, bounds_k = bounds_of(lengths), bounds_of(lengths if keys is None else keys)
    segments = {"0": (0, bounds), "1": (1, bounds), "q": (0, bounds), "k": (0, bounds_k), "v": (0, bounds_k)}
    more = {"deterministic": deterministic}
    if processors is not None:
        shape = {name: case[name] for name in ("heads_k", "causal") if name in case}
        more["schedule"] = host.schedule(
            rest["cu_seqlens"], heads=tensors["q"].shape[1], head_dim=tensors["q"].shape[2], processors=processors, **shape
        )
    call = Call(tensors, {**rest, "return_lse": True}, segments)
    judge(functools.partial(op, **more), reference.varlen_attention, call, peers=PEERS["varlen_attention"], without=(1,),
          rms=enough_rows(tensors), name=f"{name} {lengths} {keys} {case}")  # fmt: skip


@pytest.mark.parametrize("seed", range(6))
def test_random_lengths(extension, seed):
    """Lists made on the device."""
    hold(deterministic=random.Random(seed).random() < 0.5, name=f"seed {seed}", **random_case(seed))


# On a device of one multiprocessor, which no list leaves idle: blocks of the schedule's lists, and of those without one, which
# take the lengths to be equal.
BLOCKS = {
    "short ends": ([192, 190], 64, 64),
    "whole blocks": ([128, 128], 128, 128),
    "one long": ([130, 6, 1], 128, 64),
}


def check_blocks(extension: host.Extension, name: str, dim: int, *, scheduled=(False, True), modes=(False, True)) -> None:
    """Gradients by the rule, and each kernel is started for the blocks that its list has."""
    lengths, *chosen = BLOCKS[name]
    for own, deterministic in itertools.product(scheduled, modes):
        rows = chosen[not own]
        extension.launched.clear()
        extension.blocks.clear()
        hold(lengths, dim=dim, deterministic=deterministic, processors=1 if own else None, name=name)
        assert set(extension.blocks) == {(rows, rows)}, extension.blocks
        assert extension.launched[-2:] == [f"keys {rows} in turn" if deterministic else f"keys {rows}", "round"]
        assert own == (f"tiles {rows} by keys" not in extension.launched)


@pytest.mark.parametrize("dim", [64, 80])
@pytest.mark.parametrize("name", BLOCKS)
def test_blocks(monkeypatch, name, dim):
    check_blocks(host.install(monkeypatch, processors=1), name, dim)


def other(rows: int) -> int:
    return {0: 0, 64: 128, 128: 64}[rows]


# name -> a function of ops/attention_cuda.py, and the same with a bug
PLANTED = {
    "a schedule's lists with other rows": ("lists_of", lambda plain: lambda *a: (*plain(*a)[:4], other(plain(*a)[4]))),
    "a list by keys built for other rows": (
        "_tiles", lambda plain: lambda *a: plain(*a[:5], other(a[5]) if a[-1] else a[5], *a[6:])),
}  # fmt: skip


# Blocks of 64 in a kernel for 128 give the right gradients, later; the reverse leaves keys out.
@pytest.mark.parametrize(
    ("name", "pack", "reason"),
    [
        ("a schedule's lists with other rows", "short ends", r"\(128, 64\)"),
        ("a schedule's lists with other rows", "whole blocks", None),
        ("a list by keys built for other rows", "short ends", None),
        ("a list by keys built for other rows", "whole blocks", r"\(128, 64\)"),
    ],
)
def test_a_list_of_other_blocks_is_caught(monkeypatch, name, pack, reason):
    extension = host.install(monkeypatch, processors=1)
    function, planted = PLANTED[name]
    monkeypatch.setattr(attention_cuda, function, planted(getattr(attention_cuda, function)))
    with pytest.raises(AssertionError, match=reason):
        check_blocks(extension, pack, 80, scheduled=[function == "lists_of"], modes=[True])


def test_other_key_lengths_under_a_causal_mask_have_one_block_size(extension):
    """There the size can change bits, and so must not depend on the pack."""
    for causal, rows in ((True, 128), (False, 64)):
        hold([150, 40], keys=[180, 70], causal=causal, deterministic=True)
        assert extension.launched[-2:] == ([f"keys {rows}", f"queries {rows}"] if causal else [f"keys {rows} in turn", "round"])


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("same", [False, True])
def test_without_a_schedule_the_size_is_chosen_as_for_equal_keys(extension, monkeypatch, causal, same):
    """Three segments, 4 heads on 2, 100 queries on 130 keys, or on 100 of the same boundaries."""
    asked = []
    monkeypatch.setattr(attention_cuda, "backward_rows", lambda *arguments: asked.append(arguments) or 64)
    lengths, keys = [70, 10, 20], [70, 10, 20] if same else [50, 50, 30]
    hold(lengths, heads=4, heads_k=2, keys=None if same else keys, causal=causal, deterministic=True)
    known = () if causal and not same else (-(-sum(keys) // 3),)
    assert asked and set(asked) == {(known, 3 * 2, 80, host.PROCESSORS, causal)}


@pytest.mark.parametrize(("heads_k", "causal"), [(4, False), (2, True), (1, False)])
def test_a_schedule_changes_no_bit(extension, heads_k, causal):
    lengths = [70, 0, 1, 200, 64]
    tensors, rest = sample(lengths, heads=4, heads_k=heads_k, causal=causal)
    schedule = host.schedule(rest["cu_seqlens"], heads=4, heads_k=heads_k, causal=causal)
    found = []
    for extra in ({}, {"schedule": schedule}, {"schedule": replace(schedule, key_tiles=None, query_tiles=None)}):
        extension.launched.clear()
        call = Call(tensors, {**rest, **extra, "deterministic": True, "return_lse": True})
        found.append(evaluate(op, call, (upstream_of((tensors["q"],), 0)[0], None)))
        built = [name for name in extension.launched if name.startswith("tiles")]
        assert len(built) == {0: 3, 1: 0, 2: 2}[len(found) - 1], built
    for outputs, grads in found[1:]:
        assert all(map(same_bits, outputs, found[0][0])) and all(same_bits(g, found[0][1][n]) for n, g in grads.items())


def test_a_schedule_of_other_heads_is_not_used(extension):
    """Its lists would leave heads out."""
    tensors, rest = sample([30, 9], heads=4, heads_k=2)
    expected = op(**tensors, **rest)
    for other in ({"heads": 2}, {"heads": 4, "causal": True}, {"heads": 4, "head_dim": 128}):
        extension.launched.clear()
        assert same_bits(op(**tensors, **rest, schedule=host.schedule(rest["cu_seqlens"], **other)), expected)
        assert extension.launched[0].startswith("tiles")
    right = host.schedule(rest["cu_seqlens"], heads=4, heads_k=2)
    elsewhere = replace(right, tiles=right.tiles.to("meta"))  # a schedule of another device
    assert attention_cuda.lists_of(elsewhere, tensors["q"], tensors["k"], False) == (None, 0, None, None, 0)
    assert attention_cuda.lists_of(right, tensors["q"], tensors["k"], False)[2] is right.key_tiles
    assert attention_cuda.lists_of(right, tensors["q"], tensors["q"], False)[2] is None


def check_key_tiles(causal: bool, positions=positions) -> None:
    """Those of csrc/varlen_attention.h's description; longest segments first, and of one the blocks that most queries see."""
    rng = random.Random(0)
    for lengths in ([], [0, 0], [1], list(EDGES), *([rng.randint(0, 400) for _ in range(9)] for _ in range(5))):
        for rows in (64, 128):
            found = positions.attention_key_tiles(packed_bounds(lengths), 3, rows, causal).tolist()
            expected = key_tiles(lengths, lengths, 3, rows, causal).tolist()
            assert sorted(found) == sorted(expected)
            segment = {sum(lengths[:i]) + j: n for i, n in enumerate(lengths) for j in range(n)}
            order = [segment[tile[2]] for tile in found]
            assert order == sorted(order, reverse=True)
            for one, other in zip(found, found[1:], strict=False):
                assert one[4] != other[4] or one[1] >= other[1] or segment[one[2]] != segment[other[2]]


@pytest.mark.parametrize("causal", [False, True])
def test_key_tiles(causal):
    check_key_tiles(causal)


@pytest.mark.parametrize("scale", [-0.2, 0.0, 3.0])
def test_any_scale(extension, scale):
    tensors, rest = sample([90, 33], dtype=torch.float16)
    judge(op, reference.varlen_attention, Call(tensors, {**rest, "scale": scale}), peers=PEERS["varlen_attention"],
          name=f"scale {scale}")  # fmt: skip


def test_views_that_no_kernel_reads_are_copied(extension):
    """Rows at odd places, one row for all tokens, a gradient whose last dim is not contiguous."""
    tensors, rest = sample([20, 13])
    expected = evaluate(op, Call(tensors, {**rest, "deterministic": True}), upstream_of((tensors["q"],), 0))
    shifted = {n: x.new_empty(33, 2, 81)[..., 1:].copy_(x) for n, x in tensors.items()}
    assert all(x.stride(-1) == 1 and x.stride(1) % 8 for x in shifted.values())
    found = evaluate(op, Call(shifted, {**rest, "deterministic": True}), upstream_of((tensors["q"],), 0))
    assert same_bits(found[0][0], expected[0][0]) and all(same_bits(found[1][n], g) for n, g in expected[1].items())
    same = {n: x[:1].expand(33, -1, -1) for n, x in tensors.items()}
    assert same_bits(op(**same, **rest), op(**{n: x.contiguous() for n, x in same.items()}, **rest))
    leaves = {n: x.detach().requires_grad_() for n, x in tensors.items()}
    upstream = upstream_of((tensors["q"],), 0)[0]
    across = upstream.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    grads = torch.autograd.grad(op(**leaves, **rest, deterministic=True), list(leaves.values()), across)
    assert all(same_bits(g, expected[1][n]) for n, g in zip(leaves, grads, strict=True))


@pytest.mark.parametrize("switch", [False, True])
def test_who_chooses_the_way_to_dq(extension, monkeypatch, switch):
    """In turn for deterministic=True, two passes under a causal mask, dq added for False, else what torch's switch says; so for
    the tower's own op."""
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: switch)
    added, in_turn, two_passes = ["keys", "round"], ["keys in turn", "round"], ["keys", "queries"]

    def launched():
        return [re.sub(r" \d+", "", name) for name in extension.launched[-2:]]

    for causal, asked in itertools.product((False, True), (None, False, True)):
        tensors, rest = sample([9], causal=causal)
        evaluate(op, Call(tensors, {**rest, "deterministic": asked}), upstream_of((tensors["q"],), 0))
        same = two_passes if causal else in_turn
        assert launched() == (same if (switch if asked is None else asked) else added), (causal, asked)
    with_gradient(vision_attention, torch.randn(112, 3, 2, 80).bfloat16(), pack("cpu"))
    assert launched() == (in_turn if switch else added)


@pytest.mark.parametrize("deterministic", [False, True])
def test_the_workspace_is_large_enough(extension, monkeypatch, deterministic):
    """Nothing is written around it, and it may hold anything before."""
    tensors, rest = sample([70, 20], heads=4)
    leaves = [x.detach().requires_grad_() for x in tensors.values()]
    o = op(*leaves, **rest, deterministic=deterministic)
    made, new_empty = [], torch.Tensor.new_empty

    def guarded(*arguments, **options):
        made.append(guard(new_empty(*arguments, **options).fill_(77), strided=False))
        return made[-1].view

    monkeypatch.setattr(torch.Tensor, "new_empty", guarded)
    grads = torch.autograd.grad(o, leaves, torch.ones_like(o))
    monkeypatch.undo()
    assert len(made) == (3 if deterministic else 2) and all(x.isfinite().all() for x in grads)
    for workspace in made:
        workspace.view.fill_(77)
        workspace.check("workspace")


def test_no_second_derivative(extension):
    tensors, rest = sample([9])
    leaves = {n: x.detach().requires_grad_() for n, x in tensors.items()}
    (grad,) = torch.autograd.grad(op(**leaves, **rest).float().square().sum(), leaves["q"], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.float().sum().backward()


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(extension, reentrant):
    tensors, rest = sample([40, 13])

    def run(wrapped: bool) -> list[torch.Tensor]:
        leaves = {n: x.detach().requires_grad_() for n, x in tensors.items()}

        def attend(q, k, v):
            return op(q, k, v, deterministic=True, **rest)

        checkpoint = functools.partial(torch.utils.checkpoint.checkpoint, use_reentrant=reentrant)
        o = checkpoint(attend, *leaves.values()) if wrapped else attend(**leaves)
        o.float().square().sum().backward()
        return [x.grad for x in leaves.values()]

    assert all(map(same_bits, run(False), run(True)))
    assert sum(name.startswith("forward") for name in extension.launched) == 3


def test_operator_checks(extension):
    tensors, rest = sample([20, 13])
    leaves = [x.detach().requires_grad_() for x in tensors.values()]
    bounds = rest["cu_seqlens"]
    schedule = host.schedule(bounds, heads=2)
    for lists in ((None, 0, None, None, 0), attention_cuda.lists_of(schedule, leaves[0], leaves[1], False)):
        arguments = (*leaves, bounds, bounds, *lists, 0.1, False, True)
        torch.library.opcheck(attention_cuda._attention.registered, arguments)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_one_gradient_of_qkv(extension, dtype):
    """The kernels write dq, dk, dv into one tensor; the bits are those of the two ops one after another."""
    position_ids, inv_freq, plain = pack("cpu")
    schedule = host.schedule(plain.cu_seqlens, heads=2)
    qkv = torch.randn(112, 3, 2, 80, generator=torch.Generator().manual_seed(0)).to(dtype)
    with torch.random.fork_rng(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
        expected = with_gradient(two_ops, qkv, (position_ids, inv_freq, schedule))
        extension.launched.clear()
        found = with_gradient(vision_attention, qkv, (position_ids, inv_freq, schedule))
    assert all(map(same_bits, found, expected))
    assert extension.launched == ["forward sm_80 64", "row_sums", "keys 64 in turn", "round"]


@pytest.mark.parametrize("rows", [(24, 70), (200, 3)])
def test_hopper(monkeypatch, rows):
    """Capability 9.0, and that alone, takes the Hopper forward; the backward is the same."""
    tensors, rest = sample(rows)
    launched = {}
    for capability in ((8, 0), (8, 9), (9, 0), (10, 0), (12, 0)):
        with monkeypatch.context() as patch:
            extension = host.install(patch, capability)
            judge(op, reference.varlen_attention, Call(tensors, rest), peers=PEERS["varlen_attention"], name=f"{capability}")
            launched[capability] = [name for name in extension.launched if name.startswith("forward")]
    for capability, names in launched.items():
        assert names and all(name.startswith("forward sm_90") == (capability == (9, 0)) for name in names), launched


def test_blocks_of_a_hopper(monkeypatch):
    """Short segments, enough of them for two blocks a multiprocessor, have 64 rows, and the bits of 128."""
    tensors, rest = sample((3, *149 * (1,)))
    extension = host.install(monkeypatch, (9, 0))
    found = op(**tensors, **rest)
    monkeypatch.setattr(attention_cuda, "block_rows", lambda *_: 128)
    assert same_bits(found, op(**tensors, **rest))
    assert [name for name in extension.launched if name.startswith("forward")] == ["forward sm_90 64", "forward sm_90 128"]


def test_training_goes_as_with_torch(extension):
    check_training("cpu", 4, least=1)
    assert extension.launched.count("keys 64") == 4 * 4  # layers


@pytest.mark.full
def test_long_training_goes_as_with_torch(extension):
    check_training("cpu", 50)
