"""Compiles every kernel launch of recorded training and inference steps for four chips; needs none of them.

Anything that cannot run or cannot be fast on a GPU is a fault and makes the exit code 1:

    shared memory or grid beyond the chip's limits        a product of matrices without wgmma (elsewhere: mma)
    registers spilled to memory                           wgmma that ptxas has serialized
    32-bit integers that may overflow at these sizes      wgmma with its left operand in registers although it was
    descriptors that did not become TMA loads             loaded by a descriptor and used unchanged
    registers that a loop rewrites while wgmma may still read them (triton-lang/triton#9433)

The chips are NVIDIA's sm_80, sm_90 and sm_100, and AMD's MI300 (gfx942), whose kernels use no descriptors. The
launches are those of the engine (`recorded_step.py`): eight networks with frozen and with live norms, in bfloat16,
float16 and float32, in tiles of 512, 1024 and 2048 and on a whole mammogram, and an image of 32768 x 32768 in one
tile. The table at the end has the worst figures of each kernel, the last line those of all.

The whole gate takes hours. With --rows an interrupted run continues, and its table contains the file's rows for the
chips. After a change in how kernels are launched, only new launches are compiled; a run of all steps removes rows that
no step launches any more.

    python benchmarks/compile_gate.py [--quick] [--only conv2d_forward,pool] [--network resnet50] [--chip 90]
        [--rows FILE] [--faults]
"""

from __future__ import annotations

import argparse
import functools
import itertools
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

# Everything is compiled without a cache, so that ptxas reports on everything.
_cache = tempfile.TemporaryDirectory(prefix="compile_gate_")
os.environ["TRITON_CACHE_DIR"] = _cache.name
sys.path[:0] = [str(Path(__file__).parents[1] / "tests" / "helpers"), str(Path(__file__).parent)]

import torch  # noqa: E402
import triton  # noqa: E402
from compile_only import MI300, _Driver, compile_only, faults, read_code  # noqa: E402
from compile_rows import CompiledKernel, RowFile, by_kernel, key, summary, table  # noqa: E402
from coverage import build  # noqa: E402
from recorded_step import Launch, RecordedCall, calls_of_step, noted  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.progress import track  # noqa: E402
from torch import nn  # noqa: E402

from gigamorph.engine.models import create_model  # noqa: E402
from gigamorph.kernels.choice import override  # noqa: E402

CHIPS = (80, 86, 89, 90, 100, 120, MI300)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None}
MAMMOGRAM = (4096, 3328)
TILES = (512, 1024, 2048, None)
CHUNK = 24  # calls per compilation job


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "resnet18": lambda: create_model("resnet18", num_classes=2, in_channels=1),
    "resnet50": lambda: create_model("resnet50", num_classes=1000, in_channels=3),
    **{name: functools.partial(build, name) for name in ("efficientnet_b2", "convnext_tiny")},
    "unet": functools.partial(build, "own:unet_t"),
    **{name: functools.partial(build, name) for name in ("densenet121", "resnet50_gn", "seresnet50")},
}


@dataclass(frozen=True)
class Scene:
    """A recorded step; `tile` is None for the whole image in one tile."""

    network: str
    live: bool
    training: bool
    dtype: str
    size: tuple[int, int]
    tile: int | None

    def __str__(self) -> str:
        step = "inference" if not self.training else "live" if self.live else "frozen"
        tile = f"tile {self.tile}" if self.tile else f"{self.size[0]} x {self.size[1]}"
        return f"{self.network} {step}, {self.dtype}, {tile}"


def scenes(quick: bool) -> Iterator[Scene]:
    if quick:
        yield Scene("resnet18", False, True, "bf16", MAMMOGRAM, None)
        return
    for network, live, dtype, tile in itertools.product(NETWORKS, (False, True), DTYPES, TILES):
        yield Scene(network, live, True, dtype, MAMMOGRAM, tile)
    for network, tile in itertools.product(NETWORKS, TILES):
        yield Scene(network, False, False, "bf16", MAMMOGRAM, tile)
    yield Scene("resnet50", False, True, "bf16", (32768, 32768), None)


Recorded = list[tuple[RecordedCall, frozenset[str]]]


def record(scene: Scene, chips: Iterable[int], quick: bool = False) -> dict[int, Recorded]:
    """Return by chip the distinct calls of our ops in a step with the keys of their launches; see `keys_of` on `quick`.

    A step that does not ask for the chip makes the same calls on all of them.
    """
    network = NETWORKS[scene.network]().train(scene.live)
    tile = (scene.tile or max(scene.size),) * 2
    shape = (1, next(m for m in network.modules() if isinstance(m, nn.Conv2d)).in_channels, *scene.size)
    found: dict[int, Recorded] = {}
    with mock.patch.object(_Driver, "get_current_target", autospec=True, side_effect=_Driver.get_current_target) as ask:
        calls, asked = None, 0
        for chip in chips:
            if calls is None or asked:
                before = ask.call_count
                calls = calls_of_step(network, shape, tile, chip, scene.training, DTYPES[scene.dtype])
                asked = ask.call_count - before
            found[chip] = [(call, keys_of(call, chip, quick)) for call in calls]
    return found


