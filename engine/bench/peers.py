"""The peers of the comparison: stock PyTorch, its usual memory remedies, lightstream, inference runtimes, gigamorph.

A peer turns a network into a *step*: a function of the image that runs a forward and returns the output. In training
it also runs the loss and the backward, so that the network's parameters have their gradients.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ..accelerate import accelerate
from ..errors import UnsupportedError
from .ordinary import Prepared, ordinary
from .results import Task
from .runtimes import NEEDS, missing, onnxruntime_step, openvino_step

Settings = dict[str, Any]


@dataclass(frozen=True)
class Peer:
    """One method in the comparison.

    Attributes:
        name: short name for the command line and results.
        label: name in figures.
        prepare: builds a step of a network for a task and settings; also returns the module that runs the forward.
        missing: returns why it cannot run a task on this machine, or None.
        channels_last: whether network and image are in that memory format.
        compiles: whether the first step includes a compilation, so that its time does not count.
    """

    name: str
    label: str
    prepare: Callable[[nn.Module, Task, Settings], Prepared]
    missing: Callable[[Task], str | None] = lambda task: None
    channels_last: bool = False
    compiles: bool = False


def _stock(network: nn.Module, task: Task, settings: Settings) -> Prepared:
    return ordinary(network, task)


def _bf16(network: nn.Module, task: Task, settings: Settings) -> Prepared:
    return ordinary(network, replace(task, precision="bf16"))


def _no_bf16(task: Task) -> str | None:
    return None if task.precision == "fp32" else f"the task is in {task.precision}"


def _compile(network: nn.Module, task: Task, settings: Settings) -> Prepared:
    compiled: Any = torch.compile(network, dynamic=False)
    return ordinary(compiled, task)


def _no_compiler(task: Task) -> str | None:
    if task.device == "cuda" or any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++"))):
        return None
    return "torch.compile needs a C++ compiler on the CPU; install g++"


def blocks(network: nn.Module) -> list[nn.Module]:
    """Return the outermost modules named as blocks or bottlenecks, as in ResNets, ConvNeXts and most of timm."""
    found: list[nn.Module] = []

    def search(module: nn.Module) -> None:
        for child in module.children():
            if "Block" in type(child).__name__ or "Bottleneck" in type(child).__name__:
                found.append(child)
            else:
                search(child)

    search(network)
    return found


def checkpointed(network: nn.Module) -> nn.Module:
    """Checkpoint a network's blocks, so that only their inputs are stored; for a VGG the parts between poolings.

    Raises:
        UnsupportedError: it has neither.
    """
    found = blocks(network)
    features = getattr(network, "features", None)
    if not found and isinstance(features, nn.Sequential):
        for name, part in list(_between_pools(features)):
            features.add_module(name, part)
            found.append(part)
    if not found:
        raise UnsupportedError(f"{type(network).__name__} has no blocks to checkpoint")
    for block in found:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    return network


def _checkpoint(network: nn.Module, task: Task, settings: Settings) -> Prepared:
    return ordinary(checkpointed(network), task)


def _between_pools(features: nn.Sequential) -> list[tuple[str, nn.Module]]:
    """Replace the layers up to each pooling by one module with the first layer's name; the others become identities."""
    parts: list[tuple[str, nn.Module]] = []
    names: list[str] = []
    layers: list[nn.Module] = []
    for name, layer in list(features.named_children()):
        names.append(name)
        layers.append(layer)
        if isinstance(layer, nn.MaxPool2d):
            parts.append((names[0], nn.Sequential(*layers)))
            for other in names[1:]:
                features.add_module(other, nn.Identity())
            names, layers = [], []
    return parts


def _no_gradients(task: Task) -> str | None:
    return None if task.training else "it changes the backward only"


def _lightstream(network: nn.Module, task: Task, settings: Settings) -> Prepared:
    from .lightstream import streaming_step

    return streaming_step(network, task, settings["tile"])


def _no_lightstream(task: Task) -> str | None:
    if importlib.util.find_spec("lightstream") is None:
        return "lightstream is not installed; pip install lightstream==1.0.7"
    if task.batch_norm == "live":
        return "it freezes the norms"
    return None


def _gigamorph(network: nn.Module, task: Task, settings: Settings) -> Prepared:
    return ordinary(accelerate(network, **settings), task)


PEERS = {
    peer.name: peer
    for peer in (
        Peer("stock", "stock PyTorch", _stock),
        Peer("channels-last", "channels-last", _stock, channels_last=True),
        Peer("bf16", "bf16 autocast", _bf16, _no_bf16, channels_last=True),
        Peer("compile", "torch.compile", _compile, _no_compiler, channels_last=True, compiles=True),
        Peer("checkpoint", "checkpoint per block", _checkpoint, _no_gradients),
        Peer("lightstream", "lightstream", _lightstream, _no_lightstream),
        Peer("onnxruntime", "ONNX Runtime", onnxruntime_step, partial(missing, "onnxruntime")),
        Peer("openvino", "OpenVINO", openvino_step, partial(missing, "openvino")),
        Peer("gigamorph", "gigamorph", _gigamorph),
    )
}
TRAINING = tuple(name for name in PEERS if name not in NEEDS)
INFERENCE = ("stock", "compile", *NEEDS, "gigamorph")
