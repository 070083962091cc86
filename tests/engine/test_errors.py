"""Errors that the network's own forward raises: of two kinds at once, also after they went through a pipe."""

import pickle

import pytest
import torch
from torch import Tensor, nn

from gigamorph import accelerate
from gigamorph.engine.errors import ForwardError, UnsupportedError


class Picky(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] < 100:
            raise KeyError("images of 100 columns at least")
        return self.conv(x).mean((2, 3))


def test_an_error_of_the_forward_itself() -> None:
    with pytest.raises(KeyError, match="images of 100 columns at least") as raised:
        accelerate(Picky())(torch.zeros(1, 1, 20, 20))
    sent = pickle.loads(pickle.dumps(raised.value))
    for error in (raised.value, sent):
        assert isinstance(error, UnsupportedError) and isinstance(error, ForwardError) and isinstance(error, KeyError)
    assert str(sent) == str(raised.value)
