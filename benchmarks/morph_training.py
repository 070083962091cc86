"""Compare growing a trained network with training the grown architecture from scratch, on a small data set.

The benchmark trains a small parent. Three networks continue from it: one widened by two, one deepened (an identity
convolution with a P-activation after every stage), and the parent itself as a control. The rivals of each grown network
have the same architecture with random weights. One rival gets as many epochs as parent and child together. One gets the
time of both, including the morph and its checks. One gets that time without the parent's, for users who already have a
trained network. All runs have the same data, batch size and peak learning rate, and a cosine schedule of their own
length. Time is that of one CPU core without the evaluations, so other load on the machine does not count.

Before the training continues, the benchmark checks that no loss jumps and that gradients reach all new weights; it
stops at a network that fails either check.

The data are scikit-learn's digits, enlarged, at random positions with noise.

    python benchmarks/morph_training.py --json benchmarks/results/morph_training.json
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from gigamorph.engine.bench.machine import provenance
from gigamorph.engine.morph.activation import PAct
from gigamorph.engine.morph.deepen import insert_identity
from gigamorph.engine.morph.optimizer import grow_optimizer
from gigamorph.engine.morph.step import Report
from gigamorph.engine.morph.widen import widen

SEEDS = (0, 1, 2)
WIDTH = 4
EPOCHS = (30, 30)  # epochs of the parent, and of the networks that continue from it
EVERY = 3  # epochs between evaluations
BATCH, RATE, DECAY = 60, 3e-3, 1e-2
GROWN = ("widened", "deepened")
RIVALS = ("from scratch, same epochs", "from scratch, same time", "from scratch, time of growing alone")
SAME_EPOCHS, SAME_TIME, GROWING_ALONE = RIVALS  # the first one measures the time of an epoch
CONTROL = "parent, trained on"
SIDE = 24  # pixels of an image; a digit has 16
NOISE = 0.35  # standard deviation; grey levels are 0 to 1
TEST = 597  # number of test digits, out of 1,797
VIEWS = 3  # number of test images per test digit
EXAMPLE = torch.zeros(4, 1, SIDE, SIDE)
JUMP = 1e-5  # limit of the relative change of a loss by a morph; float32 rounding causes about 1e-7

Step = tuple[nn.Module, Report]
Run = dict[str, Any]


@dataclass(frozen=True)
class Digits:
    """Training digits (N, 1, 16, 16), and test images (M, 1, 24, 24) that are the same in every run."""

    digits: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def load() -> Digits:
    """Load the data set from scikit-learn; the split and the test images do not depend on the run's seed."""
    data: Any = load_digits()
    digits = F.interpolate(torch.tensor(data.images)[:, None].float() / 16, scale_factor=2, mode="bilinear")
    labels = torch.tensor(data.target)
    generator = torch.Generator().manual_seed(12345)
    order = torch.randperm(len(digits), generator=generator)
    test, train = order[:TEST].repeat(VIEWS), order[TEST:]
    return Digits(digits[train], labels[train], place(digits[test], generator), labels[test])


def place(digits: Tensor, generator: torch.Generator) -> Tensor:
    """Place each digit (N, 1, 16, 16) at a random position of an image (N, 1, 24, 24), and add noise."""
    room = SIDE - digits.shape[-1] + 1
    images = torch.zeros(len(digits), 1, SIDE, SIDE)
    corners = torch.randint(room, (len(digits), 2), generator=generator)
    for image, digit, (y, x) in zip(images, digits, corners.tolist(), strict=True):
        image[:, y : y + digit.shape[-2], x : x + digit.shape[-1]] = digit
    return images + NOISE * torch.randn(images.shape, generator=generator)


def initialise(conv: nn.Conv2d) -> None:
    """Apply He initialisation, as for all networks of the benchmark, because not all convolutions have a BatchNorm."""
    nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)


