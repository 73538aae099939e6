"""How a method of one module instance is replaced, counted and put back, and what may be read of a layer without calling it.

A hook is a bound method in the instance's own dict, where torch, accelerate and functools.wraps expect one; the class is
never touched. Each hook counts its runs in the Part (a row of the report) that it belongs to.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections import Counter
from collections.abc import Callable, Container
from dataclasses import dataclass, field
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as torch_modules

from ..ops.linear import linear

HOOKS = "_qwen2vl_fast_hooks"  # in vars(module): Hooks


class Shared:
    """A copy of a model keeps reporting to the patch() that its original was given to."""

    def __deepcopy__(self, memo: dict) -> Any:
        return self


@dataclass(eq=False)
class Part(Shared):
    """A part of the model that patch replaces. op: whose backend runs it. where: the hooks, as paths in the model.

    refused: reasons why some of its modules keep the library's code, with their number. bound: modules that are replaced.
    calls: how often its code ran; under torch.compile, how often it was traced. passed: reasons why the library's code ran
    in its place, with their number.
    """

    name: str
    op: str
    where: str
    enabled: bool = True
    bound: int = 0
    calls: int = 0
    refused: Counter = field(default_factory=Counter)
    passed: Counter = field(default_factory=Counter)

    def ran(self) -> None:
        self.calls += 1

    def fell_back(self, reason: str) -> None:
        self.passed[reason] += 1

    def refuse(self, reason: str) -> None:
        self.refused[reason] += 1

    # Run once while torch.compile traces: a counter inside a compiled graph would make it compile again at every call.
    ran._dynamo_marked_constant = True
    fell_back._dynamo_marked_constant = True

    @property
    def status(self) -> str:
        why = "; ".join(reason if count == 1 else f"{reason} ({count} modules)" for reason, count in self.refused.items())
        if not why:
            return "fused"
        return f"fused in {self.bound} modules; not in others: {why}" if self.bound else f"not fused: {why}"


@dataclass(eq=False)
class Options(Shared):
    """What patch was called with, for every hook. backends: {op: the backend asked for, or None for the fastest}."""

    backends: dict[str, str | None]


@dataclass(eq=False)
class Hook:
    """A replaced method. names: its parameters without self. more: other parts and facts that the new method needs.

    Read at every call of a layer, so plain attributes: a property costs as much as a check.
    """

    part: Part
    options: Options
    function: Callable
    names: tuple[str, ...]
    slot: str
    previous: Any  # what the slot held, or None
    more: dict[str, Any]

    def bind(self, args: tuple, kwargs: dict) -> dict[str, Any]:
        """All arguments of a call by name."""
        return {**dict(zip(self.names, args, strict=False)), **kwargs} if args else kwargs


class Hooks(dict):
    """{name of the method: Hook} of a module. A pickled one comes back unpatched: methods of an instance don't survive that."""

    def __reduce__(self) -> tuple:
        return Hooks, ()

    def __deepcopy__(self, memo: dict) -> Hooks:
        return Hooks({method: copy.deepcopy(hook, memo) for method, hook in self.items()})


def hook_of(module: nn.Module, method: str = "forward") -> Hook:
    return module.__dict__[HOOKS][method]


def hooked(module: nn.Module) -> bool:
    return bool(module.__dict__.get(HOOKS))


