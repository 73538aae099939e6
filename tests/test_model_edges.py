"""What a review of the model broke: caches after an error, late logits, hooks, dtypes, autocast, signatures."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch

from qwen2vl_fast import Qwen2VL
from qwen2vl_fast.cache import KVCache
from tests.models import pair

IDS = torch.tensor([[5, 6, 7, 8, 9]])
GRID = torch.tensor([[1, 4, 4]])


@pytest.fixture
def model() -> Qwen2VL:
    return copy.deepcopy(pair()[1])  # pair's is everybody's


def pixels(model: Qwen2VL) -> torch.Tensor:
    return torch.randn(16, model.config.vision.patch_dim, dtype=model.dtype, generator=torch.Generator().manual_seed(0))


def test_a_failed_prefill_leaves_the_cache_as_it_was(model):
    cache = KVCache(model.config.text, 1, 32, dtype=model.dtype, device=model.device)
    expected = model.generate(torch.cat((IDS, model.generate(IDS, max_new_tokens=2)[:, 5:], IDS), 1), max_new_tokens=3)
    answer = model.generate(IDS, cache=cache, max_new_tokens=2, eos_token_id=[])
    held = list(cache.lengths), list(cache.deltas)

    def fail(*_):
        raise KeyboardInterrupt

    handle = model.model.layers[-1].register_forward_pre_hook(fail)
    following = torch.cat((answer[:, -1:], IDS), 1)
    with pytest.raises(KeyboardInterrupt):
        model.generate(following, cache=cache, max_new_tokens=3)
    handle.remove()
    assert (cache.lengths, cache.deltas) == held
    assert torch.equal(model.generate(following, cache=cache, max_new_tokens=3)[:, -3:], expected[:, -3:])


def test_late_logits_are_those_of_the_forward_or_an_error(model):
    expected = model(IDS).logits
    output = model(IDS, labels=IDS)
    assert torch.equal(output.logits, expected)
    output = model(IDS, labels=IDS)
    with torch.no_grad():
        model.head_weight.add_(1)
    with pytest.raises(RuntimeError, match="head's weight has changed"):
        _ = output.logits


@pytest.mark.parametrize("name", ["patch_embed.proj", "blocks.0.mlp.fc1", "merger.mlp.0"])
def test_a_hook_on_a_layer_runs_and_changes_nothing_else(model, name):
    expected = model.encode_images(pixels(model), GRID)
    calls = []
    handle = model.visual.get_submodule(name).register_forward_hook(lambda *_: calls.append(name))
    hooked = model.encode_images(pixels(model), GRID)
    assert calls == [name]
    assert torch.allclose(hooked, expected, rtol=1e-9, atol=1e-9)
    handle.remove()
    model.visual.get_submodule(name).forward = lambda x: pytest.fail("replaced")
    with pytest.raises(pytest.fail.Exception, match="replaced"):
        model.encode_images(pixels(model), GRID)


def test_a_hook_on_the_head_runs_for_logits_and_loss():
    model = copy.deepcopy(pair("untied")[1])
    expected = model(IDS, labels=IDS).loss
    calls = []
    model.lm_head.register_forward_hook(lambda *_: calls.append(1))
    assert torch.allclose(model(IDS, labels=IDS).loss, expected, rtol=1e-6)
    assert calls == [1]


def test_the_tower_may_have_a_dtype_of_its_own(model):
    expected = model.encode_images(pixels(model), GRID)
    model.visual.float()
    assert model.encode_images(pixels(model), GRID).dtype == torch.float32
    assert torch.allclose(model.encode_images(pixels(model), GRID).double(), expected, rtol=1e-3, atol=1e-3)


def test_autocast_is_refused(model):
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(RuntimeError, match="autocast is not supported"):
            model(IDS)
        with pytest.raises(RuntimeError, match="autocast is not supported"):
            model.encode_images(pixels(model), GRID)


def test_generate_shows_its_arguments():
    parameters = inspect.signature(Qwen2VL.generate).parameters
    for name in ("attention_mask", "cache", "num_return_sequences", "max_new_tokens", "eos_token_id", "seed", "streamer"):
        assert parameters[name].kind is inspect.Parameter.KEYWORD_ONLY


def test_more_new_tokens_than_memory_has_slots_for(model):
    steps = model.stream(IDS, max_new_tokens=10**12, eos_token_id=[])
    assert next(steps).shape == (1,)
    steps.close()


BAD = [
    (lambda m: m(IDS, labels=[1, 2]), TypeError, "labels: expected a tensor, got list"),
    (lambda m: m(IDS, labels=torch.tensor([[-100, 1, 2, 3, 9999]])), ValueError, r"labels\[0, 4\]: expected -100 or 0\.\."),
    (lambda m: m(IDS, logits_to_keep="a"), TypeError, "logits_to_keep: expected an int, got str"),
    (lambda m: m(IDS, logits_to_keep=1.5), TypeError, "logits_to_keep: expected an int, got float"),
    (lambda m: m.encode_images(torch.zeros(4, 1176), [[1, 2, 2]]), TypeError, "grid_thw: expected a tensor, got list"),
    (lambda m: m.encode_images(None, GRID), TypeError, "pixel_values: expected a tensor, got NoneType"),
    (lambda m: m.generate(max_new_tokens=0), ValueError, "input_ids: expected input_ids or inputs_embeds"),
    (lambda m: m.generate("x", max_new_tokens=0), TypeError, "input_ids: expected a tensor, got str"),
    (lambda m: m.generate(IDS, max_new_tokens=1, eos_token_id=3.5), TypeError, "eos_token_id: expected an int or a list"),
    (lambda m: m.generate(IDS, max_new_tokens=1, do_sample="no"), TypeError, "do_sample: expected a bool, got str"),
    (lambda m: Qwen2VL(m.config, max_pack_patches="a"), TypeError, "max_pack_patches: expected an int, got str"),
    (lambda m: Qwen2VL(m.config, max_pack_patches=5.5), TypeError, "max_pack_patches: expected an int, got float"),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD)
def test_bad_input_is_named(model, call, error, message):
    with pytest.raises(error, match=message):
        call(model)