class PreActivationBlock(nn.Module):
    """Residual block relu(x + norm(conv(relu(norm(conv(x))))))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        layers = [nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)]
        more = [nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)]
        self.body = nn.Sequential(*layers, nn.ReLU(), *more)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.body(x))


class Net(nn.Module):
    """A residual network of three stages of stride 2: (N, 1, 24, 24) -> (N, 10)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.stages = nn.Sequential()
        channels = 1
        for out in (width, 2 * width, 4 * width):
            first = nn.Conv2d(channels, out, 3, 2, 1, bias=False)
            self.stages.append(nn.Sequential(first, nn.BatchNorm2d(out), nn.ReLU(), PreActivationBlock(out)))
            channels = out
        self.fc = nn.Linear(channels, 10)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                initialise(module)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.stages(x).mean((2, 3)))


@dataclass
class Point:
    """State of a run after an epoch; `seconds` of one core since the first step of the run, or of its parent."""

    seconds: float
    epoch: int
    train_loss: float | None
    test_loss: float
    test_accuracy: float


def run(seeds: Sequence[int] = SEEDS, epochs: tuple[int, int] = EPOCHS, echo: Callable[[str], None] = print) -> Run:
    """Run the whole benchmark; return curves of all runs, checks of all morphs, and a summary, ready for JSON.

    Args:
        seeds: seeds, with one set of runs each.
        epochs: epochs of the parent, and of the networks that continue from it.
        echo: receives a line of progress for each run.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        data = load()
        sets = [_one_seed(seed, epochs, data, echo) for seed in seeds]
    finally:
        torch.set_num_threads(threads)
    settings = {"width": WIDTH, "epochs": epochs, "batch": BATCH, "rate": RATE, "weight_decay": DECAY}
    result = {"settings": settings | {"train": len(data.digits), "test": len(data.test_labels)}, "seeds": sets}
    return result | {"summary": summary(sets)}


def evaluate(net: nn.Module, data: Digits) -> tuple[float, float]:
    """Return loss and accuracy on the test images in eval mode."""
    net.eval()
    with torch.no_grad():
        logits = net(data.test_images)
    loss = F.cross_entropy(logits, data.test_labels)
    return loss.item(), (logits.argmax(1) == data.test_labels).double().mean().item()


def train(
    net: nn.Module, optimizer: torch.optim.Optimizer, epochs: int, data: Digits, seed: int, start: Point | None = None
) -> list[Point]:
    """Train with a cosine schedule over `epochs`; the images depend only on seed and epoch."""
    points = [start] if start else [Point(0.0, 0, None, *evaluate(net, data))]
    seconds, first = points[0].seconds, points[0].epoch
    batches = len(data.digits) // BATCH
    for epoch in range(epochs):
        began, total = time.process_time(), 0.0
        generator = torch.Generator().manual_seed(1_000_003 * seed + first + epoch)
        images = place(data.digits, generator)
        order = torch.randperm(len(images), generator=generator)
        net.train()
        for number, picked in enumerate(order.split(BATCH)[:batches]):
            for group in optimizer.param_groups:
                group["lr"] = RATE / 2 * (1 + math.cos(math.pi * (epoch + number / batches) / epochs))
            optimizer.zero_grad()
            loss = F.cross_entropy(net(images[picked]), data.labels[picked])
            loss.backward()
            optimizer.step()
            total += loss.item()
        seconds += time.process_time() - began
        if (epoch + 1) % EVERY == 0 or epoch + 1 == epochs:
            points.append(Point(seconds, first + epoch + 1, total / batches, *evaluate(net, data)))
    return points


def widened(parent: nn.Module, seed: int) -> list[Step]:
    """Widen all spaces by two."""
    return [widen(parent, EXAMPLE, factor=2, seed=seed)]


def deepened(parent: nn.Module, seed: int) -> list[Step]:
    """Insert an identity convolution and a P-activation after each stage, one morph after the other."""
    del seed  # the morph uses no random numbers
    steps = []
    for stage in range(3):
        parent, report = insert_identity(parent, EXAMPLE, f"stages.{stage}", act="SiLU")
        steps.append((parent, report))
    return steps


def from_scratch(child: nn.Module, seed: int) -> nn.Module:
    """Return the child's architecture with random weights; its P-activations are plain activations."""
    torch.manual_seed(seed + 100)
    net = copy.deepcopy(child)
    for module in net.modules():
        if isinstance(module, PAct):
            nn.init.ones_(module.a)
        elif isinstance(module, nn.Conv2d):
            initialise(module)
        elif hasattr(module, "reset_parameters"):
            module.reset_parameters()  # pyright: ignore[reportCallIssue]
    return net


