"""Server of a measured process: builds one peer's step, runs it, and returns time and memory."""

from __future__ import annotations

import gc
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function

from ..accelerate import Accelerated, accelerate, freeze_batch_norm
from ..models import build_model
from ..morph.files import create_grown
from ..tiling.memory import peak_bytes, return_free_pages, used_bytes
from ..tiling.scan import TileEvent
from ..torch_private import BatchNorm
from .meter import NvmlPeak, measure
from .ordinary import loss_of
from .peers import PEERS, Settings
from .results import BenchTask

_THREAD_ADDRESS_SPACE = 2**30  # bytes of address space for stacks and heaps of new threads, almost all unused
_OUTPUTS = 1000  # of a classifier, as in ImageNet
_MASK_CLASSES = 2  # of a network for masks, where a thousand maps are unrealistic
_WARM_UP_SIDE = 64  # side of the image that makes libraries load


def build(task: BenchTask) -> nn.Module:
    """Build the network of a task, with the same weights in every process."""
    torch.manual_seed(0)
    outputs = _MASK_CLASSES if task.model.partition("?")[0] == "unet" else _OUTPUTS
    network = create_grown(task.model, outputs, task.image[1]).train(task.training)
    if task.batch_norm == "frozen":
        freeze_batch_norm(network)
        _spread_statistics(network)
    return network.to(task.device, torch.float64 if task.precision == "fp64" else torch.float32)


def _spread_statistics(network: nn.Module) -> None:
    """Give frozen norms realistic statistics, so that an error in their use is visible."""
    for module in network.modules():
        if isinstance(module, BatchNorm) and module.running_mean is not None:
            assert module.running_var is not None
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)


def picture(task: BenchTask, channels_last: bool) -> Tensor:
    """Return random pixels, the same in every process."""
    dtype = torch.float64 if task.precision == "fp64" else torch.float32
    image = torch.rand(task.image, generator=torch.Generator().manual_seed(1)).to(task.device, dtype)
    return image.contiguous(memory_format=torch.channels_last) if channels_last else image


class PeerWork:
    """One peer's steps in this process.

    Args:
        cap: maximal bytes of parameters and steps. On a GPU the allocator enforces it. On the CPU the address space is
            limited to about twice as much, to protect the machine; a step above the cap is detected by its peak.
    """

    def __init__(self, task: BenchTask, peer: str, settings: Settings, cap: int | None):
        self.task, chosen = task, PEERS[peer]
        self.nvml = NvmlPeak(task.device)
        if task.device == "cuda" and cap is not None:
            total = torch.cuda.mem_get_info()[1]
            torch.cuda.set_per_process_memory_fraction(min(1.0, cap / total))
        if task.device == "cpu":
            self._warm()
        started = time.perf_counter()
        self.network = build(task)
        if chosen.channels_last:
            self.network = self.network.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        self.image = picture(task, chosen.channels_last or task.device == "cuda")
        self.runs, self.step = chosen.prepare(self.network, task, settings)
        self.prepare_seconds = time.perf_counter() - started
        self.parameter_bytes = sum(t.nbytes for t in self.network.state_dict().values())
        self.output: Tensor | None = None
        gc.collect()
        if task.device == "cuda":
            torch.cuda.empty_cache()
        else:
            return_free_pages()
        self.before = used_bytes(task.device)
        self.process_bytes = peak_bytes("cpu")
        if task.device == "cpu" and cap is not None and sys.platform == "linux":
            held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            limit = held + 2 * cap + _THREAD_ADDRESS_SPACE
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

    def _warm(self) -> None:
        """Make the libraries load; that memory would count as the step's otherwise."""
        small = build_model("lesionnet", in_channels=1).eval()
        for net in (small, accelerate(small, tile=_WARM_UP_SIDE // 2)):
            loss_of(net(torch.rand(1, 1, _WARM_UP_SIDE, _WARM_UP_SIDE))).backward()

    def run(self, steps: int, warm: int = 0) -> dict[str, Any]:
        """Run steps, the first `warm` of them untimed. Peaks include all earlier steps.

        Returns:
            `seconds` and `cpu_seconds` of each timed step, and bytes, see `StepRow`.
        """
        device = self.task.device
        cost = measure(self._step, device, times=steps, warm=warm, nvml=self.nvml)
        if device == "cuda":
            torch.cuda.empty_cache()  # for the next peer
        else:
            self.process_bytes = max(self.process_bytes, cost.peak_bytes)
        return {
            "seconds": cost.seconds,
            "cpu_seconds": cost.cpu_seconds if device == "cpu" else [],
            "peak_bytes": cost.peak_bytes - self.before + self.parameter_bytes,
            "process_bytes": self.process_bytes if device == "cpu" else None,
            "nvml_bytes": cost.nvml_bytes,
        }

    def _step(self) -> None:
        self.output = None
        self.output = self.step(self.image)

    def results(self) -> dict[str, dict[str, Tensor]]:
        """Return output, gradients and running statistics after the last step, on the CPU."""
        assert self.output is not None
        state = {n: p.grad for n, p in self.network.named_parameters() if p.grad is not None}
        buffers = {n: b for n, b in self.network.named_buffers() if b.is_floating_point()}
        found = {"outputs": {"output": self.output}, "gradients": state, "buffers": buffers}
        return {kind: {name: t.detach().cpu() for name, t in part.items()} for kind, part in found.items()}


class Server:
    """Methods that `Child` calls."""

    def __init__(self) -> None:
        self._work: PeerWork | None = None

    @property
    def work(self) -> PeerWork:
        assert self._work is not None
        return self._work

    def start(self, task: dict[str, Any], peer: str, settings: Settings, cap: int | None) -> dict[str, Any]:
        self._work = PeerWork(BenchTask(**{**task, "image": tuple(task["image"])}), peer, settings, cap)
        return {"prepare_seconds": self._work.prepare_seconds}

    def run(self, steps: int, warm: int) -> dict[str, Any]:
        return self.work.run(steps, warm)

    def save(self, path: str) -> None:
        torch.save(self.work.results(), path)

    def ceilings(self, device: str) -> dict[str, float]:
        from .roofline import measure_ceilings

        return measure_ceilings(device)

    def profile(self, folder: str) -> None:
        """Run one step under PyTorch's profiler and write ``trace.json``, in which the end of each tile is marked."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self.work.task.device == "cuda" else [])]
        runs = self.work.runs

        def mark(event: TileEvent) -> None:
            with record_function(f"tile done: {event.phase} {event.done}"):
                pass

        if isinstance(runs, Accelerated):
            runs.on_tile = mark
        with profile(activities=activities, profile_memory=True) as recorded:
            self.work.step(self.work.image)
        if isinstance(runs, Accelerated):
            runs.on_tile = None
        recorded.export_chrome_trace(str(Path(folder) / "trace.json"))
