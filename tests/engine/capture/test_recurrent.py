"""Recurrent layers over the positions of a map, and over what is pooled of it."""

import copy
import time

import pytest
import torch
from exactness import errors
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from gigamorph import UnsupportedError, accelerate
from gigamorph.engine.capture.recording import capture


class Positions(nn.Module):
    """A recurrent layer over the positions of a map."""

    def __init__(self, kind: str, batch_first: bool, bidirectional: bool, layers: int, packed: bool = False):
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 3, stride=4, padding=1)
        form = {"batch_first": batch_first, "bidirectional": bidirectional, "num_layers": layers}
        self.rnn, self.packed = getattr(nn, kind)(3, 4, **form), packed
        self.head = nn.Linear(4 * (1 + bidirectional), 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).relu().flatten(2)
        x = x.transpose(1, 2) if self.rnn.batch_first else x.permute(2, 0, 1)
        if self.packed:
            x = nn.utils.rnn.pack_sequence(list(x))
        states, last = self.rnn(x)
        last = last[0] if isinstance(last, tuple) else last
        states = states.data[None] if self.packed else states.mul_(2)
        return self.head(states).mean((0, 1)) + last.mean()


@settings(max_examples=12)
@given(
    kind=st.sampled_from(["LSTM", "GRU", "RNN"]),
    batch_first=st.booleans(),
    bidirectional=st.booleans(),
    layers=st.integers(1, 2),
    sides=st.tuples(st.integers(8, 40), st.integers(1, 40)),
    seed=st.integers(0, 99),
)
def test_whole_maps_are_exact(kind, batch_first, bidirectional, layers, sides, seed):
    torch.manual_seed(seed)
    stock = Positions(kind, batch_first, bidirectional, layers).double()
    fast = accelerate(copy.deepcopy(stock), tile=16, fallback="untiled")
    x = torch.randn(2, 1, *sides, dtype=torch.float64)
    pairs = [(stock(x), dict(stock.named_parameters())), (fast(x), dict(fast.named_parameters()))]
    for y, _ in pairs:
        y.square().sum().backward()
    (y, own), (other, others) = pairs
    assert (y - other).abs().max() < 1e-13
    assert max(errors({n: p.grad for n, p in own.items()}, {n: p.grad for n, p in others.items()}).values()) < 1e-12


def test_a_long_sequence_is_recorded_at_once() -> None:
    """Of 131072 positions: without values PyTorch goes through each of its steps."""
    began = time.process_time()
    program = capture(Positions("LSTM", True, False, 1), (1, 1, 2048, 1024), torch.float32, "cpu")
    assert time.process_time() - began < 10 and "lstm" in {op.name for op in program.ops}


def test_packed_sequences_are_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"test_recurrent.py:\d+ \(in forward\)") as caught:
        capture(Positions("LSTM", True, False, 1, packed=True), (1, 1, 64, 32), torch.float32, "cpu")
    assert "\n" not in str(caught.value)
