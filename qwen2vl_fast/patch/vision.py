"""The vision tower of transformers: patch embedding, packing, rotation, attention, activations, merge.

The tower's forward makes a Pack from the grids on the host; its blocks are called as the modules that they are and hand it to
their attention in the place of cos and sin. Shape letters: T patches of a pack, H heads, D head dim, C = H * D.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import torch
from torch import nn

from .. import ops
from ..inputs import capped_packs, to_host
from ..ops.linear import linear
from ..ops.vision_attention import vision_attention
from ..positions import AttentionSchedule, attention_schedule, check_grid, check_grid_shape, vision_position_ids
from ..reference import vision_rope_angles
from .hooks import (
    activate,
    autocast,
    bare,
    hook_of,
    hooked,
    original,
    plain_linear,
    project,
    readable,
    silent,
    unknown_activation,
)
from .norms import add_norm

MAX_PACK_PATCHES = 1 << 17  # patches that go through the tower at once


class Pack(NamedTuple):
    """In the place of (cos, sin); three fields, so that code which expects those two fails instead of taking them.

    position_ids: [2, T]. bits: [D/4] int32, the float32 frequencies bit by bit: mixed precision (FSDP) casts every floating
    tensor that is handed to a block.
    """

    position_ids: torch.Tensor
    bits: torch.Tensor
    schedule: AttentionSchedule

    @property
    def inv_freq(self) -> torch.Tensor:
        return self.bits.view(torch.float32)

    def cos_sin(self) -> tuple[torch.Tensor, torch.Tensor]:
        """What transformers hands to its blocks: [T, D] each, float32."""
        angles = vision_rope_angles(self.position_ids, self.inv_freq)
        angles = torch.cat((angles, angles), -1)
        return angles.cos(), angles.sin()


def tower(self: nn.Module, hidden_states: torch.Tensor, grid_thw: torch.Tensor, **kwargs: Any) -> Any:
    """hidden_states [T, patch_dim] and grid_thw [N, 3] -> as the class's forward: visual tokens [T / m^2, hidden]."""
    hook = hook_of(self)
    if not hook.part.enabled:
        return original(self, hidden_states, grid_thw, **kwargs)
    if kwargs.get("output_attentions") or getattr(self.config, "output_attentions", False):
        hook.part.fell_back("attention weights were asked for")
        return original(self, hidden_states, grid_thw, **kwargs)
    if not silent(self.rotary_pos_emb, hook.more["rotary"]):
        hook.part.fell_back("the rotary module is another one, or has hooks")
        return original(self, hidden_states, grid_thw, **kwargs)
    hook.part.ran()
    return hook.more["run"](self, hidden_states, grid_thw, **kwargs)


def run_tower(self: nn.Module, hidden_states: torch.Tensor, grid_thw: torch.Tensor, **kwargs: Any) -> Any:
    hook = hook_of(self)
    return_dict = kwargs.pop("return_dict", None)
    given = {name: kwargs.pop(name, None) for name in ("position_ids", "cu_seqlens", "max_seqlen")}
    x = self.patch_embed(hidden_states)
    if _checkpoints(self) and not x.requires_grad and any(parameter.requires_grad for parameter in self.blocks.parameters()):
        x.requires_grad_()  # a reentrant checkpoint has gradients only if its input has: adapters would get none
    whole = kwargs.get("output_hidden_states") or getattr(self.config, "output_hidden_states", False)
    outputs = []
    for rows, pack in _packs(self, x, grid_thw, given["cu_seqlens"], given["position_ids"], bool(whole)):
        for block in self.blocks:
            rows = _call(self, hook, block, rows, pack, kwargs)
        outputs.append(rows)
    x = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    merged = self.merger(x)
    if not hook.more["output"]:
        return merged
    result = hook.more["output"](last_hidden_state=x, pooler_output=merged)
    return result.to_tuple() if return_dict is False else result


def several_ranks() -> bool:
    """Whether other processes may wait for this one inside a forward: sharded weights are gathered block by block."""
    return torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1


def _checkpoints(self: nn.Module) -> bool:
    """Whether the blocks run inside gradient checkpoints now."""
    on = self.gradient_checkpointing or any(getattr(block, "gradient_checkpointing", False) for block in self.blocks)
    return bool(on and self.training and torch.is_grad_enabled())


