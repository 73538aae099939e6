"""patch: modules that somebody swapped, what is bound, refused and reported, and that one instance alone changes."""

from __future__ import annotations

import copy
import importlib
import inspect
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn
from transformers.models.qwen2_vl import modeling_qwen2_vl as peer

import qwen2vl_fast
from qwen2vl_fast.patch import releases, text
from tests import models
from tests.compare import check_parity
from tests.models import CONFIGS, OLD_TRANSFORMERS, labels_of, peer_inputs, real_tokens
from tests.patching import MIXED, classes, compare, forward, model_of, patched, same, snapshot, twin
from tests.test_patch import NEW, PARTS

# Modules that somebody swapped, hooks, roundings.


class Doubled(nn.Module):
    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return 2 * self.inner(x)


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize(
    ("place", "part"),
    [
        ("model.visual.blocks.0.norm2", "vision norms"),
        ("model.visual.blocks.1.norm1", "vision norms"),
        ("model.visual.merger.ln_q", "vision norms"),
        ("model.visual.blocks.0.mlp.act", "vision activations"),
        ("model.visual.merger.mlp.1", "vision activations"),
        ("model.visual.blocks.0.mlp.fc1", None),
        ("model.visual.blocks.0.attn.qkv", None),
        ("model.language_model.layers.0.post_attention_layernorm", "text norms"),
        ("model.language_model.norm", "text norms"),
        ("model.language_model.layers.1.mlp.act_fn", "swiglu"),
        ("model.language_model.layers.1.mlp.up_proj", None),
        ("model.language_model.layers.0.self_attn.k_proj", None),
    ],
)
def test_swapped_modules_are_respected(hf, place, part, late):
    """Before or after patch; a norm or an activation is reported besides."""
    inputs = models.batch(MIXED)
    real = real_tokens(inputs)
    owner, name = hf.get_submodule(place.rpartition(".")[0]), place.rpartition(".")[2]
    before = getattr(owner, name)
    with torch.no_grad():
        plain = forward(hf, inputs).logits
        setattr(owner, name, Doubled(before))
        expected = forward(hf, inputs).logits
        if late:
            setattr(owner, name, before)
        report = qwen2vl_fast.patch(hf)
        setattr(owner, name, Doubled(before))
        got = forward(hf, inputs).logits
    assert float((expected - plain)[real].abs().max()) > 1e-6, "the case tells nothing"
    check_parity(got[real], expected[real], "released")
    row = report.parts.get(part)
    if row is not None and (not late or "act" in place or "mlp.1" in place):
        assert "Doubled" in row.status or any("Doubled" in why or "GELU" in why for why in row.passed), report


def test_forward_hooks_of_layers_run(hf):
    """A hook on any Linear, norm or activation sees the call, and what it returns counts."""
    inputs = models.batch(MIXED)
    real = real_tokens(inputs)
    kinds = (nn.Linear, nn.LayerNorm, nn.GELU, nn.Conv3d, type(hf.model.language_model.norm))
    watched = [m for m in hf.modules() if isinstance(m, kinds) and m is not hf.lm_head]
    calls: dict[nn.Module, int] = dict.fromkeys(watched, 0)

    def hook(module, args, output):
        calls[module] += 1
        return output * 1.1

    for module in watched:
        module.register_forward_hook(hook)
    with torch.no_grad():
        expected = forward(hf, inputs).logits
        once = dict(calls)
        assert all(once.values())
        with patched(hf):
            got = forward(hf, inputs).logits
    check_parity(got[real], expected[real], "released")
    # Images and videos share a pass, so that the tower's layers run once instead of twice.
    assert all(calls[module] - once[module] in (once[module], once[module] / 2) for module in watched)


