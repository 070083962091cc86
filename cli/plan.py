"""``gigamorph plan``: tile, memory and the comparison with stock PyTorch, before anything runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import rich_click as click

from . import options

if TYPE_CHECKING:
    from ..engine import Plan


@click.command()
@options.model
@click.option("--size", required=True, metavar="HxW", callback=options.parse_size, help="Image size, as in 4096x3328.")
@options.channels
@options.classes_count
@options.memory_budget
@options.batch_norm
@options.precision
@click.option("--inference", is_flag=True, help="Plan a prediction, not a training step.")
@options.device
def plan(
    model: str,
    size: tuple[int, int],
    channels: int,
    classes: int,
    memory_budget: int | None,
    batch_norm: str | None,
    precision: str,
    inference: bool,
    device: str,
) -> None:
    """Say which tile a network and an image size need, the predicted peak memory, and what stock PyTorch would need.

    Nothing is computed. The exit code is 2 if no tile fits the budget.

    Example: gigamorph plan --model resnet50 --size 4096x3328 --memory-budget 4GiB
    """
    import torch

    from ..engine import plan as make_plan
    from ..engine.accelerate import freeze_batch_norm
    from ..engine.errors import UnsupportedError
    from ..engine.models import create_model
    from .table import show_plan

    net = create_model(model, classes, channels).train(not inference)
    autocast = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)

    def planned(frozen: bool) -> Plan:
        if frozen:
            freeze_batch_norm(net)
        with torch.autocast(torch.device(device).type, dtype=autocast, enabled=autocast is not None):
            return make_plan(net, (channels, *size), memory_budget, device=device, training=not inference)

    try:
        made = planned(frozen=batch_norm == "frozen")
    except UnsupportedError as error:
        if "batch_norm" not in str(error):
            raise
        made = planned(frozen=True)
        click.echo("note: planned with --batch-norm frozen, which training this network needs", err=True)
    show_plan(made, model)
