"""The state of a training run in one safetensors file, written atomically; its scalars are JSON in the file's header."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

_WEIGHT = "weight"


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Call write(temporary path), then move that file to path: path never holds half of it, whenever the process ends."""
    temporary = path.with_name(f"{path.name}.tmp")
    write(temporary)
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_json(path: Path, content: Any) -> None:
    text = json.dumps(content, indent=2) + "\n"
    replace_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def save_state(
    path: Path,
    weights: dict[str, torch.Tensor],
    optimizers: Sequence[torch.optim.Optimizer],
    scalars: dict[str, Any],
) -> None:
    """Save weights, what the optimizers remember of them, and scalars.

    Args:
        weights: name -> a parameter that one of the optimizers updates.
        optimizers: each parameter belongs to one of them; all of their state is tensors.
        scalars: JSON values.
    """
    tensors: dict[str, torch.Tensor] = {}
    for name, weight in weights.items():
        tensors[f"{_WEIGHT}:{name}"] = weight.detach().contiguous()
        for optimizer in optimizers:
            for key, value in optimizer.state.get(weight, {}).items():
                tensors[f"{key}:{name}"] = value.contiguous()
    replace_file(path, lambda temporary: save_file(tensors, temporary, metadata={"scalars": json.dumps(scalars)}))


def load_state(
    path: Path, weights: dict[str, torch.Tensor], optimizers: Sequence[torch.optim.Optimizer]
) -> dict[str, Any]:
    """Read what save_state wrote into weights and optimizers, in place; returns the scalars.

    Raises:
        ValueError: the file is of a model with other parameters.
    """
    owners = {id(p): o for o in optimizers for group in o.param_groups for p in group["params"]}
    with safe_open(path, framework="pt") as file:
        saved: dict[str, dict[str, torch.Tensor]] = {}
        for stored in file.keys():
            key, name = stored.split(":", 1)
            saved.setdefault(name, {})[key] = file.get_tensor(stored)
        scalars = json.loads(file.metadata()["scalars"])
    if saved.keys() != weights.keys():
        others = sorted(saved.keys() ^ weights.keys())
        raise ValueError(f"{path}: expected the parameters of this model, got others: {others[:4]}")
    for name, weight in weights.items():
        value = saved[name].pop(_WEIGHT)
        if value.shape != weight.shape:
            raise ValueError(f"{path}: {name}: expected shape {list(weight.shape)}, got {list(value.shape)}")
        with torch.no_grad():
            weight.copy_(value)
        if saved[name]:
            owners[id(weight)].state[weight] = {key: moment.to(weight.device) for key, moment in saved[name].items()}
    return scalars
