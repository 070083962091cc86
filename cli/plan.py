"""``gigamorph plan``: tile size, memory and a comparison with stock PyTorch, before anything runs."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from dataclasses import asdict, fields, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import rich_click as click

from ..engine.tiling.memory import format_bytes
from . import options

if TYPE_CHECKING:
    import torch

    from ..engine.planning.plan import Plan
    from ..engine.train.options import Precision
    from .table import BudgetRow


def _parse_device(ctx: click.Context, param: click.Parameter, value: str) -> tuple[str, list[int]]:
    """Parse ``cuda:24GiB,40GiB`` as ("cuda", bytes of each)."""
    import torch

    kind, colon, memory = value.partition(":")
    sizes = memory.split(",") if colon else []
    if kind not in ("auto", "cpu", "cuda") or any(
        kind != "cuda" or not re.search(r"[kmgt]", size.lower()) for size in sizes
    ):
        raise click.BadParameter(f"{value!r} must be auto, cpu, cuda or cuda:MEMORY, as in cuda:24GiB", ctx, param)
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    return kind, sorted(options.parse_budget(ctx, param, size) or 0 for size in sizes)


@click.command()
@options.model
@click.option("--size", required=True, metavar="HxW", callback=options.parse_size, help="Image size, as in 4096x3328.")
@click.option(
    "--batch",
    "--views",
    "batch",
    type=click.IntRange(1),
    default=1,
    help="Images per step: a batch, or the views of an exam.",
)
@options.channel_count
@options.classes_count
@options.memory_budget
@options.batch_norm
@options.precision
@click.option(
    "--task",
    type=click.Choice(["classes", "labels", "ordinal", "numbers", "masks"]),
    default="classes",
    help="As in train: the loss of masks is computed in tiles; for other tasks, the network's output is whole.",
)
@click.option("--inference", is_flag=True, help="Plan a prediction instead of a training step.")
@click.option(
    "--device",
    default="auto",
    callback=_parse_device,
    metavar="auto|cpu|cuda[:MEMORY,...]",
    help="Device of the step; cuda:24GiB plans for a GPU that this machine need not have; cuda:24GiB,40GiB for two.",
)
@click.option(
    "--largest",
    type=click.Choice(["size", "batch"]),
    help="Find the largest image of about the proportions of --size, or the largest batch; takes about a minute a GPU.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the plan and the budgets as JSON; sizes in bytes.")
def plan(
    model: str,
    size: tuple[int, int],
    batch: int,
    channels: int,
    classes: int,
    memory_budget: int | None,
    batch_norm: str | None,
    precision: Precision,
    task: str,
    inference: bool,
    device: tuple[str, list[int]],
    largest: str | None,
    as_json: bool,
) -> None:
    """Print the tile size for a network and an image size, the predicted peak memory, and that of stock PyTorch.

    A table shows the cost of five other budgets, or, for a GPU that this machine does not have, which GPUs are large
    enough. Its times are lower bounds (roofline) for the stated rates.

    The step itself is not computed. The exit code is 2 if no tile fits the budget.

    Example: gigamorph plan --model timm:efficientnet_b2 --size 4096x3328 --views 4 --device cuda

    Example: gigamorph plan --model resnet50 --size 4096x3328 --largest batch --device cuda:16GiB,24GiB,80GiB
    """
    import torch

    from ..engine.accelerate import freeze_batch_norm
    from ..engine.bench.results import BenchTask
    from ..engine.bench.roofline import count
    from ..engine.models.classifier import taking_images
    from ..engine.morph.files import create_grown
    from ..engine.planning import constants
    from ..engine.planning.largest import largest as find_largest
    from ..engine.planning.preview import searching
    from ..engine.planning.request import Request
    from ..engine.planning.simulate import is_here
    from ..engine.train.mask_target import WithLoss
    from ..engine.train.options import Loss
    from ..engine.train.run import AUTOCAST
    from .table import BudgetRow, show_budgets, show_largest, show_plan

    kind, memories = device
    if memories and memory_budget is not None and memory_budget > memories[0]:
        raise click.UsageError("--memory-budget exceeds the memory of --device; lower it, or name a larger GPU")
    channels = options.channels_of(model, channels)
    net = create_grown(model, classes, channels).train(not inference)
    if batch_norm == "frozen":
        freeze_batch_norm(net)
    if memories and memory_budget is None:
        memory_budget = int(constants.FREE_SHARE * memories[0])
    autocast = AUTOCAST.get(precision)
    shape = (batch, channels, *size)
    if task == "masks":
        net = WithLoss(net, classes, Loss())
    request = Request(None, None, not inference)
    given: Any = {"request": request, "device": kind, "recording": partial(taking_images, net, model)}
    if largest is not None:
        if memory_budget is None and is_here(torch.device(kind)):
            memory_budget = request.limit(torch.device(kind))
        budgets = [memory_budget] if memory_budget and len(memories) < 2 else []
        cards = [(format_bytes(budget), budget, {}) for budget in budgets] or _compared(None, kind, memories)
        with _autocast(kind, autocast):
            search = partial(searching, net, **given)
            plans = find_largest(search, shape, [budget for _, budget, _ in cards], largest)
        show_largest(largest, [name for name, *_ in cards], plans, as_json)
        return
    with _autocast(kind, autocast):
        with searching(net, shape, **given) as search:
            plan = search.plan(memory_budget)
            made = replace(plan, stock_bytes=search.stock_bytes, folded_bytes=search.folded_bytes)
            if not as_json:
                show_plan(made, model)
            compared = _compared(made, kind, memories)
            plans = [search.plan_or_none(budget) for _, budget, _ in compared]
        sixteen = "fp32" if precision == "fp32" else "bf16"
        work = count(net, BenchTask(model, made.image, made.training, precision=sixteen))
    rows = []
    for (name, budget, rates), each in zip(compared, plans, strict=True):
        floor = work.seconds(rates, sixteen)  # of stock PyTorch's step; the plan's work multiplies it
        rows.append(BudgetRow(name, budget, each, floor * each.work if each and floor is not None else None))
    source = "those of the manufacturer's data sheets"
    if compared and compared[0][2] and is_here(torch.device(kind)):
        source = f"this machine's, measured now: {_rates(compared[0][2], sixteen)}"
    if as_json:
        found = {"model": model, **_plain(made), "budgets": [_row(row) for row in rows], "rates": source}
        click.echo(json.dumps(found))
        return
    show_budgets(rows, f"rates: {source}")


@contextlib.contextmanager
def _autocast(kind: str, dtype: torch.dtype | None) -> Iterator[None]:
    """Enable autocast as `torch.autocast` does, but also for an absent GPU, whose step is planned on the CPU."""
    import torch

    kinds = {kind, "cpu"}
    before = {each: (torch.is_autocast_enabled(each), torch.get_autocast_dtype(each)) for each in kinds}
    for each in kinds:
        torch.set_autocast_enabled(each, dtype is not None)
        torch.set_autocast_dtype(each, before[each][1] if dtype is None else dtype)
    try:
        yield
    finally:
        for each, (enabled, former) in before.items():
            torch.set_autocast_enabled(each, enabled)
            torch.set_autocast_dtype(each, former)


def _plain(made: Plan) -> dict[str, Any]:
    """Return the numbers of a plan by name, with those derived from them."""
    kept = {own.name: getattr(made, own.name) for own in fields(made) if own.name not in ("choices", "choice")}
    kept["at_peak"] = made.at_peak and asdict(made.at_peak)
    return {**kept, "peak_bytes": made.peak_bytes, "work": made.work, "fits": made.fits}


def _row(row: BudgetRow) -> dict[str, Any]:
    of = None if row.plan is None else {"tile": row.plan.tile, "peak_bytes": row.plan.peak_bytes, "work": row.plan.work}
    return {"name": row.name, "budget": row.budget, "plan": of, "seconds_at_best": row.seconds}


def _compared(made: Plan | None, kind: str, memories: list[int]) -> list[tuple[str, int, dict[str, float]]]:
    """Return name, bytes and rates of budgets: GPUs of these memories, shares of stock's memory, or common GPUs."""
    import torch

    from ..engine.bench.roofline import measure_ceilings
    from ..engine.planning import constants
    from ..engine.planning.simulate import is_here

    if len(memories) > 1:
        return [(f"{kind}:{format_bytes(size)}", int(constants.FREE_SHARE * size), {}) for size in memories]
    if made is not None and is_here(torch.device(kind)):
        rates = measure_ceilings(kind, seconds=0.5)
        stock = made.stock_bytes or made.peak_bytes
        names = {1: "stock's memory", 2: "1/2 of it", 4: "1/4 of it", 8: "1/8 of it", 16: "1/16 of it"}
        return [(name, stock // share, rates) for share, name in names.items()]
    kinds: tuple[str, ...] = ("gb_per_s", "tflop_per_s fp32", "tflop_per_s bf16")
    return [
        (f"{name}, {gb} GB", int(constants.FREE_SHARE * gb * 1e9), dict(zip(kinds, rate, strict=True)))
        for name, (gb, *rate) in constants.GPUS.items()
    ]


def _rates(rates: dict[str, float], precision: str) -> str:
    arithmetic = rates.get(f"tflop_per_s {precision}")
    return f"{rates['gb_per_s']:.3g} GB/s" + (f", {arithmetic:.3g} TFLOP/s" if arithmetic else "")
