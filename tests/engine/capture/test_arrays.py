"""NumPy arrays of tensors: reading them goes on, and what a forward writes to them is never silently lost."""

import copy
from array import array
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from gigamorph import accelerate
from gigamorph.engine.errors import UnsupportedError

Scale = Callable[[Any], Tensor | float]


class Network(nn.Module):
    def __init__(self, scale: Scale):
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3, padding=1)
        self.register_buffer("steps", torch.ones(2))
        self.register_buffer("further", torch.ones(2))
        self.weight = nn.Parameter(torch.ones(2))
        self.array = np.ones(2, dtype=np.float32)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        scale = self.scale(self)
        return x * (scale[:, None, None] if isinstance(scale, Tensor) else scale)


def network(scale: Scale) -> Network:
    torch.manual_seed(0)
    return Network(scale).double()


def then(_write: Any, scale: Any) -> Any:
    return scale


def added(array: np.ndarray, number: float = 1.0) -> np.ndarray:
    array += number
    return array


def counted_up(net: Any) -> Tensor:
    while net.steps.numpy()[0] < 3:
        net.steps.numpy()[0] += 1
    return net.steps


def of_one_that_is_made(net: Any) -> Tensor:
    made = net.steps.clone()
    added(made.numpy())
    return made


def of_zeros(_net: Any) -> Tensor:
    made = torch.zeros(2)
    made.numpy()[:] = (1, 2)
    return made


WRITES: dict[str, Scale] = {
    "a view": lambda net: then(added(net.steps.numpy()), net.steps),
    "copyto": lambda net: then(np.copyto(net.steps.numpy(), np.float32([2, 3])), net.steps),
    "out=": lambda net: then(np.add(net.array, 1, out=net.steps.numpy()), net.steps),
    "data": lambda net: then(added(net.weight.data.numpy()), net.weight),
    "detach": lambda net: then(added(net.weight.detach().numpy()), net.weight),
    "force": lambda net: then(added(net.weight.numpy(force=True)), net.weight),
    "asarray": lambda net: then(added(np.asarray(net.steps)), net.steps),
    "a part": lambda net: then(added(net.steps[1:].numpy()), net.steps),
    "the same device": lambda net: then(added(net.steps.cpu().numpy()), net.steps),
    "from_numpy": lambda net: then(torch.from_numpy(net.steps.numpy()).add_(1), net.steps),
    "from_numpy of a part": lambda net: then(torch.from_numpy(net.steps.numpy()[1:]).add_(1), net.steps),
    "as_tensor": lambda net: then(torch.as_tensor(net.steps.numpy()).add_(1), net.steps),
    "not read again": lambda net: then(added(net.steps.numpy()), 1.0),
    "a loop": counted_up,
    "of a tensor that is made": of_one_that_is_made,
    "of zeros": of_zeros,
}


@pytest.mark.usefixtures("few_objects")
@pytest.mark.parametrize("name", WRITES)
def test_writes_are_refused_and_told_where(name):
    stock = network(WRITES[name])
    before = copy.deepcopy(stock.state_dict())
    with pytest.raises(UnsupportedError, match=r"\(test_arrays.py:\d+\) writes to the NumPy array of a tensor.*copy_"):
        accelerate(stock, tile=8)(torch.randn(1, 1, 16, 16, dtype=torch.float64))
    for key, value in stock.state_dict().items():
        assert torch.equal(value, before[key])


def test_memory_that_is_handed_over_is_refused():
    stock = network(lambda net: then(added(np.from_dlpack(net.steps)), net.steps))
    with pytest.raises(UnsupportedError, match="hands a tensor's memory to other code"):
        accelerate(stock, tile=8)(torch.randn(1, 1, 16, 16, dtype=torch.float64))


def test_a_write_that_changes_nothing_is_refused_once_it_changes_something():
    stock = network(lambda net: then(np.copyto(net.steps.numpy(), net.further.numpy()), net.steps))
    accelerated, x = accelerate(stock, tile=8), torch.randn(1, 1, 16, 16, dtype=torch.float64)
    accelerated(x)
    stock.get_buffer("further").fill_(2)
    with pytest.raises(UnsupportedError, match="NumPy array"):
        accelerated(x)


