"""One image shared by two processes, a band of rows each: on two GPUs, or on the CPU where there are not two."""

from pathlib import Path

import click
import torch
from torch.nn.functional import cross_entropy

from gigamorph import accelerate, create_model
from gigamorph.engine.parallel.launch import launch
from gigamorph.engine.parallel.process_group import ProcessGroup


def step(folder: str, split: bool, device: str) -> None:
    """A training step, in each process; the first one writes the gradient."""
    group = ProcessGroup.here(split)
    torch.manual_seed(0)
    net = accelerate(create_model("lesionnet").double().to(device), tile=64, split=group.split)
    image = torch.randn(1, 1, 256, 192, dtype=torch.float64, device=device)
    cross_entropy(net(image), torch.tensor([1], device=device)).backward()
    if group.leads:
        gradient = torch.cat([p.grad.flatten().cpu() for p in net.parameters()])
        torch.save(gradient, Path(folder) / f"{'two' if split else 'one'}.pt")


@click.command(help=__doc__)
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
def main(folder: Path) -> float:
    folder.mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.device_count() >= 2 else "cpu"
    print(f"a step by one process on {device}, then by two")
    step(str(folder), False, device)
    launch(step, 2, device, str(folder), True, device)
    one, two = (torch.load(folder / f"{name}.pt") for name in ("one", "two"))
    difference = float((one - two).abs().max() / one.abs().max())
    print(f"largest difference of the gradients, relative: {difference:.1e}")
    return difference


if __name__ == "__main__":
    main()
