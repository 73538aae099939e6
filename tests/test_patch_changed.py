"""What a user changed in the model shows in the patched one as it does in the unpatched, or is refused in words."""

from __future__ import annotations

import types

import pytest
import torch
from torch import nn

import qwen2vl_fast
from tests.compare import check_parity
from tests.models import OLD_TRANSFORMERS, labels_of, peer_inputs, real_tokens
from tests.patching import forward, patched, twin
from tests.test_patch import NEW


def override_features(hf: nn.Module) -> None:
    plain = type(hf.model).get_image_features

    def doubled(self, *args, **kwargs):
        found = plain(self, *args, **kwargs)
        if isinstance(found, (list, tuple)):
            return type(found)(2 * x for x in found)
        found.pooler_output = tuple(2 * x for x in found.pooler_output)
        return found

    hf.model.get_image_features = types.MethodType(doubled, hf.model)


def hook_vision_rotary(hf: nn.Module) -> None:
    def other(module, arguments, output):
        return tuple(x * 0.5 for x in output) if isinstance(output, tuple) else output * 0.5

    hf.model.visual.rotary_pos_emb.register_forward_hook(other)


def scale_text(hf: nn.Module) -> None:
    for layer in hf.model.language_model.layers:
        layer.self_attn.scaling *= 0.5


def scale_vision(hf: nn.Module) -> None:
    for block in hf.model.visual.blocks:
        block.attn.scaling *= 0.5


CHANGES = {"features": override_features, "rotary": hook_vision_rotary, "text scaling": scale_text, "vision": scale_vision}


@pytest.mark.parametrize("change", [c for c in CHANGES if "rotary" in c or not OLD_TRANSFORMERS])
@pytest.mark.parametrize("late", [False, True])
def test_a_change_shows(change, late, hf, inputs):
    with torch.no_grad():
        before = forward(hf, inputs).logits[real_tokens(inputs)]
        changed = twin(hf)
        CHANGES[change](changed)
        expected = forward(changed, inputs).logits[real_tokens(inputs)]
        assert not torch.allclose(expected, before, rtol=1e-4, atol=1e-4)
        if not late:
            CHANGES[change](hf)
        with patched(hf):
            if late:
                CHANGES[change](hf)
            check_parity(forward(hf, inputs).logits[real_tokens(inputs)], expected, "released")


@NEW  # 4.52's forward does not take it
def test_another_ignore_index(hf, inputs):
    labels = labels_of(inputs)
    hf.train()
    given = {**peer_inputs(hf, inputs), "labels": labels.masked_fill(labels == -100, 7), "ignore_index": 7}
    expected = hf(**given).loss
    with patched(hf) as report:
        check_parity(hf(**given).loss.double(), expected.double(), "released")
    assert report.parts["loss"].passed == {"another ignore_index": 1}


def test_rows_that_are_not_those_of_the_grids(hf, inputs):
    pixels = inputs["pixel_values"]
    with patched(hf), torch.no_grad():
        for rows in (torch.cat([pixels, pixels[:4]]), pixels[:-4]):
            with pytest.raises(ValueError, match=f"pixel_values: expected {len(pixels)} rows by image_grid_thw"):
                forward(hf, {**inputs, "pixel_values": rows})
            with pytest.raises(ValueError, match="patches by grid_thw|rows by image_grid_thw"):
                hf.model.visual(rows, grid_thw=inputs["image_grid_thw"])


class Wrapped(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs)


PLACES = {
    "visual.merger.mlp": "vision activations", "visual.merger": "vision activations", "visual.blocks.0": "vision norms",
    "visual.rotary_pos_emb": "vision attention", "language_model.layers.0": "text norms", "language_model.rotary_emb": "m-rope",
}  # fmt: skip


@pytest.mark.parametrize("place", PLACES)
def test_a_wrapped_module_is_called_and_reported(place, hf, inputs):
    with torch.no_grad():
        expected = forward(hf, inputs).logits[real_tokens(inputs)]
        parent, _, name = place.rpartition(".")
        wrapped = Wrapped(hf.model.get_submodule(place))
        for attribute in ("attention_type", "gradient_checkpointing"):  # what the library reads from outside
            if hasattr(wrapped.inner, attribute):
                setattr(wrapped, attribute, getattr(wrapped.inner, attribute))
        setattr(hf.model.get_submodule(parent), name, wrapped)
        with patched(hf) as report:
            check_parity(forward(hf, inputs).logits[real_tokens(inputs)], expected, "released")
    part = report.parts[PLACES[place]]
    assert part.passed or part.refused, report


def test_unpatch_where_the_class_method_is_back(hf, inputs):
    """accelerate puts it there when it undoes its mixed precision."""
    qwen2vl_fast.patch(hf)
    hf.forward = types.MethodType(type(hf).forward, hf)
    del hf.model.visual.blocks[0].forward
    qwen2vl_fast.unpatch(hf)
    with patched(hf), torch.no_grad():
        forward(hf, inputs)


def test_verify_of_an_unpatched_model_is_refused(hf, inputs):
    report = qwen2vl_fast.patch(hf)
    qwen2vl_fast.unpatch(hf)
    with pytest.raises(RuntimeError, match="not patched"):
        report.verify(peer_inputs(hf, inputs))
