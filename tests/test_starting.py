"""The start of a kernel by its remembered binary against Triton's own way, argument by argument, without a GPU.

Triton compiles and searches as on a device; a driver of this file stands in for CUDA's and keeps what its launcher is given,
which is all that a launch depends on.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import CudaDriver
from triton.runtime import driver

from qwen2vl_fast.kernels import activation, rope, starting
from tests.compiled import Launch, cases, recorded


class Pointer(SimpleNamespace):
    """What `start` and Triton look at in a CUDA tensor."""

    is_cuda, index = True, 0

    @property
    def device(self) -> SimpleNamespace:
        return SimpleNamespace(index=self.index)

    def data_ptr(self) -> int:
        return self.place


class Driver:
    """A machine with two devices of Hopper's kind. `launched`: all that a launcher gets, in order."""

    def __init__(self) -> None:
        self.launched: list[dict[str, Any]] = []
        self.here = threading.local()
        self.streams = {0: 1000, 1: 1001}
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": 227 << 10},
            load_binary=lambda name, code, shared, device: (object(), (name, hash(code), device), 32, 0, 1024),
            unload_module=lambda module: None,
        )

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        names = ("x", "y", "z", "stream", "function", "packed", "metadata", "enter", "exit")

        def launcher(*arguments: Any) -> None:
            row = {**dict(zip(names, arguments, strict=False)), "arguments": arguments[len(names) :]}
            row["metadata"] = row["metadata"] and row["metadata"].get()  # what a profiler would be told
            self.launched.append(row)

        return launcher

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return getattr(self.here, "device", 0)

    def get_current_stream(self, device: int) -> int:
        return self.streams[device]

    map_python_to_cpp_type = CudaDriver.map_python_to_cpp_type

    @contextlib.contextmanager
    def device(self, device: int):
        before, self.here.device = self.get_current_device(), device
        try:
            yield
        finally:
            self.here.device = before


recorded_launches = functools.cache(cases)


@pytest.fixture
def machine(monkeypatch) -> Driver:
    found = Driver()
    monkeypatch.setattr(driver, "_active", found, raising=False)
    monkeypatch.setattr(starting, "_binaries", {})
    monkeypatch.setattr(torch.cuda, "current_device", found.get_current_device)
    monkeypatch.setattr(torch.cuda, "device", found.device)
    monkeypatch.setattr(torch.cuda, "device_of", lambda x: found.device(x.device.index))
    for launch in recorded_launches().values():
        monkeypatch.setattr(launch.kernel, "device_caches", type(launch.kernel.device_caches)(launch.kernel.create_binder))
    assert driver.active is found
    return found


def parts(launch: Launch) -> tuple[tuple, tuple, tuple, dict[str, Any], int]:
    """(tensors, counts, strides, constants, warps) of a launch, as `start` takes them."""
    kinds: tuple[list, list, list] = ([], [], [])
    for parameter, value in zip(launch.kernel.params, launch.arguments, strict=False):
        if isinstance(value, torch.Tensor):
            kinds[0].append(Pointer(dtype=value.dtype, place=4096 + 256 * len(kinds[0])))
        else:
            kinds[1 if parameter.do_not_specialize or isinstance(value, float) else 2].append(value)
    constants = {name: value for name, value in launch.options.items() if name != "num_warps"}
    return *map(tuple, kinds), constants, launch.options["num_warps"]


def ordinary(kernel: Any, blocks: int, tensors, counts, strides, constants, warps) -> None:
    kernel[(blocks,)](*tensors, *counts, *strides, **constants, num_warps=warps)


def found(machine: Driver) -> list[dict[str, Any]]:
    launched, machine.launched = machine.launched, []
    return launched


@pytest.fixture
def searches(monkeypatch) -> list:
    """Grows by one at every launch that goes Triton's whole way."""
    calls: list = []
    anew = starting._anew
    monkeypatch.setattr(starting, "_anew", lambda *arguments: (calls.append(arguments), anew(*arguments))[1])
    return calls