def _adamw(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(net.parameters(), lr=RATE, weight_decay=DECAY)


def _one_seed(seed: int, epochs: tuple[int, int], data: Digits, echo: Callable[[str], None]) -> Run:
    torch.manual_seed(seed)
    parent = Net(WIDTH)
    optimizer = _adamw(parent)
    curves = {"parent": train(parent, optimizer, epochs[0], data, seed)}
    trained = curves["parent"][-1]
    echo(f"seed {seed}: parent {_text(trained)}")
    checks: Run = {}

    for name, grow in (("widened", widened), ("deepened", deepened)):
        began = time.process_time()
        net, state = parent, optimizer
        for child, report in grow(parent, seed):
            state = grow_optimizer(state, net, child, report)
            net = child
        seconds = time.process_time() - began
        checks[name] = check(parent, net, data, seed) | {"seconds": seconds}
        architecture = copy.deepcopy(net)
        start = Point(trained.seconds + seconds, trained.epoch, None, *evaluate(net, data))
        curves[name] = train(net, state, epochs[1], data, seed, start)
        checks[name]["activations"] = [m.a.abs().mean().item() for m in net.modules() if isinstance(m, PAct)]
        echo(f"seed {seed}: {name} {_text(curves[name][-1])}")

        budget, pace = curves[name][-1].seconds, 0.0
        for rival in RIVALS:
            scratch = from_scratch(architecture, seed)
            time_left = budget - trained.seconds if rival == GROWING_ALONE else budget
            number = sum(epochs) if rival == SAME_EPOCHS else max(1, int(time_left / pace))
            points = curves[f"{name}, {rival}"] = train(scratch, _adamw(scratch), number, data, seed)
            pace = points[-1].seconds / number
            echo(f"seed {seed}: {name}, {rival} {_text(points[-1])}")

    state = copy.deepcopy(optimizer.state_dict())
    control = copy.deepcopy(parent)
    optimizer = _adamw(control)
    optimizer.load_state_dict(state)
    curves["parent, trained on"] = train(control, optimizer, epochs[1], data, seed, trained)
    echo(f"seed {seed}: parent, trained on {_text(curves['parent, trained on'][-1])}")
    return {"seed": seed, "checks": checks, "curves": {k: [vars(p) for p in v] for k, v in curves.items()}}


def _text(point: Point) -> str:
    return (
        f"{point.seconds:.1f} s, {point.epoch} epochs: accuracy {point.test_accuracy:.2%}, loss {point.test_loss:.3f}"
    )


# -- proofs ------------------------------------------------------------------------------------------------------


def check(parent: nn.Module, child: nn.Module, data: Digits, seed: int) -> Run:
    """Measure the loss before and after the morph, and the gradients of all weights that are new or grew.

    Raises:
        RuntimeError: a loss jumps, a new tensor gets no gradient, or copies of a channel stay tied.
    """
    generator = torch.Generator().manual_seed(seed)
    images, labels = place(data.digits[:BATCH], generator), data.labels[:BATCH]
    losses: dict[str, list[float]] = {"test": [evaluate(net, data)[0] for net in (parent, child)]}
    losses["train"] = [F.cross_entropy(copy.deepcopy(net).train()(images), labels).item() for net in (parent, child)]
    found: Run = {"losses": losses}
    found["jump"] = max(abs(b / a - 1) for a, b in losses.values())
    if not found["jump"] <= JUMP:
        raise RuntimeError(f"the loss jumps by {found['jump']:.1e}: {losses}")

    net = copy.deepcopy(child).train()
    F.cross_entropy(net(images), labels).backward()
    before = list(parent.parameters())
    expected = [
        n for n, p in net.named_parameters() if not any(p.shape == q.shape and torch.equal(p, q) for q in before)
    ]
    gradients: dict[str, Tensor] = {
        n: p.grad for n, p in net.named_parameters() if n in expected and p.grad is not None
    }
    dead = [name for name in expected if name not in gradients or not gradients[name].any()]
    if dead or not expected:
        raise RuntimeError(f"no gradient in {dead or 'anything: nothing is new'}")
    found["new_tensors"] = len(expected)
    count = sum(g.numel() for g in gradients.values())
    found["share_with_gradient"] = sum(int((g != 0).sum()) for g in gradients.values()) / count
    pairs = [tied_rows(p) for p in child.parameters() if p.ndim == 4]
    optimizer = _adamw(net)
    optimizer.step()
    # Adam's first step depends only on the signs of the gradient, which may be equal for two copies of a small filter.
    optimizer.zero_grad()
    F.cross_entropy(net(images), labels).backward()
    optimizer.step()
    after = [tied_rows(p) for p in net.parameters() if p.ndim == 4]
    found["tied_filters"] = [sum(pairs), sum(after)]  # filters that equal another one, before and after two steps
    if sum(after):
        raise RuntimeError(f"{sum(after)} filters still equal another one after two steps")
    return found


def tied_rows(weight: Tensor) -> int:
    """Count the filters of a weight (out, in, h, w) that equal another one."""
    rows = weight.detach().flatten(1)
    return len(rows) - len(torch.unique(rows, dim=0))


# -- report ------------------------------------------------------------------------------------------------------


def summary(sets: Sequence[Run]) -> Run:
    """Return the mean final state of each run, and the differences of grown networks to rivals with their range."""
    keys = ("seconds", "epoch", "test_loss", "test_accuracy")
    ends = {
        name: {key: statistics.fmean(s["curves"][name][-1][key] for s in sets) for key in keys}
        for name in sets[0]["curves"]
    }
    gaps: Run = {}
    for name in GROWN:
        for rival in (*(f"{name}, {rival}" for rival in RIVALS), CONTROL):
            for key in ("test_accuracy", "test_loss"):
                values = [s["curves"][name][-1][key] - s["curves"][rival][-1][key] for s in sets]
                range_ = {"mean": statistics.fmean(values), "least": min(values), "most": max(values)}
                gaps.setdefault(f"{name} - {rival.removeprefix(f'{name}, ')}", {})[key] = range_
    checks = [check for s in sets for check in s["checks"].values()]
    first = {name: statistics.fmean(s["curves"][name][1]["test_loss"] for s in sets) for name in (*GROWN, CONTROL)}
    return {
        "ends": ends,
        "differences": gaps,
        "first_evaluation": first,
        "largest_jump": max(check["jump"] for check in checks),
        "least_share_with_gradient": min(check["share_with_gradient"] for check in checks),
    }


def differences(result: Run) -> list[str]:
    """Return one line per comparison."""
    lines = []
    for name, gap in result["summary"]["differences"].items():
        accuracy, loss = gap["test_accuracy"], gap["test_loss"]
        lines.append(
            f"{name}: accuracy {accuracy['mean']:+.2%} ({accuracy['least']:+.2%} to {accuracy['most']:+.2%}), "
            f"loss {loss['mean']:+.3f} ({loss['least']:+.3f} to {loss['most']:+.3f})"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    result = run()
    print("\n".join(differences(result)))
    if options.json:
        options.json.write_text(json.dumps(result | {"provenance": provenance()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
