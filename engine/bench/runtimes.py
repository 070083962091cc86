"""Inference with ONNX Runtime and OpenVINO: the network is exported once and runs untiled with PyTorch's threads."""

from __future__ import annotations

import contextlib
import io
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .ordinary import Prepared
from .results import BenchTask

NEEDS = {"onnxruntime": ("onnx", "onnxscript", "onnxruntime"), "openvino": ("onnx", "onnxscript", "openvino")}


def missing(runtime: str, task: BenchTask) -> str | None:
    """Return why a runtime cannot run a task, or None."""
    if task.training:
        return "it does not train"
    if task.device != "cpu" or task.precision != "fp32":
        return "it is compared in float32 on the CPU"
    absent = [package for package in NEEDS[runtime] if find_spec(package) is None]
    return f"{', '.join(absent)} not installed; pip install 'gigamorph[peers]'" if absent else None


def onnxruntime_step(network: nn.Module, task: BenchTask, settings: dict[str, Any]) -> Prepared:
    """Build a step with ONNX Runtime's CPU provider."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    with tempfile.TemporaryDirectory() as folder:
        path = export(network, task, Path(folder))
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name

    def infer(image: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {name: image.numpy()})[0])

    return network, infer


def openvino_step(network: nn.Module, task: BenchTask, settings: dict[str, Any]) -> Prepared:
    """Build a step with OpenVINO's CPU plugin in float32; by default it uses bf16 if the processor can."""
    import openvino  # pyright: ignore[reportMissingImports]  (extra [peers])

    core = openvino.Core()
    settings = {
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
    }
    with tempfile.TemporaryDirectory() as folder:
        compiled = core.compile_model(core.read_model(export(network, task, Path(folder))), "CPU", settings)

    def infer(image: Tensor) -> Tensor:
        return torch.from_numpy(compiled([image.numpy()])[0].copy())

    return network, infer


def export(network: nn.Module, task: BenchTask, folder: Path) -> Path:
    """Export a network to ONNX for the image size of a task, including the weights."""
    path = folder / "network.onnx"
    with contextlib.redirect_stdout(io.StringIO()), torch.no_grad():  # it prints its progress
        program = torch.onnx.export(network, (torch.zeros(task.image),), dynamo=True)
    assert program is not None
    program.save(str(path), external_data=False)
    return path
