"""Finds without a GPU what a network's step launches on one: kernels, compilations and measured choices.

The tiles of a step run on fake tensors, as in the plan's memory count. Each call of one of our ops is recorded once per
kind of tile, with its number in the step. Then every op runs alone on meta tensors with its launcher, and the launches
are recorded instead of made.

    python benchmarks/recorded_step.py [--network resnet50] [--tile 1024] [--json FILE]

counts, for 20 sizes of mammograms in order, how many Triton specialisations each size compiles, and how many choices
between kernels it measures. A network's first size does all the work; the others should do none.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from compile_only import on_chip
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from triton.runtime.jit import JITFunction

from gigamorph import kernels
from gigamorph.engine.bench.machine import provenance
from gigamorph.engine.capture.recording import capture
from gigamorph.engine.lowering import fused  # noqa: F401  registers our ops
from gigamorph.engine.lowering.rewrites import prepare
from gigamorph.engine.lowering.stages import lower
from gigamorph.engine.models.compat import make_torchvision_importable
from gigamorph.engine.planning import simulate
from gigamorph.engine.planning.candidate_tiles import stage_sides
from gigamorph.engine.tiling.stage import TiledStage
from gigamorph.kernels import choice
from gigamorph.kernels.measurements import Measurement, MeasurementFile

# Rows and columns of mammograms of several vendors and detectors, after cropping or not.
SIZES = (
    *((3328, 2560), (4096, 3328), (2294, 1914), (2850, 2394), (3062, 2394), (3518, 2800), (3580, 2700), (4096, 2560)),
    *((3328, 2082), (2457, 1890), (4084, 3328), (2776, 2082), (3480, 2744), (2560, 2048), (3000, 1800), (3328, 1664)),
    *((4096, 1900), (2294, 1300), (3510, 2311), (2990, 2012)),
)


@dataclass(frozen=True)
class Like:
    """A tensor's shape, strides and dtype, from which a meta tensor is made."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> Like:
        return cls(tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype)

    def make(self) -> Tensor:
        return torch.empty_strided(self.shape, self.strides, dtype=self.dtype, device="meta")


@dataclass(frozen=True)
class RecordedCall:
    """One call of one of our ops, with `Like` in place of tensors."""

    name: str
    args: tuple[Any, ...]

    def run(self) -> None:
        """Run the op's own code on meta tensors."""
        args = tree_map(lambda a: a.make() if isinstance(a, Like) else a, self.args)
        torch._library.custom_ops.OPDEFS[self.name]._init_fn(*args)  # pyright: ignore


@dataclass(frozen=True)
class Launch:
    """A kernel, what it is specialised on, and the needed and performed multiply-adds on tensor cores.

    Each program computes a tile of `elements` elements in `turns` iterations of its loop.
    """

    kernel: str
    specialization: str
    programs: int
    wanted: int = 0
    done: int = 0
    elements: int = 0
    turns: int = 0


