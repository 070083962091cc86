"""Delegation: attributes of an accelerated network are those of its network."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gigamorph import accelerate


def test_names_of_the_network_are_its_own(caplog: pytest.LogCaptureFixture) -> None:
    """Also those that methods of ours had, and those of ours that it hides are named."""

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.open, self.split = nn.Conv2d(1, 2, 3), torch.relu, 3
            self.call: Any = torch.sigmoid

        def compute(self, x: Tensor) -> Tensor:
            return self.open(self.conv(x)) if self.call is torch.sigmoid else self.conv(x)

        def seal(self) -> str:
            return "sealed"

        def forward(self, x: Tensor) -> Tensor:
            return self.call(self.compute(x)).mean((2, 3))

    net, x = Named().double(), torch.rand(1, 1, 12, 14, dtype=torch.float64)
    ours = accelerate(net, tile=8)
    assert [record.getMessage() for record in caplog.records] == [
        "Named has an attribute split too, which the accelerated network hides; read and set it on the network itself"
    ]
    assert (ours.call, ours.open, ours.seal()) == (torch.sigmoid, torch.relu, "sealed")
    torch.testing.assert_close(ours(x), net(x), rtol=0, atol=1e-14)
    torch.testing.assert_close(ours.compute(x), net.compute(x))
    ours.call = torch.tanh
    assert net.call is torch.tanh and ours.split is None and net.split == 3
    torch.testing.assert_close(ours(x), net(x), rtol=0, atol=1e-14)