def test_rounded_frequencies_are_made_again():
    """model.to(bfloat16) rounds the tables; past position 256 they are then wrong, in the patched model they are not."""
    hf = model_of(CONFIGS["released"], dtype=torch.bfloat16)
    exact = twin(hf)
    for module in hf.modules():
        if hasattr(module, "inv_freq"):
            module.inv_freq = module.inv_freq.bfloat16()
    ids = torch.randint(0, 256, (1, 8))
    position_ids = 30000 + torch.arange(8).expand(3, 1, 8)
    with torch.no_grad(), patched(exact), patched(hf):
        assert torch.equal(hf(input_ids=ids, position_ids=position_ids).logits,
                           exact(input_ids=ids, position_ids=position_ids).logits)  # fmt: skip


def test_rope_types_that_change_with_the_length_are_left_alone():
    config = copy.deepcopy(CONFIGS["released"])
    config["rope_scaling"] = {"type": "dynamic", "rope_type": "dynamic", "factor": 2.0, "mrope_section": [16, 24, 24]}
    report = compare(model_of(config), models.batch(MIXED))
    assert "rope type dynamic" in report.parts["m-rope"].status and report.parts["m-rope"].calls == 0


def test_attentions_fall_back_and_say_so(shared):
    config = copy.deepcopy(CONFIGS["released"])
    hf = model_of(config)
    hf.load_state_dict(shared.state_dict())
    if not OLD_TRANSFORMERS:
        hf.set_attn_implementation("eager")
    inputs = models.batch(MIXED[:1])  # padded rows are NaN in transformers' eager attention in float64
    real = real_tokens(inputs)
    with torch.no_grad():
        before = forward(hf, inputs, output_attentions=True)
        with patched(hf) as report:
            after = forward(hf, inputs, output_attentions=True)
    check_parity(after.logits[real], before.logits[real], "released")
    assert len(after.attentions) == len(before.attentions) == 2
    for ours, theirs in zip(after.attentions, before.attentions, strict=True):
        check_parity(ours.transpose(1, 2)[real], theirs.transpose(1, 2)[real], "released")
    if OLD_TRANSFORMERS:
        assert report.parts["m-rope"].passed


@NEW
def test_tower_attentions_and_hidden_states(hf):
    hf.set_attn_implementation("eager")
    inputs = models.batch(MIXED)
    arguments = {"grid_thw": inputs["image_grid_thw"], "output_attentions": True, "output_hidden_states": True}
    with torch.no_grad():
        before = hf.model.visual(inputs["pixel_values"], **arguments)
        with patched(hf) as report:
            after = hf.model.visual(inputs["pixel_values"], **arguments)
            assert report.parts["packing"].passed["attention weights were asked for"] == 1
            del arguments["output_attentions"]
            again = hf.model.visual(inputs["pixel_values"], **arguments)
    assert report.parts["packing"].calls == 1
    for output in (after, again):
        for ours, theirs in zip(output.hidden_states, before.hidden_states, strict=True):
            check_parity(ours, theirs, "released")


# What is bound, refused, reported.


def test_callable_package():
    code = """
import sys
import qwen2vl_fast
assert not {"transformers", "qwen2vl_fast.patch"} & set(sys.modules)
assert "patch" in qwen2vl_fast.__all__ and not hasattr(qwen2vl_fast, "patched")
import qwen2vl_fast.patch
assert callable(qwen2vl_fast.patch) and qwen2vl_fast.unpatch is qwen2vl_fast.patch.unpatch
from qwen2vl_fast import patch
assert patch is qwen2vl_fast.patch is sys.modules["qwen2vl_fast.patch"]
from transformers import AttentionInterface
assert "qwen2vl_fast" in AttentionInterface()
"""
    root = Path(__file__).parent.parent
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert result.returncode == 0, result.stderr
    names = list(inspect.signature(qwen2vl_fast.patch).parameters)
    assert names == [
        "hf_model", "rope", "attention", "norms", "activations", "patch_embed", "positions", "fused_loss", "backend",
    ]  # fmt: skip