@torch.compiler.disable  # reads the grids on the host
def _packs(
    self: nn.Module, x: torch.Tensor, grid_thw: torch.Tensor, cu_seqlens: Any, position_ids: Any, whole: bool
) -> list[tuple[torch.Tensor, Pack]]:
    """(patches, what the blocks need to know of them) of each pack of at most MAX_PACK_PATCHES patches."""
    check_grid_shape("grid_thw", grid_thw)
    grid, bounds = to_host(grid_thw, cu_seqlens)
    grid = check_grid(grid, self.spatial_merge_size)
    if x.shape[0] != (patches := int(grid.prod(1).sum())):
        raise ValueError(f"hidden_states: expected {patches} patches by grid_thw, got {x.shape[0]}")
    if whole or several_ranks() or bounds is not None or position_ids is not None:
        return [(x, _pack(self, x.device, grid, bounds, position_ids))]
    units = capped_packs(grid, MAX_PACK_PATCHES)
    return [(x[rows], _pack(self, x.device, part, None, None)) for rows, part in units]


def _pack(self: nn.Module, device: torch.device, grid: Any, bounds: Any, position_ids: Any) -> Pack:
    """position_ids: what a caller of transformers 5.x computed itself, [T, 2]; bounds: likewise its cu_seqlens."""
    if position_ids is None:
        ids = vision_position_ids(grid, self.spatial_merge_size)
    else:
        ids = position_ids.t()
    heads = self.config.num_heads
    head_dim = self.config.embed_dim // heads
    return Pack(
        ids.to(device, non_blocking=True),
        frequencies(self.rotary_pos_emb, hook_of(self).more["exact"]).to(device, non_blocking=True).view(torch.int32),
        attention_schedule(grid if bounds is None else bounds.int(), heads=heads, head_dim=head_dim, device=device),
    )


def frequencies(rotary: nn.Module, exact: torch.Tensor | None) -> torch.Tensor:
    """The module's float32 frequencies; `exact` where model.to(dtype) has rounded them (wrong from position 256 on)."""
    table = rotary.inv_freq
    return exact if table.dtype in (torch.float16, torch.bfloat16) else table.float()


def _call(self: nn.Module, hook: Any, block: nn.Module, x: torch.Tensor, pack: Pack, kwargs: dict) -> torch.Tensor:
    """One block, as a module, with the checkpointing that this release leaves to the tower (4.52)."""
    given: Any = pack
    if not hooked(getattr(block, "attn", block)):
        hook.part.fell_back("a block has an attention that patch did not see")
        given = pack.cos_sin()
    if hook.more["checkpoints"] and self.gradient_checkpointing and self.training:
        return self._gradient_checkpointing_func(block.__call__, x, pack.schedule.cu_seqlens, None, given)
    return block(x, cu_seqlens=pack.schedule.cu_seqlens, position_embeddings=given, **kwargs)


