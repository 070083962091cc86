"""A network that is widened in the middle of its training: it computes what it did, and so goes on from there."""

from pathlib import Path

import click
import torch
from torch.nn.functional import cross_entropy

from gigamorph import accelerate, create_model, grow_optimizer, widen


@click.command(help=__doc__)
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
def main(folder: Path) -> tuple[float, float]:
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    images, labels = torch.randn(4, 1, 96, 80), torch.tensor([0, 1, 0, 1])
    net = create_model("lesionnet")
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)

    def train(steps: int) -> None:
        fast = accelerate(net, memory_budget="64MiB")
        for step in range(steps):
            loss = cross_entropy(fast(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            print(f"step {step + 1} of {steps}: loss {loss.item():.4f}")

    train(3)
    with torch.no_grad():
        before = cross_entropy(net.eval()(images), labels).item()
    # Half as many channels again; checked in float64 and float32 before it is returned.
    wide, report = widen(net, images[:1], factor=1.5)
    optimizer = grow_optimizer(optimizer, net, wide, report)
    net = wide
    with torch.no_grad():
        after = cross_entropy(net.eval()(images), labels).item()
    print(f"loss before {before:.6f}, right after widening {after:.6f}")
    net.train()
    train(3)
    torch.save(net.state_dict(), folder / "wide.pt")
    print(f"weights: {folder / 'wide.pt'}")
    return before, after


if __name__ == "__main__":
    main()
