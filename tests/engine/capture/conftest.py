"""Fixtures for tests of recording."""

from __future__ import annotations

import pytest
import torch
from torch import fx, nn

from gigamorph import accelerate
from gigamorph.engine.capture.graph import Graph


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[Graph]:
    """The graphs that TorchDynamo hands over during the test, in order."""
    accelerate(nn.ReLU(), tile=4)(torch.zeros(1, 1, 4, 4))  # the first network of a process has the recorder loaded
    found: list[Graph] = []
    copied = Graph.of

    def of(module: fx.GraphModule) -> Graph:
        graph = copied(module)
        found.append(graph)
        return graph

    monkeypatch.setattr("gigamorph.engine.capture.dynamo.Graph.of", of)
    return found
