"""Kernels run in Triton's interpreter here, compiled where there is a GPU; both with the same tests."""

import pytest
import torch
from kernel_checks import poisoned

from gigamorph.kernels import choice

if not torch.cuda.is_available():
    import interpreter

    interpreter.install()


@pytest.fixture(autouse=True)
def _poison():
    with poisoned():
        yield


@pytest.fixture(autouse=True)
def _our_kernels(request: pytest.FixtureRequest):
    """Registered ops run our kernels here, whatever would be faster."""
    if "test_choice" in request.node.nodeid:
        yield
    else:
        with choice.override("triton"):
            yield
