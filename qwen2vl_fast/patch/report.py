"""What patch did to a model: a table that counts, and a comparison with the model as it was."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..ops.backends import choose
from .hooks import Options, Part, hooked


class PatchReport:
    """parts: {name: Part}; prints as a table. `verify(batch)` runs the model with and without each part."""

    def __init__(self, model: nn.Module, parts: dict[str, Part], options: Options, version: str):
        self.model, self.parts, self.options, self.version = model, parts, options, version

    def rows(self) -> list[dict[str, Any]]:
        return [
            {
                "part": part.name, "hook": part.where, "backend": self._backend(part), "status": part.status,
                "calls": part.calls, "passed": dict(part.passed),
            }
            for part in self.parts.values()
        ]  # fmt: skip

    def _backend(self, part: Part) -> str:
        if not part.bound:
            return "-"
        device = next(self.model.parameters()).device
        return choose(part.op, self.options.backends[part.op], device) if part.op and device.type != "meta" else "torch"

    def __str__(self) -> str:
        lines = [f"{'part':<19} {'backend':<8} {'calls':>6}  status"]
        for row in self.rows():
            lines.append(f"{row['part']:<19} {row['backend']:<8} {row['calls']:>6}  {row['status']}")
            lines += [f"{'':<37}the library's code ran {n} times: {why}" for why, n in row["passed"].items()]
        return "\n".join([f"{type(self.model).__name__} of transformers {self.version}", *lines])

    __repr__ = __str__

    def verify(self, batch: Mapping[str, Any], *, repeats: int = 3) -> list[dict[str, Any]]:
        """Runs model(**batch) as it was, with each part alone and with all of them; prints and returns error and speed.

        batch: what the model's forward takes. With labels the fused loss is compared too.
        error: max |patched - unpatched| / max |unpatched| of the logits (the loss; without a head the hidden states).
        speed: time unpatched / time patched, median of `repeats`. A part that needs another one is timed with it.
        Counters of the report go on counting.
        """
        if any(part.bound for part in self.parts.values()) and not any(map(hooked, self.model.modules())):
            raise RuntimeError("verify: the model is not patched, so that there is nothing to compare")
        together = {
            "packing": ("vision attention",),
            "vision attention": ("packing",),
            "vision rope": ("packing", "vision attention"),
        }
        rows = []
        bound = [part for part in self.parts.values() if part.bound]
        with _kept(self.model), torch.no_grad():
            for name in [*(part.name for part in bound), "all"]:
                needed = {name, *together.get(name, ())}
                ours = [part for part in bound if name == "all" or part.name in needed]
                train = name == "loss"
                if train and "labels" not in batch:
                    continue
                self.model.train(train)
                results, seconds = {}, {False: [], True: []}
                for turn in range(repeats + 1):
                    for patched in (False, True):
                        with _only(bound, ours if patched else []):
                            elapsed, results[patched] = _timed(self.model, batch)
                        seconds[patched] += [elapsed] if turn else []
                before, after = (sorted(seconds[key])[repeats // 2] for key in (False, True))
                error = _error(results[True], results[False])
                rows.append({"part": name, "error": error, "speed": before / after, "seconds": after, "before": before})
        print(f"{'part':<19} {'error':>9} {'speed':>7}")
        for row in rows:
            print(f"{row['part']:<19} {row['error']:>9.1e} {row['speed']:>6.2f}x")
        return rows


@contextmanager
def _kept(model: nn.Module) -> Iterator[None]:
    """Puts back what a forward leaves on the model: the mode of every module, transformers' rope_deltas."""
    modes = [(module, module.training) for module in model.modules()]
    deltas = [(module, module.rope_deltas) for module in model.modules() if "rope_deltas" in vars(module)]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for module, value in deltas:
            module.rope_deltas = value


@contextmanager
def _only(bound: list[Part], ours: list[Part]) -> Iterator[None]:
    before = [part.enabled for part in bound]
    for part in bound:
        part.enabled = part in ours
    try:
        yield
    finally:
        for part, enabled in zip(bound, before, strict=True):
            part.enabled = enabled


def _timed(model: nn.Module, batch: Mapping[str, Any]) -> tuple[float, torch.Tensor]:
    cuda = next(model.parameters()).device.type == "cuda"
    if cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    output = model(**batch)
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start, _result(output, model.training)


def _result(output: Any, training: bool) -> torch.Tensor:
    if isinstance(output, torch.Tensor):
        return output
    names = ("loss",) if training else ("logits", "pooler_output", "last_hidden_state")
    return next(output[name] for name in names if output.get(name) is not None)


def _error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    top = theirs.double().abs().max()
    return float((ours.double() - theirs.double()).abs().max() / top) if top else float(ours.double().abs().max())
