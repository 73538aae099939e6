"""Which module gets which hook. A class that is transformers' own but has changed raises; a module that somebody else put
there is left alone and reported.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from .. import ops
from ..reference import inverse_frequencies
from . import loss, model, norms, text, vision
from .hooks import Options, Part, hooked, replace, replaced_elsewhere
from .releases import Release

TARGETS = ("Qwen2VLForConditionalGeneration", "Qwen2VLModel", "Qwen2VLTextModel", "Qwen2VisionTransformerPretrainedModel")


def parts() -> dict[str, Part]:
    """The rows of a report, in its order."""
    rows = (
        Part("one tower pass", "", "model"),
        Part("position ids", "", "model.get_rope_index"),
        Part("packing", "", "visual"),
        Part("patch embedding", "", "visual.patch_embed"),
        Part("vision attention", "varlen_attention", "visual.blocks.*.attn"),
        Part("vision rope", "vision_rope", "visual.blocks.*.attn"),
        Part("vision norms", "layer_norm", "visual.blocks.*, .norm1, .norm2, .ln_q"),
        Part("vision activations", "quick_gelu", "visual.blocks.*.mlp, visual.merger"),
        Part("m-rope", "mrope", "rotary_emb, layers.*.self_attn"),
        Part("text norms", "rms_norm", "layers.*, .*_layernorm, norm"),
        Part("swiglu", "swiglu", "layers.*.mlp"),
        Part("loss", "linear_cross_entropy", "the model itself"),
    )
    return {part.name: part for part in rows}


class Installer:
    def __init__(self, release: Release, options: Options, wanted: dict[str, bool]):
        """wanted: {argument of patch: its value}."""
        self.release, self.options, self.wanted = release, options, wanted
        self.parts = parts()

    def install(self, root: nn.Module, found: dict[str, list[tuple[str, nn.Module]]]) -> None:
        for path, module in found["Qwen2VisionTransformerPretrainedModel"]:
            self._tower(module, path)
        for path, module in found["Qwen2VLTextModel"]:
            self._text(module, path)
        for path, module in found["Qwen2VLModel"]:
            self._model(module, path)
        for path, module in found["Qwen2VLForConditionalGeneration"]:
            self._whole(module, path)

    def _hook(
        self, module: nn.Module, path: str, kinds: str | tuple[str, ...], part: str, function: Callable,
        *, needs: tuple[str, ...] = (), arguments: tuple[str, ...] = (), method: str = "forward", **more: Any,
    ) -> bool:  # fmt: skip
        """Replaces module.method if it is the method of one of the named classes. needs, arguments: what must be there."""
        row = self.parts[part]
        if reason := self._refusal(module, path, kinds, method):
            row.refuse(reason)
            return False
        owner = self._owner(module, kinds)
        known = inspect.signature(getattr(owner, method)).parameters
        missing = [name for name in needs if not hasattr(module, name)] + [name for name in arguments if name not in known]
        if missing:
            raise RuntimeError(
                f"patch: {path or owner.__name__}.{method} ({owner.__name__} of transformers {self.release.version}) has no "
                f"{', '.join(missing)}, so that {part!r} does not bind; pass {_argument(part)}=False or use a tested release"
            )
        replace(module, row, self.options, function, method=method, **more)
        return True

    def _refusal(self, module: nn.Module, path: str, kinds: str | tuple[str, ...], method: str = "forward") -> str | None:
        """Why module.method is not the one that patch knows."""
        owner = self._owner(module, kinds)
        if owner is None:
            return f"{path} is a {type(module).__name__}"
        if inspect.unwrap(getattr(type(module), method)) is not inspect.unwrap(getattr(owner, method)):
            return f"{type(module).__name__} overrides {method}"
        return f"{path}.{method} was replaced on the instance" if replaced_elsewhere(module, method) else None

    def _owner(self, module: nn.Module, kinds: str | tuple[str, ...]) -> type | None:
        names = (kinds,) if isinstance(kinds, str) else kinds
        classes = [getattr(self.release.modeling, name) for name in names if hasattr(self.release.modeling, name)]
        return next((cls for cls in classes if isinstance(module, cls)), None)

    def _leave(self, part: str) -> bool:
        """Whether the caller doesn't want the part; says so in its row."""
        argument = _argument(part)
        if self.wanted[argument]:
            return False
        if not self.parts[part].refused:
            self.parts[part].refuse(f"{argument}=False")
        return True

    # The tower.

    def _tower(self, tower: nn.Module, path: str) -> None:
        release, at = self.release, f"{path}." if path else ""
        rotary = self._owner(tower.rotary_pos_emb, ("VisionRotaryEmbedding", "Qwen2VLVisionRotaryEmbedding"))
        attention = not self._leave("vision attention")
        rope = not self._leave("vision rope")
        if rope and not attention:
            self.parts["vision rope"].refuse("it needs attention=True")
        if attention and rotary is None:
            self.parts["vision attention"].refuse(f"{at}rotary_pos_emb is a {type(tower.rotary_pos_emb).__name__}")
            attention = False
        if attention:
            attention = self._attention(tower, at, rope)
        if attention:
            self._hook(
                tower, path, TARGETS[3], "packing", vision.tower,
                needs=("patch_embed", "rotary_pos_emb", "blocks", "merger", "spatial_merge_size"),
                arguments=("hidden_states", "grid_thw"), exact=_exact_vision(tower.rotary_pos_emb), rotary=rotary,
                run=release.record(vision.run_tower), output=release.tower_output, checkpoints=release.tower_checkpoints,
            )  # fmt: skip
        else:
            self.parts["packing"].refuse("it needs the vision attention")
        if not self._leave("patch embedding"):
            name, function = f"{at}patch_embed", vision.patch_embed
            self._hook(tower.patch_embed, name, "PatchEmbed", "patch embedding", function, needs=("proj",))
        if not self._leave("vision norms"):
            for index, block in enumerate(tower.blocks):
                name = f"{at}blocks.{index}"
                for norm in ("norm1", "norm2"):
                    self._layer_norm(getattr(block, norm, None), f"{name}.{norm}")
                self._hook(
                    block, name, "Qwen2VLVisionBlock", "vision norms", vision.block, needs=("norm1", "norm2", "attn", "mlp"),
                    arguments=("hidden_states", "cu_seqlens", "position_embeddings"), kind=nn.LayerNorm,
                    checkpoints=release.forward_checkpoints,
                )  # fmt: skip
            self._layer_norm(getattr(tower.merger, "ln_q", None), f"{at}merger.ln_q")
        if not self._leave("vision activations"):
            functions = self._activations()
            for index, block in enumerate(tower.blocks):
                name = f"{at}blocks.{index}.mlp"
                mlp = getattr(block, "mlp", None)
                if type(getattr(mlp, "act", None)) not in functions:
                    self.parts["vision activations"].refuse(f"the activation is a {type(getattr(mlp, 'act', None)).__name__}")
                    continue
                needs = ("fc1", "fc2")
                self._hook(mlp, name, "VisionMlp", "vision activations", vision.mlp, needs=needs, functions=functions)
            needs = ("ln_q", "mlp", "hidden_size")
            self._hook(tower.merger, f"{at}merger", "PatchMerger", "vision activations", vision.merger, needs=needs)

    def _attention(self, tower: nn.Module, at: str, rope: bool) -> bool:
        kinds = ("VisionAttention", "VisionSdpaAttention", "VisionFlashAttention2")
        head = tower.config.embed_dim // tower.config.num_heads
        if head % 4 or getattr(tower.rotary_pos_emb, "attention_scaling", 1.0) != 1.0:
            self.parts["vision attention"].refuse(f"head_dim {head} is no multiple of 4, or the rotation is scaled")
            return False
        bound = [
            self._hook(
                getattr(block, "attn", None), f"{at}blocks.{index}.attn", kinds, "vision attention", vision.attention,
                needs=("qkv", "proj", "num_heads"), arguments=("hidden_states", "cu_seqlens", "position_embeddings"),
                rope=self.parts["vision rope"] if rope else Part("vision rope", "", "", enabled=False),
                library_rope=self.release.modeling.apply_rotary_pos_emb_vision,
            )
            for index, block in enumerate(tower.blocks)
        ]  # fmt: skip
        if rope:
            self.parts["vision rope"].bound += sum(bound)
        return any(bound)

    def _layer_norm(self, norm: nn.Module, path: str) -> None:
        if reason := norms.layer_norm_refusal(norm):
            self.parts["vision norms"].refuse(reason)
        elif replaced_elsewhere(norm):
            self.parts["vision norms"].refuse(f"{path}.forward was replaced on the instance")
        else:
            replace(norm, self.parts["vision norms"], self.options, norms.layer_norm)

    def _activations(self) -> dict[type, Callable]:
        from transformers import activations

        known = {nn.GELU: ops.gelu}
        known |= {type(activations.get_activation(name)): getattr(ops, name) for name in ("quick_gelu", "gelu")}
        return known

    # The decoder.

    def _text(self, decoder: nn.Module, path: str) -> None:
        at = f"{path}." if path else ""
        if not self._leave("m-rope"):
            self._mrope(decoder, at)
        if not self._leave("text norms"):
            names = ("Qwen2RMSNorm", "Qwen2VLRMSNorm")
            kinds = tuple(getattr(self.release.modeling, name) for name in names if hasattr(self.release.modeling, name))
            found = {f"{at}norm": decoder.norm}
            for index, layer in enumerate(decoder.layers):
                for norm in ("input_layernorm", "post_attention_layernorm"):
                    found[f"{at}layers.{index}.{norm}"] = getattr(layer, norm, None)
                self._hook(
                    layer, f"{at}layers.{index}", "Qwen2VLDecoderLayer", "text norms", text.layer,
                    needs=("input_layernorm", "self_attn", "post_attention_layernorm", "mlp"), arguments=("hidden_states",),
                    kind=kinds, checkpoints=self.release.forward_checkpoints,
                    returns_tuple=self.release.layer_returns_tuple,
                )  # fmt: skip
            for name, norm in found.items():
                self._hook(norm, name, names, "text norms", norms.rms_norm, needs=("weight", "variance_epsilon"))
        if not self._leave("swiglu"):
            from transformers import activations

            kinds = {nn.SiLU, type(activations.get_activation("silu"))}
            for index, layer in enumerate(decoder.layers):
                mlp = getattr(layer, "mlp", None)
                if type(getattr(mlp, "act_fn", None)) not in kinds:
                    self.parts["swiglu"].refuse(f"the activation is a {type(getattr(mlp, 'act_fn', None)).__name__}")
                    continue
                needs = ("gate_proj", "up_proj", "down_proj")
                self._hook(mlp, f"{at}layers.{index}.mlp", "Qwen2MLP", "swiglu", text.mlp, needs=needs, activations=kinds)

    def _mrope(self, decoder: nn.Module, at: str) -> None:
        part, rotary = self.parts["m-rope"], decoder.rotary_emb
        kinds = ("Qwen2VLSdpaAttention", "Qwen2VLFlashAttention2", "Qwen2VLAttention")
        sections = _sections(rotary, getattr(decoder.layers[0], "self_attn", None)) if len(decoder.layers) else None
        reason = self._refusal(rotary, f"{at}rotary_emb", "Qwen2VLRotaryEmbedding")
        if reason is None and (sections is None or len(sections) != 3):
            reason = f"mrope_section is {sections}, expected three numbers"
        if reason is None and rotary.rope_type in ("dynamic", "longrope"):
            reason = f"rope type {rotary.rope_type} changes its frequencies with the length"
        for index, layer in enumerate(decoder.layers):  # all of them or none: the rotary module serves every layer
            reason = reason or self._refusal(getattr(layer, "self_attn", None), f"{at}layers.{index}.self_attn", kinds)
        if reason is not None:
            return part.refuse(reason)
        exact = _exact_text(rotary)
        hooked = self._hook(
            rotary, f"{at}rotary_emb", "Qwen2VLRotaryEmbedding", "m-rope", text.rotary,
            needs=("inv_freq", "attention_scaling"), arguments=("x", "position_ids"), exact=exact, decoder=decoder,
        )  # fmt: skip
        if not hooked:
            return None
        for index, layer in enumerate(decoder.layers):
            self._hook(
                layer.self_attn, f"{at}layers.{index}.self_attn", kinds, "m-rope", text.attention,
                needs=("q_proj", "k_proj", "v_proj", "o_proj", "head_dim", "layer_idx"),
                arguments=("hidden_states", "attention_mask", "position_embeddings"), sections=tuple(sections),
                interface=self.release.interface(), mask_options=self.release.mask_options(),
                returns_cache=self.release.attention_returns_cache,
            )  # fmt: skip
        return None

    # What joins them.

    def _model(self, module: nn.Module, path: str) -> None:
        if not self._leave("one tower pass"):
            self._hook(
                module, path, TARGETS[1], "one tower pass", model.forward, needs=("visual", "language_model"),
                arguments=("input_ids", "inputs_embeds", *model.PIXELS, *model.GRIDS),
                owner=self._owner(module, TARGETS[1]),
            )  # fmt: skip
        if not self._leave("position ids"):
            self._hook(
                module, path, TARGETS[1], "position ids", model.get_rope_index, method="get_rope_index",
                arguments=("input_ids", "image_grid_thw", "video_grid_thw", "attention_mask"),
                counts_padding=self.release.padded_deltas(module),
            )  # fmt: skip

    def _whole(self, module: nn.Module, path: str) -> None:
        if hasattr(type(module), model.ENCODE) and not self._leave("one tower pass"):
            self._hook(
                module, path, TARGETS[0], "one tower pass", model.encode_for_generation, method=model.ENCODE,
                arguments=("model_kwargs",), output=self.release.tower_output, owner=getattr(self.release.modeling, TARGETS[1]),
            )  # fmt: skip
        if self._leave("loss"):
            return
        from transformers.modeling_outputs import CausalLMOutputWithPast

        output = getattr(self.release.modeling, "Qwen2VLCausalLMOutputWithPast", CausalLMOutputWithPast)
        fields = tuple(name for name in output.__dataclass_fields__ if name not in ("loss", "logits"))
        needs = ("model", "lm_head", "loss_function")
        self._hook(
            module, path, TARGETS[0], "loss", loss.forward, needs=needs, arguments=("labels",), output=output, fields=fields
        )


