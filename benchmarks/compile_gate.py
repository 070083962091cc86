"""Every kernel launch of recorded training and inference steps, compiled for four chips without any of them.

Whatever cannot run or cannot be fast on a GPU is a fault and makes the exit code 1:

    shared memory or grid beyond the chip's limits        a product of matrices without wgmma (elsewhere: mma)
    registers spilled to memory                           wgmma that ptxas has serialized
    32-bit integers that may overflow at these sizes      wgmma with its left operand in registers although it was
    descriptors that did not become TMA loads             loaded by a descriptor and used unchanged
    registers that a loop rewrites while wgmma may still read them (triton-lang/triton#9433)

The chips are NVIDIA's sm_80, sm_90 and sm_100, and AMD's MI300 (gfx942), whose kernels are those without descriptors.
The launches are those that the engine makes (`recorded_step.py`): of six networks with frozen and with live norms, in
bfloat16, float16 and float32, in tiles of 512, 1024 and 2048 and on a whole mammogram, and of an image of 32768 x 32768
in one tile. The last line holds the worst figures.

    python benchmarks/compile_gate.py [--quick] [--only conv2d_forward,pool] [--network resnet50] [--chip 90] [--faults]
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
from dataclasses import dataclass
from pathlib import Path

# Everything is compiled afresh, so that ptxas reports on everything.
_cache = tempfile.TemporaryDirectory(prefix="compile_gate_")
os.environ["TRITON_CACHE_DIR"] = _cache.name
sys.path[:0] = [str(Path(__file__).parents[1] / "tests" / "helpers"), str(Path(__file__).parent)]

import torch  # noqa: E402
import triton  # noqa: E402
from compile_only import MI300, compile_only, read_code  # noqa: E402
from compile_verdict import faults  # noqa: E402
from recorded_step import Call, Launch, calls_of_step, noted  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.progress import track  # noqa: E402
from rich.table import Table  # noqa: E402
from torch import nn  # noqa: E402

from gigamorph.engine.models import create_model  # noqa: E402
from gigamorph.engine.models.compat import make_torchvision_importable  # noqa: E402
from gigamorph.kernels.choice import override  # noqa: E402

CHIPS = (80, 90, 100, MI300)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None}
MAMMOGRAM = (4096, 3328)
TILES = (512, 1024, 2048, None)
CHUNK = 24  # calls that a process compiles at a time


def _timm(name: str) -> nn.Module:
    make_torchvision_importable()
    import timm

    return timm.create_model(name)


def _unet() -> nn.Module:
    import coverage_nets

    return coverage_nets.NETWORKS["unet_t"]()


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    **{
        name: lambda name=name: create_model(name, num_classes=1000, in_channels=3) for name in ("resnet18", "resnet50")
    },
    **{name: lambda name=name: _timm(name) for name in ("efficientnet_b2", "convnext_tiny")},
    "unet": _unet,
    **{name: lambda name=name: _timm(name) for name in ("densenet121", "resnet50_gn", "seresnet50")},
}


@dataclass(frozen=True)
class Scene:
    """A step that is recorded; `tile` is None for the whole image in one."""

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


Case = tuple[str, Callable[[], object]]


def record(scene: Scene, chip: int) -> list[Call]:
    """The distinct calls of our ops in a step."""
    network = NETWORKS[scene.network]().train(scene.live)
    tile = (scene.tile or max(scene.size),) * 2
    shape = (1, network_channels(network), *scene.size)
    return list(calls_of_step(network, shape, tile, chip, scene.training, DTYPES[scene.dtype]))


def network_channels(network: nn.Module) -> int:
    return next(m for m in network.modules() if isinstance(m, nn.Conv2d)).in_channels


def wanted(recorded: Iterable[tuple[str, list[Call]]], chip: int, quick: bool = False) -> list[tuple[str, Call]]:
    """Of all calls those that launch what no other has launched, each with the scene that it was first seen in.

    `quick`: of launches whose code differs only in how often a loop over the input channels runs, the first alone.
    """
    seen: set[tuple[str, str]] = set()
    known: set[Call] = set()
    found = []
    for scene, calls in recorded:
        for call in calls:
            if call in known:
                continue
            known.add(call)
            launches: list[Launch] = []
            with noted(chip, launches, []):
                call.run()
            keys = {(launch.kernel, launch.specialization) for launch in launches}
            if quick:
                keys = {(kernel, re.sub(r"\bCIN=\d+", "CIN", form)) for kernel, form in keys}
            if keys - seen:
                seen |= keys
                found.append((scene, call))
    return found


# -- verdicts -----------------------------------------------------------------------------------------------------


@dataclass
class Row:
    """One compiled kernel and what is wrong with it."""

    case: str  # the first call that needs it
    chip: int
    kernel: str
    launches: int = 1
    shared: int = 0
    registers: int = 0
    warps: int = 0
    blocks: int = 0
    matrix: str = ""
    loads: int = 0
    seconds: float = 0.0
    faults: tuple[str, ...] = ()


def gate(chip: int, cases: Iterable[Case]) -> list[Row]:
    """Compile the cases for a chip; one row per kernel, and one per case that does not compile."""
    rows: dict[int, Row] = {}
    with compile_only(chip) as launches, override("triton"):
        for case, run in cases:
            launches.clear()
            try:
                run()
            except Exception as error:  # the compiler's own; the other cases are still wanted
                told = str(error).strip().splitlines() or [""]
                rows[hash(case)] = Row(case, chip, "", faults=(f"{type(error).__name__}: {told[0]}",))
            for launch in launches:
                wrong = faults(launch, chip)
                row = rows.get(id(launch.kernel))
                if row is not None:
                    row.launches += 1
                    row.faults += tuple(fault for fault in wrong if fault not in row.faults)
                    continue
                code = read_code(launch.kernel)
                rows[id(launch.kernel)] = Row(
                    case,
                    chip,
                    launch.name.strip("_"),
                    1,
                    code.shared,
                    code.registers,
                    code.warps,
                    code.blocks(chip),
                    "wgmma" if code.wgmma else "mma" if code.mma else "",
                    code.descriptor_loads,
                    launch.seconds,
                    wrong,
                )
    return list(rows.values())


def _compile(chip: int, calls: list[tuple[str, Call]]) -> list[Row]:
    return gate(chip, [(f"{call.name.partition('::')[2]} of {scene}", call.run) for scene, call in calls])


def table(rows: list[Row]) -> Table:
    result = Table(box=None, pad_edge=False)
    for heading in ("first call", "sm", "kernel", "times"):
        result.add_column(heading, justify="right" if heading in ("sm", "times") else "left", overflow="fold")
    for heading in ("shared", "regs", "warps", "blocks", "TMA"):
        result.add_column(heading, justify="right")
    for heading in ("matrix", "verdict"):
        result.add_column(heading, overflow="fold")
    for row in rows:
        verdict = f"[red]{'; '.join(row.faults)}[/red]" if row.faults else "ok"
        result.add_row(
            row.case,
            str(row.chip),
            row.kernel,
            str(row.launches),
            f"{row.shared:,}",
            str(row.registers),
            str(row.warps),
            str(row.blocks),
            str(row.loads),
            row.matrix,
            verdict,
        )
    return result


def summary(rows: list[Row], seconds: float) -> str:
    """The worst figures, in one line."""
    bad = sum(bool(row.faults) for row in rows)
    built = [row for row in rows if row.kernel]
    shared = ", ".join(
        f"{max((row.shared for row in built if row.chip == chip), default=0):,} B (sm_{chip})"
        for chip in sorted({row.chip for row in built})
    )
    return (
        f"{'FAIL' if bad else 'ok'}: {len(built)} kernels for {sum(row.launches for row in built)} launches, "
        f"{bad} with faults; worst: shared {shared}, {max((r.registers for r in built), default=0)} registers, "
        f"{min((r.blocks for r in built), default=0)} blocks per multiprocessor; "
        f"triton {triton.__version__}, {seconds:.0f} s"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="ResNet-18 with frozen norms in one tile alone")
    parser.add_argument("--only", default="", help="ops by comma, as conv2d_forward")
    parser.add_argument("--network", default="", help="only steps whose name has this part")
    parser.add_argument("--chip", type=int, choices=CHIPS, help="one chip only")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="processes")
    parser.add_argument("--faults", action="store_true", help="list only kernels with faults")
    options = parser.parse_args()
    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set: nothing can be compiled in this process; unset it")
    only = set(filter(None, options.only.split(",")))
    chosen = [scene for scene in scenes(options.quick) if options.network in str(scene)]
    began = time.perf_counter()
    rows: list[Row] = []
    show = functools.partial(track, console=Console(stderr=True))
    with ProcessPoolExecutor(options.jobs) as pool:
        for chip in [options.chip] if options.chip else CHIPS:
            steps = show(pool.map(record, chosen, itertools.repeat(chip)), f"sm_{chip} steps", len(chosen))
            found = wanted(zip(map(str, chosen), steps, strict=True), chip, options.quick)
            calls = [(s, call) for s, call in found if not only or call.name.partition("::")[2] in only]
            chunks = [calls[n : n + CHUNK] for n in range(0, len(calls), CHUNK)]
            compiled = pool.map(_compile, itertools.repeat(chip), chunks)
            rows += itertools.chain.from_iterable(show(compiled, f"sm_{chip} kernels", len(chunks)))
    console = Console(width=None if sys.stdout.isatty() else 200, highlight=False)
    console.print(table([row for row in rows if row.faults or not options.faults]))
    console.print(summary(rows, time.perf_counter() - began), soft_wrap=True)
    return 1 if any(row.faults for row in rows) or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
