"""Every check can fail: an altered copy of the source is caught by the very check that guards the original.

A mutant is a file, what its source says, what the copy says instead, and the check. The checks first pass on a faithful
copy. A substitution that no longer applies fails: then the mutant has to follow the source.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch

from tests import test_ops_attention as attention
from tests import test_ops_every as every
from tests import test_ops_loss as loss
from tests import test_ops_norm_activation as rows
from tests import test_ops_patchify_merge as pixels
from tests import test_ops_registration as registration
from tests import test_ops_rope as rope
from tests import test_positions as places
from tests import test_reference as definition
from tests.host import test_extension as lists
from tests.mutants import altered

pytestmark = pytest.mark.usefixtures("poison")
Check = Callable[[SimpleNamespace], None]
F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64


class Mutant(NamedTuple):
    name: str
    file: str
    old: str
    new: str
    check: Check


def of(module: str, check: Callable[..., None], *arguments, keyword: str = "", **options) -> Check:
    """check(*arguments, ops=<the copy's ops>), or another module of the copy."""
    return lambda copy: check(*arguments, **{keyword or module: getattr(copy, module)}, **options)


def several(check: Callable[..., None], module: str, name: str, values, **options) -> Check:
    """The check for several values of one argument."""

    def run(copy: SimpleNamespace) -> None:
        for value in values:
            check(**{name: value, module: getattr(copy, module)}, **options)

    return run


in_ops, in_reference, in_positions = (partial(of, module) for module in ("ops", "reference", "positions"))
vision = several(places.check_vision, "positions", "grids", places.GRIDS)
choice = of("positions", places.check_backward_rows)
keys = several(lists.check_key_tiles, "positions", "causal", (False, True))
mixed = several(places.check_mrope_positions, "positions", "seed", range(12), padding="scattered")


def rule(kind: str, dtype: torch.dtype = F32, seeds=range(4), layout: str = "guarded") -> Check:
    return several(every.check_rule, "ops", "seed", seeds, kind=kind, dtype=dtype, layout=layout)


def blocks(copy: SimpleNamespace) -> None:
    for seed in range(12):
        every.check_blocks("rms_norm", seed, F32, ops=copy.ops, module=copy.ops_checks)


def case(name: str, dtype: torch.dtype = F32) -> Check:
    return in_ops(attention.check_case, name, dtype)


POSITIONS = "positions.py"
POSITION_MUTANTS = [
    ("row and column swapped", "torch.stack((row, column))", "torch.stack((column, row))", vision),
    ("height and width swapped", "for side in (grid[:, 1], grid[:, 2])", "for side in (grid[:, 2], grid[:, 1])", vision),
    ("rows in raster order", "row = token // merged_w * merge_size + within // merge_size",
     "row = local // segment_w[segment]", vision),
    ("columns of the merged grid", "column = token % merged_w * merge_size + within % merge_size",
     "column = token % merged_w + within % merge_size", vision),
    ("a segment per video", "(grid[:, 1] * grid[:, 2]).repeat_interleave(grid[:, 0]).cumsum(0)",
     "(grid[:, 0] * grid[:, 1] * grid[:, 2]).cumsum(0)", vision),
    ("boundaries that wrap", "total > _MAX_PATCHES", "total > 2 * _MAX_PATCHES",
     in_positions(places.check_boundaries_fit_int32)),
    ("a medium's patches counted in int64", "grid.double().prod(1)", "grid.prod(1)",
     in_positions(places.check_boundaries_fit_int32)),
    ("queries before a block of keys see it", "unseeing = first if causal else torch.zeros_like(first)",
     "unseeing = torch.zeros_like(first)", keys),
    ("the first block's diagonal for all", "head, unseeing - first)", "head, unseeing)", keys),
    ("short segments first", "lengths.argsort(descending=True, stable=True)", "lengths.argsort(stable=True)", keys),
    ("blocks of 64 for nothing", "_SMALL_STEP * small < large", "small < large", choice),
    ("a block alone is as fast as two", "(_ALONE - 1) * (turns % 2)", "0", choice),
    ("idle multiprocessors are not seen", "longest * (turns +", "0 * (turns +", choice),
    ("all blocks see all queries", "2 if causal else 0", "2 if False else 0", choice),
    ("no first boundary", "torch.cat((ends.new_zeros(1), ends))", "torch.cat((ends.new_zeros(0), ends))", vision),
    ("advance by the sides alone", "torch.maximum(frames, torch.maximum(rows, columns))", "torch.maximum(rows, columns)",
     mixed),
    ("advance by the area", "torch.maximum(frames, torch.maximum(rows, columns))", "frames * rows * columns", mixed),
    ("advance at a medium's first token", "last = index == frames * rows * columns - 1", "last = index == 0", mixed),
    ("height and width of a token swapped", "index // columns % rows, index % columns",
     "index % columns, index // columns % rows", mixed),
    ("grids used up anew in every sequence", "visual.flatten().cumsum(0).view_as(input_ids) - 1", "visual.cumsum(1) - 1",
     mixed),
    ("padding advances", "advance = real.long()", "advance = torch.ones_like(input_ids)", mixed),
    ("the delta counts padding", "total - real.sum(1)", "total - input_ids.shape[1]", mixed),
    ("a token starts after itself", "advance.cumsum(1) - advance + local", "advance.cumsum(1) - 1 + local", mixed),
    ("masked placeholders count", "(input_ids == token_id) & real", "input_ids == token_id", mixed),
    ("the last token belongs to the next medium", "torch.searchsorted(ends, ordinal, right=True)",
     "torch.searchsorted(ends, ordinal + 1, right=True)", mixed),
]  # fmt: skip

REFERENCE = "reference.py"
mrope, vision_rope = in_reference(definition.check_mrope), in_reference(definition.check_vision_rope)
norms, merge = in_reference(definition.check_norms), in_reference(definition.check_merge)
segments = several(definition.check_attention, "reference", "case", definition.ATTENTION)
activations, patches = in_reference(definition.check_activations), in_reference(definition.check_patchify)
REFERENCE_MUTANTS = [
    ("height and width sections swapped", "torch.arange(3)", "torch.tensor([0, 2, 1])", mrope),
    ("sections interleaved", "torch.repeat_interleave(torch.arange(3), torch.tensor(sections))",
     "(torch.arange(sum(sections)) % 3)", mrope),
    ("turned the other way", "a * cos - b * sin, b * cos + a * sin", "a * cos + b * sin, b * cos - a * sin", mrope),
    ("neighbouring pairs", "x.to(compute).chunk(2, -1)", "x.to(compute).unflatten(-1, (-1, 2)).unbind(-1)", mrope),
    ("no attention scaling", "(f(angles) * attention_scaling)", "f(angles)", in_reference(definition.check_mrope, scaling=1.2)),
    ("frequencies in bf16", "[axis].movedim(0, -1) * inv_freq.float()", "[axis].movedim(0, -1) * inv_freq.bfloat16().float()",
     mrope),
    ("positions in bf16", "position_ids.float()[axis]", "position_ids.bfloat16()[axis]", mrope),
    ("row and column of the tower swapped", ".movedim(0, 1).flatten(1)", ".flip(0).movedim(0, 1).flatten(1)", vision_rope),
    ("row and column interleaved", ".movedim(0, 1).flatten(1)", ".permute(1, 2, 0).flatten(1)", vision_rope),
    ("LayerNorm without bias", " + bias.to(compute)).to(x.dtype)", ").to(x.dtype)", norms),
    ("sample variance", "torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)",
     "torch.rsqrt(wide.var(-1, keepdim=True) + eps)", norms),
    ("eps outside the root", "torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)",
     "1 / (wide.square().mean(-1, keepdim=True).sqrt() + eps)", norms),
    ("merge of raster rows", "raster.permute(0, 1, 3, 2, 4).flatten()", "raster.flatten()", merge),
    ("frames of a video overlap", "start += t * h * w", "start += h * w", merge),
    ("causal mask aligned top-left", " + (end_k - start_k) - (end - start)", "", segments),
    ("a query does not see itself", "columns[None] <= rows", "columns[None] < rows", segments),
    ("attention reaches back over boundaries", "(x[start_k:end_k].to", "(x[:end_k].to", segments),
    ("head groups interleaved", ".repeat_interleave(group, 1) for", ".repeat(1, group, 1) for", segments),
    ("scaled by the heads", "q.shape[-1] ** -0.5", "q.shape[1] ** -0.5", segments),
    ("QuickGELU with 1.7", "torch.sigmoid(1.702 * y)", "torch.sigmoid(1.7 * y)", activations),
    ("GELU by tanh", "(y * 0.5 * (1 + torch.erf(y * math.sqrt(0.5))))", 'F.gelu(y, approximate="tanh")', activations),
    ("gate and up swapped", "gate, up = gate_up", "up, gate = gate_up", activations),
    ("frame before channel", "permute(0, 2, 5, 3, 6, 8, 1, 4, 7)", "permute(0, 2, 5, 3, 6, 1, 8, 4, 7)", patches),
    ("patches in raster order", "permute(0, 2, 5, 3, 6, 8, 1, 4, 7)", "permute(0, 2, 3, 5, 6, 8, 1, 4, 7)", patches),
    ("mean subtracted before / 255", "frames.to(compute) / 255 - mean", "(frames.to(compute) - mean) / 255", patches),
    ("every label counts", "F.cross_entropy(logits, labels, ignore_index=ignore_index)",
     "F.cross_entropy(logits, labels.clamp(min=0))", in_reference(definition.check_loss)),
]  # fmt: skip

OPS_MUTANTS = [
    ("ops/rope.py", "the gradient turns the same way", "*rest, -sign, backend)", "*rest, sign, backend)", rule("mrope")),
    ("ops/rope.py", "rotated in bf16", "compute = torch.promote_types(q.dtype, torch.float32)", "compute = q.dtype",
     rule("mrope", BF16, range(12))),
    ("ops/rope.py", "the input is overwritten", "_cos_sin(q, angles, scaling, sign), _fake(q, k)",
     "_cos_sin(q, angles, scaling, sign), (q, k)", rule("vision_rope")),
    ("ops/rope.py", "k is not rotated", "return _rotated(q, k, angles, 1.0, sign)",
     "return _rotated(q, k, angles, 1.0, sign)[0], k.clone()", rule("vision_rope")),
    ("ops/rope.py", "k is not rotated in place", "    for x in (q, k):\n        _rotate_into(x, x, *factors)",
     "    for x in (q, q):\n        _rotate_into(x, x, *factors)", in_ops(rope.check_in_place, "mrope", F32)),
    ("ops/rope.py", "sections of the default", "angles = mrope_angles(position_ids, inv_freq, sections)\n    return",
     "angles = mrope_angles(position_ids, inv_freq, [inv_freq.numel(), 0, 0])\n    return", rule("mrope")),
    ("ops/rope.py", "one angle a batch", "x[i], cos[i]", "x[i], cos[0]", rule("mrope_batch")),
    ("ops/rope.py", "angles in bf16", "for f, scale in ((angles.cos(), scaling)",
     "for f, scale in ((angles.bfloat16().float().cos(), scaling)", in_ops(rope.check_units, "mrope", BF16, 100)),
    ("ops/checks.py", "a row between blocks is left out", "for start in range(0, count, step)",
     "for start in range(0, count, step + 1)", blocks),
    ("ops/checks.py", "a row in two blocks", "min(count, start + step)", "min(count, start + step + 1)",
     lambda copy: rope.check_in_place_blocks(ops=copy.ops, module=copy.ops_checks)),
    ("ops/norm.py", "the sum gets no gradient", "op(grad, grad_sum, x", "op(grad, None, x",
     rule("rms_norm", seeds=range(12))),
    ("ops/norm.py", "bf16 inside", "_inverse_rms(x, t, eps), out=t), wide_weight",
     "_inverse_rms(x, t, eps), out=t).to(weight.dtype), wide_weight", rule("rms_norm", BF16, range(12))),
    ("ops/norm.py", "LayerNorm's gradient by the moments of another row", "*moments, *parameters",
     "*(m.flip(0) for m in moments), *parameters", rule("layer_norm")),
    ("ops/norm.py", "a gradient summed over the wrong rows", "out=t).sum(0)", "out=t)[:-1].sum(0)", rule("rms_norm")),
    ("ops/checks.py", "a gradient of the last block alone", "torch.stack(sums).sum(0)", "sums[-1]",
     lambda copy: rows.check_parameter_blocks(ops=copy.ops, module=copy.ops_checks)),
    ("ops/activation.py", "bits that depend on the place",
     "checks.in_vectors(torch.sigmoid_, torch.mul(z, 1.702, out=t))", "torch.mul(z, 1.702, out=t).sigmoid_()",
     several(every.check_isolation, "ops", "seed", range(12), kind="quick_gelu", dtype=F32)),
    ("ops/activation.py", "torch's gelu", "_pointwise(_gelu_rows,",
     "_pointwise(lambda z, t, out: out.copy_(torch.nn.functional.gelu(z)),",
     rule("gelu", seeds=range(12))),
    ("ops/activation.py", "a slope without its 1.702", "z.mul_(1.702), t.copy_(grad)", "z.mul_(1.0), t.copy_(grad)",
     rule("quick_gelu")),
    ("ops/activation.py", "bias left out of the gradient", "_shifted(rows[block], wide_bias, z), s",
     "_shifted(rows[block], None, z), s", rule("gelu", seeds=range(8))),
    ("ops/activation.py", "a view of a permuted gradient", "(y.reshape(-1, x.shape[-1]) for y in (grad",
     "(y.view(-1, x.shape[-1]) for y in (grad",
     in_ops(rows.check_permuted_upstream, "gelu")),
    ("ops/merge.py", "raster order not applied", "raster_to_merge_order(grid).to(x.device)",
     "torch.arange(x.shape[0], device=x.device)",
     in_ops(pixels.check_raster)),
    ("ops/merge.py", "every T/4-th row merged", "eps).view(-1, 4 * x.shape[1])",
     "eps).view(4, -1, x.shape[1]).transpose(0, 1).reshape(-1, 4 * x.shape[1])", rule("merge_patches")),
    ("ops/patchify.py", "normalised in bf16", "compute = torch.promote_types(dtype, torch.float32)", "compute = dtype",
     in_ops(pixels.check_patchify, BF16)),
    ("ops/patchify.py", "frames swapped", "permute(0, 2, 5, 3, 6, 8, 1, 4, 7)", "flip(1).permute(0, 2, 5, 3, 6, 8, 1, 4, 7)",
     in_ops(pixels.check_places)),
    ("ops/loss.py", "ignored rows count", "costs.masked_fill(~counted, 0)", "costs",
     rule("linear_cross_entropy", seeds=range(12))),
    ("ops/loss.py", "ignored rows have a gradient", "counted.sum()).masked_fill(~counted, 0)",
     "counted.sum()).expand(counted.shape)", rule("linear_cross_entropy", seeds=range(12))),
    ("ops/loss.py", "sums keep their old largest logit", "total.mul_((top - high).exp_()).add_(", "total.add_(",
     lambda copy: loss.check_blocks(F32, 8, ops=copy.ops, module=copy.ops_loss)),
    ("ops/loss.py", "labels counted from the first block", "labels[:, None] - first", "labels[:, None]",
     lambda copy: loss.check_blocks(F32, 8, ops=copy.ops, module=copy.ops_loss)),
    ("ops/loss.py", "mean over all rows", ".sum() / counted.sum()", ".sum() / counted.numel()",
     rule("linear_cross_entropy", seeds=range(12))),
    ("ops/loss.py", "a word short of a block", "slice(start, start + step)", "slice(start, start + step - 1)",
     lambda copy: loss.check_blocks(F32, 8, ops=copy.ops, module=copy.ops_loss)),
    ("ops/attention.py", "segments batched whatever their keys", "lengths = (end - start, end_k - start_k)",
     "lengths = (end - start, end - start)", case("chunk")),
    ("ops/attention.py", "a square mask for more keys", "= causal and rows == length_k", "= causal", case("chunk")),
    ("ops/attention.py", "the mask shifted by one", ".triu(1 + length_k - rows)", ".triu(length_k - rows)", case("chunk")),
    ("ops/attention.py", "the mask shifted by one, keys left over", ".triu(1 + length_k - rows)", ".triu(2 + length_k - rows)",
     in_ops(attention.check_chunks, F32)),
    ("ops/attention.py", "blind rows see", "max(length - length_k, 0) if causal else 0", "0", case("blind rows")),
    ("ops/attention.py", "rows without keys are left as they were", "out.zero_(), lse", "out, lse",
     case("no keys")),
    ("ops/attention.py", "gradients without keys are left as they were", "x.zero_()", "x.dim()",
     case("no keys")),
    ("ops/attention.py", "a log-sum-exp of 0", "lse.fill_(-math.inf)", "lse.zero_()", case("no keys")),
    ("ops/attention.py", "not filled where some rows see no key", "== q.shape[0]\n", "<= q.shape[0]\n", case("no keys")),
    ("ops/attention.py", "one head's gradient for its group", "part.unflatten(1, (-1, group)).sum(2)", "part[:, ::group]",
     case("one key head")),
    ("ops/attention.py", "a log-sum-exp in float64", "scale, causal)\n        return (o, lse.detach().float())",
     "scale, causal)\n        return (o, lse.detach())", case("equal lengths", F64)),
    ("ops/attention.py", "always causal", "return (None, mask) if isinstance(mask, bool)",
     "return (None, True) if isinstance(mask, bool)", in_ops(attention.check_exact, F16)),
    ("ops/backends.py", "another backend in silence",
     'if reason := unusable(op, backend, device) or (refused if backend == _PREFERRED[op] else None):',
     'if unusable(op, backend, device):\n            return "torch"\n        if reason := None:',
     of("ops_backends", registration.check_explicit_backend, "mrope", "flash", keyword="module")),
    ("config.py", "YaRN with another ramp", 'self.rope.get("beta_fast") or 32', 'self.rope.get("beta_fast") or 16',
     lambda copy: definition.check_yarn(definition.YARN["factor 4"], copy.config.TextConfig)),
    ("config.py", "YaRN without its factor on cos and sin", "return blended, _yarn_attention_scaling(self.rope, factor)",
     "return blended, 1.0", lambda copy: definition.check_yarn(definition.YARN["factor 4"], copy.config.TextConfig)),
]  # fmt: skip

MUTANTS = [
    *(Mutant(name, POSITIONS, old, new, check) for name, old, new, check in POSITION_MUTANTS),
    *(Mutant(name, REFERENCE, old, new, check) for name, old, new, check in REFERENCE_MUTANTS),
    *(Mutant(name, file, old, new, check) for file, name, old, new, check in OPS_MUTANTS),
]


@pytest.fixture(scope="module")
def faithful() -> SimpleNamespace:
    return altered()


@pytest.fixture(scope="module")
def passed() -> set[int]:
    """The checks, by id, that passed on the faithful copy."""
    return set()


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: f"{mutant.file}: {mutant.name}")
def test_mutant_is_caught(mutant, faithful, passed):
    if id(mutant.check) not in passed:
        mutant.check(faithful)
        passed.add(id(mutant.check))
    copy = altered(mutant.file, mutant.old, mutant.new)
    try:
        mutant.check(copy)
    except (Exception, pytest.fail.Exception):  # a wrong value, or an error that the change brings about: both are noticed
        return
    pytest.fail(f"{mutant.file} with {mutant.new!r} passes")


def test_a_copy_registers_its_own_ops(faithful):
    """The copy's ops are not the original's, so that a mutant tests itself."""
    from qwen2vl_fast import ops

    assert faithful.ops is not ops and faithful.ops.mrope is not ops.mrope
    assert faithful.ops_loss._loss is not loss.loss._loss


def test_a_substitution_must_apply():
    with pytest.raises(AssertionError, match="holds 0 times, not once"):
        altered("positions.py", "no such line", "")
