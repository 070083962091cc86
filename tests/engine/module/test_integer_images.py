"""Images of integers, as files and loaders give them, to a network that converts and scales them itself."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from exactness import LIMIT, step, step_errors
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from gigamorph import GigamorphError, accelerate

FIRST: dict[str, Callable[[Tensor], Tensor]] = {
    "scaled": lambda x: x.double() / 255,
    "divided before": lambda x: (x / 255).double(),
    "standardised": lambda x: (x.to(torch.float64) - torch.tensor([90.0, 100.0, 110.0]).double().view(3, 1, 1)) / 60,
    "centred": lambda x: x.double() - x.double().mean((2, 3), keepdim=True),
    "padded as integers": lambda x: F.pad(x, (1, 2, 0, 1)).double(),
    "cut out": lambda x: x[:, :, 3:-2, 4:].double(),
    "clamped": lambda x: x.clamp(10, 200).double() / 99,
    "a mask of them": lambda x: (x > 100).double(),
    "by its type": lambda x: x.double() / (255 if x.dtype == torch.uint8 else 1000),
    "by its values": lambda x: x.double() / 255 if x.max() > 1 else x.double(),
    "one channel for each value": lambda x: F.one_hot((x[:, 0] % 3).long(), 3).movedim(-1, 1).double(),
}


class Network(nn.Module):
    def __init__(self, first: str):
        super().__init__()
        self.first = first
        self.stem, self.norm = nn.Conv2d(3, 4, 3, 2, 1, bias=False), nn.BatchNorm2d(4)
        self.body, self.head = nn.Conv2d(4, 4, 3, padding=1), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(FIRST[self.first](x))).relu()
        return self.head(self.body(x).relu().mean((2, 3)))


@settings(max_examples=16, deadline=None)
@given(
    first=st.sampled_from(sorted(FIRST)),
    dtype=st.sampled_from([torch.uint8, torch.int16, torch.int32, torch.int64]),
    live=st.booleans(),
    tile=st.sampled_from([16, (12, 20), None]),
    size=st.tuples(st.integers(30, 50), st.integers(30, 50)),
    seed=st.integers(0, 10**6),
)
def test_a_step_on_integers_is_stocks(
    first: str, dtype: torch.dtype, live: bool, tile: int | tuple[int, int] | None, size: tuple[int, int], seed: int
) -> None:
    torch.manual_seed(seed)
    image = torch.randint(0, 256, (2, 3, *size)).to(dtype)
    network = Network(first).double().train(live)
    fast = accelerate(copy.deepcopy(network), tile=tile, fallback="untiled" if first == "by its values" else None)
    expected, got = (step(net, image, image_gradient=False) for net in (network, fast))
    assert max(step_errors(expected, got).values()) < LIMIT


def test_a_budget_and_a_list_of_integers() -> None:
    torch.manual_seed(0)
    network = Network("scaled").double()
    image = torch.randint(0, 256, (1, 3, 400, 300)).to(torch.uint8)
    expected = step(copy.deepcopy(network), image, image_gradient=False)
    got = step(accelerate(copy.deepcopy(network), memory_budget="8MiB", verify=True), image, image_gradient=False)
    assert max(step_errors(expected, got).values()) < LIMIT
    images = [image[0, :, :40, :50], image[0, :, :60, :30]]
    network.eval()
    fast = accelerate(network, tile=16)
    with torch.no_grad():
        assert torch.allclose(fast(images), torch.cat([network(i[None]) for i in images]), atol=1e-13)


def test_what_is_no_image_batch_is_refused() -> None:
    with pytest.raises(RuntimeError, match="should be the same"):  # PyTorch's own
        accelerate(nn.Conv2d(3, 4, 3), tile=8)(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))
    net = accelerate(Network("scaled"))
    with pytest.raises(GigamorphError, match=r"of real numbers, not torch.complex64 of shape \(1, 3, 8, 8\)$"):
        net(torch.zeros(1, 3, 8, 8, dtype=torch.complex64))
    with pytest.raises(GigamorphError, match=r"dense tensor, not torch.sparse_coo; pass x.to_dense\(\)$"):
        net(torch.zeros(1, 3, 8, 8).to_sparse())
    with pytest.raises(GigamorphError, match=r"\(3, 8, 8\); give one image as x\[None\]$"):
        net(torch.zeros(3, 8, 8))
    for call in (net, net.evidence):  # PyTorch's own, of bags and volumes
        with pytest.raises(RuntimeError, match=r"to conv2d, but got input of size: \[1, 4, 3, 8, 8\]"):
            call(torch.zeros(1, 4, 3, 8, 8))
