"""NumPy arrays of tensors: reading them goes on, and what a forward writes to them is never silently lost."""

import copy
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
    "a tensor on a kept array": lambda net: from_numpy(net.array),
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
