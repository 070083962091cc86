"""Whole steps for `gpu.py`: ours against the ways of an expert to make stock PyTorch faster or smaller.

Batch 1, one grey channel (three in models with "rgb" in the name), float32 parameters under bfloat16 autocast, frozen
BatchNorm (batch statistics in models with "live"), the mean square of the output as the loss. Stock gets the image on
the GPU, and so does gigamorph up to 8192 pixels; above, the image is in host memory as uint16 and is read by tiles.

`traces` lists the work of one step on the GPU in order: the microseconds of each kernel, and the idle time.
"""

from __future__ import annotations

import contextlib
import gc
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from gigamorph import accelerate, open_pixels, plan
from gigamorph.engine.bench.meter import NvmlPeak, time_call
from gigamorph.engine.bench.ordinary import loss_of
from gigamorph.engine.bench.read import LIVE
from gigamorph.engine.bench.ways import checkpointed, fold_norms
from gigamorph.engine.cuda_graphs import buffers
from gigamorph.engine.models import create_model
from gigamorph.engine.tiling.memory import parse_bytes, peak_bytes, reset_peak, used_bytes
from gigamorph.engine.torch_private import functorch_config
from gigamorph.kernels import choice

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
MODELS = {
    "resnet18": "resnet18",
    "resnet34": "resnet34",
    "resnet50": "resnet50",
    "convnext_tiny": "timm:convnext_tiny",
    "vgg16": "timm:vgg16",
    "densenet121": "timm:densenet121",
    "efficientnet_b2": "timm:efficientnet_b2",
}
WAYS = {
    "cudnn_benchmark": "channels-last, cudnn.benchmark",
    "folded": "folded-channels-last",
    "compile_folded": "folded-compile",
    "compile_tuned": "autotune",
    "checkpoint_folded": "folded-checkpoint",
}
TILE, DRY_TILE = 2048, 24
ON_GPU = 8192  # largest side of an image on the GPU for gigamorph


@dataclass(frozen=True)
class GpuStep:
    """One measurement.

    Attributes:
        how: "ours"; "ours_stock" (no kernels); "ours_op_by_op" (no capture and replay of tiles); with the plan's tile:
            "ours_auto" (no budget), "ours_third", "ours_equal", "ours_0.5" (this share of stock's memory as the
            budget), "ours_8GiB". Ways of stock: "eager"; in channels-last: "channels_last", "cudnn_benchmark", "folded"
            (norms), "checkpoint", "compile", and in one name "compile_folded", "compile_tuned" (max-autotune),
            "compile_folded_0.5" (share of activations that it may store), "checkpoint_folded".
    """

    model: str
    training: bool
    side: int
    how: str

    def __str__(self) -> str:
        return f"{self.model} {'train' if self.training else 'infer'} {self.side} {self.how}"

    @property
    def peer(self) -> str | None:
        """The name in `gigamorph bench`, if it is not that of `engine.bench.read`."""
        base, _, share = self.how.rpartition("_")
        if share.startswith("0."):
            of = "stock" if base == "ours" else "activations"
            return f"{WAYS.get(base, base).replace('ours', 'gigamorph')}, {share} of {of}"
        return WAYS.get(self.how)

    @property
    def channels(self) -> int:
        return 3 if "_rgb" in self.model else 1

    @property
    def share(self) -> float | None:
        word = self.how.rpartition("_")[2]
        shares = {"third": 1 / 3, "equal": 1.0}
        return shares.get(word, float(word) if word.startswith("0.") else None)


def build(step: GpuStep) -> nn.Module:
    torch.manual_seed(0)
    name = step.model.removesuffix(LIVE).removesuffix("_rgb")
    made = small if name == "small" else partial(create_model, MODELS[name], num_classes=1000)
    network = made(in_channels=step.channels)
    return network.train(step.model.endswith(LIVE)).to(DEVICE)


