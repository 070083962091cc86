"""The self-test of doctor: it passes here, and names what differs or fails."""

from __future__ import annotations

import re
from typing import Any

import pytest
from torch import Tensor, nn

from gigamorph import UnsupportedError
from gigamorph.engine import self_test
from gigamorph.engine.capture import gaps


def test_it_passes_here() -> None:
    assert self_test.self_test() is None
    assert self_test.missing() == []


class Other(nn.Module):
    """A network with another output, gradient or state than its inner network."""

    def __init__(self, inner: nn.Module, what: str):
        super().__init__()
        self.inner, self.what = [inner], what
        self.named_parameters = inner.named_parameters
        self.named_buffers = inner.named_buffers

    def forward(self, x: Tensor) -> Tensor:
        if self.what == "fails":
            raise UnsupportedError("no\n  rule")
        y = self.inner[0](x)
        if self.what == "state":
            next(iter(self.inner[0].buffers())).data.add_(1e-6)
        if self.what == "gradient":
            return y + (1e-6 * x.mean((2, 3)) - 1e-6 * x.detach().mean((2, 3)))
        return y * (1 + 1e-6) if self.what == "output" else y


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("output", r"the output differs by 1e-06"),
        ("gradient", r"the gradient of the image differs by"),
        ("state", r"stem\.1\.running_mean differs by"),
        ("fails", r"no rule"),
    ],
)
def test_it_names_what_differs(what: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def accelerate(net: nn.Module, **_options: Any) -> nn.Module:
        return Other(net, what)

    monkeypatch.setattr(self_test, "accelerate", accelerate)
    found = self_test.self_test()
    assert found is not None
    assert re.search(message, found), found


def test_a_renamed_function_of_dynamo_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    before = list(gaps._corrections())
    renamed = "variables.TensorVariable.renamed"
    monkeypatch.setattr(
        gaps, "_corrections", lambda: iter([*before, (renamed, before[0][1]), (renamed + "?", before[0][1])])
    )
    (name,) = self_test.missing()
    assert name.path == f"torch._dynamo.{renamed}" and name.without == "every network is refused"
