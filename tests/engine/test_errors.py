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
        assert isinstance(error, ForwardError) and isinstance(error, KeyError)
        assert not isinstance(error, NotImplementedError)
    assert str(sent) == str(raised.value)


class Sorts(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.last = how, nn.Conv2d(1, 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.last(x)
        if self.how == "op":
            return x.flatten(2).sort(-1)[0][:, :, None]
        if self.how == "value":
            return x * x.max().item()
        torch._dynamo.graph_break()
        return x


@pytest.mark.parametrize(("how", "op"), [("op", "sort"), ("value", "item"), ("break", None)])
def test_a_refusal_names_module_and_op(how: str, op: str | None) -> None:
    net = accelerate(nn.Sequential(nn.ReLU(), Sorts(how)), tile=8)
    with pytest.raises(NotImplementedError) as raised:
        net(torch.zeros(1, 1, 20, 20))
    error = raised.value
    assert isinstance(error, UnsupportedError)
    assert (error.module, error.op) == ("1", op)
    sent = pickle.loads(pickle.dumps(error))
    assert (str(sent), sent.module, sent.op) == (str(error), error.module, error.op)
