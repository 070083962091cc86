"""``gigamorph plan``: tile, memory and the comparison with stock PyTorch, before anything runs."""

from __future__ import annotations

import rich_click as click

from . import options


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

    Example: gigamorph plan --model resnet50 --size 4096x3328 --batch-norm frozen --memory-budget 4GiB
    """
    import torch

    from ..engine import plan as make_plan
    from ..engine.errors import BudgetError
    from ..engine.memory import format_bytes
    from ..engine.models import create_model

    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    net = create_model(model, classes, channels)
    made = make_plan(
        net,
        image_size=(channels, *size),
        budget=memory_budget,
        dtype=dtypes[precision],
        device=device,
        training=not inference,
        batch_norm=batch_norm,
    )
    click.echo(str(made))
    if memory_budget is not None and not made.fits:
        needed, given = format_bytes(made.peak_bytes), format_bytes(memory_budget)
        raise BudgetError(
            f"{model} on {size[0]}x{size[1]} needs {needed} even with its smallest tile, more than "
            f"the budget of {given}; raise --memory-budget"
        )