ON_A_KEPT_ARRAY: dict[str, Scale] = {
    "from the constructor": lambda net: then(added(net.array), net.on_array),
    "made after the write": lambda net: torch.from_numpy(added(net.array)),
    "made before the write": lambda net: then(added(net.array), torch.from_numpy(net.array)),
    "on a part": lambda net: then(added(net.array), torch.from_numpy(net.array[1:])),
    "read before and after": lambda net: net.on_array * 2 + then(added(net.array), net.on_array),
}


@pytest.mark.usefixtures("few_objects")
@pytest.mark.parametrize("name", ON_A_KEPT_ARRAY)
def test_a_tensor_on_a_kept_array_that_was_written_to(name):
    """Each call reads the tensor before it writes to the array: it read what had been there."""
    net = network(ON_A_KEPT_ARRAY[name])
    net.on_array = torch.from_numpy(net.array)
    with pytest.raises(UnsupportedError, match=r"\(test_arrays.py:\d+\) reads a tensor.*NumPy array the model.array"):
        accelerate(net, tile=8)(torch.randn(1, 1, 16, 16, dtype=torch.float64))
    assert np.array_equal(net.array, [1, 1])


def then_image(net: Any) -> float:
    array = net.steps.numpy()
    net.steps.add_(net.seen.mean())
    return float(array.sum())


OF_A_KEPT_ARRAY: dict[str, Scale] = {
    "made in the forward": lambda net: then(torch.from_numpy(net.array).add_(1), float(net.array.sum())),
    "the same of as_tensor": lambda net: then(torch.as_tensor(net.array).add_(1), float(net.array.sum())),
    "kept with it": lambda net: then(net.on_array.add_(1), float(net.array.sum())),
    "on bytes": lambda net: then(net.on_bytes.add_(1), net.bytes[2] / 100),
    "by its array": lambda net: then(net.steps.add_(1), float(net.of_steps.sum())),
    "of the image": then_image,
}


@pytest.mark.usefixtures("few_objects")
@pytest.mark.parametrize("name", OF_A_KEPT_ARRAY)
def test_an_array_whose_tensor_is_written_to(name):
    """NumPy read what had been there before, in silence."""
    net = network(OF_A_KEPT_ARRAY[name])
    net.on_array, net.bytes = torch.from_numpy(net.array), bytearray(8)
    net.on_bytes = torch.frombuffer(net.bytes, dtype=torch.float32)
    if name != "of the image":
        net.of_steps = net.steps.numpy()
    net.conv.register_forward_hook(lambda _conv, _given, y: setattr(net, "seen", y))
    with pytest.raises(UnsupportedError, match=r"\(test_arrays.py:\d+\) writes .*to a tensor.* a NumPy array.*; "):
        accelerate(net, tile=8)(torch.randn(1, 1, 16, 16, dtype=torch.float64))


def test_each_call_returns_arrays_of_its_own():
    """All calls returned the same one: what a user wrote to it was in the next result."""

    class Returning(Network):
        def forward(self, x: Tensor) -> Any:
            grid = np.arange(6.0).reshape(2, 3)
            return self.conv(x).mean(), grid, grid.T[::-1, 1:], bytearray(2), array("d", [1, 2])

    net = accelerate(Returning(lambda net: 1.0), tile=8)
    for _ in range(3):
        _, grid, part, held, numbers = net(torch.randn(1, 1, 16, 16))
        assert grid[1].tolist() == [3, 4, 5] and held == bytearray(2) and numbers[0] == 1
        grid[1] = 7
        held[0], numbers[0] = 1, 3
        assert part.tolist() == [[7], [7], [7]]  # on the same memory


@pytest.mark.usefixtures("few_objects")
@pytest.mark.parametrize("kept", ["part", "with its tensor", ""])
def test_an_array_on_the_memory_of_a_tensor_is_not_handed_out(kept):
    """That of a weight was one of a copy, which a step of the optimizer does not change."""

    class HandsOut(Network):
        def forward(self, x: Tensor) -> Any:
            bias = self.conv.bias.detach().numpy()
            if kept == "part":
                self.kept = bias[1:]
            elif kept:
                own = np.ones(2)
                self.kept = own, torch.from_numpy(own)
            return self.conv(x).mean(), 0 if kept else bias

    where = "the model: attribute 'kept'" if kept else "the result of the model"
    with pytest.raises(UnsupportedError, match=f"{where} holds a NumPy array on the memory of a tensor"):
        accelerate(HandsOut(lambda net: 1.0), tile=8)(torch.randn(1, 1, 16, 16))


