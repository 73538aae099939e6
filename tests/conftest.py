"""Devices as a parameter: the same test bodies run on the CPU and, with `-m gpu`, on a CUDA device."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests import compare


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.fail("this test needs a CUDA device; leave it out with -m 'not gpu'")
    return request.param


@pytest.fixture(params=[True, False], ids=["deterministic", "dq added"])
def deterministic(request: pytest.FixtureRequest, poison: None) -> bool:
    """Whether gradients of attention are deterministic by default."""
    torch.use_deterministic_algorithms(request.param)
    return request.param


@pytest.fixture
def poison() -> Iterator[None]:
    """torch.empty comes filled with NaN."""
    with compare.poisoned():
        yield


# Of the tests of patch. Imported where they run: not every environment has transformers.


@pytest.fixture(scope="module")
def shared() -> torch.nn.Module:
    """A small model of transformers, not to be left changed."""
    from tests import models, patching

    return patching.model_of(models.CONFIGS["released"])


@pytest.fixture
def hf(shared: torch.nn.Module) -> torch.nn.Module:
    """One of the same weights, to do with as one likes."""
    from tests import patching

    return patching.twin(shared)


@pytest.fixture(scope="module")
def inputs() -> dict[str, torch.Tensor]:
    from tests import models, patching

    return models.batch(patching.MIXED)
