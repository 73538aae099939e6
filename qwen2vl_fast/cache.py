"""The key-value cache: one row of slots a sequence, with the rotary offset that belongs to it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .config import TextConfig


@dataclass(frozen=True)
class Step:
    """Where the T new tokens of one forward go, and which slots they see.

    slots: [T] int64, index into the flattened [B * S] slots. lengths: entries of each sequence after the step.
    decode: every sequence adds exactly one token. key_slots: [Tk] int64, all entries of all sequences, when some of them are
    older than the step; cu_seqlens_k: [B + 1] int32, their boundaries.
    """

    slots: torch.Tensor
    lengths: tuple[int, ...]
    decode: bool
    key_slots: torch.Tensor | None
    cu_seqlens_k: torch.Tensor | None


class KVCache:
    """Keys and values of B sequences: for each layer two tensors [B, S, Hk, D], S slots allocated.

    lengths: entries of each sequence. deltas: largest rotary id + 1 - length of each (MODEL.md section 4), so that a
    sequence carries its own offset and nothing is kept on the model.
    """

    def __init__(self, config: TextConfig, batch: int, slots: int, *, dtype: torch.dtype, device: torch.device):
        shape = (batch, slots, config.num_key_value_heads, config.head_dim)
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_hidden_layers)]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_hidden_layers)]
        self.lengths = [0] * batch
        self.deltas = [0] * batch

    @property
    def slots(self) -> int:
        return self.keys[0].shape[1]

    def begin(self, counts: list[int]) -> Step:
        """Plans the addition of counts[b] tokens to each sequence and makes room; `append` follows for every layer."""
        if len(counts) != len(self.lengths):
            raise ValueError(f"cache: holds {len(self.lengths)} sequences, but the input has {len(counts)}")
        before, after = self.lengths, [old + new for old, new in zip(self.lengths, counts, strict=True)]
        self._reserve(max(after))
        device, slots = self.keys[0].device, self.slots
        new_slots = [
            torch.arange(b * slots + old, b * slots + end) for b, (old, end) in enumerate(zip(before, after, strict=True))
        ]
        decode = all(count == 1 for count in counts)
        key_slots = bounds = None
        if any(before) and not decode:
            key_slots = torch.cat([torch.arange(b * slots, b * slots + end) for b, end in enumerate(after)]).to(device)
            bounds = torch.tensor([0, *after]).cumsum(0).to(device=device, dtype=torch.int32)
        self.lengths = after
        return Step(torch.cat(new_slots).to(device, non_blocking=True), tuple(after), decode, key_slots, bounds)

    def append(self, layer: int, k: torch.Tensor, v: torch.Tensor, step: Step) -> tuple[torch.Tensor, torch.Tensor]:
        """Stores k, v [T, Hk, D]; returns what the step's queries attend to.

        For a decode step the slots [B, max length, Hk, D], else packed keys and values [Tk, Hk, D].
        """
        stored = []
        for buffer, new in ((self.keys[layer], k), (self.values[layer], v)):
            flat = buffer.flatten(0, 1)
            flat.index_copy_(0, step.slots, new)
            if step.decode:
                stored.append(buffer[:, : max(step.lengths)])
            else:
                stored.append(new if step.key_slots is None else flat[step.key_slots])
        return stored[0], stored[1]

    def repeat(self, times: int) -> None:
        """Every sequence `times` times in a row, for several continuations of one prompt."""
        for buffers in (self.keys, self.values):
            buffers[:] = [buffer.repeat_interleave(times, 0) for buffer in buffers]
        self.lengths = [length for length in self.lengths for _ in range(times)]
        self.deltas = [delta for delta in self.deltas for _ in range(times)]

    def _reserve(self, needed: int) -> None:
        if needed <= self.slots:
            return
        extra = max(needed, 2 * self.slots) - self.slots
        for buffers in (self.keys, self.values):
            buffers[:] = [
                torch.cat((buffer, buffer.new_zeros(buffer.shape[0], extra, *buffer.shape[2:])), 1) for buffer in buffers
            ]