OTHERS = {
    "qwen2_5_vl": "Qwen2_5_VL",
    **({} if OLD_TRANSFORMERS else {"qwen3_vl": "Qwen3VL"}),
}


@pytest.mark.parametrize("family", OTHERS)
def test_other_families_are_refused_by_name(family):
    """The whole model, its tower and its decoder."""
    name = OTHERS[family]
    modeling = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    config = importlib.import_module(f"transformers.models.{family}").__dict__[f"{name}Config"]
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 1, "vocab_size": 32,
             "intermediate_size": 8, "head_dim": 8, "rope_scaling": {"rope_type": "default", "mrope_section": [1, 1, 2]},
             "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}  # fmt: skip
    text = sizes if family == "qwen2_5_vl" else {"text_config": sizes}
    vision_config = {"depth": 1, "hidden_size": 16, "num_heads": 2, "out_hidden_size": 16, "intermediate_size": 8,
                     "deepstack_visual_indexes": []}  # fmt: skip
    other = getattr(modeling, f"{name}Model")(config(vision_config=vision_config, **text))
    for part in (other, other.visual, other.language_model):
        before = snapshot(other)
        with pytest.raises(TypeError, match=f"hf_model: expected .* got {type(part).__name__}"):
            qwen2vl_fast.patch(part)
        assert same(before, snapshot(other))
    with pytest.raises(ValueError, match="not patched"):
        qwen2vl_fast.unpatch(other)


def test_what_is_no_model_is_refused():
    for wrong, name in ((nn.Linear(2, 2), "Linear"), ("model", "str"), (None, "NoneType")):
        with pytest.raises(TypeError, match=f"hf_model: expected .* got {name}"):
            qwen2vl_fast.patch(wrong)


@NEW
def test_colqwen2(shared):
    """A family that holds Qwen2VLModel, and calls its tower itself."""
    config = transformers.ColQwen2Config(vlm_config=shared.config.to_dict(), embedding_dim=16)
    torch.manual_seed(0)
    hf = transformers.ColQwen2ForRetrieval(config).double().eval()
    inputs = models.batch([[("text", 3), ("image", 4, 6), ("text", 4)], [("image", 2, 4), ("text", 3)]])
    counts = inputs["image_grid_thw"].prod(1).tolist()
    inputs["pixel_values"] = nn.utils.rnn.pad_sequence(inputs["pixel_values"].split(counts), batch_first=True)
    given = {name: inputs[name] for name in ("input_ids", "attention_mask", "pixel_values", "image_grid_thw")}
    with torch.no_grad():
        expected = hf(**given).embeddings
        with patched(hf) as report:
            got = hf(**given).embeddings
            assert all(row["error"] < 1e-5 for row in report.verify(given, repeats=1))
    real = real_tokens(inputs)
    check_parity(got[real], expected[real], "released")
    assert all(report.parts[name].calls for name in ("packing", "vision attention", "m-rope", "text norms", "swiglu")), report


def test_bad_arguments(hf):
    with pytest.raises(TypeError, match="rope: expected True or False, got 1"):
        qwen2vl_fast.patch(hf, rope=1)
    with pytest.raises(ValueError, match="backend: expected one of"):
        qwen2vl_fast.patch(hf, backend="tpu")
    with patched(hf):
        with pytest.raises(ValueError, match="patched already"):
            qwen2vl_fast.patch(hf)
        with pytest.raises(ValueError, match="patched already"):
            qwen2vl_fast.patch(hf.model.visual)
    with pytest.raises(ValueError, match="not patched"):
        qwen2vl_fast.unpatch(hf)


def test_wrapped_models_are_found(hf):
    """ColQwen2 and the like hold one of the classes."""
    wrapper = Doubled(hf.model)
    report = qwen2vl_fast.patch(wrapper)
    assert report.parts["swiglu"].bound == 2
    qwen2vl_fast.unpatch(hf)
    with pytest.raises(ValueError, match="not patched"):
        qwen2vl_fast.unpatch(wrapper)


