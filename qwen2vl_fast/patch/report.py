"""What patch did to a model: a table that counts, and a comparison with the model as it was."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..ops.backends import choose
from .hooks import Options, Part, hooked

CACHES = ("past_key_values", "past_key_value")  # arguments that a forward writes to


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
        lines = [f"{'part':<19} {'hook':<40} {'backend':<8} {'calls':>6}  status"]
        for row in self.rows():
            lines.append(f"{row['part']:<19} {row['hook']:<40} {row['backend']:<8} {row['calls']:>6}  {row['status']}")
            lines += [f"{'':<78}the library's code ran {n} times: {why}" for why, n in row["passed"].items()]
        return "\n".join([f"{type(self.model).__name__} of transformers {self.version}", *lines])

    __repr__ = __str__

    def verify(self, batch: Mapping[str, Any], *, repeats: int = 3) -> list[dict[str, Any]]:
        """Runs model(**batch) as it was, with each part alone and with all of them; prints and returns error and speed.

        batch: what the model's forward takes. With labels the fused loss is compared too. A cache in it, filled under
            torch.no_grad(), is copied for each run; every run begins with the same state of the random generators, which are
            put back at the end.
        error: max |patched - unpatched| / max |unpatched| of the logits (the loss; without a head the first floating output).
        speed: time unpatched / time patched, median of `repeats`. A part that needs another one is timed with it.
        Counters of the report go on counting.
        Raises: ValueError for repeats below 1; RuntimeError if the model is not patched.
        """
        if repeats < 1:
            raise ValueError(f"repeats: expected 1 or more, got {repeats}")
        if any(part.bound for part in self.parts.values()) and not any(map(hooked, self.model.modules())):
            raise RuntimeError("verify: the model is not patched, so that there is nothing to compare")
        together = {
            "packing": ("vision attention",),
            "vision attention": ("packing",),
            "vision rope": ("packing", "vision attention"),
        }
        rows = []
        bound = [part for part in self.parts.values() if part.bound]
        with _kept(self.model) as same_random_numbers, torch.no_grad():
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
                        same_random_numbers()
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
def _kept(model: nn.Module) -> Iterator[Callable[[], None]]:
    """Puts back what a forward leaves behind: the mode of every module, transformers' rope_deltas, the random generators.

    Yields a function that puts the generators back, for runs that are to draw the same numbers.
    """
    modes = [(module, module.training) for module in model.modules()]
    deltas = [(module, module.rope_deltas) for module in model.modules() if "rope_deltas" in vars(module)]
    devices = {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}
    states = [(torch.cuda.set_rng_state, torch.cuda.get_rng_state(device), device) for device in devices]
    states.append((torch.set_rng_state, torch.get_rng_state()))

    def same_random_numbers() -> None:
        for put, *state in states:
            put(*state)

    try:
        yield same_random_numbers
    finally:
        same_random_numbers()
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
    batch = {name: copy.deepcopy(value) if name in CACHES else value for name, value in batch.items()}
    if cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    output = model(**batch)
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start, _result(output, model.training)


def _result(output: Any, training: bool) -> torch.Tensor:
    """What is compared: the logits, in training the loss, or the first floating tensor that there is."""
    if not isinstance(output, Mapping):
        outputs = output if isinstance(output, (tuple, list)) else [output]
        return next(x for x in outputs if isinstance(x, torch.Tensor) and x.is_floating_point())
    names = ("loss",) if training else ("logits", "pooler_output", "last_hidden_state")
    found = next((output[name] for name in names if output.get(name) is not None), None)
    return _result(tuple(output.values()), training) if found is None else found


def _error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    both = ours.isnan() & theirs.isnan()  # what ColQwen2 makes of padding
    ours, theirs = (x.double().masked_fill(both, 0.0) for x in (ours, theirs))
    top = theirs.abs().max()
    return float((ours - theirs).abs().max() / top) if top else float(ours.abs().max())