def targets(root: nn.Module, modeling: Any) -> dict[str, list[tuple[str, nn.Module]]]:
    """{class: [(path, module)]} of everything in root that patch knows."""
    found: dict[str, list[tuple[str, nn.Module]]] = {name: [] for name in TARGETS}
    for path, module in root.named_modules():
        for name in TARGETS:
            if isinstance(module, getattr(modeling, name)):
                found[name].append((path, module))
    return found


def patched(root: nn.Module) -> Iterator[str]:
    return (path or type(module).__name__ for path, module in root.named_modules() if hooked(module))


def _argument(part: str) -> str:
    arguments = {
        "one tower pass": "attention", "packing": "attention", "position ids": "positions", "patch embedding": "patch_embed",
        "vision attention": "attention", "vision rope": "rope", "m-rope": "rope", "vision norms": "norms",
        "text norms": "norms", "vision activations": "activations", "swiglu": "activations", "loss": "fused_loss",
    }  # fmt: skip
    return arguments[part]


def _sections(rotary: nn.Module, attention: nn.Module) -> list[int] | None:
    if hasattr(rotary, "mrope_section"):
        return rotary.mrope_section
    scaling = getattr(attention, "rope_parameters", None) or getattr(attention, "rope_scaling", None) or {}
    return scaling.get("mrope_section")


def _exact_text(rotary: nn.Module) -> torch.Tensor | None:
    """The float32 frequencies by the config; None if the module's own (not rounded) ones are others."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    default = getattr(rotary, "compute_default_rope_parameters", None)
    function = default if default is not None and rotary.rope_type == "default" else ROPE_INIT_FUNCTIONS[rotary.rope_type]
    device = inspect.signature(function).parameters.get("device")
    needed = {"device": None} if device is not None and device.default is inspect.Parameter.empty else {}
    return _agreeing(function(rotary.config, **needed)[0].float(), rotary.inv_freq)


def _exact_vision(rotary: nn.Module) -> torch.Tensor | None:
    parameters = getattr(getattr(rotary, "config", None), "rope_parameters", None) or {}
    exact = inverse_frequencies(2 * rotary.inv_freq.numel(), parameters.get("rope_theta", 1e4))
    return _agreeing(exact, rotary.inv_freq)


def _agreeing(exact: torch.Tensor, table: torch.Tensor) -> torch.Tensor | None:
    """exact, if it is what the table was before it was rounded."""
    if table.is_meta:
        return exact
    return exact if torch.equal(exact.to(table.dtype), table.detach().cpu()) else None
