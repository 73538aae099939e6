"""One rank of the distributed tests of patch: `python -m tests.ranks KIND RANK WORLD PORT FOLDER`.

KIND: ddp, fsdp2, late fsdp2 (patched after it was wrapped), zero1 (torch's), accelerate, deepspeed 0 to 3 (its ZeRO stage),
plain deepspeed 0 (unpatched).

Rank 0 has images, rank 1 text alone. Writes the losses of two steps, and afterwards the parameters, to FOLDER/RANK.pt.
"""

from __future__ import annotations

import datetime
import os
import sys
from pathlib import Path
from typing import Any

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
    if kind == "accelerate":  # wraps it itself
        return hf
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


def with_deepspeed(stage: int, hf: nn.Module, rank: int, signature: nn.Module) -> list[torch.Tensor]:
    """Losses of the steps, in float32."""
    import deepspeed
    import deepspeed.ops

    for name in list(deepspeed.ops.__compatible_ops__):  # none is compiled for this
        deepspeed.ops.__compatible_ops__[name] = False
    deepspeed.init_distributed(dist_backend="gloo")
    engine, *_ = deepspeed.initialize(
        model=hf.float(), optimizer=torch.optim.SGD(hf.parameters(), lr=0.1),
        config={
            "train_micro_batch_size_per_gpu": 1, "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False,
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        },
    )  # fmt: skip
    losses = []
    for _ in range(STEPS):
        inputs = {name: x.float() if x.is_floating_point() else x for name, x in batch_of(rank).items()}
        loss = engine(**models.peer_inputs(signature, inputs), use_cache=False).loss
        engine.backward(loss)
        engine.step()
        losses.append(loss.detach())
    return losses


def main(kind: str, rank: int, world: int, port: int, folder: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(world))
    os.environ.update(LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world), LOCAL_SIZE=str(world), DS_ACCELERATOR="cpu")
    dist.init_process_group("gloo", rank=rank, world_size=world, timeout=datetime.timedelta(seconds=60))
    plain = hf = build()
    if "deepspeed" in kind:
        report = None if kind.startswith("plain") else qwen2vl_fast.patch(hf)
        losses = with_deepspeed(int(kind[-1]), hf, rank, plain)
        return finish(folder, rank, losses, {}, report)
    if kind.startswith("late"):  # patched after it was wrapped
        hf = wrap(kind.removeprefix("late "), hf)
        report = qwen2vl_fast.patch(plain)
    else:
        report = qwen2vl_fast.patch(hf)
        hf = wrap("ddp" if kind == "zero1" else kind, hf)
    optimizer = optimizer_of(kind, hf)
    if kind == "accelerate":
        from accelerate import Accelerator

        hf, optimizer = Accelerator(cpu=True).prepare(hf, optimizer)
    losses = []
    for _ in range(STEPS):
        losses.append(step(hf, batch_of(rank), plain))
        optimizer.step()
        optimizer.zero_grad()
    parameters = {}
    for name, parameter in plain.named_parameters():
        full = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
        parameters[name] = full.detach().clone()
    finish(folder, rank, losses, parameters, report)


def finish(folder: str, rank: int, losses: list, parameters: dict, report: Any) -> None:
    calls = {name: part.calls for name, part in report.parts.items()} if report else {}
    torch.save({"losses": losses, "parameters": parameters, "calls": calls, "report": str(report)}, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    kind, rank, world, port, folder = sys.argv[1:]
    main(kind, int(rank), int(world), int(port), folder)
