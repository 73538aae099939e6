"""Every Triton kernel by the shared test bodies, and what is particular to each."""

from __future__ import annotations

import functools
import importlib
import importlib.util

import pytest
import torch
import triton
import triton.language as tl

from qwen2vl_fast import ops, reference
from qwen2vl_fast.kernels import norm, rope
from qwen2vl_fast.kernels.offsets import offset
from tests.compare import Call, check, check_pair_units, check_units, error, judge, same_bits
from tests.interpreted.test_gated import check_gated
from tests.models import batch, pair
from tests.samples import PEERS, SAMPLES, Sample
from tests.test_ops_every import (
    LAYOUTS,
    check_determinism,
    check_isolation,
    check_nan_isolation,
    check_rule,
    definition_of,
    sweep,
)
from tests.test_ops_loss import check_blocks, inputs
from tests.test_ops_patchify_merge import SIZES, check_resize

KINDS = [kind for kind in SAMPLES if kind != "varlen_attention"]
MANY = {  # cases of each dtype in the long run, 20 000 in all: more where one is cheap
    "mrope": 800, "mrope_batch": 1400, "vision_rope": 800, "merge_patches": 1500, "patchify": 400,
    "rms_norm": 1100, "layer_norm": 1100, "quick_gelu": 900, "gelu": 900, "swiglu": 700, "linear_cross_entropy": 400,
}  # fmt: skip
every_kind = pytest.mark.parametrize("kind", KINDS)
dtypes = pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["float16", "float32"])


@pytest.fixture
def one_program_for_all_heads(monkeypatch):
    """A switch: rotations in as few programs as can be, or as they come."""
    before = {"FILL": rope.FILL, "SHARE": rope.SHARE}

    def switch(on: bool) -> None:
        for name, value in ({"FILL": 1, "SHARE": 64} if on else before).items():
            monkeypatch.setattr(rope, name, value)

    return switch


@every_kind
@dtypes
def test_rule(kind, dtype, device, one_program_for_all_heads):
    for first, layout in enumerate(LAYOUTS):
        one_program_for_all_heads(layout != "plain")
        sweep(check_rule, range(first, 4, 3), kind=kind, dtype=dtype, device=device, layout=layout)


@every_kind
def test_rule_in_float64(kind, device):
    """Whose tiles are smaller. Each kind that has tiles of columns gets more of them than one holds."""
    for first, layout in enumerate(LAYOUTS):
        sweep(check_rule, [270 + first], kind=kind, dtype=torch.float64, device=device, layout=layout)


@pytest.mark.parametrize("kind", ["mrope_batch", "vision_rope", "merge_patches", "rms_norm", "swiglu"])  # all: test_many
def test_isolation_and_determinism(kind, device):
    sweep(check_isolation, range(1), kind=kind, dtype=torch.float16, device=device)
    sweep(check_nan_isolation, range(1, 2), kind=kind, dtype=torch.float16, device=device)
    sweep(check_determinism, range(2, 3), kind=kind, dtype=torch.float16, device=device)


def check_outputs(kind: str, seed: int, dtype: torch.dtype, device: str, layout: str) -> None:
    """The rule without gradients, which cost three times the outputs."""
    sample = SAMPLES[kind](seed)
    call, guards = sample.call(dtype, device, layout)

    def run(**arguments):
        return getattr(ops, sample.op)(**arguments, backend="triton")

    name = f"{kind} seed {seed} {dtype} {layout}"
    peers, definition = PEERS.get(kind, ()), definition_of(kind, dtype)
    judge(run, definition, call, peers=peers, gradients=False, rms=sample.rms, seed=seed, name=name)
    for guard_ in guards:
        guard_.check(kind)


