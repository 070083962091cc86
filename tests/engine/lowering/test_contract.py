"""einsum, tensordot, mm and conv1d against stock: what stays per pixel, what is summed over tiles, what is whole."""

import pytest
import torch
from around import Around, image
from exactness import assert_exact
from torch import Tensor, nn
from torch.nn import functional as F

from gigamorph.engine.capture.recording import capture
from gigamorph.engine.lowering.nodes import sort
from gigamorph.engine.lowering.ops import Whole
from gigamorph.engine.lowering.ops.contract import labels


class Contraction(nn.Module):
    """A function of a map, a matrix (3, 4) and ramps over rows and columns, after a convolution."""

    def __init__(self, function, pixelwise: bool):
        super().__init__()
        self.first, self.last = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(3, 2, 3) if pixelwise else nn.Identity()
        self.weight, self.bias = nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(3))
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.function(self.first(x).tanh(), self)).tanh()


def ramps(x: Tensor) -> tuple[Tensor, Tensor]:
    return (torch.linspace(-1, 1, n, dtype=x.dtype) for n in x.shape[2:])  # pyright: ignore


def tokens(x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2)


PIXELWISE = {
    "1x1": lambda x, m: torch.einsum("nchw,oc->nohw", x, m.weight),
    "spaces, implicit": lambda x, m: torch.einsum("n c h w, o c -> n h w o", x, m.weight).permute(0, 3, 1, 2),
    "implicit": lambda x, m: torch.einsum("achw,ob->abchwo", x, m.weight[:, :1])[:, 0].sum(1).movedim(-1, 1),
    "operands in a list": lambda x, m: torch.einsum("oc,nchw->nohw", [m.weight, x]),
    "sublists": lambda x, m: torch.einsum(x, [0, 1, 2, 3], m.weight, [7, 1], [0, 7, 2, 3]),
    "ellipsis": lambda x, m: torch.einsum("...c,oc->...o", x.movedim(1, -1), m.weight).movedim(-1, 1),
    "ellipsis over positions": lambda x, m: torch.einsum("nc...,oc->no...", x, m.weight),
    "tokens": lambda x, m: torch.einsum("npc,oc->nop", tokens(x), m.weight).unflatten(2, x.shape[2:]),
    "batch in the positions": lambda x, m: (
        torch.einsum("pc,oc->po", x.movedim(1, -1).reshape(-1, 4), m.weight).reshape(2, 19, 14, 3).movedim(-1, 1)
    ),
    "two maps": lambda x, m: torch.einsum("nchw,ndhw,oc,od->nohw", x, x * 2, m.weight, m.weight),
    "gate of each channel": lambda x, m: torch.einsum("nchw,nc->nchw", x, x.mean((2, 3)))[:, 1:],
    "a value for each position": lambda x, m: torch.einsum("nchw,hw,oc->nohw", x, ramps_product(x), m.weight),
    "a value for each row": lambda x, m: torch.einsum("nchw,h,oc->nohw", x, next(iter(ramps(x))), m.weight),
    "size one": lambda x, m: torch.einsum("nchw,ohw->nohw", x[:, :1], m.bias[:, None, None]),
    "tensordot": lambda x, m: torch.tensordot(x, m.weight, dims=([1], [1])).movedim(-1, 1),
    "tensordot of the last": lambda x, m: torch.tensordot(x.movedim(1, -1), m.weight.T, 1).movedim(-1, 1),
    "mm": lambda x, m: torch.mm(x.movedim(1, -1).reshape(-1, 4), m.weight.t()).view(2, 19, 14, 3).movedim(-1, 1),
    "addmm": lambda x, m: (
        torch.addmm(m.bias, x.movedim(1, -1).reshape(-1, 4), m.weight.t(), beta=0.5).view(2, 19, 14, 3).movedim(-1, 1)
    ),
    "matmul of tokens": lambda x, m: (m.weight @ x.flatten(2)).unflatten(2, x.shape[2:]),
    "bmm of tokens": lambda x, m: torch.bmm(m.weight.expand(2, 3, 4), x.flatten(2)).unflatten(2, x.shape[2:]),
    "conv1d": lambda x, m: F.conv1d(x.flatten(2), m.weight[..., None], m.bias).unflatten(2, x.shape[2:]),
    "grouped conv1d": lambda x, m: (
        F.conv1d(x.flatten(2), m.weight[:2, :2, None], groups=2, padding="same")
        .unflatten(2, x.shape[2:])
        .repeat(1, 2, 1, 1)[:, :3]
    ),
    "conv1d over channels": lambda x, m: (
        F.conv1d(x.movedim(1, -1).reshape(-1, 1, 4), m.weight[:1, None, :2]).view(2, 19, 14, 3).movedim(-1, 1)
    ),
}