def small(in_channels: int) -> nn.Module:
    """Return a network for dry runs, with the layers of the others but less depth."""

    class SkipBlock(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(super().forward(x) + x)

    def block(inside: int, stride: int) -> list[nn.Module]:
        return [nn.Conv2d(inside, 16, 3, stride, 1, bias=False), nn.BatchNorm2d(16)]

    stem = [*block(in_channels, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    residual = SkipBlock(*block(16, 1), nn.ReLU(), *block(16, 1))
    return nn.Sequential(*stem, residual, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))


def prepare(step: GpuStep, tile: int | None) -> nn.Module:
    """Build the network as this entry runs it."""
    network = build(step)
    if step.how.startswith("ours"):
        budget = parse_bytes("8GiB") if step.how == "ours_8GiB" else None
        if step.share is not None:
            with torch.set_grad_enabled(step.training):
                planned = plan(network, (step.channels, step.side, step.side), training=step.training)
            assert planned.stock_bytes is not None
            budget = int(planned.stock_bytes * step.share)
        return accelerate(network, memory_budget=budget, tile=None if budget or step.how == "ours_auto" else tile)
    if step.how == "eager":
        return network
    network = network.to(memory_format=torch.channels_last)  # pyright: ignore
    network = fold_norms(network, step.channels) if "folded" in step.how else network
    if step.how.startswith("checkpoint"):
        return checkpointed(network)
    if step.how.startswith("compile"):
        torch._dynamo.reset()
        functorch_config().activation_memory_budget = 1.0 if step.share is None else step.share
        options = {"mode": "max-autotune-no-cudagraphs"} if "tuned" in step.how else {}
        options = {"backend": "eager"} if DEVICE.type == "cpu" else options
        return torch.compile(network, dynamic=False, **options)  # pyright: ignore
    return network


def picture(step: GpuStep, side: int) -> Any:
    """Return random pixels: a tensor on the GPU, or a source in host memory."""
    generator = torch.Generator(DEVICE).manual_seed(side)
    if step.how.startswith("ours") and side > ON_GPU:
        image = torch.empty(side, side, dtype=torch.uint16)
        for top in range(0, side, 1024):
            rows = torch.randint(0, 2**16, (min(1024, side - top), side), device=DEVICE, generator=generator)
            image[top : top + 1024] = rows.to(torch.uint16).cpu()
        return open_pixels(image, flip=False)
    image = torch.rand(1, step.channels, side, side, device=DEVICE, generator=generator)
    return image if step.how == "eager" else image.contiguous(memory_format=torch.channels_last)


@contextlib.contextmanager
def _mode(step: GpuStep) -> Iterator[None]:
    kernels = choice.override("stock") if step.how == "ours_stock" else contextlib.nullcontext()
    one_by_one = step.how == "ours_op_by_op"
    replay = mock.patch.object(buffers, "executor", lambda device: None) if one_by_one else contextlib.nullcontext()
    tuned = torch.backends.cudnn.flags(True, benchmark=step.how == "cudnn_benchmark")
    cast = torch.autocast(DEVICE.type, dtype=torch.bfloat16)
    with kernels, replay, tuned, cast, torch.set_grad_enabled(step.training):
        yield


def once(step: GpuStep, network: nn.Module, image: Any) -> Tensor:
    """Run one step; return its loss."""
    network.zero_grad(set_to_none=True)
    with _mode(step):
        loss = loss_of(network(image))
    if step.training:
        loss.backward()
    return loss


def outcome(network: nn.Module, loss: Tensor) -> dict[str, float]:
    """Return the results of a step for comparison: its loss, and the norm of the gradients."""
    norms = [p.grad.norm() for p in network.parameters() if p.grad is not None]
    return {"loss": loss.item()} | ({"gradient": torch.stack(norms).norm().item()} if norms else {})


def synchronize() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def measure(step: GpuStep, tile: int, box: float, warm_only: bool = False) -> dict[str, Any]:
    """Measure seconds of up to five steps within `box` seconds, Mpx/s, and the peak of memory.

    The first step is not timed; for ours neither is the second, in which whole passes are captured. Above 8192 pixels
    the first uses a smaller image with the same tiles, and the large one's program is recorded before.
    `left_bytes` is memory that earlier entries have left, not this one's.
    `nvml_bytes` is the growth of the GPU's memory in use in the timed steps since before the network was created, by
    NVML, including what the allocator and libraries cache.
    """
    if DEVICE.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
    began, left = time.perf_counter(), used_bytes(DEVICE)
    nvml = NvmlPeak(DEVICE.type)
    network = prepare(step, tile)
    parameters = used_bytes(DEVICE) - left
    warm_side = min(step.side, 2 * tile) if step.how.startswith("ours") and step.side > ON_GPU else step.side
    once(step, network, picture(step, warm_side))
    if warm_only:
        return {"warm_up_seconds": time.perf_counter() - began}
    image = picture(step, step.side)
    if warm_side < step.side:
        with _mode(step):
            network.plan_for((1, step.channels, step.side, step.side), torch.float32, DEVICE)
    if DEVICE.type == "cuda" and step.how.startswith("ours") and step.side <= ON_GPU:
        once(step, network, image)
    synchronize()
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()
    warm_up = time.perf_counter() - began
    reset_peak(DEVICE)
    seconds: list[float] = []
    losses: list[Tensor] = []
    with nvml:
        while len(seconds) < 5 and (not seconds or sum(seconds) + seconds[-1] < box):
            losses.clear()
            passed, _ = time_call(lambda: losses.append(once(step, network, image)), DEVICE.type)
            seconds.append(passed)
    row = {
        **asdict(step),
        "peer": step.peer,
        "channels": step.channels,
        "seconds": seconds,
        "median_seconds": statistics.median(seconds),
        "mpx_per_s": step.side**2 / statistics.median(seconds) / 1e6,
        "peak_bytes": peak_bytes(DEVICE),
        "left_bytes": left,
        "nvml_bytes": nvml.bytes,
        "parameter_bytes": parameters,
        "image_bytes": image.nbytes if isinstance(image, Tensor) else 0,
        "warm_up_seconds": warm_up,
        **outcome(network, losses[0]),
    }
    if step.how.startswith("ours"):
        with _mode(step):
            planned = network.plan_for((1, step.channels, step.side, step.side), torch.float32, DEVICE)
        row |= {
            "tile": planned.tile,
            "planned_bytes": planned.peak_bytes,
            "retained": planned.retained,
            "replayed": planned.replayed,
            "captured": planned.capture_bytes > 0,
            "op_by_op": planned.op_by_op,
            "carries": planned.halos,
        }
    return row


STOCK = ("channels_last", "eager", "compile")
OURS = ("ours_auto", "ours_0.8", "ours_0.5", "ours_0.33", "ours_0.2")
FOLDED = ("folded", "compile_folded", "compile_folded_0.5", "compile_folded_0.2", "checkpoint_folded")
LIVE_WAYS = (*STOCK, "cudnn_benchmark", "compile_tuned", "compile_0.5", "compile_0.2", "checkpoint")


def steps(dry: bool) -> list[GpuStep]:
    """Return every entry, the most important first: entries at the end are dropped if time runs out."""
    if dry:
        hows = ("ours", "ours_stock", "ours_op_by_op", "ours_auto", *STOCK)
        # Each variant once in training; inference has the same.
        frozen = [GpuStep("small", True, 32, how) for how in hows]
        frozen += [GpuStep("small", False, 32, how) for how in ("ours", "channels_last", "eager")]
        live = [GpuStep("small_live", True, 32, how) for how in ("ours", "channels_last")]
        return [*frozen, *live]
    train, infer = True, False
    default = ("ours_auto", *STOCK)
    wanted = [
        ("resnet50", train, 4096, default),
        ("resnet50_live", train, 4096, default),
        ("resnet50", infer, 4096, default),
        ("convnext_tiny", infer, 4096, default),
        ("convnext_tiny", train, 4096, default),
        ("efficientnet_b2_live", train, 4096, default),
        ("resnet50", train, 4096, ("ours_equal", "ours_third", "ours", "checkpoint")),
        ("resnet50_live", train, 4096, ("ours_third",)),
        ("densenet121", train, 4096, default),
        ("resnet18", train, 4096, default),
        ("vgg16", train, 4096, default),
        ("resnet50", train, 8192, ("ours_auto", "ours_third", "channels_last")),
        ("resnet18", infer, 4096, default),
        ("vgg16", infer, 4096, default),
        ("resnet50", train, 32768, ("ours",)),
        ("resnet50", infer, 8192, ("ours", "channels_last")),
        ("resnet50", train, 8192, ("ours", "ours_op_by_op", "ours_stock", "checkpoint")),
        ("resnet50", train, 2048, ("ours_auto", "channels_last", "eager")),
        ("resnet50", infer, 32768, ("ours",)),
        ("resnet34", train, 65536, ("ours",)),
        ("resnet50", train, 16384, ("ours", "channels_last", "checkpoint")),
    ]
    listed = [GpuStep(model, training, side, how) for model, training, side, hows in wanted for how in hows]
    for side in (8192, 16384, 32768, 2048):
        for model in ("resnet18", "convnext_tiny", "vgg16", "resnet50"):
            for training in (train, infer):
                listed += [GpuStep(model, training, side, how) for how in ("ours", "channels_last", "eager")]
    return list(dict.fromkeys(listed))


def front(dry: bool) -> list[GpuStep]:
    """Return the entries of a front of time against memory: all ways of stock, ours at several budgets."""
    if dry:
        hows = (*OURS[:3], "ours_third", *FOLDED, *LIVE_WAYS)
        return [GpuStep("small_rgb", True, 1024, how) for how in hows]
    models = ("resnet50", "resnet50_live", "resnet50_rgb", "efficientnet_b2_live", "convnext_tiny")
    return [
        GpuStep(model, True, 4096, how)
        for model in models
        for how in (*OURS, *(FOLDED if model in ("resnet50", "resnet50_rgb") else ()), *LIVE_WAYS)
    ]


def limits(dry: bool) -> list[GpuStep]:
    """Return the entries with the largest images: within 8 GiB, on tiles that the plan chooses."""
    if dry:
        return [GpuStep("small", True, 32, "ours_8GiB")]
    entries = [("resnet50", 32768), ("resnet18", 65536), ("resnet50", 65536), ("convnext_tiny", 32768)]
    return [GpuStep(model, training, side, "ours_8GiB") for model, side in entries for training in (True, False)]


def warm_ups(dry: bool) -> list[GpuStep]:
    """Return the steps to compile beforehand in separate processes: torch.compile's, and those with our kernels."""
    if dry:
        return []
    found = [s for s in steps(dry) if s.side == 4096 and s.how in ("ours_auto", "compile")]
    return sorted(found, key=lambda s: not s.training)  # the slowest first


def warm_up(step: GpuStep, tile: int) -> dict[str, Any]:
    """Compile what a step needs. Our kernels are forced, because times in parallel processes would be meaningless."""
    with choice.override("triton") if step.how.startswith("ours") else contextlib.nullcontext():
        return measure(step, tile, 0.0, warm_only=True)


def runs(entries: Sequence[GpuStep], dry: bool, box: float) -> dict[str, Callable[[], dict[str, Any]]]:
    tile = DRY_TILE if dry else TILE
    return {str(step): partial(measure, step, tile, box) for step in entries}


def preparations(dry: bool) -> dict[str, Callable[[], dict[str, Any]]]:
    tile = DRY_TILE if dry else TILE
    return {str(step): partial(warm_up, step, tile) for step in warm_ups(dry)}


WARM = 3  # steps before the trace: compiled, captured, replayed
LONGEST = 100  # characters of a kernel's name


def traces(dry: bool) -> dict[str, Callable[[], dict[str, Any]]]:
    """Return traces by name, the most important first. A dry run has no GPU and none."""
    if dry:
        return {}
    wanted = [
        ("resnet50_live", True, ("ours_auto", "compile")),
        ("resnet50", True, ("ours_auto", "compile")),
        ("convnext_tiny", False, ("ours_auto", "compile")),
        ("efficientnet_b2_live", True, ("ours_auto", "compile")),
        ("convnext_tiny", True, ("ours_auto",)),
        ("densenet121", True, ("ours_auto",)),
        ("vgg16", True, ("ours_auto",)),
    ]
    steps = [GpuStep(model, training, 4096, how) for model, training, hows in wanted for how in hows]
    return {str(step): partial(trace, step) for step in steps}


def trace(step: GpuStep) -> dict[str, Any]:
    """Return kernel names, and [index of the name, grid, registers, start, microseconds] of each in order of start."""
    network = prepare(step, None)
    image = picture(step, step.side)
    for _ in range(WARM):
        once(step, network, image)
    synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        once(step, network, image)
        synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        seen.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    return summarized(events)


def summarized(events: list[dict[str, Any]]) -> dict[str, Any]:
    """Extract the work on the GPU from a Chrome trace."""
    work = [e for e in events if e.get("ph") == "X" and e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    work.sort(key=lambda e: e["ts"])
    names: dict[str, int] = {}
    rows, busy, reached = [], 0.0, 0.0
    for event in work:
        begun, args = event["ts"] - work[0]["ts"], event.get("args", {})
        number = names.setdefault(event["name"][:LONGEST], len(names))
        grid = args.get("grid") or args.get("bytes")
        rows.append([number, grid, args.get("registers per thread"), round(begun, 1), round(event["dur"], 1)])
        busy += max(0.0, begun + event["dur"] - max(begun, reached))
        reached = max(reached, begun + event["dur"])
    return {"span_us": round(reached, 1), "busy_us": round(busy, 1), "names": list(names), "kernels": rows}
