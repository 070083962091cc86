"""Tensors that a network makes in inference mode and keeps: later calls raise PyTorch's error where stock raises it."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from gigamorph import accelerate


class Cached(nn.Module):
    """A convolution, and a row of numbers that the first call makes and later calls use."""

    def __init__(self, use: Callable[[Tensor, Tensor], Tensor]):
        super().__init__()
        self.conv, self.use, self.row = nn.Conv2d(1, 2, 3, padding=1), use, None

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        if self.row is None:
            self.row = torch.linspace(0.5, 1, y.shape[-1], dtype=y.dtype)
        return self.use(y, self.row).mean((2, 3))


def written(y: Tensor, row: Tensor) -> Tensor:
    row.mul_(0.5)
    return y + row


def written_as_data(y: Tensor, row: Tensor) -> Tensor:
    row.data.clamp_(0.6, 0.9)
    row.detach().mul_(0.5)
    return y + row


def a_view_of_data_written(y: Tensor, row: Tensor) -> Tensor:
    row.data[1:].mul_(0.5)
    return y + row


USES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "saved": lambda y, row: y * row,
    "a view saved": lambda y, row: y * row[None, None, None],
    "written": written,
    "written as data": written_as_data,
    "a view of data written": a_view_of_data_written,
    "data saved": lambda y, row: y * row.data,
    "added": lambda y, row: y + row,
    "copied": lambda y, row: y * row.clone(),
    "written into": lambda y, row: y.clone().mul_(row),
    "frozen": lambda y, row: y.detach() * row,
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("no_grad", [False, True])
def test_as_in_stock(use: str, no_grad: bool) -> None:
    torch.manual_seed(0)
    stock = Cached(USES[use]).double()
    image, found = torch.randn(1, 1, 24, 20, dtype=torch.float64), []
    for net in (stock, accelerate(copy.deepcopy(stock), tile=8)):
        with torch.inference_mode():
            net(image)
        try:
            with torch.set_grad_enabled(not no_grad):
                y = net(image)
                if y.requires_grad:
                    y.sum().backward()
            found.append(y.detach())
        except RuntimeError as error:
            found.append(str(error).split(".")[0])
    if isinstance(found[0], str):
        assert isinstance(found[1], str) and found[0] in found[1]
    else:
        torch.testing.assert_close(found[1], found[0], rtol=1e-11, atol=1e-11)
