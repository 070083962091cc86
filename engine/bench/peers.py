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

from ..accelerate import accelerate
from ..torch_private import functorch_config
from .ordinary import Prepared, ordinary
from .results import BenchTask
from .runtimes import NEEDS, missing, onnxruntime_step, openvino_step
from .ways import checkpointed, fold_norms

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
    prepare: Callable[[nn.Module, BenchTask, Settings], Prepared]
    missing: Callable[[BenchTask], str | None] = lambda task: None
    channels_last: bool = False
    compiles: bool = False


def _bf16(network: nn.Module, task: BenchTask, settings: Settings) -> Prepared:
    return ordinary(network, replace(task, precision="bf16"))


def _no_bf16(task: BenchTask) -> str | None:
    return None if task.precision == "fp32" else f"the task is in {task.precision}"


def _no_compiler(task: BenchTask) -> str | None:
    if task.device == "cuda" or any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++"))):
        return None
    return "torch.compile needs a C++ compiler on the CPU; install g++"


def _way(
    network: nn.Module,
    task: BenchTask,
    settings: Settings,
    *,
    folds: bool = False,
    checkpoints: bool = False,
    compiler: dict[str, Any] | None = None,
) -> Prepared:
    """What an expert does to stock PyTorch; see `ways.py`.

    Args:
        folds: fold frozen norms.
        checkpoints: checkpoint blocks.
        compiler: options of `torch.compile`; None does not compile.
        settings: ``activations`` is the share of activations that a compiled forward may store.
    """
    network = fold_norms(network, task.image[1]) if folds else network
    network = checkpointed(network) if checkpoints else network
    if "activations" in settings:
        functorch_config().activation_memory_budget = settings["activations"]  # of this process, for all its graphs
    runs: Any = network if compiler is None else torch.compile(network, dynamic=False, **compiler)
    return ordinary(runs, task)


def _not_frozen(task: BenchTask) -> str | None:
    return None if task.batch_norm == "frozen" else "norms in training mode cannot be folded"


def _no_gradients(task: BenchTask) -> str | None:
    return None if task.training else "it changes the backward only"


def _lightstream(network: nn.Module, task: BenchTask, settings: Settings) -> Prepared:
    from .lightstream import streaming_step

    return streaming_step(network, task, settings["tile"])


def _no_lightstream(task: BenchTask) -> str | None:
    if importlib.util.find_spec("lightstream") is None:
        return "lightstream is not installed; pip install lightstream==1.0.7"
    if task.batch_norm == "live":
        return "it freezes the norms"
    return None


def _gigamorph(network: nn.Module, task: BenchTask, settings: Settings) -> Prepared:
    return ordinary(accelerate(network, **settings), task)


_COMPILED: Any = {"channels_last": True, "compiles": True}
_AUTOTUNE = {"mode": "max-autotune-no-cudagraphs"}
PEERS = {
    peer.name: peer
    for peer in (
        Peer("stock", "stock PyTorch", _way),
        Peer("channels-last", "channels-last", _way, channels_last=True),
        Peer("bf16", "bf16 autocast", _bf16, _no_bf16, channels_last=True),
        Peer("compile", "torch.compile", partial(_way, compiler={}), _no_compiler, **_COMPILED),
        Peer("checkpoint", "checkpoint per block", partial(_way, checkpoints=True), _no_gradients),
        Peer("folded", "folded norms", partial(_way, folds=True), _not_frozen),
        Peer(
            "folded-channels-last", "folded channels-last", partial(_way, folds=True), _not_frozen, channels_last=True
        ),
        Peer(
            "folded-checkpoint",
            "folded, checkpoint per block",
            partial(_way, folds=True, checkpoints=True),
            lambda task: _not_frozen(task) or _no_gradients(task),
            channels_last=True,
        ),
        Peer(
            "folded-compile",
            "folded, torch.compile",
            partial(_way, folds=True, compiler={}),
            lambda task: _not_frozen(task) or _no_compiler(task),
            **_COMPILED,
        ),
        Peer("autotune", "torch.compile, max-autotune", partial(_way, compiler=_AUTOTUNE), _no_compiler, **_COMPILED),
        Peer("lightstream", "lightstream", _lightstream, _no_lightstream),
        Peer("onnxruntime", "ONNX Runtime", onnxruntime_step, partial(missing, "onnxruntime")),
        Peer("openvino", "OpenVINO", openvino_step, partial(missing, "openvino")),
        Peer("gigamorph", "gigamorph", _gigamorph),
    )
}
TRAINING = ("stock", "channels-last", "bf16", "compile", "checkpoint", "lightstream", "gigamorph")
INFERENCE = ("stock", "compile", *NEEDS, "gigamorph")