def test_subclass_with_a_forward_of_its_own(shared):
    class Scored(transformers.Qwen2VLForConditionalGeneration):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    hf = Scored(shared.config).double().eval()
    hf.load_state_dict(shared.state_dict())
    inputs = peer_inputs(shared, models.batch(MIXED[:1]))
    with torch.no_grad(), patched(hf) as report:
        check_parity(hf(**inputs).logits, shared(**inputs).logits, "released")
    assert report.parts["loss"].status == "not fused: Scored overrides forward" and report.parts["swiglu"].calls


def test_hook_that_does_not_bind_raises(hf, monkeypatch):
    def changed(self, states, boundaries):
        return states

    name = "VisionSdpaAttention" if OLD_TRANSFORMERS else "VisionAttention"
    monkeypatch.setattr(getattr(peer, name), "forward", changed)
    with pytest.raises(RuntimeError, match=r"blocks.0.attn.forward .* has no hidden_states, cu_seqlens, position_embeddings"):
        qwen2vl_fast.patch(hf)
    with pytest.raises(ValueError, match="not patched"):
        qwen2vl_fast.unpatch(hf)
    report = qwen2vl_fast.patch(hf, attention=False, rope=False)
    assert report.parts["vision attention"].status == "not fused: attention=False"


def test_version_outside_the_tested_range_warns_once(hf, monkeypatch):
    monkeypatch.setattr(releases, "_warned", False)
    monkeypatch.setattr(sys.modules["transformers"], "__version__", "5.99.0" if not OLD_TRANSFORMERS else "4.40.0")
    with pytest.warns(UserWarning, match=r"tested with transformers 4.52 to 5.23, this is"), patched(hf):
        pass
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with patched(hf):
            pass


def test_unpatch_restores_every_attribute(hf):
    other = twin(hf)
    before, types = snapshot(hf, other), classes()
    report = qwen2vl_fast.patch(hf)
    assert not same(snapshot(hf), {k: v for k, v in before.items() if k[0] == 0})
    now, others = classes(), {k: v for k, v in before.items() if k[0] == 1}
    assert all(now[name][key] is types[name][key] for name in types for key in types[name])
    assert same({(0, n): v for (_, n), v in others.items()}, snapshot(other))
    assert all(part.calls == 0 for part in report.parts.values())
    qwen2vl_fast.unpatch(hf)
    assert same(before, snapshot(hf, other))


def test_unpatch_refuses_when_a_method_was_replaced(hf):
    qwen2vl_fast.patch(hf)
    before = snapshot(hf)
    visual = hf.model.visual
    ours = visual.forward
    visual.forward = lambda *a, **k: ours(*a, **k)
    with pytest.raises(RuntimeError, match="model.visual.forward was replaced after patch"):
        qwen2vl_fast.unpatch(hf)
    visual.forward = ours
    assert same(before, snapshot(hf)), "it changed something before it refused"
    qwen2vl_fast.unpatch(hf)


def test_a_copy_of_a_patched_model(hf):
    """It is patched too, and independent: unpatching one leaves the other."""
    inputs = models.batch(MIXED)
    qwen2vl_fast.patch(hf)
    with torch.no_grad():
        expected = forward(hf, inputs).logits
        clone = copy.deepcopy(hf)
        assert torch.equal(forward(clone, inputs).logits, expected)
        qwen2vl_fast.unpatch(hf)
        for parameter in hf.parameters():
            parameter.zero_()
        assert torch.equal(forward(clone, inputs).logits, expected)
    qwen2vl_fast.unpatch(clone)