def test_every_kernel_is_launched_as_triton_does(machine, searches):
    """Twice by `start`, of which the second is by memory, once by Triton: all that the launcher gets is equal."""
    assert starting._remembers, f"Triton {triton.__version__} is not among those compared: run this with it, then move COMPARED"
    for name, launch in recorded_launches().items():
        before = len(searches)
        for blocks, more in ((7, 0), (1, 16), (65537, 3)):
            tensors, counts, *rest = parts(launch)
            counts = tuple([n + more if isinstance(n, int) else n for n in counts])  # what is not specialised is free to change
            machine.streams[0] += 1
            for call in (ordinary, starting.start, starting.start):
                call(launch.kernel, blocks, tensors, counts, *rest)
            first, *others = found(machine)
            assert others == [first, first], name
            assert (first["x"], first["y"], first["z"], first["stream"]) == (blocks, 1, 1, machine.streams[0])
            assert all(a is b for a, b in zip(first["arguments"], tensors, strict=False)), name
        assert len(searches) <= before + 1, f"{name}: searched again"  # none where another case has the same kernel and kinds


def small(**changes: Any) -> tuple:
    """Arguments for `start` of one small kernel."""
    launch = recorded_launches()["swiglu 8960"]
    values = dict(zip(("tensors", "counts", "strides", "constants", "num_warps"), parts(launch), strict=True))
    return launch.kernel, 3, *(values | changes).values()


def test_a_binary_serves_arguments_of_its_kind_alone(machine, searches):
    """What Triton would compile or specialise anew is searched anew, and found there by Triton's own key."""
    x, y = Pointer(dtype=torch.bfloat16, place=256), Pointer(dtype=torch.bfloat16, place=512)
    starting.start(*small())
    starting.start(*small())
    assert len(searches) == 1
    constants = small()[5]
    others = {
        "dtypes": {"tensors": (x, Pointer(dtype=torch.float32, place=512))},
        "strides": {"strides": (2 * 18944,)},
        "a stride that is no multiple of 16": {"strides": (520,)},
        "constants": {"constants": {**constants, "F": 128}},
        "warps": {"num_warps": 8},
    }
    for name, other in others.items():
        before, functions = len(searches), []
        for call in (starting.start, starting.start, ordinary):
            call(*small(**other))
        functions = [launch["function"] for launch in found(machine)[-3:]]
        assert len(searches) == before + 1 and len(set(functions)) == 1, name
    for other in ({"tensors": (x, Pointer(dtype=torch.bfloat16, place=514))}, {"counts": (2**31,)}):
        before = len(searches)
        for _ in range(2):
            starting.start(*small(**other))
        assert len(searches) == before + 2, "remembered though Triton's search depends on it"
    before = len(searches)
    starting.start(*small(tensors=(x, y)))
    assert len(searches) == before


def test_a_factor_is_no_constant():
    """attention_scaling=1 reaches a launcher as it is. Of an integer Triton would make a constant, for all that come later."""
    with recorded() as launches:
        q = torch.empty(48, 2, 128, dtype=torch.bfloat16)
        for scaling in (1, 1.5):
            rope.launch(q, q, q, q, torch.zeros(3, 48, dtype=torch.int64), torch.empty(64), (16, 24, 24), scaling, 1.0)
    factors = [launch.arguments[[p.name for p in launch.kernel.params].index("scaling")] for launch in launches]
    assert factors == [1.0, 1.5] and all(type(factor) is float for factor in factors)


def test_each_device_has_a_binary_and_its_stream(machine, searches):
    on_1 = tuple(Pointer(dtype=torch.bfloat16, place=256 * i, index=1) for i in (1, 2))
    for _ in range(2):  # device 0 is current: the tensors' device counts
        starting.start(*small())
        starting.start(*small(tensors=on_1))
    assert len(searches) == 2 and machine.get_current_device() == 0
    launched = found(machine)
    assert [launch["stream"] for launch in launched] == [1000, 1001] * 2
    assert [launch["function"][2] for launch in launched] == [0, 1] * 2
    with machine.device(1):
        starting.start(*small(tensors=on_1))
    assert found(machine)[-1]["stream"] == 1001 and len(searches) == 2


