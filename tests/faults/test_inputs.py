"""Faults 8, 14, 15, 16, 18 of QUALITY.md: rounded frequencies, media cut or miscounted, gradients that get lost, devices."""

from __future__ import annotations

import importlib
import re

import pytest
import torch
from torch import nn

from qwen2vl_fast import Qwen2VL, config
from tests import models
from tests.compare import check, check_parity, error
from tests.models import GREEDY, empty_cache, pair

backends = importlib.import_module("qwen2vl_fast.ops.backends")  # the package has a function of that name

ROWS = [
    [("text", 3), ("image", 4, 6), ("text", 5), ("video", 2, 4, 4), ("image", 2, 2), ("text", 2)],
    [("text", 1), ("image", 2, 4), ("text", 2)],
]


# 8: frequencies rounded by .to(bfloat16).


def far_positions(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """[3, B, S], ids up to 131071 that differ from axis to axis."""
    generator = torch.Generator().manual_seed(0)
    steps = torch.randint(1, 9000, (3, *inputs["input_ids"].shape), generator=generator)
    ids = steps.cumsum(-1) % 131072
    ids[..., -1] = 131071
    return ids


@pytest.mark.parametrize("name", ["released", "yarn"])
def test_fault_8_far_positions(monkeypatch, name):
    hf, ours = pair(name)
    models.lift_casts(monkeypatch, hf)
    inputs = models.batch([[("text", 40)]])
    ids = far_positions(inputs)
    with torch.no_grad():
        expected = hf(**models.peer_inputs(hf, inputs), position_ids=ids).logits
        check_parity(ours(**inputs, position_ids=ids).logits, expected, "lifted")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fault_8_frequencies_stay_exact_in_low_precision(monkeypatch, dtype):
    hf = models.transformers_model(models.CONFIGS["released"], dtype)
    cast = Qwen2VL.from_transformers(models.transformers_model(models.CONFIGS["released"])).to(dtype)
    assert not list(cast.named_buffers()), "a table kept in the module is cast with it"
    wide = models.transformers_model(models.CONFIGS["released"])
    wide.load_state_dict(hf.state_dict())
    inputs = models.batch([[("text", 40)]])
    ids = far_positions(inputs)
    with torch.no_grad():
        reference = Qwen2VL.from_transformers(wide)(**inputs, position_ids=ids).logits
        peer = hf(**models.peer_inputs(hf, inputs), position_ids=ids).logits
        check(cast(**inputs, position_ids=ids).logits, reference, [error(peer, reference)])
        table = config.TextConfig.rope_table
        monkeypatch.setattr(config.TextConfig, "rope_table", lambda self: (table(self)[0].to(dtype).float(), 1.0))
        with pytest.raises(AssertionError):  # the fault itself is seen
            check(cast(**inputs, position_ids=ids).logits, reference, [error(peer, reference)])


# 14: a prompt cut inside a medium; 15: counts that don't match. Never padded, never dropped: an error that says which.


def message_of(inputs, **changes) -> str:
    _, ours = pair()
    inputs = {**inputs, **changes}
    messages = []
    for call in (ours, lambda **given: ours.generate(**given, max_new_tokens=2)):
        with pytest.raises(ValueError) as caught, torch.no_grad():
            call(**inputs)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
    return messages[0]


@pytest.mark.parametrize("kept", range(1, 27))
def test_fault_14_truncation(kept):
    """Cut on the right: an error while a medium is hurt, which names the first one that is and what is left of it."""
    rows = [[("text", 2), ("image", 2, 4), ("text", 1), ("image", 4, 6), ("video", 3, 2, 4), ("text", 4)], [("text", 3)]]
    inputs = models.batch(rows, padding="right")
    # 27 columns: text 0-1, image 0 in 3-4, text 6, image 1 in 8-13, the clip in 16-21, text from 23.
    short = {name: inputs[name][:, :kept] for name in ("input_ids", "attention_mask", "mm_token_type_ids")}
    if kept > 21:
        assert pair()[1](**{**inputs, **short}).logits.shape[1] == kept
        return
    hurt, first, needs = ("image 0", 3, 2) if kept < 5 else ("image 1", 8, 6) if kept < 14 else ("video 0", 16, 6)
    pattern = rf"{hurt} of the batch, grid \[.*\], needs {needs} in a row and has {max(kept - first, 0)}:"
    assert re.search(pattern, message_of(inputs, **short))


def test_fault_14_truncation_on_the_left():
    inputs = models.batch([[("image", 4, 4), ("text", 6)]])
    cut = {name: inputs[name][:, 3:] for name in ("input_ids", "mm_token_type_ids")}
    assert "image 0 of the batch, grid [1, 4, 4], needs 4 in a row and has 2" in message_of(inputs, **cut)


def test_fault_14_a_hole_in_the_mask():
    inputs = models.batch(ROWS)
    mask = inputs["attention_mask"].clone()
    mask[0, (inputs["input_ids"][0] == models.IMAGE).nonzero()[2]] = 0
    assert "image 0 of the batch" in message_of(inputs, attention_mask=mask, mm_token_type_ids=None)


def test_fault_15_counts():
    inputs = models.batch(ROWS)
    pixels, grid = inputs["pixel_values"], inputs["image_grid_thw"]
    free = {"mm_token_type_ids": None}
    text = int((inputs["input_ids"][1] < 256).nonzero()[-1])
    more = inputs["input_ids"].clone()
    more[1, text] = models.IMAGE
    fewer = inputs["input_ids"].clone()
    fewer[1, (fewer[1] == models.IMAGE).nonzero()[0]] = 7
    assert "10 image placeholders (268), but image_grid_thw asks for 9" in message_of(inputs, input_ids=more, **free)
    assert "image 2 of the batch, grid [1, 2, 4], needs 2 in a row and has 1" in message_of(inputs, input_ids=fewer, **free)
    assert "pixel_values: expected 36 rows by its grid_thw, got 32" in message_of(inputs, pixel_values=pixels[:-4])
    assert "pixel_values: expected 36 rows by its grid_thw, got 40" in message_of(
        inputs, pixel_values=torch.cat((pixels, pixels[:4]))
    )
    assert "image_grid_thw asks for 7" in message_of(inputs, image_grid_thw=grid[:-1], pixel_values=pixels[:-8])
    assert "image_grid_thw asks for 11" in message_of(inputs, image_grid_thw=torch.cat((grid, grid[-1:])))
    assert "image 0 of the batch, grid [1, 2, 2]" not in message_of(inputs, image_grid_thw=grid.flip(0))
    assert "pixel_values: the grids ask for 36 patch rows, but no pixels were given" in message_of(inputs, pixel_values=None)
    assert "9 image placeholders (268) but no image_grid_thw" in message_of(inputs, image_grid_thw=None, pixel_values=None)
    only_text = models.batch([[("text", 5)]])
    assert "image_grid_thw asks for 9" in message_of(only_text, pixel_values=pixels, image_grid_thw=grid)
    assert "pixel_values: expected 0 rows by its grid_thw, got 36" in message_of(only_text, pixel_values=pixels)


def test_fault_15_grids_in_another_order():
    """The counts add up, but no medium would get its own pixels."""
    inputs = models.batch([[("image", 2, 4), ("text", 1), ("image", 4, 4), ("text", 1)]])
    message = message_of(inputs, image_grid_thw=inputs["image_grid_thw"].flip(0))
    assert "image 0 of the batch, grid [1, 4, 4], needs 4 in a row and has 2" in message


def test_fault_15_a_medium_over_two_sequences():
    ids = torch.tensor([[1, models.IMAGE], [models.IMAGE, 2]])
    inputs = {"input_ids": ids, "pixel_values": torch.zeros(8, 1176), "image_grid_thw": torch.tensor([[1, 2, 4]])}
    assert "image 0 of the batch, grid [1, 2, 4], needs 2 in a row and has 1" in message_of(inputs)


def test_fault_15_leaves_the_cache_alone():
    _, ours = pair()
    cache = empty_cache(ours, 1, 30)
    models.answers(ours, models.batch([[("text", 4)]]), max_new_tokens=2, cache=cache, **GREEDY)
    before = ([x.clone() for x in cache.keys + cache.values], list(cache.lengths), list(cache.deltas))
    inputs = models.batch([[("image", 4, 4), ("text", 6)]])
    for change in ({"pixel_values": inputs["pixel_values"][:-1]}, {"image_grid_thw": inputs["image_grid_thw"] * 2}):
        with pytest.raises(ValueError):
            ours.generate(**{**inputs, **change}, cache=cache, max_new_tokens=2)
    assert (cache.lengths, cache.deltas) == (before[1], before[2])
    assert all(torch.equal(a, b) for a, b in zip(cache.keys + cache.values, before[0], strict=True))


# 16: gradients that don't arrive. (Gradient checkpointing is not there yet.)


class Adapter(nn.Module):
    """A low-rank adapter around a linear layer, as adapter libraries put it in the layer's place."""

    def __init__(self, base: nn.Module, rank: int = 2):
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)

    @property
    def weight(self):
        return self.base.weight

    @property
    def bias(self):
        return self.base.bias

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


