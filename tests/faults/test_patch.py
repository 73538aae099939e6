"""Faults 16-21 of QUALITY.md, as a patched transformers model could have them."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers.models.qwen2_vl import modeling_qwen2_vl as peer

import qwen2vl_fast
from qwen2vl_fast import ops
from tests import models
from tests.models import CONFIGS, OLD_TRANSFORMERS, peer_inputs
from tests.patching import classes, forward, model_of, patched, run_ranks, same, snapshot, step, twin, with_lora

ROWS = [[("text", 3), ("image", 4, 6), ("text", 5)], [("text", 4), ("video", 2, 4, 4), ("text", 2)]]


# 16: zero gradients with adapters on the tower; gradient checkpointing on equals off.


@pytest.mark.parametrize("reentrant", [False, True])
def test_fault_16_adapters_of_the_tower(reentrant):
    hf = model_of(CONFIGS["released"])
    model = with_lora(hf)
    inputs = models.batch(ROWS)
    with patched(hf):
        _, expected = step(model, hf, inputs)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model.enable_input_require_grads()
        _, got = step(model, hf, inputs)
    tower = [name for name in expected if ".visual." in name]
    assert len(tower) == 2 * (4 * 2 + 2)
    for name in tower:
        assert expected[name] is not None and float(expected[name].abs().max()) > 0, name
        assert torch.equal(got[name], expected[name]), name


# 17: patches of a class, which reach other models.


def test_fault_17_one_instance_alone():
    first = model_of(CONFIGS["released"])
    other = twin(first)
    inputs = models.batch(ROWS)
    with torch.no_grad():
        expected = forward(other, inputs).logits
    other.model.rope_deltas = None
    types, before = classes(), snapshot(first, other)
    qwen2vl_fast.patch(first)
    fresh = model_of(CONFIGS["released"])
    now = classes()
    assert all(now[name].keys() == types[name].keys() for name in types)
    assert all(now[name][key] is types[name][key] for name in types for key in types[name])
    for hf in (other, fresh):
        assert not any("forward" in vars(module) for module in hf.modules())
        with torch.no_grad():
            assert torch.equal(forward(hf, inputs).logits, expected)
    other.model.rope_deltas = None
    qwen2vl_fast.unpatch(first)
    assert same(before, snapshot(first, other))


# 18: a model on the CPU that reaches a GPU kernel.


def test_fault_18_cpu_model_beside_a_gpu(monkeypatch):
    """As on a machine with a GPU: every kernel is usable there, and none is launched for a model on the CPU."""
    from qwen2vl_fast.kernels import activation, gated, loss, merge, norm, patchify, rope

    def refuse(*args, **kwargs):
        raise AssertionError("a kernel was launched for tensors on the CPU")

    for module in (activation, gated, loss, merge, norm, patchify, rope):
        for name in [name for name in vars(module) if name.startswith("launch")]:
            monkeypatch.setattr(module, name, refuse)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    assert ops.backends()["mrope"]["triton"] is None
    hf = model_of(CONFIGS["released"])
    inputs = models.batch(ROWS)
    with patched(hf) as report:
        step(hf, hf, inputs)
        assert {row["backend"] for row in report.rows()} == {"torch"}
    with patched(hf, backend="triton"), pytest.raises(RuntimeError, match="backend 'triton' can't run"):
        forward(hf, inputs)


# 19: a rank without media among sharded ones.


def test_fault_19_no_hang(tmp_path):
    """Two processes with FSDP2, one of them with text alone; a hang fails by its timeout."""
    found = run_ranks("fsdp2", tmp_path)
    assert found[0]["calls"]["vision attention"] == found[1]["calls"]["vision attention"] > 0


# 20: an offset that wraps in int32 at 262 144 tokens x 64 heads x 128.


@pytest.mark.gpu
def test_fault_20_rotation_past_2_31_elements():
    tokens, heads = 262_144 + 64, 64
    q = torch.randn(tokens, heads, 128, device="cuda", dtype=torch.bfloat16)
    k = q[:, :1]
    ids = torch.arange(tokens, device="cuda").expand(3, -1).contiguous()
    rotated, _ = ops.mrope(q, k, ids)
    assert rotated.numel() > 2**31
    for rows in (slice(0, 64), slice(tokens - 64, tokens)):
        alone, _ = ops.mrope(q[rows].contiguous(), k[rows].contiguous(), ids[:, rows].contiguous())
        assert torch.equal(rotated[rows], alone)


def test_fault_20_offsets_are_64_bits_wide():
    """What the kernels of a patched model are compiled to: tokens times their stride never in 32 bits."""
    from pathlib import Path

    folder = Path(ops.__file__).parent.parent / "kernels"
    for name in ("rope", "norm", "activation", "gated", "loss"):
        source = (folder / f"{name}.py").read_text(encoding="utf-8")
        assert "offset(" in source and " * stride" not in source, name
    assert "int64" in (folder / "offsets.py").read_text(encoding="utf-8")


# 21: a patch that does nothing.


def test_fault_21_every_part_counts():
    hf = model_of(CONFIGS["released"])
    inputs = models.batch(ROWS)
    with patched(hf) as report:
        assert all(part.calls == 0 for part in report.parts.values())
        step(hf, hf, inputs)
        assert all(part.calls and part.status == "fused" for part in report.parts.values()), report


@pytest.mark.parametrize(
    ("name", "argument"),
    [
        ("VisionSdpaAttention" if OLD_TRANSFORMERS else "VisionAttention", "attention"),
        ("Qwen2VLVisionBlock", "norms"),
        ("Qwen2VLSdpaAttention" if OLD_TRANSFORMERS else "Qwen2VLAttention", "rope"),
        ("Qwen2VLRotaryEmbedding", "rope"),
        ("Qwen2VLModel", "attention"),
    ],
)
def test_fault_21_a_hook_that_no_longer_binds(monkeypatch, name, argument):
    """As after a rename in a new release: patch says which, and leaves nothing patched."""
    hf = model_of(CONFIGS["released"])
    before = snapshot(hf)
    cls = getattr(peer, name)
    real = cls.forward

    def renamed(self, states, *args, **kwargs):
        return real(self, states, *args, **kwargs)

    monkeypatch.setattr(cls, "forward", renamed)
    with pytest.raises(RuntimeError, match=rf"{name} of transformers .* does not bind; pass {argument}=False"):
        qwen2vl_fast.patch(hf)
    assert same(before, snapshot(hf))


@pytest.mark.parametrize("gone", ["blocks.0.mlp.fc1", "blocks.0.attn.qkv", "merger.mlp"])
def test_fault_21_a_layer_that_is_gone(gone):
    hf = model_of(CONFIGS["released"])
    owner, _, name = gone.rpartition(".")
    module = hf.model.visual.get_submodule(owner)
    setattr(module, f"{name}_renamed", getattr(module, name))
    delattr(module, name)
    before = copy.copy(snapshot(hf))
    with pytest.raises(RuntimeError, match=f"has no {name}"):
        qwen2vl_fast.patch(hf)
    assert same(before, snapshot(hf))


def test_fault_21_the_report_shows_what_did_not_run():
    """A part whose place was taken over after patch stays at zero calls."""
    hf = model_of(CONFIGS["released"])
    inputs = peer_inputs(hf, models.batch(ROWS))
    with torch.no_grad(), patched(hf) as report:
        for layer in hf.model.language_model.layers:
            layer.mlp = torch.nn.Identity()
        hf(**inputs)
        assert report.parts["swiglu"].calls == 0 and report.parts["text norms"].calls
