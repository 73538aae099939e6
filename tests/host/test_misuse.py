"""What the host runtime must find: each fault alone (tests/host/misuse.cpp), and the same without it, which must pass."""

from __future__ import annotations

import ctypes

import pytest
import torch

from tests.host import build
from tests.host.runner import HostError, call, load

# number: (what is wrong, what the runtime says; None: the result is NaN)
FAULTS = {
    0: ("no barrier between stores and loads", "race"),
    1: ("no warp barrier between lanes", "race: load"),
    2: ("no barrier before memory is written again", "race"),
    3: ("no wait for cp.async", "asynchronous copy still writes"),
    4: ("a wait that leaves one group", "asynchronous copy still writes"),
    5: ("no barrier after waiting for own copies", "race"),
    6: ("lanes in different collectives", "divergence"),
    7: ("a warp that misses the barrier", "deadlock"),
    8: ("outside of shared memory", "bytes of shared memory"),
    9: ("a misaligned load", "not aligned"),
    10: ("no arrival at a named barrier", "deadlock"),
    11: ("the wrong named barrier", "race|deadlock"),
    12: ("an mbarrier that was not initialised", "no mbarrier"),
    13: ("a wrong count of arrivals", "race|deadlock|still writes|arrivals"),
    14: ("no fence after mbarrier_init", "fence_mbarrier_init"),
    15: ("no barrier after mbarrier_init", "race|no mbarrier"),
    16: ("the producer starts with the wrong parity", "deadlock"),
    17: ("a wrong number of bytes", "deadlock"),
    18: ("no wait for TMA", "race|still writes"),
    19: ("the consumer's parity stays", "race|still writes|deadlock"),
    20: ("a stage released before it is read", "race|still writes"),
    21: ("a stage released by one lane for others", "race: asynchronous store .* load by"),
    22: ("stores without a proxy fence", "proxy"),
    23: ("a warp without its product", "issued different products"),
    24: ("no wgmma_fence", "without wgmma_fence"),
    25: ("accumulators changed after the fence", "changed after the last wgmma_fence"),
    26: ("accumulators read before the wait", None),
    27: ("an operand overwritten under way", "products of warp|race"),
    28: ("a product that is never awaited", "under way"),
    29: ("take_registers that gives", "gives some up"),
    30: ("give_registers that takes", "takes some"),
    31: ("no wait before an addition to what another block adds to", "race: an addition"),
    32: ("additions after they were published", "race: an addition"),
    33: ("a wait for what nobody publishes", "deadlock: block 1 and all others wait"),
    34: ("no barrier behind one thread's wait for another block", "race: an addition"),
}
BETWEEN_BLOCKS = (31, 32, 33, 34)


class Arguments(ctypes.Structure):
    _fields_ = [
        ("fault", ctypes.c_int), ("right", ctypes.c_int), ("data", ctypes.c_void_p), ("out", ctypes.c_void_p),
        ("count", ctypes.c_void_p), ("map", ctypes.c_char * 128),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def misuse():
    return load(build.own_library("misuse")).misuse


def run(misuse, fault: int, right: bool, seed: int) -> torch.Tensor:
    data, out, count = torch.ones(4096), torch.full((256,), torch.nan), torch.zeros(1, dtype=torch.int32)
    arguments = Arguments(fault, right, data.data_ptr(), out.data_ptr(), count.data_ptr())
    call(misuse, ctypes.byref(arguments), grid=2 if fault in BETWEEN_BLOCKS else 1, seed=seed)
    return out


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: FAULTS[fault][0])
def test_a_fault_is_found(misuse, fault, seed):
    message = FAULTS[fault][1]
    if message is None:
        assert run(misuse, fault, False, seed)[:128].isnan().all()
        return
    with pytest.raises(HostError, match=message):
        run(misuse, fault, False, seed)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: FAULTS[fault][0])
def test_without_the_fault_nothing_is_found(misuse, fault, seed):
    run(misuse, fault, True, seed)
