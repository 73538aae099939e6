"""What people do to a patched model: copies, pickles, casts, surgery, calls of its parts, unusual inputs."""

from __future__ import annotations

import copy
import pickle
import threading

import pytest
import torch
import transformers
from torch import nn
from torch.nn.utils import parametrize

import qwen2vl_fast
from tests import models
from tests.compare import check_parity
from tests.models import CONFIGS, OLD_TRANSFORMERS, PAD, labels_of, peer_inputs, real_tokens
from tests.patching import MIXED, compare, forward, gradients, model_of, patched, twin
from tests.test_patch import NEW

ONE = MIXED[:1]
GREEDY = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": PAD, "eos_token_id": None}


@pytest.fixture(scope="module")
def logits(shared: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Of real tokens, unpatched."""
    with torch.no_grad():
        found = forward(twin(shared), inputs).logits[real_tokens(inputs)]
    return found


def agrees(hf: nn.Module, inputs: dict[str, torch.Tensor], expected: torch.Tensor) -> None:
    with torch.no_grad():
        check_parity(forward(hf, inputs).logits[real_tokens(inputs)], expected, "released")


def hooks(hf: nn.Module) -> bool:
    try:
        qwen2vl_fast.unpatch(hf)
    except ValueError:
        return False
    return True


# Copies.


def test_a_pickled_model_comes_back_unpatched(hf, inputs, logits):
    qwen2vl_fast.patch(hf)
    other = pickle.loads(pickle.dumps(hf))
    agrees(other, inputs, logits)
    assert not hooks(other)
    with patched(other) as report:
        agrees(other, inputs, logits)
        assert all(part.calls for part in report.parts.values() if part.name != "loss"), report
    agrees(hf, inputs, logits)
    assert hooks(hf)


def test_a_copy_is_unpatched_and_patched_again(hf, inputs, logits):
    qwen2vl_fast.patch(hf)
    other = copy.deepcopy(hf)
    qwen2vl_fast.unpatch(other)
    assert not any("forward" in vars(module) for module in other.modules())
    agrees(other, inputs, logits)
    with patched(other) as report:
        agrees(other, inputs, logits)
        assert report.parts["swiglu"].calls
    agrees(hf, inputs, logits)


def test_a_model_on_meta(shared, inputs, logits):
    """Patched before it has weights."""
    with torch.device("meta"):
        hf = transformers.Qwen2VLForConditionalGeneration(shared.config)
    report = qwen2vl_fast.patch(hf)
    assert "fused" in str(report)
    hf.to_empty(device="cpu").double().eval()
    hf.load_state_dict(shared.state_dict())
    for mine, theirs in zip(hf.modules(), shared.modules(), strict=True):
        for name in ("inv_freq", "original_inv_freq"):
            if hasattr(theirs, name):
                setattr(mine, name, getattr(theirs, name).clone())
    agrees(hf, inputs, logits)
    assert report.parts["m-rope"].calls and report.parts["vision rope"].calls


def test_two_models_with_one_tower(hf, shared, inputs, logits):
    other = twin(shared)
    other.model.visual = hf.model.visual
    qwen2vl_fast.patch(hf)
    with pytest.raises(ValueError, match="model.visual is patched already"):
        qwen2vl_fast.patch(other)
    agrees(other, inputs, logits)
    qwen2vl_fast.unpatch(hf)
    agrees(other, inputs, logits)


# Changes after patch.


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_cast_after_patch(hf, shared, dtype):
    """As cast before: the same bits."""
    qwen2vl_fast.patch(hf)
    hf.to(dtype)
    other = twin(shared).to(dtype)
    qwen2vl_fast.patch(other)
    inputs = models.batch(MIXED, dtype=dtype)
    with torch.no_grad():
        got = forward(hf, inputs).logits
        assert got.dtype == dtype and torch.equal(got, forward(other, inputs).logits)


@NEW
def test_another_attention_implementation_after_patch(hf, shared):
    inputs = models.batch(ONE)
    with torch.no_grad():
        expected = forward(shared, inputs).logits[real_tokens(inputs)]
    with patched(hf):
        for name in ("eager", "sdpa", "qwen2vl_fast"):
            hf.set_attn_implementation(name)
            agrees(hf, inputs, expected)


def test_attentions_by_the_config(shared, inputs):
    hf = model_of(copy.deepcopy(CONFIGS["released"]))
    hf.load_state_dict(shared.state_dict())
    if not OLD_TRANSFORMERS:
        hf.set_attn_implementation("eager")
    for config in {id(c): c for c in (m.config for m in hf.modules() if hasattr(m, "config"))}.values():
        config.output_attentions = True
    report = compare(hf, models.batch(ONE))
    assert report.parts["packing"].passed["attention weights were asked for"] == 1


@pytest.mark.parametrize("place", ["model.visual.blocks", "model.language_model.layers"])
def test_a_layer_put_in_after_patch(hf, shared, inputs, logits, place):
    """It gets what the library's code expects, and the report says so."""
    qwen2vl_fast.patch(hf)
    hf.get_submodule(place)[1] = twin(shared).get_submodule(place)[1]
    report = qwen2vl_fast.patch(twin(shared))  # another model's counters stand still
    agrees(hf, inputs, logits)
    assert not any(part.calls for part in report.parts.values())
    assert hooks(hf)
    with patched(hf) as report:
        hf.get_submodule(place)[0] = twin(shared).get_submodule(place)[0]
        agrees(hf, inputs, logits)
    part = "packing" if "visual" in place else "m-rope"
    assert any("attention that patch did not see" in why for why in report.parts[part].passed), report


@pytest.mark.parametrize("strange", [False, True])
def test_a_new_list_of_layers_after_patch(hf, shared, inputs, strange):
    """In another order, one of them a copy or (strange) one that patch has not seen: the report says so."""
    other = twin(shared)
    report = qwen2vl_fast.patch(hf)
    decoders = [model.model.language_model for model in (hf, other)]
    for decoder, plain in zip(decoders, (shared, other), strict=True):
        first, second = decoder.layers
        last = twin(plain).model.language_model.layers[0] if strange else copy.deepcopy(first)
        decoder.layers = nn.ModuleList([second, last])
    with torch.no_grad():
        agrees(hf, inputs, forward(other, inputs).logits[real_tokens(inputs)])
    assert bool(report.parts["m-rope"].calls) != strange
    assert any("attention that patch did not see" in why for why in report.parts["m-rope"].passed) == strange


def test_a_copied_layer_brings_no_other_layers(hf):
    qwen2vl_fast.patch(hf)
    for layer in (hf.model.language_model.layers[0], hf.model.visual.blocks[0]):
        copies = {}
        copy.deepcopy(layer, copies)
        assert sum(isinstance(x, nn.Parameter) for x in copies.values()) == len(list(layer.parameters()))


def test_text_on_meta(shared):
    """Shapes without numbers, to count a model's work, with and without labels."""
    hf = twin(shared).to("meta")
    ids = torch.arange(7, device="meta")[None]
    with patched(hf) as report:
        assert hf(input_ids=ids).logits.shape == (1, 7, hf.config.get_text_config().vocab_size)
        hf.train()
        assert hf(input_ids=ids, labels=ids).loss.is_meta
    assert all(report.parts[name].calls for name in ("m-rope", "text norms", "swiglu", "loss"))


def test_parametrized_weights(hf, shared, inputs):
    class Twice(nn.Module):
        def forward(self, weight):
            return 2 * weight

    places = ("model.visual.blocks.0.norm2", "model.visual.blocks.0.mlp.fc1", "model.language_model.layers.0.mlp.up_proj")
    other = twin(shared)
    qwen2vl_fast.patch(hf)
    for place in places:
        parametrize.register_parametrization(hf.get_submodule(place), "weight", Twice())
        other.get_submodule(place).weight.data.mul_(2)
    with torch.no_grad():
        agrees(hf, inputs, forward(other, inputs).logits[real_tokens(inputs)])


def test_hooks_that_write_into_what_they_get():
    """In training, where autograd refuses to write into some views: what the patched parts return is none of those."""
    hf = model_of(CONFIGS["released"], dtype=torch.float32)
    inputs = models.batch(MIXED, dtype=torch.float32)
    for place in ("mlp", "mlp.down_proj", "self_attn.o_proj", "post_attention_layernorm"):
        hf.model.language_model.layers[0].get_submodule(place).register_forward_hook(lambda m, a, output: output.mul_(1.1))
    for place in ("attn", "mlp", "norm1"):
        hf.model.visual.blocks[0].get_submodule(place).register_forward_hook(lambda m, a, output: output.mul_(1.1))
    expected, _ = gradients(hf, inputs)
    with patched(hf):
        loss, _ = gradients(hf, inputs)
    assert float((loss - expected).abs()) <= 1e-5 * float(expected)


def test_new_embeddings_after_patch(hf, inputs):
    with patched(hf) as report:
        hf.resize_token_embeddings(300)
        loss, found = gradients(hf, inputs)
        assert report.parts["loss"].calls == 1 and torch.isfinite(loss)
        assert found["model.language_model.embed_tokens.weight"].shape[0] == 300
        hf.tie_weights()
        assert hf.lm_head.weight is hf.get_input_embeddings().weight


def test_unpatch_and_patch_in_the_middle_of_a_stream(hf):
    inputs = peer_inputs(hf, models.batch(ONE))
    expected = hf.generate(**inputs, **GREEDY)
    qwen2vl_fast.patch(hf)

    class Streamer:
        count = 0

        def put(self, tokens):
            self.count += 1
            if self.count == 4:
                qwen2vl_fast.unpatch(hf)
            if self.count == 6:
                qwen2vl_fast.patch(hf)

        def end(self):
            assert self.count > 6

    assert torch.equal(hf.generate(**inputs, **GREEDY, streamer=Streamer()), expected)


# Inputs.


@NEW  # 4.52 itself fails with embeddings and no mask
def test_embeddings_after_a_call_with_media(hf):
    """transformers 5.x then adds the rope deltas of the call before, so that ids of real tokens are negative."""
    media = models.batch([[("text", 1), ("image", 20, 20), ("text", 2)]])
    text = torch.randint(0, 200, (1, 6))
    with torch.no_grad():
        embeds = hf.get_input_embeddings()(text)
        forward(hf, media)
        expected = hf(inputs_embeds=embeds).logits
        with patched(hf) as report:
            forward(hf, media)
            check_parity(hf(inputs_embeds=embeds).logits, expected, "released")
    assert report.parts["m-rope"].calls == 6 and not report.parts["m-rope"].passed


@pytest.mark.parametrize("shape", ["[S]", "float"])
def test_position_ids_of_another_kind(hf, shape):
    """What the library takes is taken, by the library's code where need be."""
    ids = torch.randint(0, 200, (1, 6))
    position_ids = torch.arange(6)[None].expand(3, 1, 6)
    position_ids = position_ids.double() if shape == "float" else position_ids[:, :, :1]
    with torch.no_grad():
        expected = hf(input_ids=ids, position_ids=position_ids).logits
        with patched(hf) as report:
            check_parity(hf(input_ids=ids, position_ids=position_ids).logits, expected, "released")
    assert report.parts["m-rope"].passed["position ids of another shape or type"] == 1


def test_grids_of_other_kinds(hf, inputs, logits):
    given = peer_inputs(hf, inputs)
    grids = ("image_grid_thw", "video_grid_thw")
    with patched(hf), torch.no_grad():
        out = hf(**{**given, **{name: given[name].int() for name in grids}}).logits[real_tokens(inputs)]
        check_parity(out, logits, "released")
        with pytest.raises(TypeError, match="image_grid_thw: expected a tensor, got ndarray"):
            hf(**{**given, **{name: given[name].numpy() for name in grids}})
        with pytest.raises(TypeError, match="grid_thw: expected a tensor, got ndarray"):
            hf.model.visual(inputs["pixel_values"], inputs["image_grid_thw"].numpy())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pixels_of_another_dtype(hf, shared, dtype):
    compare(hf, models.batch(MIXED, dtype=dtype), unpatched=twin(shared))


def test_gradients_of_pixels_and_embeddings(hf, shared):
    found = []
    for one in (twin(shared), hf):
        if one is hf:
            qwen2vl_fast.patch(hf)
        inputs = models.batch(MIXED)
        inputs["pixel_values"].requires_grad_()
        forward(one, inputs).logits[real_tokens(inputs)].square().mean().backward()
        embeds = one.get_input_embeddings()(inputs["input_ids"]).detach().requires_grad_()
        out = one(inputs_embeds=embeds, attention_mask=inputs["attention_mask"]).logits[real_tokens(inputs)]
        out.square().mean().backward()
        found.append((inputs["pixel_values"].grad, embeds.grad[real_tokens(inputs)]))
    for theirs, ours in zip(*found, strict=True):
        check_parity(ours, theirs, "released")


@pytest.mark.parametrize("rows", [[[("text", 6)]], [[("text", 2), ("video", 2, 4, 4), ("text", 2)]], [[("image", 2, 2)]]])
def test_one_kind_of_input_alone(hf, rows):
    compare(hf, models.batch(rows))


def test_tuples_and_positional_arguments(hf, inputs):
    given = peer_inputs(hf, inputs)
    first = given.pop("input_ids"), given.pop("attention_mask")
    with torch.no_grad():
        expected = hf(*first, **given, return_dict=False)
        with patched(hf):
            got = hf(*first, **given, return_dict=False)
    assert isinstance(got, tuple) and len(got) == len(expected)
    check_parity(got[0][real_tokens(inputs)], expected[0][real_tokens(inputs)], "released")


def test_inference_mode_then_training(hf, inputs, logits):
    """What inference makes and keeps must not be met again by autograd."""
    with patched(hf):
        with torch.inference_mode():
            check_parity(forward(hf, inputs).logits[real_tokens(inputs)].clone(), logits, "released")
        _, found = gradients(hf, inputs)
    assert all(torch.isfinite(gradient).all() for gradient in found.values() if gradient is not None)


def test_dropout_draws_the_same_numbers(hf, inputs):
    for layer in hf.model.language_model.layers:
        layer.self_attn.attention_dropout = 0.5
    hf.train()
    losses = []
    for patch in (False, True):
        if patch:
            qwen2vl_fast.patch(hf)
        torch.manual_seed(3)
        losses.append(forward(hf, inputs, labels=labels_of(inputs)).loss.detach().double())
    check_parity(losses[1], losses[0], "released")


def test_threads(hf, inputs, logits):
    errors = []

    def run() -> None:
        try:
            for _ in range(2):
                agrees(hf, inputs, logits)
        except BaseException as error:
            errors.append(error)

    with patched(hf):
        threads = [threading.Thread(target=run) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not errors
