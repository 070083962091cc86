"""What a GPU has to do in a training step, counted on a recorded one without a GPU: launches, bytes, tensor work.

    env -u TRITON_INTERPRET python benchmarks/step_work.py [--network resnet50] [--tile 1024] [--json FILE]

The step is one of 4096 x 4096 pixels in bfloat16 with frozen norms: each tile's forward and backward, without the
second forward of tiles that are computed again. Of each kind of op:

    launches   kernels, of our own ops each Triton kernel, of PyTorch's each op that is no view
    bytes      of what it reads and what it writes, each tensor once, for each pixel of the image
    useful     of the multiply-adds that a convolution's tiles make on tensor cores, those that are wanted

and of the convolutions the worst, by multiply-adds that are not. Of all of them besides, with one program at a time on
each of an H100's multiprocessors and nothing but multiply-adds taking time:

    busy       of the multiprocessors' time what is not spent waiting for the last programs of a launch
    phases     of that time what would be saved if all phases of a strided data gradient were one launch
    split      of that time what the best of two to eight splits of the depth of forwards and data gradients would save,
               with nothing lost, and if a launch that adds up the parts took what `SPLIT` says
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from compile_only import on_chip
from recorded_step import Call, Launch, Like, _hashable, _kinds, noted
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from gigamorph import kernels
from gigamorph.engine.bench.machine import provenance
from gigamorph.engine.capture.recording import capture
from gigamorph.engine.lowering import fused  # noqa: F401  registers our ops
from gigamorph.engine.lowering.rewrites import prepare
from gigamorph.engine.lowering.stages import lower
from gigamorph.engine.models.compat import make_torchvision_importable
from gigamorph.engine.planning import simulate
from gigamorph.engine.planning.sides import stage_sides
from gigamorph.engine.tiling.stage import TiledStage
from gigamorph.kernels.tuning import PROCESSORS

WORST = 12
# A launch more and the parts of an element, written and read in float32, in the multiply-adds of that time: 2.5 us, and
# 8 bytes at 5 TB/s of L2, at 600 TFLOP/s.
SPLIT = 2.5e-6 * 3e14, 8 / 5e12 * 3e14


class _Notes(simulate.Meter):
    """Notes each op that is no view: of ours the call, of all what they move."""

    calls: Counter[Call]
    ops: Counter[str]
    moved: Counter[str]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_dispatch__(func, types, args, kwargs)
        name = func._schema.name
        if func.is_view or "empty" in name or name == "aten::detach" or func.namespace == "prim":
            return result
        tensors = {id(t): t for t in tree_leaves((args, kwargs, result)) if isinstance(t, Tensor)}
        self.ops[name] += 1
        self.moved[name] += sum(t.numel() * t.element_size() for t in tensors.values())
        if func.namespace == "gigamorph":
            frozen = tree_map(lambda a: Like.of(a) if isinstance(a, Tensor) else a, args)
            self.calls[Call(name, _hashable(frozen))] += 1
        return result


def record(model: nn.Module, shape: tuple[int, ...], side: int, chip: int) -> tuple[Counter[Call], Counter, Counter]:
    """Calls of our ops in a step, and all ops and the bytes that they move, by name."""
    calls, ops, moved = Counter[Call](), Counter[str](), Counter[str]()
    autocast = torch.autocast("cpu", dtype=torch.bfloat16)
    with on_chip(chip), mock.patch.object(kernels, "enabled", lambda device: True), autocast:
        staged = lower(capture(model, shape, torch.float32, "cpu"))
        prepare(staged, training=True)
        wanted = staged.wanted(False)
        for stage, tile in zip(staged.stages, stage_sides(staged, (side, side)), strict=True):
            tiled = TiledStage(stage, tile)
            for (i, j), times in _kinds(tiled).items():
                found = {"calls": Counter(), "ops": Counter(), "moved": Counter()}
                notes = type("Notes", (_Notes,), found)
                with (
                    mock.patch.object(simulate, "Meter", notes),
                    mock.patch.object(simulate, "heaviest_tile", lambda tiled, at=(i, j): at),
                ):
                    simulate.tile_peak(tiled.stage, tiled, True, wanted)
                for total, name in ((calls, "calls"), (ops, "ops"), (moved, "moved")):
                    for key, number in found[name].items():
                        total[key] += times * number
    return calls, ops, moved


def work(model: nn.Module, size: int, side: int, chip: int = 90) -> dict[str, Any]:
    """The report of a step of `size` x `size` pixels in tiles of `side`."""
    calls, ops, moved = record(model, (1, 3, size, size), side, chip)
    pixels = size * size
    families: dict[str, dict[str, float]] = {}
    wasted: list[tuple[int, str]] = []
    taken = phases = split = split_paid = 0.0
    for call, times in calls.items():
        launches: list[Launch] = []
        with noted(chip, launches, []):
            call.run()
        family = families.setdefault(call.name.partition("::")[2], {"launches": 0, "wanted": 0, "done": 0})
        family["launches"] += times * len(launches)
        for launch in launches:
            family["wanted"] += times * launch.wanted
            family["done"] += times * launch.done
        products = [launch for launch in launches if launch.done]
        taken += times * sum(map(_taken, products))
        if call.name == "gigamorph::conv2d_dgrad":
            phases += times * (sum(map(_taken, products)) - _taken_together(products))
        if call.name != "gigamorph::conv2d_wgrad_":  # which splits its pixels
            split += times * sum(_saved_by_splits(launch, paid=False) for launch in products)
            split_paid += times * sum(_saved_by_splits(launch, paid=True) for launch in products)
        waste = times * sum(launch.done - launch.wanted for launch in launches)
        wasted.append((waste, f"{times} x {call.name.partition('::')[2]} {_shapes(call)}"))
    done = sum(family["done"] for family in families.values())
    rows: dict[str, dict[str, Any]] = {}
    for name, number in ops.items():
        family = families.get(name.partition("::")[2]) if name.startswith("gigamorph") else None
        rows[name] = {
            "launches": number if family is None else int(family["launches"]),
            "bytes_per_pixel": round(moved[name] / pixels, 1),
        }
        if family is not None and family["done"]:
            useful, share = family["wanted"] / family["done"], family["done"] / done
            rows[name] |= {"useful": round(useful, 3), "share": round(share, 3)}
    return {
        "size": size,
        "tile": side,
        "useful": round(sum(f["wanted"] for f in families.values()) / done, 3),
        "busy": round(done / taken, 3),
        "phases": round(phases / taken, 4),
        "split": round(split / taken, 4),
        "split_paid": round(split_paid / taken, 4),
        "launches": sum(row["launches"] for row in rows.values()),
        "bytes_per_pixel": round(sum(moved.values()) / pixels, 1),
        "ops": dict(sorted(rows.items(), key=lambda row: -row[1]["bytes_per_pixel"])),
        "worst": [{"of_all": round(n / done, 4), "call": what} for n, what in sorted(wasted, reverse=True)[:WORST]],
    }


def _taken(launch: Launch, splits: int = 1) -> float:
    """What all multiprocessors could do in the time of a launch, its depth in so many parts."""
    whole = -(-launch.turns // splits) * splits / launch.turns
    return _in_waves(launch.done * whole, launch.programs * splits)


def _taken_together(launches: list[Launch]) -> float:
    """The same if one launch did the work of all, in as many programs."""
    programs = sum(launch.programs for launch in launches)
    return _in_waves(sum(launch.done for launch in launches), programs) if programs else 0.0


def _in_waves(done: float, programs: int) -> float:
    return done * -(-programs // PROCESSORS) * PROCESSORS / programs


def _saved_by_splits(launch: Launch, paid: bool) -> float:
    start, part = SPLIT if paid else (0.0, 0.0)
    parts = launch.programs * launch.elements
    split = min(_taken(launch, splits) + start + parts * splits * part for splits in range(2, 9))
    return max(0.0, _taken(launch) - split)


def _shapes(call: Call) -> str:
    return " ".join("x".join(map(str, a.shape)) for a in call.args if isinstance(a, Like))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="resnet50")
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--tile", type=int, action="append", help="sides; 1024 and 2048 if none is given")
    parser.add_argument("--chip", type=int, default=90)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    make_torchvision_importable()
    import timm

    rows = []
    for side in given.tile or (1024, 2048):
        row = work(timm.create_model(given.network).eval(), given.size, side, given.chip)
        rows.append(row)
        print(
            f"tile {side}: {row['useful']:.1%} of the tensor work useful, {row['launches']} launches, "
            f"{row['bytes_per_pixel']:.0f} bytes per pixel, multiprocessors busy {row['busy']:.1%} of the time, "
            f"phases in one launch would save {row['phases']:.2%}, split-K {row['split']:.1%} without its cost, "
            f"{row['split_paid']:.2%} with it",
            flush=True,
        )
        for name, op in list(row["ops"].items())[:WORST]:
            print("   ", name, op)
        for one in row["worst"]:
            print("   ", f"{one['of_all']:.2%}", one["call"])
    if given.json:
        report = {"machine": provenance(), "network": given.network, "rows": rows}
        given.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
