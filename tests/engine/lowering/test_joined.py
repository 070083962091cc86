"""Maps joined along rows or columns, differences of neighbours, mirrored and turned maps, against stock."""

import pytest
import torch
from around import Around, image
from exactness import assert_exact
from torch import Tensor, nn
from torch.nn import functional as F

from gigamorph import UnsupportedError, accelerate, plan

JOINS = {
    "rows": lambda x: torch.cat([x, x.tanh()], 2),
    "the same twice": lambda x: torch.cat([x, x, x], 3),
    "maps of two sizes": lambda x: torch.cat([F.max_pool2d(x, 1, (2, 1)), x, x[:, :, 3:5]], dim=-2),
    "rows of zeros": lambda x: torch.cat([x.new_zeros(2, 4, 1, 14), x, x.new_ones(2, 4, 2, 14)], 2),
    "the first row once more": lambda x: torch.cat([x[:, :, :1], x, x[:, :, -2:]], 2),
    "a mirrored border": lambda x: (
        torch.cat([x, x.flip(2)], 2)[:, :, :23] * torch.cat([x, x.flip(-2)], -2)[..., :23, :]
    ),
    "mirrored borders": lambda x: mirrored(mirrored(x, 2, 16), 3, 16).tanh(),
    "twice as many rows": lambda x: torch.cat([x, x.flip(2)], 2).tanh(),
    "a map and its mirror image": lambda x: torch.cat([x, x.flip(3)], 3)[..., 2:-3].tanh(),
    "rolled": lambda x: torch.cat([x[..., 3:], x[..., :3]], 3),
    "channels last": lambda x: torch.cat([x.movedim(1, -1)] * 2, 2).movedim(-1, 1),
    "both": lambda x: torch.cat([torch.cat([x, x * 2], 2), torch.cat([x * 3, x.tanh()], 2)], 3),
    "stack": lambda x: torch.stack([x, x.tanh()], 2).flatten(1, 2)[:, ::2],
    "hstack": lambda x: torch.hstack([x[:, :2], x[:, 1:3]]) + torch.vstack([x[:1], x[1:]]),
    "dstack": lambda x: torch.dstack([x, x.tanh()]),
    "diff": lambda x: torch.diff(x, dim=2)[..., 1:] * x.diff(dim=-1)[:, :, 1:],
    "diff of diff": lambda x: x.diff(n=2, dim=2) + x.diff(2, 2),
    "diff of channels": lambda x: torch.cat([x.diff(dim=1), x[:, :1]], 1),
    "sorted channels": lambda x: x.sort(1)[0] + x.sort(dim=1, descending=True).indices + x.argsort(1),
    "cumulative channels": lambda x: x.cumprod(1) + x.cummax(1).values + torch.cummin(x, dim=1)[0] + x.cumsum(1),
    "rot90 of channels and batch": lambda x: x[:1].repeat(4, 1, 1, 1).rot90(2, (0, 1))[:2] + x.fliplr(),
    "cosine similarity": lambda x: (
        x * F.cosine_similarity(x, x.flip(1) + 1)[:, None]
        + F.cosine_similarity(x, torch.arange(1.0, 5.0, dtype=x.dtype)[None, :, None, None], dim=1).unsqueeze(1)
    ),
    "roll": lambda x: x.roll(1, 2) * x + x.roll((-2, 3), (2, 3)) + x.roll(20, -1),
    "roll by half": lambda x: torch.roll(x, shifts=[-7, 9], dims=[3, 2]).tanh(),
    "roll of windows": lambda x: (
        x.movedim(1, -1).roll((-3, -3), (1, 2)).tanh().roll((3, 3), dims=(1, 2)).movedim(-1, 1)
    ),
    "transposed": lambda x: x.mT + 1,
    "transposed, then a convolution": lambda x: x.transpose(2, 3).relu().mT,
}


def mirrored(x: Tensor, dim: int, window: int) -> Tensor:
    """As SwinIR and those after it fill the last windows."""
    return torch.cat([x, torch.flip(x, [dim])], dim).narrow(dim, 0, (x.shape[dim] // window + 1) * window)


@pytest.mark.parametrize("tile", [(5, 4), 64])
@pytest.mark.parametrize("name", [n for n in JOINS if n != "transposed"])
def test_joins(name, tile):
    assert_exact(Around(JOINS[name]).double(), image(), tile=tile)


class Ends(nn.Module):
    """A convolution, and what is made of its map at the network's end."""

    def __init__(self, function):
        super().__init__()
        self.conv, self.function = nn.Conv2d(2, 4, 3, padding=1), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.conv(x).tanh())


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.flip(3),
        lambda x: torch.flip(x, [2, 3]),
        lambda x: x.rot90(1, (2, 3)),
        lambda x: torch.rot90(x, 2, [-2, -1]),
        lambda x: x.transpose(2, 3),
        lambda x: x.mT,
        lambda x: x.permute(3, 0, 2, 1),
        lambda x: {"as it is": x, "mirrored": x.flip(2), "joined": torch.cat([x, x * 2], 2)},
        lambda x: torch.cat([x.mean((2, 3))[..., None], x.flatten(2)], 2),
        lambda x: (x.flip(3) * 2).roll(1, 2).softmax(1),
    ],
)
def test_the_whole_output(function):
    assert_exact(Ends(function).double(), image(), tile=(5, 4))


@pytest.mark.parametrize("function", [lambda x: x.flip(3), lambda x: x.rot90(2, (2, 3))])
def test_a_mirrored_map_in_the_middle(function):
    """It is taken whole, which has to be allowed."""
    net = Around(lambda x: x + function(x)).double()
    assert_exact(net, image(), tile=(5, 4), fallback="untiled")
    with pytest.raises(UnsupportedError, match=r'needs the whole map.*fallback="untiled"'):
        accelerate(net, tile=8)(image())


def test_joined_maps_are_planned():
    """The last tiles, which compute what had to wait, are those that are counted."""
    peaks = [
        plan(Around(function), (1, 2, 512, 64), tile=32).tile_bytes
        for function in (lambda x: x, lambda x: torch.cat([x, x], 2))
    ]
    assert peaks[1] > 5 * peaks[0]
