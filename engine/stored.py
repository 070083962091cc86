"""Bytes of maps that exist whole: when each comes into being, and how long it and its gradient live.

A stored map lives from the sweep that writes it to its last reader; where a backward will follow, until the backward
of the sweep that wrote it, since the sweeps that read it keep it. Its gradient comes into being in the backward of its
last reader, and goes with the map.
"""

from __future__ import annotations

import math
from collections.abc import Container

from .graph import Graph, Network
from .ops import Small


def map_bytes(network: Network, value: int) -> int:
    info = network.program.values[value]
    return math.prod(info.shape) * info.dtype.itemsize


def stored_peak(network: Network, training: bool, wanted: Container[int]) -> int:
    """The most bytes of stored maps, of what ops make of them whole, and of their gradients, at any time of a step.

    Args:
        wanted: the values that want a gradient.
    """
    steps = network.steps
    made: dict[int, int] = {}
    last: dict[int, int] = {}
    for number, step in enumerate(steps):
        outputs = step.stored if isinstance(step, Graph) else () if isinstance(step, Small) else step.outputs
        made.update((v, number) for v in outputs)
        inputs = step.sources if isinstance(step, Graph) else step.inputs
        last.update((v, number) for v in inputs if v in made)
    if not any(network.sweeps[i].stored for i in range(len(network.sweeps))):
        return 0
    size = {v: map_bytes(network, v) for v in made}
    end = len(steps)
    if not training:
        alive = [sum(size[v] for v in made if made[v] <= now <= last.get(v, end)) for now in range(end)]
        return max(alive)
    total = []
    for now in range(end):  # the backward of step `now`; the forward's peak is that of its last step
        held = [v for v in made if made[v] <= now]
        grads = [v for v in held if v in wanted and last.get(v, end) >= now]
        total.append(sum(size[v] for v in held) + sum(size[v] for v in grads))
    return max(total)