def patch_embed(self: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
    """The convolution with kernel = stride as the matrix product that it is: [T, patch_dim] -> [T, C]."""
    hook, proj = hook_of(self), self.proj
    x = hidden_states.to(proj.weight.dtype)
    usable = bare(proj, nn.Conv3d) and readable(proj.weight, x) and proj.bias is None
    if not hook.part.enabled or not usable or autocast(x):
        if hook.part.enabled:
            hook.part.fell_back("autocast" if usable else "the convolution is not a plain Conv3d with its weight in place")
        return original(self, hidden_states)
    hook.part.ran()
    weight = proj.weight.flatten(1)
    return linear(x.reshape(-1, weight.shape[1]), weight)


def block(
    self: nn.Module,
    hidden_states: torch.Tensor,
    cu_seqlens: torch.Tensor | None = None,
    rotary_pos_emb: torch.Tensor | None = None,
    position_embeddings: Any = None,
    **kwargs: Any,
) -> torch.Tensor:
    """x + attn(norm1(x)), then x + mlp(norm2(x)), the first addition fused with norm2."""
    hook = hook_of(self)
    if rotary_pos_emb is not None:
        kwargs["rotary_pos_emb"] = rotary_pos_emb
    if not hook.part.enabled or hook.more["checkpoints"] and self.gradient_checkpointing and self.training:
        return original(self, hidden_states, cu_seqlens=cu_seqlens, position_embeddings=position_embeddings, **kwargs)
    attended = self.attn(self.norm1(hidden_states), cu_seqlens=cu_seqlens, position_embeddings=position_embeddings, **kwargs)
    normed, x = add_norm(self.norm2, hook, hidden_states, attended)
    return x + self.mlp(normed)


def attention(
    self: nn.Module,
    hidden_states: torch.Tensor,
    cu_seqlens: torch.Tensor | None = None,
    rotary_pos_emb: torch.Tensor | None = None,
    position_embeddings: Any = None,
    **kwargs: Any,
) -> torch.Tensor:
    """Rotation and attention of one pack: [T, C] -> [T, C]."""
    hook, pack = hook_of(self), position_embeddings
    if rotary_pos_emb is not None:
        kwargs["rotary_pos_emb"] = rotary_pos_emb
    if not isinstance(pack, Pack):
        return original(self, hidden_states, cu_seqlens=cu_seqlens, position_embeddings=pack, **kwargs)
    scaled = getattr(self, "scaling", None) not in (None, (hidden_states.shape[-1] // self.num_heads) ** -0.5)
    if not hook.part.enabled or scaled:
        if hook.part.enabled:
            hook.part.fell_back("another scaling of the scores")
        return original(self, hidden_states, cu_seqlens=cu_seqlens, position_embeddings=pack.cos_sin(), **kwargs)
    hook.part.ran()
    qkv, heads = project(self.qkv, hidden_states), self.num_heads
    owned = qkv.requires_grad or plain_linear(self.qkv, hidden_states)  # hooks may keep what they saw
    qkv = qkv.reshape(qkv.shape[0], 3, heads, qkv.shape[1] // (3 * heads))
    schedule = _moved(pack.schedule, qkv.device)
    rope_backend, backend = (hook.options.backends[op] for op in ("vision_rope", "varlen_attention"))
    if hook.more["rope"].enabled:
        hook.more["rope"].ran()
        qkv = qkv if owned else qkv.clone()
        o = vision_attention(qkv, pack.position_ids, pack.inv_freq, schedule, rope_backend=rope_backend, backend=backend)
    else:
        q, k, v = qkv.unbind(1)
        q, k = hook.more["library_rope"](q, k, *pack.cos_sin())
        o = ops.varlen_attention(q, k, v, schedule.cu_seqlens, schedule=schedule, backend=backend)
    return project(self.proj, o.flatten(1))


def _moved(schedule: AttentionSchedule, device: torch.device) -> AttentionSchedule:
    """On the device of this block: where a model is split, accelerate moves tensors but not what a dataclass holds."""
    if schedule.cu_seqlens.device == device:
        return schedule
    tensors = {name: x for name, x in vars(schedule).items() if isinstance(x, torch.Tensor)}
    return dataclasses.replace(schedule, **{name: x.to(device) for name, x in tensors.items()})


def mlp(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
    hook = hook_of(self)
    function = hook.more["functions"].get(type(self.act)) if bare(self.act, type(self.act)) else None
    if not hook.part.enabled or function is None:
        if hook.part.enabled:
            hook.part.fell_back(unknown_activation(self.act, hook.more["functions"]))
        return original(self, x)
    hook.part.ran()
    return project(self.fc2, activate(self.fc1, x, function, hook.options.backends[function.__name__]))


def merger(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """LayerNorm, m^2 patches side by side, two layers with GELU between: [T, C] -> [T / m^2, hidden]."""
    hook = hook_of(self)
    layers = list(self.mlp) if bare(self.mlp, nn.Sequential) else []
    known = len(layers) == 3 and bare(layers[1], nn.GELU) and layers[1].approximate == "none"
    if not hook.part.enabled or not known:
        if hook.part.enabled:
            hook.part.fell_back("the merger's activation is not a plain GELU, or has hooks")
        return original(self, x)
    hook.part.ran()
    first, _, second = layers
    y = self.ln_q(x).view(-1, self.hidden_size)
    return project(second, activate(first, y, ops.gelu, hook.options.backends["gelu"]))
