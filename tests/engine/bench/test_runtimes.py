"""ONNX Runtime and OpenVINO compute what the network does, and say why where they cannot run."""

from dataclasses import replace

import pytest
import torch

from gigamorph.engine.bench import runtimes
from gigamorph.engine.bench.peers import INFERENCE, PEERS, TRAINING
from gigamorph.engine.bench.results import BenchTask
from gigamorph.engine.bench.work import build, picture

TASK = BenchTask("lesionnet", (1, 1, 64, 48), training=False)


@pytest.mark.parametrize("name", runtimes.NEEDS)
def test_a_runtime_computes_what_the_network_does(name, capfd):
    if runtimes.missing(name, TASK):
        pytest.skip("not installed")
    network, image = build(TASK), picture(TASK, channels_last=False)
    _, step = PEERS[name].prepare(network, TASK, {})
    with torch.no_grad():
        expected = network(image)
    assert torch.allclose(step(image), expected, atol=1e-5)
    assert not capfd.readouterr().out


@pytest.mark.parametrize("name", runtimes.NEEDS)
def test_what_a_runtime_cannot_do_is_said(name, monkeypatch):
    assert runtimes.missing(name, replace(TASK, training=True)) == "it does not train"
    assert "float32" in str(runtimes.missing(name, replace(TASK, precision="bf16")))
    monkeypatch.setattr(runtimes, "find_spec", lambda package: None)
    assert "pip install 'gigamorph[peers]'" in str(runtimes.missing(name, TASK))


def test_runtimes_are_no_peers_of_training():
    assert not set(runtimes.NEEDS) & set(TRAINING)
    assert set(runtimes.NEEDS) <= set(INFERENCE) <= set(PEERS)