def test_fault_16_adapters_get_gradients():
    """Around every linear layer of the tower and the decoder, everything else frozen."""
    hf = models.transformers_model(models.CONFIGS["released"])
    ours = Qwen2VL.from_transformers(hf).requires_grad_(False)
    adapters = {}
    for name, module in list(ours.named_modules()):
        if isinstance(module, nn.Linear):
            owner, _, leaf = name.rpartition(".")
            adapters[name] = Adapter(module).double()
            setattr(ours.get_submodule(owner), leaf, adapters[name])
    assert len(adapters) == 2 * 4 + 2 + 2 * 7
    inputs = models.batch(ROWS)
    ours(**inputs, labels=models.labels_of(inputs)).loss.backward()
    for name, adapter in adapters.items():
        for part in (adapter.down, adapter.up):
            assert part.weight.grad is not None and part.weight.grad.any(), f"no gradient in the adapter of {name}"


@pytest.mark.parametrize("trained", ["visual.", "visual.merger.", "model.", "model.embed_tokens."])
def test_fault_16_one_part_trained(trained):
    """With the rest frozen a part gets the gradients that it gets when everything is trained."""
    ours = Qwen2VL.from_transformers(models.transformers_model(models.CONFIGS["released"]))
    inputs = models.batch(ROWS)
    labels = models.labels_of(inputs)
    ours(**inputs, labels=labels).loss.backward()
    everything = {name: parameter.grad for name, parameter in ours.named_parameters()}
    ours.zero_grad(set_to_none=True)
    for name, parameter in ours.named_parameters():
        parameter.requires_grad_(name.startswith(trained))
    ours(**inputs, labels=labels).loss.backward()
    for name, parameter in ours.named_parameters():
        if name.startswith(trained):
            assert everything[name].any() and torch.equal(parameter.grad, everything[name]), name
        else:
            assert parameter.grad is None, name