def test_a_kept_array_that_is_written_to_after_its_tensor_was_read():
    def scale(net: Any) -> Tensor:
        now = net.on_array * 2
        net.array += 1
        return now

    x = torch.randn(1, 1, 16, 16, dtype=torch.float64)
    stock, net = network(scale), network(scale)
    for each in (stock, net):
        each.on_array = torch.from_numpy(each.array)
    tiled = accelerate(net, tile=8)
    for _ in range(3):
        torch.testing.assert_close(tiled(x), stock(x))
        assert np.array_equal(net.array, stock.array)


def from_numpy(array: np.ndarray) -> Tensor:
    tensor = torch.from_numpy(array)
    tensor += 1
    return tensor


def both_ways(tensor_on: Callable[[np.ndarray], Tensor]) -> Tensor:
    array = np.ones(2, dtype=np.float32)
    tensor = tensor_on(array)
    tensor.mul_(3)
    total = float(array.sum())
    array[0] = 5
    return tensor * total


def two_tensors() -> Tensor:
    array = np.ones(2, dtype=np.float32)
    first, second = torch.from_numpy(array), torch.from_numpy(array)
    first.mul_(3)
    return second


def read_before(tensor_of: Callable[[np.ndarray], Tensor]) -> Tensor:
    array = np.ones(2, dtype=np.float32)
    before = tensor_of(array) * 2
    array += 1
    return before + torch.from_numpy(array)


def of_bytes() -> float:
    held = bytearray(8)
    torch.frombuffer(held, dtype=torch.float32).add_(1)
    return held[2] / 100


def normalized(net: Any) -> Tensor:
    array = (net.steps * net.further).numpy()
    array /= array.sum()
    return torch.from_numpy(array)


def followed(net: Any) -> float:
    array, part = net.steps.numpy(), net.steps.numpy()[1:]
    net.steps.add_(net.further)
    net.steps[1:].mul_(2)
    return float(array.sum() + part.sum())


def not_read_again(net: Any) -> Tensor:
    array = net.steps.numpy()
    mean = float(array.mean())
    net.steps.add_(net.further)
    return net.steps * mean


READS: dict[str, Scale] = {
    "numbers": lambda net: float(net.steps.numpy().sum() + np.asarray(net.weight.detach()).max()),
    "a copy": lambda net: float(added(net.steps.numpy().copy()).sum()),
    "another dtype": lambda net: float(added(np.asarray(net.steps, dtype=np.float32)).sum()),
    "a tensor for the array alone": lambda net: float(added(net.steps.clone().numpy()).sum()),
    "a tensor of it": normalized,
    "as_tensor of it": lambda net: torch.as_tensor(net.steps.numpy()) * 2,
    "a tensor on an array that is made": lambda net: from_numpy(np.ones(2, dtype=np.float32)),
    "an array of what is written": followed,
    "an array of what it was": not_read_again,
    "an array whose tensor is written to": lambda net: both_ways(torch.from_numpy),
    "the same of as_tensor": lambda net: both_ways(torch.as_tensor),
    "the same of the class": lambda net: both_ways(torch.Tensor),
    "the same of from_dlpack": lambda net: both_ways(torch.from_dlpack),
    "a part of an array": lambda net: both_ways(lambda array: torch.from_numpy(array[:])),
    "two tensors on an array": lambda net: two_tensors(),
    "a tensor of before the write": lambda net: read_before(torch.from_numpy),
    "a copy of before the write": lambda net: read_before(torch.tensor),
    "bytes": lambda net: of_bytes(),
    "an array that is kept": lambda net: then(setattr(net, "array", net.array + 1), torch.as_tensor(net.array)),
}


@pytest.mark.parametrize("name", READS)
def test_reading_and_arrays_of_the_forwards_own_are_as_in_stock(name):
    stock, other = network(READS[name]), network(READS[name])
    accelerated = accelerate(other, tile=8)
    for seed in range(3):
        x = torch.randn(1, 1, 16, 16, generator=torch.Generator().manual_seed(seed)).double()
        for net in (stock, accelerated):
            net(x).square().mean().backward()
        torch.testing.assert_close(other.conv.weight.grad, stock.conv.weight.grad)
        with torch.no_grad():
            stock.get_buffer("steps").add_(1)
            other.get_buffer("steps").add_(1)
    assert np.array_equal(stock.array, other.array)
