"""Checkpoints: safetensors on disk <-> the parameters of the model. The module tree uses the released names, so the mapping
is a short table of prefixes.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

# transformers 4.52 and later name the parts differently in memory, and so do files saved by some of its releases.
RENAMES = (
    ("model.visual.", "visual."),
    ("model.language_model.", "model."),
    ("language_model.", "model."),
)
# Buffers that old checkpoints carry and that are computed from the config.
IGNORED_SUFFIXES = (".rotary_emb.inv_freq", ".rotary_pos_emb.inv_freq")
_SHARD_BYTES = 5 * 10**9


def released_name(name: str) -> str:
    """The released checkpoint's name of a parameter, whichever layout `name` comes from."""
    for prefix, replacement in RENAMES:
        if name.startswith(prefix):
            return replacement + name[len(prefix) :]
    return name


def checkpoint_files(directory: Path) -> list[Path]:
    """The safetensors files of a checkpoint folder, by its index if it has one.

    Raises FileNotFoundError when there is none, and ValueError for pickled weights or an index that points elsewhere.
    """
    index = directory / "model.safetensors.index.json"
    if index.exists():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, AttributeError, TypeError) as error:
            raise ValueError(f"{index}: expected a JSON object with a weight_map: {error!r}") from None
        for name in names:
            if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
                raise ValueError(f"{index}: weight_map names {name!r}; expected a .safetensors file in the same folder")
            if not (directory / name).is_file():
                raise FileNotFoundError(f"{index} names {name}, which is not in {directory}")
        return [directory / name for name in names]
    single = directory / "model.safetensors"
    if single.is_file():
        return [single]
    pickled = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in directory.glob(pattern))
    if pickled:
        raise ValueError(
            f"{directory}: only pickled weights ({pickled[0]}) found; only safetensors are read, since a pickle runs code"
        )
    raise FileNotFoundError(f"{directory}: expected model.safetensors or model.safetensors.index.json")


def load_parameters(model: nn.Module, directory: Path, *, tied: bool, device: torch.device, dtype: torch.dtype) -> None:
    """Puts a checkpoint's tensors in place of the model's (meta) parameters.

    On the CPU, in the checkpoint's own dtype, the parameters are the mapped file: nothing is copied and pages are read when
    first used. Raises ValueError that lists missing, surplus or misshapen tensors; the model is then not to be used.
    """
    expected = dict(model.named_parameters())
    problems: list[str] = []
    for file in checkpoint_files(directory):
        try:
            with safe_open(file, framework="pt") as tensors:
                for stored in tensors.keys():
                    name = released_name(stored)
                    if name.endswith(IGNORED_SUFFIXES) or (tied and name == "lm_head.weight"):
                        continue
                    if name not in expected:
                        problems.append(f"surplus {stored}")
                        continue
                    wanted = tuple(expected.pop(name).shape)
                    tensor = tensors.get_tensor(stored)
                    if tuple(tensor.shape) != wanted or not tensor.is_floating_point():
                        problems.append(f"{stored} is {tensor.dtype} {list(tensor.shape)}, expected floating {list(wanted)}")
                        continue
                    assign(model, name, nn.Parameter(tensor.to(device=device, dtype=dtype)))
        except SafetensorError as error:
            raise ValueError(f"{file}: not a readable safetensors file: {error}") from None
    problems.extend(f"missing {name}" for name in expected)
    if problems:
        shown = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
        raise ValueError(f"{directory}: the tensors do not fit config.json: {shown}")


def share_parameters(model: nn.Module, named: Iterable[tuple[str, nn.Parameter]], *, tied: bool) -> None:
    """Makes the model use these very Parameter objects. Raises ValueError as `load_parameters`."""
    expected = dict(model.named_parameters())
    problems = []
    for original, parameter in named:
        name = released_name(original)
        if tied and name == "lm_head.weight":
            continue
        if name not in expected:
            problems.append(f"surplus {original}")
        elif parameter.shape != expected.pop(name).shape:
            problems.append(f"{original} has shape {list(parameter.shape)}")
        else:
            assign(model, name, parameter)
    problems.extend(f"missing {name}" for name in expected)
    if problems:
        raise ValueError(f"the model's parameters do not fit its config: {'; '.join(problems[:8])}")


def assign(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, parameter)


def save_parameters(model: nn.Module, directory: Path) -> None:
    """Writes the parameters under their released names, in shards of at most 5 GB with an index when there are several."""
    shards: list[dict[str, torch.Tensor]] = [{}]
    size = 0
    for name, parameter in model.named_parameters():
        tensor = parameter.detach().cpu().contiguous()
        if shards[-1] and size + tensor.nbytes > _SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    if len(shards) == 1:
        save_file(shards[0], directory / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        save_file(shard, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    total = sum(tensor.nbytes for shard in shards for tensor in shard.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


@contextmanager
def replacing_checkpoint(directory: Path) -> Iterator[Path]:
    """A folder to write a checkpoint's files into; they take their places in `directory` when the block ends without error.

    Until then what was there stays whole, also for a model whose parameters are those very files, mapped. Weights of the
    checkpoint before that have no successor are removed, so that a stale index can't be read.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=directory) as temporary:
        part = Path(temporary)
        yield part
        names = {path.name for path in part.iterdir()}
        for name in names:
            os.replace(part / name, directory / name)
        for pattern in ("model.safetensors*", "model-*-of-*.safetensors"):
            for stale in directory.glob(pattern):
                if stale.name not in names:
                    stale.unlink()
