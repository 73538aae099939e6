"""What holds for every op: the tolerance rule, guard bands, poisoned memory, isolation, determinism, empty inputs.

Every check_... function is the body of a test here, of a long run, and of the mutants in test_mutants.py.
"""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from qwen2vl_fast import ops, reference
from qwen2vl_fast.ops import checks
from qwen2vl_fast.ops.backends import BACKENDS, unusable
from tests.compare import DTYPES, evaluate, judge, same_bits, upstream_of
from tests.samples import PEERS, SAMPLES, TRUTHS, Sample

LAYOUTS = ("plain", "guarded", "strided")
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
every_op = pytest.mark.parametrize("kind", SAMPLES)
pytestmark = pytest.mark.usefixtures("poison")


def usable(op: str, device: str) -> list[str]:
    """The backends that can run op on this device in any dtype and width; the torch backend always can.

    The extension's attention takes few of both, and has tests/test_extension_attention.py to itself.
    """
    names = [name for name in BACKENDS if name != "cuda" and unusable(op, name, device) is None]
    assert "torch" in names
    return names


def definition_of(kind: str, dtype: torch.dtype):
    """What judges outputs of dtype: the op's definition, or for narrower dtypes what stands for it in TRUTHS."""
    plain = getattr(reference, SAMPLES[kind](0).op)
    return plain if dtype == torch.float64 else TRUTHS.get(kind, plain)


def check_rule(kind: str, seed: int, dtype: torch.dtype, device: str = "cpu", layout: str = "guarded", ops=ops) -> None:
    """Outputs and gradients by the tolerance rule, on every backend; inputs and their surroundings stay as they were."""
    sample = SAMPLES[kind](seed)
    definition = definition_of(kind, dtype)
    for backend in usable(sample.op, device):
        call, guards = sample.call(dtype, device, layout)
        name = f"{kind} seed {seed} {dtype} {layout} {backend}"

        def run(backend=backend, **arguments):
            return getattr(ops, sample.op)(**arguments, backend=backend)

        judge(
            run, definition, call, peers=PEERS.get(kind, ()), rms=sample.rms, without=sample.without, seed=seed, name=name
        )
        for guard in guards:
            guard.check(name)


def check_isolation(kind: str, seed: int, dtype: torch.dtype, device: str = "cpu", ops=ops) -> None:
    """Every segment has the same bits alone, in the whole pack, and in the pack reversed: outputs and gradients."""
    whole = SAMPLES[kind](seed)
    count = len(whole.segments)
    for backend in usable(whole.op, device):
        expected = _by_segment(whole, range(count), dtype, device, backend, seed, ops)
        for order in ([i] for i in range(count)), [list(range(count))[::-1]]:
            for indices in order:
                got = _by_segment(whole, indices, dtype, device, backend, seed, ops)
                for i in indices:
                    for name, x in got[i].items():
                        assert same_bits(x, expected[i][name]), f"{kind} seed {seed} {dtype} {backend}: {name} of segment {i}"


def _by_segment(whole: Sample, indices, dtype, device, backend, seed, ops) -> dict[int, dict[str, torch.Tensor]]:
    """segment -> {"0": its rows of output 0, ..., "q": of the gradient of q, ...} of the pack of these segments."""
    sample = whole.part(indices)
    call, _ = sample.call(dtype, device)

    def op(**arguments):
        return getattr(ops, sample.op)(**arguments, backend=backend)

    outputs, grads = evaluate(op, call)
    if call.tensors:
        pieces = []
        for i in indices:  # a segment's upstream gradient depends on the segment alone
            alone, _ = whole.part([i]).call(dtype, device)
            pieces.append(upstream_of(evaluate(op, alone)[0], seed + i, whole.without))
        upstream = [None if g[0] is None else torch.cat(g) for g in zip(*pieces, strict=True)]
        _, grads = evaluate(op, call, upstream)
    found = {str(i): x for i, x in enumerate(outputs)} | {n: x for n, x in grads.items() if n in call.segments}
    result: dict[int, dict[str, torch.Tensor]] = {i: {} for i in indices}
    for name, x in found.items():
        axis, bounds = call.segments[name]
        for i, (start, end) in zip(indices, pairwise(bounds), strict=True):
            result[i][name] = x.narrow(axis, start, end - start)
    return result


