"""Channels by list and tensor, assignment to channels and regions, copies and fills, against stock."""

import pytest
import torch
from around import Around, image
from exactness import assert_exact
from torch import Tensor, nn
from torch.nn import functional as F

from gigamorph import UnsupportedError, accelerate

PICKS = [
    lambda x: x[:, [2, 0, 3, 1]],
    lambda x: x[:, torch.tensor([[1, 0], [3, 3]])].sum(1).repeat(1, 2, 1, 1),
    lambda x: x[torch.tensor([1, 0])][:, 1:].repeat(1, 2, 1, 1)[:, :4],
    lambda x: x[[1, 0], [2, 3]].unsqueeze(1).repeat(2, 4, 1, 1)[:2],
    lambda x: x.permute(0, 2, 3, 1)[..., [0, 0, 1, 2]].permute(0, 3, 1, 2),
    lambda x: x.permute(0, 2, 3, 1)[1:, ..., torch.arange(4)].movedim(3, 1).expand(2, -1, -1, -1),
    lambda x: x[:, [0, 2], 1:-2:2, 3:].repeat(1, 2, 1, 1),
    lambda x: x.flatten(2)[:, [1, 2, 0, 3]].unflatten(2, x.shape[2:]),
    lambda x: x.index_select(1, torch.tensor([2, 0, 3, 1]).sort()[1]),
    lambda x: x.take_along_dim(x.argsort(1), 1) + x.gather(1, torch.ones(2, 4, 19, 14, dtype=torch.long)),
    lambda x: x[:, :2].repeat_interleave(2, 1) + x[:, :2].repeat_interleave(torch.tensor([3, 1]), dim=1, output_size=4),
    lambda x: x.repeat_interleave(2, 2).repeat_interleave(3, dim=-1)[:, :, 1:, :-1],
    lambda x: x * F.embedding((x * 4).long().clamp(0, 3)[:, 0], x.new_ones(4, 4).cumsum(0)).movedim(-1, 1),
]


@pytest.mark.parametrize("pick", PICKS)
def test_picks(pick):
    assert_exact(Around(pick).double(), image(), tile=(5, 4))


def test_a_generator_of_the_forwards_own():
    """Dynamo does not record one that is made inside."""
    pick = Around(lambda x: x[:, torch.randperm(4, generator=torch.Generator().manual_seed(0))]).double()
    with pytest.raises(UnsupportedError, match=r"^test_indices.py:\d+ .*cannot be recorded by TorchDynamo"):
        accelerate(pick, tile=(5, 4))(image())


def assigned(x: Tensor, key, value) -> Tensor:
    y = x.clone()
    y[key] = value
    return y


def collected(x: Tensor, make) -> Tensor:
    """Channels that are put into a tensor one after the other."""
    y = make(x)
    y[:, :1] = x[:, 3:]
    y[:, 1:3] = x[:, :2].tanh()
    y[:, 3] = x.sum(1)
    return y


def padded(x: Tensor, make) -> Tensor:
    y = make(x, 2, 4, 22, 15)
    y[:, :, 1:20, :14] = x
    y[:, 1:3, 3:, 1:] = x[:, :2]
    return y