@pytest.mark.full
@every_kind
@dtypes
def test_many(kind, dtype, one_program_for_all_heads, device="cpu"):
    """Every tenth case with gradients, and every tenth rotation with its heads shared among programs, which takes long here."""
    assert sum(MANY.values()) == 10_000 and set(MANY) == set(KINDS)
    for index in range(30):
        one_program_for_all_heads(index % 10 != 1)
        body = check_rule if index % 10 == 0 else check_outputs
        seeds = range(1000 + index, 1000 + MANY[kind], 30)
        sweep(body, seeds, kind=kind, dtype=dtype, device=device, layout=LAYOUTS[(index + index // 10) % 3])
    if SAMPLES[kind](0).isolated:
        sweep(check_isolation, range(1000, 1003), kind=kind, dtype=dtype, device=device)
        sweep(check_nan_isolation, range(1003, 1005), kind=kind, dtype=dtype, device=device)


@pytest.mark.gpu
@every_kind
def test_bfloat16(kind, device):
    for layout in LAYOUTS:
        sweep(check_rule, range(6), kind=kind, dtype=torch.bfloat16, device=device, layout=layout)


@triton.jit
def _sincos_kernel(x_ptr, sin_ptr, cos_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    sin, cos = rope.sincos(tl.load(x_ptr + i, mask=i < n, other=0.0))
    tl.store(sin_ptr + i, sin, mask=i < n)
    tl.store(cos_ptr + i, cos, mask=i < n)


def test_sincos_at_every_position(device):
    """Positions 0..131072 by every frequency of both towers: as near the truth as torch's float32 functions, by the rule."""
    tables = (reference.inverse_frequencies(128, 1e6), reference.inverse_frequencies(40, 1e4))
    angles = (torch.arange(131073).float()[:, None] * torch.cat(tables)).flatten().to(device)
    block = 65536 if device == "cpu" else 1024
    found = [torch.empty_like(angles) for _ in range(2)]
    _sincos_kernel[(triton.cdiv(angles.numel(), block),)](angles, *found, angles.numel(), block)
    for out, function in zip(found, (torch.sin, torch.cos), strict=True):
        truth = function(angles.double())
        check(out, truth, [error(function(angles), truth)], name=function.__name__)
        assert (out.double() - truth).abs().max() < 2**-24  # half a unit in the last place of 1


@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)])
def test_rotated_pairs_within_a_unit(dtype, device):
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(64, h, 128, generator=generator).to(device, dtype) for h in (3, 1))
    positions = torch.randint(0, 131073, (3, 64), generator=generator).to(device)
    outs, refs = ops.mrope(q, k, positions, backend="triton"), reference.mrope(q.double(), k.double(), positions)
    for out, ref in zip(outs, refs, strict=True):
        check_pair_units(out, ref)
    q, k = (torch.randn(64, 2, 80, generator=generator).to(device, dtype) for _ in range(2))
    outs = ops.vision_rope(q, k, positions[:2], backend="triton")
    for out, ref in zip(outs, reference.vision_rope(q.double(), k.double(), positions[:2]), strict=True):
        check_pair_units(out, ref)


@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)])
def test_merge_within_a_unit(dtype, device):
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(*n, generator=generator).to(device, dtype) for n in ((48, 160), (160,), (160,)))
    ref = reference.merge_patches(x.double(), weight.double(), bias.double())
    check_units(ops.merge_patches(x, weight, bias, backend="triton"), ref, ref.abs().clamp(min=2.0**-3))