def original(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The class's own forward."""
    return type(module).forward(module, *args, **kwargs)


def replaced_elsewhere(module: nn.Module, method: str = "forward") -> bool:
    """Whether the instance has a method that is neither its class's nor accelerate's wrapper around that."""
    mine = vars(module).get(_slot(module, method))
    return mine is not None and getattr(mine, "__func__", None) is not getattr(type(module), method)


def _slot(module: nn.Module, method: str) -> str:
    """Where the method that really runs is: accelerate (device_map) moves forward to _old_forward and puts a wrapper there."""
    return "_old_forward" if method == "forward" and "_hf_hook" in vars(module) else method


def replace(
    module: nn.Module, part: Part, options: Options, function: Callable, *, method: str = "forward", **more: Any
) -> None:
    """Puts function in the place of module.method. The caller has checked that it binds."""
    owner = getattr(type(module), method)
    # A function object for each hook, by which unpatch recognises its own, and not one around another: that is a call more.
    parts = (function.__code__, function.__globals__, function.__name__, function.__defaults__, function.__closure__)
    replacement = FunctionType(*parts)
    replacement.__kwdefaults__ = function.__kwdefaults__
    functools.update_wrapper(replacement, owner)
    slot = _slot(module, method)
    hook = Hook(part, options, replacement, parameters(owner), slot, vars(module).get(slot), more)
    vars(module).setdefault(HOOKS, Hooks())[method] = hook
    vars(module)[slot] = MethodType(replacement, module)
    part.bound += 1


def restore(model: nn.Module) -> int:
    """Takes every hook in the model away and returns their number. Raises before any change if one can't be."""
    found = [(name, module) for name, module in model.named_modules() if hooked(module)]
    plans, lost = [], []
    for name, module in found:
        for method, hook in vars(module)[HOOKS].items():
            slots = [slot for slot in dict.fromkeys((hook.slot, method, "_old_forward")) if _is(module, slot, hook)]
            if slots:
                plans.append((module, slots[0], hook))
            elif not _gone(module, hook.slot, method):
                lost.append(f"{name or type(module).__name__}.{method}")
    if lost:
        raise RuntimeError(
            f"unpatch: {', '.join(lost[:3])}{' and others' if len(lost) > 3 else ''} was replaced after patch(); "
            "undo that first"
        )
    for module, slot, hook in plans:
        if slot == hook.slot and hook.previous is None:
            del vars(module)[slot]
        elif hook.previous is None:  # accelerate came after patch: it expects the class's method there
            vars(module)[slot] = MethodType(getattr(type(module), slot.replace("_old_", "")), module)
        else:
            vars(module)[slot] = hook.previous
    for _, module in found:
        del vars(module)[HOOKS]
    return len(plans)


def _gone(module: nn.Module, slot: str, method: str) -> bool:
    """Whether somebody has put the class's method back: accelerate does, undoing its mixed precision."""
    mine = inspect.unwrap(getattr(vars(module).get(slot), "__func__", vars(module).get(slot)))
    return mine is None or mine is inspect.unwrap(getattr(type(module), method))


def _is(module: nn.Module, slot: str, hook: Hook) -> bool:
    return getattr(vars(module).get(slot), "__func__", None) is hook.function


def parameters(function: Callable) -> tuple[str, ...]:
    """Names of the positional parameters, without self."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return tuple(name for name, p in inspect.signature(function).parameters.items() if p.kind in kinds)[1:]


# What may be fused. Everything else is called as the module that it is, so that adapters, quantized and sharded weights and
# hooks keep working.


def bare(module: nn.Module, kind: type | tuple[type, ...]) -> bool:
    """Whether module is exactly of this kind, without hooks, and its forward is its class's or ours."""
    if type(module) is not kind and not (isinstance(kind, tuple) and type(module) in kind):
        return False
    own = module.__dict__
    if _watched(own):
        return False
    if _all.forward_hooks or _all.forward_pre_hooks or _all.backward_hooks or _all.backward_pre_hooks:
        return False
    if "forward" not in own:
        return True
    return hooked(module) and "_hf_hook" not in own and _is(module, "forward", own[HOOKS]["forward"])


def silent(module: nn.Module, kind: type) -> bool:
    """Whether nobody sees or changes what module's forward gives: of this class, no hooks but accelerate's."""
    return type(module) is kind and not _watched(vars(module)) and not replaced_elsewhere(module)


def _watched(own: dict[str, Any]) -> bool:
    return bool(own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"])


class _all:
    """torch's hooks of every module: dicts that it fills in place."""

    forward_hooks, forward_pre_hooks = torch_modules._global_forward_hooks, torch_modules._global_forward_pre_hooks
    backward_hooks, backward_pre_hooks = torch_modules._global_backward_hooks, torch_modules._global_backward_pre_hooks


def readable(parameter: torch.Tensor | None, x: torch.Tensor) -> bool:
    """Whether a parameter can be used beside x as it is: whole (not sharded), not quantized, of x's dtype and device."""
    return (
        type(parameter) in (nn.Parameter, torch.Tensor)
        and not hasattr(parameter, "ds_id")  # DeepSpeed's ZeRO-3 keeps an empty tensor in its place
        and parameter.dtype == x.dtype
        and parameter.device == x.device
    )


def autocast(x: torch.Tensor) -> bool:
    """Whether x's device is under autocast; torch has no such thing for the device meta."""
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)


def plain_linear(layer: nn.Module, x: torch.Tensor) -> bool:
    if not bare(layer, nn.Linear) or autocast(x):
        return False
    return readable(layer.weight, x) and (layer.bias is None or readable(layer.bias, x))


def project(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """layer(x), of a plain Linear on the CPU by the package's own product; elsewhere that is torch's."""
    if x.device.type != "cpu" or not plain_linear(layer, x):
        return layer(x)
    return linear(x, layer.weight, layer.bias)


def activate(layer: nn.Module, x: torch.Tensor, function: Callable, backend: str | None) -> torch.Tensor:
    """function(layer(x)), of a plain Linear with its bias added inside function."""
    if plain_linear(layer, x):
        return function(linear(x, layer.weight), layer.bias, backend=backend)
    return function(layer(x), backend=backend)


def unknown_activation(activation: nn.Module, known: Container[type]) -> str:
    """Why the library's code runs in the place of an activation function."""
    return f"the activation is a {type(activation).__name__}{' with hooks' if type(activation) in known else ''}"