SUMMED = {
    "sum": lambda x, m: torch.einsum("nchw->nc", x),
    "sum, then a matrix": lambda x, m: torch.einsum("nchw,oc->no", x, m.weight),
    "Gram": lambda x, m: torch.einsum("nchw,ndhw->ncd", x, x) / 100,
    "Gram of tokens": lambda x, m: torch.einsum("npc,npd->ncd", tokens(x), tokens(x * 2)) / 100,
    "over the batch": lambda x, m: torch.einsum("pc,pd->cd", *[x.movedim(1, -1).reshape(-1, 4)] * 2) / 100,
    "class activation": lambda x, m: torch.einsum("nchw,nohw->noc", x, torch.einsum("nchw,oc->nohw", x, m.weight)) / 50,
    "soft-argmax": lambda x, m: torch.einsum(
        "nkp,pd->nkd", x.flatten(2).softmax(2), torch.stack(torch.meshgrid(*ramps(x), indexing="ij"), -1).flatten(0, 1)
    ),
    "soft-argmax of rows": lambda x, m: torch.einsum("nchw,h->nc", x, next(iter(ramps(x)))),
    "one map less": lambda x, m: torch.einsum("nchw,nhw,oc->no", x, x[:, 0], m.weight) / 50,
    "mv": lambda x, m: torch.mv(x.movedim(1, -1).reshape(-1, 4).t(), x[:, 0].flatten())[None] / 50,
    "mm": lambda x, m: torch.mm(x[0].flatten(1), x[0].flatten(1).t()) / 50,
    "tensordot over all": lambda x, m: torch.tensordot(x, x, ([2, 3], [2, 3]))[:, :, 0, 1] / 50,
}

WHOLE = {
    "over columns": lambda x, m: torch.einsum("nchw,w->nch", x, list(ramps(x))[1]),
    "positions by positions": lambda x, m: torch.einsum("nchw,ncuv->nhwuv", x, x)[:, 3, 4],
    "diagonal": lambda x, m: torch.einsum("ncii->nci", x[..., :14, :]),
    "transposed": lambda x, m: torch.tensordot(x[0, 0], x[0, 1], ([1], [1])) / 10,
}


@pytest.mark.parametrize("tile", [(5, 4), 64])
@pytest.mark.parametrize("name", PIXELWISE)
def test_pixelwise(name, tile):
    torch.manual_seed(0)
    assert_exact(Contraction(PIXELWISE[name], True).double(), image(), tile=tile)


@pytest.mark.parametrize("name", [*SUMMED, *WHOLE])
def test_summed(name):
    torch.manual_seed(0)
    assert_exact(Contraction({**SUMMED, **WHOLE}[name], False).double(), image(), tile=(5, 4))


def test_sums_come_from_tiles():
    """No map is taken whole for a contraction over both axes."""
    for name in SUMMED:
        program = capture(Contraction(SUMMED[name], False).double(), (2, 2, 19, 14), torch.float64, "cpu")
        maps, nodes = sort(program)
        assert not any(isinstance(node, Whole) and maps.inputs(node.op) for node in nodes), name


def test_in_the_middle():
    """What is contracted over the image may scale the map, in a further stage."""
    gate = Around(lambda x: x * torch.einsum("nchw,ndhw->nc", x, x.tanh()).tanh()[..., None, None])
    assert_exact(gate.double(), image(), tile=(5, 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtypes(dtype):
    torch.manual_seed(0)
    net = Contraction(SUMMED["Gram"], False).to(dtype)
    assert_exact(net, image().to(dtype), tile=(5, 4), limit=3e-2 if dtype == torch.bfloat16 else 1e-5)


def ramps_product(x: Tensor) -> Tensor:
    rows, columns = ramps(x)
    return rows[:, None] * columns


@pytest.mark.parametrize(
    "equation, ranks, expected",
    [
        ("ab,bc", [2, 2], ([["a", "b"], ["b", "c"]], ["a", "c"])),
        ("...a,b...->b...", [3, 2], ([["2", "1", "a"], ["b", "1"]], ["b", "2", "1"])),
        ("...a", [3], ([["2", "1", "a"]], ["2", "1", "a"])),
    ],
)
def test_labels(equation, ranks, expected):
    assert labels(equation, ranks) == expected


class OfEachPlace(nn.Module):
    """Positions of all images as one axis, (N * H * W, C), and parameters with a value for each of them."""

    def __init__(self, function):
        super().__init__()
        self.first, self.function = nn.Conv2d(2, 4, 3, padding=1), function
        self.weight = nn.Parameter(torch.randn(2 * 12 * 10, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.first(x).permute(0, 2, 3, 1).reshape(-1, 4), self.weight)


OF_EACH_PLACE = {
    "summed": lambda x, w: torch.einsum("nc,nk,nl->ckl", x, w, w[:, :2].sin()),
    "product": lambda x, w: torch.einsum("nc,nk->nck", x, w).view(2, 12, 10, 16),
    "where": lambda x, w: torch.where(w[:, :1] > 0, x.sin(), w * w[:, 1:2]).view(2, 12, 10, 4),
    "cosine similarity": lambda x, w: torch.cosine_similarity(x, w, dim=1).view(2, 12, 10),
}


@pytest.mark.parametrize("name", OF_EACH_PLACE)
def test_values_of_each_position_of_each_image(name):
    torch.manual_seed(0)
    x = torch.randn(2, 2, 12, 10, dtype=torch.float64)
    assert_exact(OfEachPlace(OF_EACH_PLACE[name]).double(), x, tile=(5, 4))
