"""``gigamorph plan``: tile, memory and the comparison with stock PyTorch, before anything runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import rich_click as click

from . import options

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ..engine.planning.plan import Plan


@click.command()
@options.model
@click.option("--size", required=True, metavar="HxW", callback=options.parse_size, help="Image size, as in 4096x3328.")
@options.channels
@options.classes_count
@options.memory_budget
@options.batch_norm
@options.precision
@click.option("--inference", is_flag=True, help="Plan a prediction, not a training step.")
@click.option(
    "--kernels", is_flag=True, help="Also run some tiles on the GPU and list our kernel's time and cuDNN's per layer."
)
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
    kernels: bool,
    device: str,
) -> None:
    """Say which tile a network and an image size need, the predicted peak memory, and what stock PyTorch would need.

    Nothing is computed, except with --kernels. The exit code is 2 if no tile fits the budget. Which kernels run is
    measured once per layer and amount of work and kept; the environment variable GIGAMORPH_KERNELS=stock (or triton, or
    auto) overrides it.

    Example: gigamorph plan --model resnet50 --size 4096x3328 --memory-budget 4GiB
    """
    import torch

    from ..engine.accelerate import freeze_batch_norm
    from ..engine.morph.origin import create_grown
    from ..engine.planning.preview import plan as make_plan
    from .table import show_plan

    net = create_grown(model, classes, channels).train(not inference)
    if batch_norm == "frozen":
        freeze_batch_norm(net)
    autocast = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    with torch.autocast(torch.device(device).type, dtype=autocast, enabled=autocast is not None):
        made = make_plan(net, (channels, *size), memory_budget, device=device, training=not inference)
    show_plan(made, model)
    if kernels:
        _measure_kernels(net, made, torch.device(device), autocast)


def _measure_kernels(net: nn.Module, made: Plan, device: torch.device, autocast: torch.dtype | None) -> None:
    """Run the tiles of a small image, interior ones among them, and list what was chosen."""
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