def check_in_place(tokens: int, device: str, dtype: torch.dtype) -> None:
    """q and k of one fused qkv inside a larger buffer: nothing else is written, and they get the bits of the functional op."""
    generator = torch.Generator().manual_seed(tokens)
    for op, op_, heads, dim, axes, rest in (
        (ops.mrope, ops.mrope_, (4, 2, 2), 128, 3, {}),
        (ops.mrope, ops.mrope_, (6, 3, 3), 64, 3, {"sections": (8, 12, 12)}),
        (ops.mrope, ops.mrope_, (3, 1, 1), 32, 3, {"sections": (4, 6, 6)}),
        (ops.vision_rope, ops.vision_rope_, (2, 2, 2), 80, 2, {}),
    ):
        buffer = torch.randn(tokens + 2, sum(heads) + 2, dim + 16, generator=generator).to(device, dtype)
        before = buffer.clone()
        positions = torch.randint(1, 9000, (axes, tokens), generator=generator).to(device)
        q, k, _ = buffer[1:-1, 1:-1, 8:-8].split(heads, 1)
        old_q, old_k, _ = before[1:-1, 1:-1, 8:-8].split(heads, 1)
        op_(q, k, positions, backend="triton", **rest)
        got_q, got_k = q.clone(), k.clone()
        q.copy_(old_q)
        k.copy_(old_k)
        assert same_bits(buffer, before), "written beyond q and k"
        expected = op(q, k, positions, backend="triton", **rest)
        assert all(map(same_bits, (got_q, got_k), expected)), "in place differs from the functional op"


def check_strides(device: str) -> None:
    """q and k whose strides have nothing in common."""
    q, k = (torch.randn(9, heads, dim, generator=torch.Generator().manual_seed(heads)).to(device)
            for heads, dim in ((5, 88), (4, 112)))  # fmt: skip
    positions = torch.arange(18, device=device).view(2, 9)
    q, k = q[..., :80], k[:, :3, :80]
    outs, expected = (ops.vision_rope(a, b, positions, backend="triton") for a, b in ((q, k), (q.contiguous(), k.contiguous())))
    assert all(map(same_bits, outs, expected))


@pytest.mark.parametrize("name", ["one element", "every other"])
def test_parameters_of_any_strides(name, device):
    """A weight and a bias that are views give the bits and the gradients of their copies, and nothing beside them is read."""
    generator = torch.Generator().manual_seed(0)
    x, row = torch.randn(8, 33, generator=generator).to(device), torch.randn(66, generator=generator).to(device)
    view = row[:1].expand(33) if name == "one element" else row[::2]
    for run in (
        lambda x, p: ops.rms_norm(x, p, eps=1e-6, backend="triton"),
        lambda x, p: ops.rms_norm(x, p, eps=1e-6, residual=x, backend="triton")[0],
        lambda x, p: ops.layer_norm(x, p, p, eps=1e-6, backend="triton"),
        lambda x, p: ops.merge_patches(x, p, p, backend="triton"),
        lambda x, p: ops.merge_patches(x, p, p, grid_thw=torch.tensor([[1, 2, 4]]), backend="triton"),
        lambda x, p: ops.quick_gelu(x, p, backend="triton"),
        lambda x, p: ops.gelu(x, p, backend="triton"),
    ):
        results = []
        for parameter in (view.detach(), view.clone(memory_format=torch.contiguous_format)):
            leaves = x.clone().requires_grad_(), parameter.requires_grad_()
            out = run(*leaves)
            results.append((out.detach(), *torch.autograd.grad(out.square().sum(), leaves)))
        assert all(map(same_bits, *results))


def test_strides(device, one_program_for_all_heads):
    for on in (False, True):
        one_program_for_all_heads(on)
        check_strides(device)


@pytest.mark.parametrize("tokens", [0, 1, 7, 21])
def test_in_place(tokens, device, one_program_for_all_heads):
    for on in (False, True):
        one_program_for_all_heads(on)
        check_in_place(tokens, device, torch.float16)