def check_nan_isolation(kind: str, seed: int, dtype: torch.dtype, device: str = "cpu", ops=ops) -> None:
    """NaN in one segment leaves the outputs and gradients of all others bit-identical."""
    whole = SAMPLES[kind](seed)
    everyone = range(len(whole.segments))
    for backend in usable(whole.op, device):
        expected = _by_segment(whole, everyone, dtype, device, backend, seed, ops)
        for sick in everyone:
            got = _by_segment(whole.poison(sick), everyone, dtype, device, backend, seed, ops)
            for i in everyone:
                for name, x in got[i].items():
                    assert i == sick or same_bits(x, expected[i][name]), (
                        f"{kind} seed {seed} {dtype} {backend}: NaN in segment {sick} reached {name} of segment {i}"
                    )


def check_determinism(kind: str, seed: int, dtype: torch.dtype, device: str = "cpu", ops=ops) -> None:
    """Twice the same call, twice the same bits: forward always, backward with deterministic algorithms."""
    sample = SAMPLES[kind](seed)
    for backend in usable(sample.op, device):
        call, _ = sample.call(dtype, device)

        def op(backend=backend, **arguments):
            return getattr(ops, sample.op)(**arguments, backend=backend)

        torch.use_deterministic_algorithms(False)
        first, again = evaluate(op, call)[0], evaluate(op, call)[0]
        assert all(map(same_bits, first, again)), f"{kind} seed {seed} {dtype} {backend}: outputs differ"
        torch.use_deterministic_algorithms(True)
        if call.tensors:
            upstream = upstream_of(first, seed, sample.without)
            one, two = (evaluate(op, call, upstream)[1] for _ in range(2))
            assert all(same_bits(one[n], two[n]) for n in one), f"{kind} seed {seed} {dtype} {backend}: gradients differ"


def check_blocks(kind: str, seed: int, dtype: torch.dtype, ops=ops, module=checks) -> None:
    """The torch backend works in blocks of rows: however small they are, the bits are the same."""
    sample = SAMPLES[kind](seed)
    call, _ = sample.call(dtype)

    def op(**arguments):
        return getattr(ops, sample.op)(**arguments, backend="torch")

    expected, _ = evaluate(op, call)
    before = module._BLOCK_BYTES
    try:
        for size in (1, 3000, 9000):
            module._BLOCK_BYTES = size
            outputs, _ = evaluate(op, call)
            assert all(map(same_bits, outputs, expected)), f"{kind} seed {seed} {dtype} blocks of {size} bytes"
    finally:
        module._BLOCK_BYTES = before


def sweep(check, seeds, **arguments) -> None:
    """check(seed=...) for many seeds; a failure says how to run its seed alone."""
    for seed in seeds:
        try:
            check(seed=seed, **arguments)
        except Exception as error:
            keywords = ", ".join(f"{name}={value!r}" for name, value in {**arguments, "seed": seed}.items())
            line = f'python -c "import torch; from {check.__module__} import {check.__name__} as f; f({keywords})"'
            raise AssertionError(f"{error}\nreproduce: {line}") from error


@every_op
@dtypes
@pytest.mark.parametrize("layout", LAYOUTS)
def test_rule(kind, dtype, layout, device):
    sweep(check_rule, range(4), kind=kind, dtype=dtype, device=device, layout=layout)


@every_op
@dtypes
def test_isolation(kind, dtype, device):
    if SAMPLES[kind](0).isolated:
        sweep(check_isolation, range(5), kind=kind, dtype=dtype, device=device)
        sweep(check_nan_isolation, range(3), kind=kind, dtype=dtype, device=device)


@every_op
@dtypes
def test_determinism(kind, dtype, device):
    sweep(check_determinism, range(2), kind=kind, dtype=dtype, device=device)


@every_op
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks(kind, dtype):
    sweep(check_blocks, range(6), kind=kind, dtype=dtype)


@pytest.mark.full
@every_op
@dtypes
def test_many(kind, dtype, device):
    for layout in LAYOUTS:
        sweep(check_rule, range(100, 300), kind=kind, dtype=dtype, device=device, layout=layout)
    if SAMPLES[kind](0).isolated:
        sweep(check_isolation, range(100, 300), kind=kind, dtype=dtype, device=device)
        sweep(check_nan_isolation, range(100, 150), kind=kind, dtype=dtype, device=device)