def test_save_and_reload(hf, tmp_path):
    inputs = models.batch(MIXED)
    with torch.no_grad(), patched(hf):
        hf.save_pretrained(tmp_path)
        expected = forward(hf, inputs).logits
    name = "torch_dtype" if OLD_TRANSFORMERS else "dtype"
    loaded = transformers.Qwen2VLForConditionalGeneration.from_pretrained(tmp_path, **{name: torch.float64}).eval()
    with torch.no_grad(), patched(loaded):
        assert torch.equal(forward(loaded, inputs).logits, expected)


def test_report_counts_and_prints(hf):
    inputs = models.batch(MIXED)
    with torch.no_grad(), patched(hf) as report:
        forward(hf, inputs)
        first = {name: part.calls for name, part in report.parts.items()}
        forward(hf, inputs)
    assert {name: part.calls for name, part in report.parts.items()} == {name: 2 * n for name, n in first.items()}
    depth = 2
    assert first == {
        "one tower pass": 1, "position ids": 1, "packing": 1, "patch embedding": 1, "vision attention": depth,
        "vision rope": depth, "vision norms": 2 * depth + 1, "vision activations": depth + 1, "m-rope": depth + 1,
        "text norms": 2 * depth + 1, "swiglu": depth, "loss": 0,
    }  # fmt: skip
    text = str(report)
    assert all(name in text for name in PARTS) and transformers.__version__ in text and "fused" in text


def test_report_verifies(hf, capsys):
    inputs = peer_inputs(hf, models.batch(MIXED))
    hf.train()
    deltas = torch.ones(3, 1, dtype=torch.int64)
    hf.model.rope_deltas = deltas
    with patched(hf) as report:
        rows = report.verify({**inputs, "labels": labels_of(models.batch(MIXED))}, repeats=1)
        without = report.verify(inputs, repeats=1)
        assert all(part.enabled for part in report.parts.values())
    assert [row["part"] for row in rows] == [*PARTS, "all"]
    assert [row["part"] for row in without] == [*PARTS[:-1], "all"]
    assert all(row["error"] < 1e-5 and row["speed"] > 0 for row in rows)
    assert any(row["error"] > 0 for row in rows)
    assert hf.training and all(m.training for m in hf.modules()) and hf.model.rope_deltas is deltas
    printed = capsys.readouterr().out
    assert all(name in printed for name in PARTS)


def test_verify_with_dropout_a_cache_and_other_outputs(hf):
    """Every run draws the same numbers and gets the same cache; outputs without names are compared."""
    inputs = peer_inputs(hf, models.batch(MIXED))
    for layer in hf.model.language_model.layers:
        layer.self_attn.attention_dropout = 0.5
        layer.mlp.gate_proj = nn.Sequential(layer.mlp.gate_proj, nn.Dropout(0.5))
    cache = transformers.DynamicCache()
    state = torch.get_rng_state()
    with patched(hf) as report:
        rows = report.verify({**inputs, "labels": labels_of(models.batch(MIXED))}, repeats=1)
        assert rows[-2]["part"] == "loss" and all(row["error"] < 1e-5 for row in rows)
        assert all(row["error"] < 1e-5 for row in report.verify({**inputs, "past_key_values": cache}, repeats=1))
        assert all(row["error"] < 1e-5 for row in report.verify({**inputs, "return_dict": False}, repeats=1))
        with pytest.raises(ValueError, match="repeats"):
            report.verify(inputs, repeats=0)
    assert cache.get_seq_length() == 0 and torch.equal(torch.get_rng_state(), state)


def test_verify_tells_of_an_error(hf, monkeypatch):
    """A part that computes something else is seen in its row and in that of all parts, and in no other."""
    inputs = peer_inputs(hf, models.batch(MIXED))
    plain = text.gated
    monkeypatch.setattr(text, "gated", lambda *args, **options: plain(*args, **options) * 1.01)
    with patched(hf) as report:
        rows = report.verify(inputs, repeats=1)
    assert {row["part"] for row in rows if row["error"] > 1e-4} == {"swiglu", "all"}
