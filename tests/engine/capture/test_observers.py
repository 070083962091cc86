"""What watches a process, counters of FLOPs and modes that log calls, sees what tiles compute and no recording."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from gigamorph import accelerate
from gigamorph.engine.capture.graph import Graph

X = torch.randn(1, 3, 40, 44)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3))


def flops(net: nn.Module) -> int:
    with FlopCounterMode(display=False) as counter:
        net(X).sum().backward()
    return counter.get_total_flops()


def test_flops_of_a_step_are_counted() -> None:
    stock = flops(network())
    whole, tiled = accelerate(network()), accelerate(network(), tile=16)
    first = flops(tiled)  # with the recording, of which nothing counts
    hooks = dict(nn.modules.module._global_forward_hooks)
    whole(X)
    assert flops(whole) == stock
    assert stock < flops(tiled) == first < 2 * stock  # halos, and what is computed again
    assert nn.modules.module._global_forward_hooks == hooks == {}


def test_a_counter_does_not_make_a_network_be_recorded_anew(graphs: list[Graph]) -> None:
    net = accelerate(network(), tile=16)
    y = net(X)
    with FlopCounterMode(display=False):
        again = net(X)
    assert torch.equal(y, again) and len(graphs) == 1


def test_a_mode_of_the_callers_sees_tensors_with_values() -> None:
    class Log(TorchDispatchMode):
        sees_tiles = True

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            assert not any(isinstance(a, FakeTensor) for a in tree_leaves((args, kwargs)))
            calls.append(str(func))
            return func(*args, **(kwargs or {}))

    calls: list[str] = []
    net = accelerate(network(), tile=16)
    with Log():
        net(X).sum().backward()
    assert calls.count("aten.convolution.default") > 4