@functools.cache  # steps of a network share most of their calls
def keys_of(call: RecordedCall, chip: int, quick: bool) -> frozenset[str]:
    """Return the keys of a call's launches; with `quick`, equal if only a loop's input channels differ."""
    launches: list[Launch] = []
    with noted(chip, launches, []):
        call.run()
    if quick:
        depth = re.compile(r"'CIN': \('constexpr', \d+\)")
        launches = [replace(one, specialization=depth.sub("'CIN'", one.specialization)) for one in launches]
    return frozenset(map(key, launches))


def wanted(recorded: Iterable[tuple[str, Recorded]], seen: set[str]) -> list[tuple[str, RecordedCall, set[str]]]:
    """Return the calls with a launch that is not in `seen`: the scene, the call, the keys of its new launches."""
    seen = set(seen)
    found = []
    for scene, calls in recorded:
        for call, keys in calls:
            new = set(keys) - seen
            if new:
                seen |= new
                found.append((scene, call, new))
    return found


def gate(chip: int, cases: Iterable[tuple[str, Callable[[], object]]]) -> list[CompiledKernel]:
    """Compile the cases for a chip; return one row per kernel, and one per case that does not compile."""
    rows: dict[int, CompiledKernel] = {}
    with compile_only(chip) as launches, override("triton"):
        for case, run in cases:
            launches.clear()
            try:
                run()
            except Exception as error:  # compiler errors; continue with the other cases
                lines = str(error).strip().splitlines() or [""]
                rows[hash(case)] = CompiledKernel(case, chip, "", faults=(f"{type(error).__name__}: {lines[0]}",))
            for launch in launches:
                wrong = faults(launch, chip)
                row = rows.get(id(launch.kernel))
                if row is not None:
                    row.launches += 1
                    row.faults += tuple(fault for fault in wrong if fault not in row.faults)
                    continue
                code = read_code(launch.kernel)
                matrix, name = "wgmma" if code.wgmma else "mma" if code.mma else "", launch.name.strip("_")
                needs = code.shared, code.registers, code.warps, code.blocks(chip), matrix, code.descriptor_loads
                rows[id(launch.kernel)] = CompiledKernel(case, chip, name, 1, *needs, launch.seconds, wrong)
    return list(rows.values())


def _compile(chip: int, calls: list[tuple[str, RecordedCall, set[str]]]) -> list[CompiledKernel]:
    return gate(chip, [(f"{call.name.partition('::')[2]} of {scene}", call.run) for scene, call, _ in calls])


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="only ResNet-18 with frozen norms in one tile")
    parser.add_argument("--only", default="", help="comma-separated ops, such as conv2d_forward")
    parser.add_argument("--network", default="", help="only steps whose name contains this text")
    parser.add_argument("--chip", type=int, choices=CHIPS, help="one chip only")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="processes")
    parser.add_argument("--rows", type=Path, metavar="FILE", help="file of rows to continue, not compiled again")
    parser.add_argument("--faults", action="store_true", help="list only kernels with faults")
    options = parser.parse_args()
    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set: nothing can be compiled in this process; unset it")
    only = set(filter(None, options.only.split(",")))
    chosen = [scene for scene in scenes(options.quick) if options.network in str(scene)]
    began = time.perf_counter()
    file = RowFile(options.rows)
    show = functools.partial(track, console=Console(stderr=True))
    chips = [options.chip] if options.chip else CHIPS
    with ProcessPoolExecutor(options.jobs) as pool:
        recorded = pool.map(record, chosen, itertools.repeat(chips), itertools.repeat(options.quick))
        steps = list(show(recorded, "steps", len(chosen)))
        for chip in chips:
            if not (options.quick or options.only or options.network):
                file.leave_out(chip, {key for step in steps for _, keys in step[chip] for key in keys})
            calls_of = ((str(scene), step[chip]) for scene, step in zip(chosen, steps, strict=True))
            found = wanted(calls_of, file.keys(chip))
            calls = [entry for entry in found if not only or entry[1].name.partition("::")[2] in only]
            chunks = [calls[n : n + CHUNK] for n in range(0, len(calls), CHUNK)]
            compiled = pool.map(_compile, itertools.repeat(chip), chunks)
            for chunk, rows in zip(chunks, show(compiled, f"sm_{chip} kernels", len(chunks)), strict=True):
                file.add(chip, set().union(*(keys for _, _, keys in chunk)), rows)
    rows = [row for chip in chips for row in file.rows(chip)]
    console = Console(width=None if sys.stdout.isatty() else 200, highlight=False)
    console.print(table([row for row in rows if row.faults or not options.faults]))
    console.print(by_kernel(rows))
    console.print(summary(rows, time.perf_counter() - began), soft_wrap=True)
    return 1 if any(row.faults for row in rows) or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