def tensor_work(kernel: str, given: dict[str, Any], grid: tuple[int, ...]) -> tuple[int, ...]:
    """Return needed and performed multiply-adds of a convolution in descriptor form, and its tiles; () for others."""
    if kernel not in ("conv2d_descriptor_kernel", "wgrad_descriptor_kernel"):
        return ()
    product = given["P"]
    taps, depth = product.R * product.S, given["CIN"]
    if kernel == "conv2d_descriptor_kernel":
        n, lines, run, filters = given["y_desc"].shape
        turns = taps * -(-depth // product.BK)
        done = grid[0] * product.BM * product.BN * turns * product.BK
    else:
        n, lines, run, filters = given["dy_desc"].shape
        blocks = -(-filters // product.BM) * product.BM * -(-depth // product.BN) * product.BN
        turns = given["total"]
        done = blocks * taps * turns * product.BK
    return n * lines * run * filters * depth * taps, done, product.BM * product.BN, turns


class _Notes(simulate.StorageMeter):
    """A meter that also records calls of our ops."""

    calls: list[RecordedCall]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "gigamorph":
            frozen = tree_map(lambda a: Like.of(a) if isinstance(a, Tensor) else a, args)
            self.calls.append(RecordedCall(func._schema.name, _hashable(frozen)))
        return super().__torch_dispatch__(func, types, args, kwargs)


def _hashable(tree: Any) -> Any:
    return tuple(map(_hashable, tree)) if isinstance(tree, (list, tuple)) else tree


def calls_of_step(
    model: nn.Module,
    shape: Sequence[int],
    tile: tuple[int, int],
    chip: int,
    training: bool = True,
    dtype: torch.dtype | None = None,
) -> Counter[RecordedCall]:
    """Return the calls of our ops in a step with their numbers.

    Args:
        shape: of the image batch.
        chip: 10 * major + minor of the GPU's compute capability.
        dtype: of autocast; None to disable it.
    """
    found: Counter[RecordedCall] = Counter()
    autocast = torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None)
    with on_chip(chip), mock.patch.object(kernels, "enabled", lambda device: True), autocast:
        staged = lower(capture(model, tuple(shape), torch.float32, "cpu"))
        prepare(staged, training)
        wanted = staged.wanted(False)
        for stage, side in zip(staged.stages, stage_sides(staged, tile), strict=True):
            tiled = TiledStage(stage, side)
            for (i, j), times in _kinds(tiled).items():
                for call in _calls_of_tile(tiled, i, j, training, wanted):
                    found[call] += times
    return found


def _kinds(tiled: TiledStage) -> Counter[tuple[int, int]]:
    """Return the first tile of each kind with the number of tiles; blocks of the same sizes count as alike."""

    def firsts(axis: Any) -> list[int]:
        sizes = [
            tuple(hi - lo for lo, hi in (axis.block(v, step) for v in axis.frontier)) for step in range(axis.steps)
        ]
        ends = [(size, step == 0, step == axis.steps - 1) for step, size in enumerate(sizes)]
        return [ends.index(end) for end in ends]

    rows, cols = firsts(tiled.rows), firsts(tiled.cols)
    return Counter((i, j) for i in rows for j in cols)


def _calls_of_tile(tiled: TiledStage, i: int, j: int, training: bool, wanted: set[int]) -> list[RecordedCall]:
    calls: list[RecordedCall] = []
    notes = type("Notes", (_Notes,), {"calls": calls})
    with (
        mock.patch.object(simulate, "StorageMeter", notes),
        mock.patch.object(simulate, "heaviest_tile", lambda tiled: (i, j)),
    ):
        simulate.tile_peak(tiled.stage, tiled, training, wanted)
    return calls


@contextlib.contextmanager
def noted(chip: int, launches: list[Launch], choices: list[tuple[str, tuple, int]]) -> Iterator[None]:
    """Record launches and choices (op, key, work) instead of making them; our kernel is always chosen."""

    def run(self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        binder = self.device_caches[chip][-1]
        _, specialization, given = binder(*args, **options, debug=False)
        share = tensor_work(self.__name__, dict(zip(self.arg_names, args, strict=False)) | options, grid)
        form = f"{dict(zip(self.arg_names, specialization, strict=True))} {sorted(given.items(), key=str)}"
        launches.append(Launch(self.__name__, form, math.prod(grid), *share))

    def choose(op: str, key: Any, candidates: Any, work: int = 0, like: Tensor | None = None) -> str:
        choices.append((op, key, work))
        return "triton"

    with on_chip(chip), mock.patch.object(JITFunction, "run", run), mock.patch.object(choice, "choose", choose):
        yield


def start_up(
    make: Callable[[], nn.Module], tile: int | None, chip: int, sizes: Sequence[tuple[int, int]]
) -> list[dict]:
    """Return for each size in order the calls of our ops in a step, and new compilations and measurements."""
    compiled: set[tuple[str, str]] = set()
    rows = []
    model = make()
    with tempfile.TemporaryDirectory() as folder:
        file = MeasurementFile(Path(folder) / "choices.jsonl")
        for height, width in sizes:
            side = (tile or max(height, width),) * 2
            calls = calls_of_step(model, (1, 3, height, width), side, chip, dtype=torch.bfloat16)
            launches: list[Launch] = []
            choices: list[tuple[str, tuple, int]] = []
            wanted = done = 0
            for call, times in calls.items():
                before = len(launches)
                with noted(chip, launches, choices):
                    call.run()
                wanted += times * sum(launch.wanted for launch in launches[before:])
                done += times * sum(launch.done for launch in launches[before:])
            new = {(launch.kernel, launch.specialization) for launch in launches} - compiled
            compiled |= new
            measured = 0
            for op, key, work in choices:
                if file.find(op, key, ("stock", "triton"), work) is None:
                    measured += 1
                    file.add(Measurement(op, key, work, {"stock": [2.0], "triton": [1.0]}))
            rows.append(
                {
                    "size": [height, width],
                    "calls": calls.total(),
                    "distinct": len(calls),
                    "compiled": len(new),
                    "measured": measured,
                    "useful": round(wanted / done, 3) if done else None,
                    "kernels": dict(Counter(name for name, _ in new)),
                }
            )
            print(
                f"{height} x {width}: {calls.total()} calls, {len(new)} compiled, {measured} measured, "
                f"{wanted / max(1, done):.0%} of the tensor work useful",
                flush=True,
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="resnet50")
    parser.add_argument("--tile", type=int, help="side; default: one tile")
    parser.add_argument("--chip", type=int, default=90)
    parser.add_argument("--sizes", type=int, default=len(SIZES), help="number of sizes")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    make_torchvision_importable()
    import timm

    rows = start_up(lambda: timm.create_model(given.network).eval(), given.tile, given.chip, SIZES[: given.sizes])
    if given.json:
        report = {
            "machine": provenance(),
            "network": given.network,
            "tile": given.tile,
            "chip": given.chip,
            "rows": rows,
        }
        given.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
