"""``gigamorph plan``: tile size, memory and a comparison with stock PyTorch, before anything runs."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any

import rich_click as click

from . import options

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ..engine.planning.plan import Plan
    from ..engine.train.options import Precision
    from .table import BudgetRow


def _parse_device(ctx: click.Context, param: click.Parameter, value: str) -> tuple[str, int | None]:
    """Parse ``cuda:24GiB`` as ("cuda", bytes)."""
    import torch

    kind, colon, memory = value.partition(":")
    if kind not in ("auto", "cpu", "cuda") or (colon and (kind != "cuda" or not re.search(r"[kmgt]", memory.lower()))):
        raise click.BadParameter(f"{value!r} must be auto, cpu, cuda or cuda:MEMORY, as in cuda:24GiB", ctx, param)
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    return kind, options.parse_budget(ctx, param, memory) if colon else None


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
    "--kernels", is_flag=True, help="Also run some tiles on the GPU and list the times of our kernels and cuDNN's."
)
@click.option(
    "--device",
    default="auto",
    callback=_parse_device,
    metavar="auto|cpu|cuda[:MEMORY]",
    help="Device of the step; cuda:24GiB plans for a GPU that this machine need not have.",
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
    kernels: bool,
    device: tuple[str, int | None],
    as_json: bool,
) -> None:
    """Print the tile size for a network and an image size, the predicted peak memory, and that of stock PyTorch.

    A table shows the cost of five other budgets, or, for a GPU that this machine does not have, which GPUs are large
    enough. Its times are lower bounds (roofline) for the stated rates.

    The step itself is not computed, except with --kernels. The exit code is 2 if no tile fits the budget. The choice of
    kernels is measured once per layer and amount of work, and stored; the environment variable
    GIGAMORPH_KERNELS=stock (or triton, or auto) overrides it.

    Example: gigamorph plan --model timm:efficientnet_b2 --size 4096x3328 --views 4 --device cuda
    """
    if as_json and kernels:
        raise click.UsageError("--kernels and --json exclude each other")
    import torch

    from ..engine.accelerate import freeze_batch_norm
    from ..engine.bench.results import BenchTask
    from ..engine.bench.roofline import count
    from ..engine.models.classifier import taking_images
    from ..engine.morph.files import create_grown
    from ..engine.planning import constants
    from ..engine.planning.preview import plan_each
    from ..engine.planning.simulate import is_here
    from ..engine.train.mask_target import WithLoss
    from ..engine.train.options import AUTOCAST, Loss
    from .table import BudgetRow, show_budgets, show_plan

    kind, memory = device
    if memory is not None and memory_budget is not None and memory_budget > memory:
        raise click.UsageError("--memory-budget exceeds the memory of --device; lower it, or name a larger GPU")
    channels = options.channels_of(model, channels)
    net = create_grown(model, classes, channels).train(not inference)
    if batch_norm == "frozen":
        freeze_batch_norm(net)
    if memory is not None and memory_budget is None:
        memory_budget = int(constants.FREE_SHARE * memory)
    autocast = AUTOCAST.get(precision)
    shape = (batch, channels, *size)
    if task == "masks":
        net = WithLoss(net, classes, Loss())
    compared: list[tuple[str, int, dict[str, float]]] = []

    def budgets(made: Plan) -> list[int]:
        """Print the plan; returns the budgets to compare it with."""
        if not as_json:
            show_plan(made, model)
        compared.extend(_compared(made, kind))
        return [budget for _, budget, _ in compared]

    with _autocast(kind, autocast):
        named: Any = {"device": kind, "training": not inference, "recording": taking_images(net, model, shape)}
        made, plans = plan_each(net, shape, memory_budget, budgets, **named)
        sixteen = "fp32" if precision == "fp32" else "bf16"
        work = count(net, BenchTask(model, made.image, made.training, precision=sixteen))
    rows = []
    for (name, budget, rates), each in zip(compared, plans, strict=True):
        floor = work.seconds(rates, sixteen)  # of stock PyTorch's step; the plan's work multiplies it
        rows.append(BudgetRow(name, budget, each, floor * each.work if each and floor is not None else None))
    source = "those of the manufacturer's data sheets"
    if compared and is_here(torch.device(kind)):
        source = f"this machine's, measured now: {_rates(compared[0][2], sixteen)}"
    if as_json:
        found = {"model": model, **_plain(made), "budgets": [_row(row) for row in rows], "rates": source}
        click.echo(json.dumps(found))
        return
    show_budgets(rows, f"rates: {source}")
    if kernels:
        _measure_kernels(net, made, torch.device(kind), autocast)


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


def _compared(made: Plan, kind: str) -> list[tuple[str, int, dict[str, float]]]:
    """Return name, bytes and rates of five budgets: shares of stock's memory, or GPUs."""
    import torch

    from ..engine.bench.roofline import measure_ceilings
    from ..engine.planning import constants
    from ..engine.planning.simulate import is_here

    if is_here(torch.device(kind)):
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


def _measure_kernels(net: nn.Module, made: Plan, device: torch.device, autocast: torch.dtype | None) -> None:
    """Run the tiles of a small image, including interior ones, and list the chosen kernels."""
    import torch

    from .. import kernels
    from ..engine.accelerate import accelerate
    from .table import show_choices

    if not kernels.enabled(device):
        click.echo(f"kernels        none on {device.type}: PyTorch's own ops run (ours need a CUDA GPU and Triton)")
        return
    from ..kernels.choice import table

    n, channels, *size = made.image
    few = [min(side, 3 * tile) for side, tile in zip(size, made.tile, strict=True)]
    image = torch.rand(n, channels, *few, device=device)
    run = accelerate(net.to(device), tile=made.tile)
    with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
        if made.training:
            output = run(image)
            output.float().square().mean().backward()
        else:
            with torch.no_grad():
                run(image)
    show_choices(table())
