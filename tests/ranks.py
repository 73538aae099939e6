"""One rank of the distributed tests of patch: `python -m tests.ranks KIND RANK WORLD PORT FOLDER`.

Rank 0 has images, rank 1 text alone. Writes the losses of two steps, and afterwards the parameters, to FOLDER/RANK.pt.
"""

from __future__ import annotations

import datetime
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

import qwen2vl_fast
from tests import models, patching

ROWS = ([[("text", 3), ("image", 4, 6), ("text", 4)], [("text", 5)]], [[("text", 6)], [("text", 4)]])
STEPS = 2


def batch_of(rank: int) -> dict[str, torch.Tensor]:
    inputs = models.batch(ROWS[rank])
    return {**inputs, "labels": models.labels_of(inputs)}


def step(hf: nn.Module, inputs: dict[str, torch.Tensor], signature: nn.Module) -> torch.Tensor:
    loss = hf(**models.peer_inputs(signature, inputs), use_cache=False).loss
    loss.backward()
    return loss.detach()


def build() -> nn.Module:
    return patching.model_of(models.released_config(tie_word_embeddings=False)).train()


def wrap(kind: str, hf: nn.Module) -> nn.Module:
    if kind == "ddp":
        return nn.parallel.DistributedDataParallel(hf)
    from torch.distributed.fsdp import fully_shard

    for block in (*hf.model.visual.blocks, *hf.model.language_model.layers):
        fully_shard(block)
    fully_shard(hf.model.visual)
    return fully_shard(hf)


def optimizer_of(kind: str, hf: nn.Module) -> torch.optim.Optimizer:
    if kind == "zero1":
        from torch.distributed.optim import ZeroRedundancyOptimizer

        return ZeroRedundancyOptimizer(hf.parameters(), optimizer_class=torch.optim.SGD, lr=0.1)
    return torch.optim.SGD(hf.parameters(), lr=0.1)


def main(kind: str, rank: int, world: int, port: int, folder: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(world))
    dist.init_process_group("gloo", rank=rank, world_size=world, timeout=datetime.timedelta(seconds=60))
    plain = hf = build()
    if kind.startswith("late"):  # patched after it was wrapped
        hf = wrap(kind.removeprefix("late "), hf)
        report = qwen2vl_fast.patch(plain)
    else:
        report = qwen2vl_fast.patch(hf)
        hf = wrap("ddp" if kind == "zero1" else kind, hf)
    optimizer = optimizer_of(kind, hf)
    losses = []
    for _ in range(STEPS):
        losses.append(step(hf, batch_of(rank), plain))
        optimizer.step()
        optimizer.zero_grad()
    parameters = {}
    for name, parameter in plain.named_parameters():
        full = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
        parameters[name] = full.detach().clone()
    calls = {name: part.calls for name, part in report.parts.items()}
    torch.save({"losses": losses, "parameters": parameters, "calls": calls, "report": str(report)}, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    kind, rank, world, port, folder = sys.argv[1:]
    main(kind, int(rank), int(world), int(port), folder)