# 18: a model on the CPU stays away from kernels for the GPU.


def test_fault_18_cpu_model_beside_a_gpu(monkeypatch):
    """With a CUDA device in the machine and every backend written, tensors on the CPU still run in torch."""
    _, ours = pair()
    inputs = models.batch(ROWS)
    with torch.no_grad():
        expected = ours(**inputs).logits
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(backends, "_chosen", {})
    monkeypatch.setattr(backends, "_WRITTEN", dict.fromkeys(backends.BACKENDS, backends.OPS))
    monkeypatch.setattr(backends, "extension_error", lambda: None)
    monkeypatch.setattr(backends, "_interpreting", lambda: False)
    monkeypatch.setattr(backends, "_installed", lambda package: True)
    chosen = []
    choose = backends.unusable
    monkeypatch.setattr(backends, "unusable", lambda *a: chosen.append((a[1], choose(*a))) or chosen[-1][1])
    with torch.no_grad():
        assert torch.equal(ours(**inputs).logits, expected)
    assert {name for name, reason in chosen if reason is None} == {"torch"}
    assert {name for name, _ in chosen} == set(backends.BACKENDS)
    for name in ("cuda", "triton", "flash"):
        monkeypatch.setattr(ours, "backend", name)
        with pytest.raises(RuntimeError, match="the tensors are on cpu"), torch.no_grad():
            ours(**inputs)