ALL = slice(None)
WRITES = {
    "a number": lambda x: assigned(x, (ALL, slice(2)), 0.5),
    "a map": lambda x: assigned(x, (ALL, slice(2)), x[:, 2:].tanh()),
    "a map, broadcast": lambda x: assigned(x, (ALL, slice(1, 4)), x[:, :1]),
    "a map without channels": lambda x: assigned(x, (ALL, 1), x.mean(1)),
    "one image": lambda x: assigned(x, 1, x[0]),
    "listed": lambda x: assigned(x, (ALL, [0, 3]), x[:, 1:3]),
    "by a tensor": lambda x: assigned(x, (ALL, torch.tensor([3, 0])), x[:, 1:3] * 2),
    "a vector": lambda x: assigned(x, (ALL, slice(2)), torch.tensor([[[0.1]], [[0.2]]], dtype=x.dtype)),
    "a vector for each position": lambda x: assigned(x, (ALL, slice(2)), torch.linspace(0, 1, 14, dtype=x.dtype)),
    "all": lambda x: assigned(x, ..., x.flip(1)),
    "channels last": lambda x: assigned(x.permute(0, 2, 3, 1), (..., 0), 1.0).permute(0, 3, 1, 2),
    "tokens": lambda x: assigned(x.flatten(2).mT, (..., 0), 1.0).mT.unflatten(2, x.shape[2:]),
    "border": lambda x: assigned(assigned(x, (ALL, ALL, 0), 0), (..., slice(-2, None)), 0.5),
    "every second row": lambda x: assigned(x, (ALL, slice(2), slice(1, None, 2), slice(3, -3, 3)), 0.5),
    "a vector in a region": lambda x: assigned(x, (ALL, ALL, slice(4, 9)), x.new_ones(4, 1, 1).cumsum(0)),
    "a map in a region": lambda x: assigned(x, (ALL, ALL, slice(4, 9), slice(0, 6)), x[:, :, 3:8, 8:] * 2),
    "a smaller map": lambda x: assigned(x, (ALL, slice(2), slice(9, 18), slice(7)), F.avg_pool2d(x, 2)[:, :2]),
    "by a mask": lambda x: assigned(x, x < 0.1, 0.3),
    "by a mask of positions": lambda x: assigned(x.movedim(1, -1), x[:, 0] < 0.1, 0.3).movedim(-1, 1),
    "by a mask, a vector": lambda x: assigned(x, x < 0.1, x.new_ones(())),
    "to zeros": lambda x: collected(x, torch.zeros_like),
    "to an empty tensor": lambda x: collected(x, lambda x: torch.empty(2, 4, 19, 14, dtype=x.dtype)),
    "to new zeros": lambda x: collected(x, lambda x: x.new_zeros(x.shape)),
    "to a computed tensor": lambda x: collected(x, lambda x: x.new_ones(14).cumsum(0).repeat(2, 4, 19, 1)),
    "to a longer tensor": lambda x: padded(x, lambda x, *shape: x.new_ones(shape)),
    "to a longer computed tensor": lambda x: padded(
        x, lambda x, *s: torch.linspace(0, 1, s[-1], dtype=x.dtype).expand(s).contiguous()
    ),
    "fill": lambda x: x * torch.empty_like(x).fill_(2) + x.clone().fill_(x.new_ones(())) + x.clone().zero_(),
    "copy": lambda x: torch.empty_like(x).copy_(x) * x.clone().copy_(x[:, :1]) + x.new_empty(x.shape).copy_(x),
    "copy of another dtype": lambda x: torch.empty_like(x).copy_(x > 0) * x,
    "torch.fill": lambda x: torch.fill(x, 0.5) + x,
    "index_fill": lambda x: x.index_fill(1, torch.tensor([0, 2]), 0.5) + x.clone().index_fill_(1, torch.tensor([1]), 2),
    "index_copy": lambda x: x.index_copy(1, torch.tensor([3, 1]), x[:, :2] * 2),
    "index_add": lambda x: x.index_add(1, torch.tensor([3, 1, 1]), x[:, :3], alpha=0.5),
    "index_add_": lambda x: torch.zeros_like(x).index_add_(1, torch.tensor([3, 1, 1]), x[:, :3]),
    "scatter_add": lambda x: x.scatter_add(1, (x > 0).long(), x * 2),
    "scatter into zeros": lambda x: x.new_zeros(2, 4, 19, 14).scatter_(1, x.argmax(1, keepdim=True), 1.0) * x,
    "slice_scatter": lambda x: x.slice_scatter(x[:, :2] * 2, 1, 2).select_scatter(x[:, 0] + 1, 1, 1),
    "slice_scatter of rows": lambda x: x.slice_scatter(x[:, :, 3:7] * 2, 2, 5, 9),
}


@pytest.mark.parametrize("name", WRITES)
def test_writes(name):
    assert_exact(Around(WRITES[name]).double(), image(), tile=(5, 4))


def test_the_old_map_is_read_on():
    """A shift that reads the map before the write gets the old one, in every tile."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Conv2d(2, 4, 3), nn.Conv2d(4, 3, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            before = F.pad(x, (2, -2, -1, 1))
            x[:, :2] = before[:, 2:]
            return self.last(x + before).tanh().mean((2, 3))

    assert_exact(Net().double(), image(), tile=(3, 4))