@pytest.mark.parametrize("dim", [64, 80, 96, 128])
@pytest.mark.parametrize("heads", [(1, 1), (7, 2), (12, 4)])
def test_head_dims_and_counts(dim, heads, device, one_program_for_all_heads):
    """Sections of every kind, an empty one too, with a fused qkv and int32 positions."""
    one_program_for_all_heads(True)
    generator = torch.Generator().manual_seed(dim)
    qkv = torch.randn(11, sum(heads), dim, generator=generator).to(device)
    q, k = qkv.split(heads, 1)
    positions = torch.randint(0, 500, (3, 11), generator=generator).to(device, torch.int32)
    for sections in ((dim // 2, 0, 0), (0, 0, dim // 2), (dim // 8, dim // 8, dim // 4), (1, dim // 2 - 1, 0)):
        arguments = {"position_ids": positions, "sections": sections, "attention_scaling": 1.3}
        outs = ops.mrope(q, k, **arguments, backend="triton")
        refs = reference.mrope(q.double(), k.double(), **arguments)
        peers = reference.mrope(q, k, **arguments)
        for out, ref, peer in zip(outs, refs, peers, strict=True):
            check(out, ref, [error(peer, ref)])


def check_every_value(device: str, dtype: torch.dtype) -> None:
    """GELU and its slope at every number of 16 bits: within a unit, and nearly always the nearest."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    leaf = bits[bits.isfinite()].to(device).requires_grad_()
    out = ops.gelu(leaf, backend="triton")
    (slope,) = torch.autograd.grad(out, leaf, torch.ones_like(out))
    z = leaf.detach().double()
    below = torch.special.erfc(-z * 0.5**0.5) / 2
    refs = z * below, below + z * (-z * z / 2).exp() / (2 * torch.pi) ** 0.5
    for found, ref, name in ((out.detach(), refs[0], "gelu"), (slope, refs[1], "slope")):
        check_units(found, ref, torch.maximum(ref.abs(), below), name)  # the slope is the sum of below and another
        wrong = (found != ref.to(dtype)).double().mean().item()
        assert wrong < 0.004, f"{name}: {wrong:.2%} are not the nearest"
    wild = torch.tensor([torch.inf, -torch.inf, torch.nan, -0.0], device=device, dtype=dtype)
    assert same_bits(ops.gelu(wild, backend="triton").isnan(), reference.gelu(wild).isnan())
    assert ops.gelu(wild, backend="triton")[0] == torch.inf and ops.gelu(wild, backend="triton")[3].signbit()


@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)])
def test_gelu_at_every_value(dtype, device):
    check_every_value(device, dtype)


def check_gelu_near_zero(device: str) -> None:
    """In float32, where values that are much larger would hide an erf of less than its precision."""
    x = torch.linspace(-1, 1, 4096, device=device)
    judge(functools.partial(ops.gelu, backend="triton"), reference.gelu, Call({"x": x}), name="gelu near zero")


def test_gelu_near_zero(device):
    check_gelu_near_zero(device)


def test_frames_at_an_odd_byte(device):
    """The kernel reads words of two bytes."""
    frames = torch.randint(0, 256, (4 * 56 * 84 * 3 + 1,), generator=torch.Generator().manual_seed(0)).to(device, torch.uint8)
    odd = frames[1:].view(4, 56, 84, 3)
    assert same_bits(ops.patchify(odd, backend="triton"), ops.patchify(odd.clone(), backend="triton"))


def test_resize(device):
    check_resize(["triton"], device, SIZES[4:6] if device == "cpu" else SIZES)


@triton.jit
def _offset_kernel(index_ptr, stride, out_ptr):
    tl.store(out_ptr, offset(tl.load(index_ptr), stride))


def check_offset(product: int, device: str) -> None:
    stride = next(s for s in (8192, 4096, 56, 12, 4, 1) if product % s == 0)
    index = product // stride
    dtype = torch.int32 if index < 2**31 else torch.int64
    out = torch.zeros(1, dtype=torch.int64, device=device)
    _offset_kernel[(1,)](torch.tensor([index], dtype=dtype, device=device), stride, out)
    assert out.item() == product


@pytest.mark.parametrize("product", [2**31 - 1, 2**31, 2**31 + 12, 2**33, 2**33 + 8 * 7])
def test_offsets_beyond_32_bits(product, device):
    """int32 index and stride, as kernels have them, with a product that does not fit."""
    check_offset(product, device)


def test_a_row_beyond_32_bits(device):
    """Strides whose product with the token wraps in int32; the memory is reserved, not used."""
    tokens, stride = 3, 2**30 + 2**20  # token 2 starts beyond 2^31 elements
    base = torch.empty(0, dtype=torch.float16, device=device)
    try:
        buffer = base.new_empty(0).set_(torch.UntypedStorage(2 * (2 * stride + 512), device=device))
    except (RuntimeError, torch.OutOfMemoryError) as error:
        pytest.fail(f"needs 4.3 GB of address space: {error}")
    x = torch.as_strided(buffer, (tokens, 2, 128), (stride, 128, 1))
    values = torch.randn(tokens, 2, 128, generator=torch.Generator().manual_seed(0)).to(device, torch.float16)
    x.copy_(values)
    positions = torch.arange(9, device=device).view(3, 3)
    outs, expected = (ops.mrope(v, v, positions, backend="triton") for v in (x, values))
    assert all(map(same_bits, outs, expected))
    ops.mrope_(x, x[:, :0], positions, backend="triton")
    assert same_bits(x, expected[0])
    rows = x[:, 0]
    assert same_bits(ops.quick_gelu(rows, backend="triton"), ops.quick_gelu(rows.contiguous(), backend="triton"))
    ones = torch.ones(128, dtype=torch.float16, device=device)
    wide = ops.rms_norm(rows, ones, eps=1e-6, backend="triton")
    assert same_bits(wide, ops.rms_norm(rows.contiguous(), ones, eps=1e-6, backend="triton"))


def test_the_whole_model(device):
    """Logits and gradients of the model with backend='triton', against float64 through the definition-level torch backend."""
    _, wide = pair("released")
    inputs = batch([[("text", 3), ("image", 4, 6), ("text", 2)], [("video", 2, 2, 4), ("text", 5)]])
    config, state = wide.config, wide.state_dict()
    results = {}
    runs = (("ref", torch.float64, "torch"), ("peer", torch.float32, "torch"), ("out", torch.float32, "triton"))
    for name, dtype, backend in runs:
        model = type(wide)(config, backend=backend)
        model.load_state_dict(state)
        model.to(device, dtype)
        moved = {n: x.to(device, dtype if x.is_floating_point() else x.dtype) for n, x in inputs.items()}
        logits = model(**moved).logits
        weight = model.visual.blocks[0].norm1.weight
        (grad,) = torch.autograd.grad(logits.float().log_softmax(-1)[..., 0].sum(), weight)
        with torch.no_grad():
            plain = model(**moved).logits
        mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool().to(device)
        results[name] = logits.detach()[mask], grad, plain[mask]
    for i, label in enumerate(("logits", "gradient", "logits in place")):
        out, ref, peer = (results[n][i] for n in ("out", "ref", "peer"))
        check(out, ref.double(), [error(peer, ref.double())], k=3 if i == 1 else 2, name=label)


def test_automatic_choice_stays_with_torch():
    from qwen2vl_fast.ops.backends import choose, unusable

    if triton.knobs.runtime.interpret:
        assert unusable("mrope", "triton", "cpu") is None
    assert choose("mrope", None, torch.device("cpu")) == "torch"
    assert "no triton kernel" in unusable("varlen_attention", "triton", "cpu")


def check_parts(device: str, dtype: torch.dtype) -> None:
    """Rows of 16 bits that a backward kernel takes in parts, in the last tile fewer than it holds; one tile a program too."""
    for width in norm.PARTED:
        for rows in (1, 9):
            x, residual, weight, bias = (
                torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)
                for seed, shape in enumerate(((rows, width), (rows, width), (width,), (width,)))
            )
            call = Call({"x": x, "residual": residual, "weight": weight}, {"eps": 1e-6})
            name = f"{width} columns, {rows} rows"
            for kind in ("rms_norm", "layer_norm"):
                if kind == "layer_norm":
                    call.tensors["bias"] = bias
                run = functools.partial(getattr(ops, kind), backend="triton")
                judge(run, getattr(reference, kind), call, peers=PEERS[kind], rms=False, name=f"{kind} of {name}")


@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)])
def test_rows_in_parts(dtype, device):
    check_parts(device, dtype)


@pytest.mark.parametrize("kind", ["rms_norm", "layer_norm"])
def test_no_epsilon(kind, device):
    """A row beyond the last has no variance either, and leaves no NaN in the sums over rows."""
    x, weight, bias = (
        torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape))) for shape in ((3, 64), (64,), (64,))
    )
    tensors = {"x": x, "weight": weight} | ({"bias": bias} if kind == "layer_norm" else {})
    call = Call({name: tensor.to(device) for name, tensor in tensors.items()}, {"eps": 0.0})
    run = functools.partial(getattr(ops, kind), backend="triton")
    judge(run, getattr(reference, kind), call, peers=PEERS[kind], rms=False, name=f"{kind} with eps 0")


def check_partial_sums(device: str) -> None:
    """More rows than one program of a backward kernel takes, and more sums of programs than one step of the second stage."""
    for kind, rows in (("layer_norm", 300), ("gelu", 50), ("gelu", 1050)):
        x = torch.randn(rows, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        shared = {"weight": x[0], "bias": x[1]} if kind == "layer_norm" else {"bias": x[1]}
        sample = Sample(kind, [{"x": x}], shared, {"eps": 1e-6} if kind == "layer_norm" else {})
        call, _ = sample.call(torch.float32, device)
        judge(functools.partial(getattr(ops, kind), backend="triton"), getattr(reference, kind), call, name=kind)


def test_partial_sums_of_several_programs(device):
    check_partial_sums(device)


MUTANTS = [
    # module, the line's part, what it becomes, the kind of sample that shows it ("in place": check_in_place)
    ("rope", "pair < END_0", "pair <= END_0", "vision_rope"),
    ("rope", "pair < END_1", "pair < END_1 + 1", "mrope"),
    ("rope", "sin * (scaling * SIGN)", "sin * scaling", "mrope"),
    ("rope", "b * cos + a * sin", "b * cos - a * sin", "mrope"),
    ("rope", "offset(head, stride_h)", "offset(head, 2 * HALF)", "strides"),
    ("rope", "stride_k_h, stride_ko_h, first", "stride_q_h, stride_ko_h, first", "strides"),
    ("rope", "tl.int32), stride_h)", "tl.int32), 2 * HALF)", "strides"),
    ("rope", "offset(n, stride_p_b)", "offset(n, S)", "mrope_batch"),
    ("rope", "rest = n * 3.139164786504813e-07", "rest = n * 0.0", "mrope"),
    ("rope", "pair % PERIOD", "pair // 2", "vision_rope"),
    ("rope", "(row < tokens * chunks)", "(row < ROWS)", "in place"),
    ("rope", "(head < HEADS)[:", "(head < HEADS + 1)[:", "in place"),
    ("rope", "head += BLOCK_H", "head += 0", "in place"),
    ("rope", "(head + BLOCK_H < HEADS) &", "(head + 2 * BLOCK_H < HEADS) &", "mrope"),
    ("rope", "first = (part - programs_q) * share", "first = part * share", "mrope"),
    ("rope", "tl.minimum(first + share, groups_q)", "tl.minimum(first + share, groups_q - 1)", "mrope"),
    ("rope", "low, high = tl.load(x, mask=more", "low, _ = tl.load(x, mask=more", "mrope"),
    ("rope", "(group + 1 < end)", "(group + 2 < end)", "mrope"),
    ("norm", "x - (tl.sum(x, 1) / C)[:, None], 0.0", "x - (tl.sum(x, 1) / (C + 1))[:, None], 0.0", "layer_norm"),
    ("norm", "tl.sum(x * x, 1) / C + EPS", "tl.sum(x * x, 1) / C", "rms_norm"),
    ("norm", "grad_x = grad_x - mean_weighted", "grad_x = grad_x", "layer_norm"),
    ("norm", "unit * (along * scale)", "unit * along", "rms_norm"),
    ("norm", "share + C + i", "share + i", "layer_norm"),
    ("norm", "(grad_bias[i] + grad[i],)", "(grad[i],)", "layer_norm"),
    ("norm", "target = offset(source, C)", "target = offset(t, C)", "merge_patches"),
    ("norm", "offset(source, stride_x_t)", "offset(source, C)", "rms_norm"),
    ("norm", "x = (wide(x) + wide(residual)).to(x.dtype)", "x = (wide(x) - wide(residual)).to(x.dtype)", "rms_norm"),
    ("norm", "grad_x = grad_x + wide(tl.load(grad_total_ptr", "grad_x = grad_x + 0 * wide(tl.load(grad_total_ptr", "rms_norm"),
    ("norm", "static_range(1, PARTS)", "static_range(2, PARTS)", "parts"),
    ("norm", "weight_ptr + i * BLOCK_C", "weight_ptr", "parts"),
    ("norm", "(grad_weight[i] + ", "(grad_weight[0] + ", "parts"),
    ("norm", "grad_total_ptr + i * BLOCK_C", "grad_total_ptr", "parts"),
    ("norm", "share + C + i * BLOCK_C", "share + C", "parts"),
    ("norm", "source = t\n        if", "source = t // 2 * 2\n        if", "parts"),
    ("activation", "z * _sigmoid(1.702 * z)", "z * _sigmoid(1.7 * z)", "quick_gelu"),
    ("activation", "z * (1.0 - s)", "z * s", "quick_gelu"),
    ("activation", "z * tl.exp(-0.5 * z * z)", "z * tl.exp(-z * z)", "gelu"),
    ("activation", "1.0 + 0.295 * a", "1.0 + 0.2955 * a", "every value"),
    ("activation", "z * z * -0.7213475204444817", "z * z * -0.7212", "every value"),
    ("activation", "z >= 0.0, 1.0 - m * e, m * e)", "z >= 0.0, 1.0 - m * e, e)", "every value"),
    ("activation", "1.0 - below, below)", "1.0 - below, -below)", "every value"),
    ("activation", "primitive_bitwidth < 32", "primitive_bitwidth < 64", "near zero"),
    ("activation", "_load(x_ptr + F, t", "_load(x_ptr, t", "swiglu"),
    ("activation", "grad * gate * s, mask", "grad * s, mask", "swiglu"),
    ("activation", "grad_bias += grad", "grad_bias = grad", "gelu"),
    ("sums", "range(0, R, BLOCK_R)", "range(0, BLOCK_R, BLOCK_R)", "sums"),
    ("sums", "part * C + c", "c", "sums"),
    ("sums", "PARTS * C)[:, None]", "C)[:, None]", "sums"),
    ("offsets", "index.to(tl.int64) * stride", "index * stride", "offset"),
    ("gated", "_load(up_ptr, t, f, stride_up_t", "_load(up_ptr, t, f, stride_gate_t", "gated"),
    ("gated", "gate * (1.0 - s)", "gate * s", "gated"),
    ("gated", "grad * gate * s", "grad * s", "gated"),
    ("loss", "total * tl.exp(top - high) + tl.sum", "total + tl.sum", "blocks of words"),
    ("loss", "mask=n < N, other=float", "mask=n < N - 1, other=float", "linear_cross_entropy"),
    ("loss", "tl.load(labels_ptr + row) - first", "tl.load(labels_ptr + row)", "blocks of words"),
    ("loss", "(label >= 0) &", "", "blocks of words"),
    ("loss", "p - 1.0, p)", "p + 1.0, p)", "linear_cross_entropy"),
    ("loss", "p) * factor", "p)", "linear_cross_entropy"),
    ("patchify", "t // 2 % 2", "t % 2", "patchify"),
    ("patchify", "p // 98, p", "p // 196, p", "patchify"),
    ("patchify", "mask, SCALE_R, SHIFT_R", "mask, SCALE_G, SHIFT_R", "patchify"),
    ("patchify", "rg & 255, br >> 8", "rg & 255, br & 255", "patchify"),
    ("resize", "known = inside & (first + k < L)", "known = inside & (first + k < L - 1)", "resize"),
    ("resize", "1 << (BITS - 1)", "0", "resize"),
    ("resize", "tl.maximum(total >> BITS, 0)", "total >> BITS", "resize"),
    ("resize", "e // I, e % I", "e % J, e // J", "resize"),
]  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: f"{m[0]}: {m[2]}")
def test_mutants_are_caught(mutant, monkeypatch, tmp_path):
    module, old, new, kind = mutant
    original = importlib.import_module(f"qwen2vl_fast.kernels.{module}")
    with open(original.__file__, encoding="utf-8") as file:
        source = file.read()
    assert old in source and old != new
    path = tmp_path / f"{module}.py"
    path.write_text(source.replace(old, new), encoding="utf-8")
    spec = importlib.util.spec_from_file_location(f"qwen2vl_fast.kernels.{module}", path)
    altered = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(altered)
    monkeypatch.setattr(importlib.import_module("qwen2vl_fast.kernels"), module, altered)
    for op in ("rope", "norm", "activation", "gated", "merge", "loss"):  # which remember the module that they have imported
        of_op = importlib.import_module(f"qwen2vl_fast.ops.{op}")
        monkeypatch.setattr(of_op, "_kernels", of_op._kernels.__wrapped__)
    if module == "rope":  # all heads in one program, so that it has a group after the first
        altered.FILL, altered.SHARE = 1, 64
    if module == "norm":
        monkeypatch.setattr(importlib.import_module("qwen2vl_fast.kernels.merge"), "norm", altered)
    for user in ("norm", "activation") if module == "sums" else ():
        monkeypatch.setattr(importlib.import_module(f"qwen2vl_fast.kernels.{user}"), "sums", altered)
    if module == "offsets":
        monkeypatch.setitem(globals(), "offset", altered.offset)
    with pytest.raises(AssertionError):
        if kind == "in place":
            check_in_place(21, "cpu", torch.float16)
        elif kind == "strides":
            check_strides("cpu")
        elif kind == "blocks of words":
            check_blocks(torch.float32, 8, backend="triton")
        elif kind == "gated":
            for seed in range(6):
                check_gated(seed, torch.float32)
        elif kind == "every value":
            check_every_value("cpu", torch.float16)
        elif kind == "parts":
            check_parts("cpu", torch.float16)
        elif kind == "sums":
            check_partial_sums("cpu")
        elif kind == "offset":
            check_offset(2**31, "cpu")
        elif kind == "near zero":
            check_gelu_near_zero("cpu")
        elif kind == "resize":
            check_resize(["triton"], sizes=SIZES[4:6])
        else:
            for seed in range(12):
                check_rule(kind, seed, torch.float32, layout=LAYOUTS[1 + seed % 2])


@dtypes
def test_loss_by_blocks_of_words(dtype, device):
    for words in (1, 8, 49, 50):
        check_blocks(dtype, words, device, backend="triton")


def test_loss_of_labels_with_strides(device):
    """The kernels read them by their place."""
    hidden, weight, labels = inputs(9, device=device)
    strided = torch.stack((labels, labels.flip(0)), 1)[:, 0]
    plain, other = (ops.linear_cross_entropy(hidden, weight, x, backend="triton") for x in (labels, strided))
    assert same_bits(plain, other)