def test_threads_on_two_devices(machine):
    def work(index: int) -> None:
        with machine.device(index):
            tensors = tuple(Pointer(dtype=torch.bfloat16, place=256 * i, index=index) for i in (1, 2))
            for stride in range(17920, 17920 + 16 * 40, 16):
                starting.start(*small_of[index][:2], tensors, (48,), (stride,), *small_of[index][5:])

    small_of = [small(), small()]
    starting.start(*small_of[0])  # compiled once
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(starting, "KINDS", 7)  # cleared again and again while others look
        threads = [threading.Thread(target=work, args=(i % 2,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    launched = found(machine)[1:]
    assert len(launched) == 4 * 40
    assert all(launch["stream"] == 1000 + launch["function"][2] for launch in launched)


def hooked(add: Any, remove: Any) -> Any:
    @contextlib.contextmanager
    def during():
        add()
        try:
            yield
        finally:
            remove()

    return during()


@pytest.mark.parametrize("what", ["enter", "exit", "replaced hook", "pre-run", "debug", "instrumentation", "stages", "release"])
def test_whatever_watches_launches_sees_tritons_own(machine, searches, monkeypatch, what):
    seen: list = []
    starting.start(*small())
    starting.start(*small())
    assert len(searches) == 1
    watch, run = (lambda *arguments, **options: seen.append(what)), knobs.runtime
    if what in ("enter", "exit"):
        chain = run.launch_enter_hook if what == "enter" else run.launch_exit_hook
        during = hooked(lambda: chain.add(watch), lambda: chain.remove(watch))
    else:
        during = contextlib.nullcontext()
    if what == "replaced hook":
        monkeypatch.setattr(run, "launch_enter_hook", watch)
    elif what == "pre-run":
        monkeypatch.setattr(small()[0], "pre_run_hooks", [watch])
    elif what == "debug":
        monkeypatch.setattr(run, "debug", True)
    elif what == "instrumentation":
        if not hasattr(knobs.compilation, "instrumentation_mode"):
            pytest.skip("this Triton has no instrumentation")
        monkeypatch.setattr(knobs.compilation, "instrumentation_mode", "consan")
        monkeypatch.setattr(starting, "_anew", lambda *arguments: searches.append(arguments))  # it needs more of a device
    elif what == "stages":
        if not hasattr(run, "add_stages_inspection_hook"):
            pytest.skip("this Triton has no such hook")
        monkeypatch.setattr(run, "add_stages_inspection_hook", lambda *a: seen.append(what) or ("key", "hash"))
        monkeypatch.setattr(starting, "_anew", lambda *arguments: searches.append(arguments))
    elif what == "release":
        monkeypatch.setattr(starting, "_remembers", False)
    with during:
        starting.start(*small())
    assert len(searches) == 2
    if what in ("pre-run",):
        assert seen
    monkeypatch.undo()


@pytest.mark.parametrize("release", ["3.4.0", "3.10.0", "4.0.0", "main", "3"])
def test_other_releases_go_tritons_way(release):
    assert not starting._is_compared(release)


def test_compared_releases_are_taken(monkeypatch):
    assert all(map(starting._is_compared, ("3.5.1", "3.6.0", "3.7.1", "3.8.0", "3.9.0+git1234")))
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert not starting._is_compared("3.7.1")


def test_what_is_no_binary_is_not_kept(machine, monkeypatch):
    """A kernel that is compiled in the background gives a promise of one."""
    monkeypatch.setattr(starting, "_anew", lambda *arguments: SimpleNamespace())
    starting.start(*small())
    assert starting._binaries == {}


def test_launches_follow_their_signature():
    """Pointers, what is not specialised, what is, constants: in this order, which a remembered binary is started by."""
    for name, launch in recorded_launches().items():
        parameters = launch.kernel.params
        constants = [p.name for p in parameters if p.is_constexpr]
        assert list(launch.options) == [*constants, "num_warps"], name
        assert [p.name for p in parameters[len(launch.arguments) :]] == constants, name
        kinds = [0 if isinstance(value, torch.Tensor) else 1 if p.do_not_specialize or isinstance(value, float) else 2
                 for p, value in zip(parameters, launch.arguments, strict=False)]  # fmt: skip
        assert kinds == sorted(kinds), name


@pytest.mark.gpu
def test_on_a_device(device="cuda"):
    """By memory as by search: on another stream, in a graph, with other lengths, from a thread."""
    x = torch.randn(300, 512, device=device, dtype=torch.bfloat16, generator=torch.Generator(device).manual_seed(0))
    starting._binaries.clear()
    expected = activation.launch_swiglu(x)
    assert len(starting._binaries) == 1
    results = [activation.launch_swiglu(x)]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        results.append(activation.launch_swiglu(x))
    torch.cuda.current_stream().wait_stream(side)
    thread = threading.Thread(target=lambda: results.append(activation.launch_swiglu(x)))
    thread.start()
    thread.join()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = activation.launch_swiglu(x)
    captured.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert len(starting._binaries) == 1
    assert all(torch.equal(result, expected) for result in (*results, captured))
    for rows in (1, 16, 299):
        assert torch.equal(activation.launch_swiglu(x[:rows]), expected[:rows])
    assert len(starting._binaries) == 1
