"""What is drawn: a network as a list of named parts, and a scenario of visits to it.

Every part has a seed of its own for its options, so that leaving one out does not change the others.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from torch import nn

from . import attributes, changes, custom, effects, hooks, modes, norms, objects, outputs, plain, roots, state
from .net import build
from .piece import PIECES

_FAMILIES = (
    plain,
    modes,
    state,
    norms,
    attributes,
    custom,
    objects,
    effects,
)  # imported for the pieces that they register


@dataclass(frozen=True)
class Part:
    """A named part and the seed of its options."""

    name: str
    seed: int = 0

    def __repr__(self) -> str:
        return f"{self.name}({self.seed})"


@dataclass(frozen=True)
class Visit:
    """One call of the network, what is changed before it, and what follows it.

    Attributes:
        changes: done to the network before the call, see `changes.py`.
        mode: the network's mode that is set before: "train", "eval" or "" for as it is.
        grad: "train" (forward, backward and optimizer step), "grad" (no optimizer step), "no_grad" or "inference_mode".
        size: height and width of the image.
        batch: images.
        style: "positional", "keyword" or "mixed".
        image: "leaf", "plain" (wants no gradient) or "inner" (result of another operation).
        layout: of the image in memory: "plain", "channels_last" or "strided".
        loss: "all", "first" or "last" of the outputs that want a gradient.
        touch: what is done to the first output before the loss: "", "relu_", "add_" or "detached".
        calls: forwards and backwards before the optimizer's step.
        clear: how gradients are cleared before: "none", "zero" or "keep".
    """

    changes: tuple[Part, ...] = ()
    mode: str = ""
    grad: str = "train"
    size: tuple[int, int] = (12, 12)
    batch: int = 2
    style: str = "positional"
    image: str = "leaf"
    layout: str = "plain"
    loss: str = "all"
    touch: str = ""
    calls: int = 1
    clear: str = "none"


@dataclass(frozen=True)
class Spec:
    """A network and its scenario.

    Attributes:
        pieces: from the image to the last map.
        skips: numbers of pieces around which there is a residual connection, where shapes allow.
        heads: what is made of the last map.
        container: how the outputs are returned.
        roots: what the network's class itself does besides.
        inputs: what the forward takes besides the image.
        fitted: changes made to the network before it is accelerated: hooks, parametrizations, frozen parameters.
        optimizer: "SGD" or "AdamW".
        tile: of the accelerated network.
    """

    seed: int
    channels: int = 2
    width: int = 3
    pieces: tuple[Part, ...] = ()
    skips: tuple[int, ...] = ()
    heads: tuple[Part, ...] = (Part("vector"),)
    container: str = "tensor"
    roots: tuple[str, ...] = ()
    inputs: tuple[str, ...] = ()
    fitted: tuple[Part, ...] = ()
    optimizer: str = "SGD"
    tile: tuple[int, int] = (5, 7)
    visits: tuple[Visit, ...] = field(default=(Visit(),))

    def build(self) -> nn.Module:
        """The network, float64, in training mode; the same at each call."""
        return build(self)

    def __str__(self) -> str:
        usual = Spec(self.seed)
        lines = [f"seed {self.seed}"]
        for name, value in vars(self).items():
            if name not in ("seed", "visits") and (value != getattr(usual, name) or name in ("pieces", "heads")):
                lines.append(f"  {name:<10} {' '.join(map(str, value)) if isinstance(value, tuple) else value}")
        for number, visit in enumerate(self.visits):
            told = [f"{k}={v!r}" for k, v in vars(visit).items() if v != getattr(Visit(), k)]
            lines.append(f"  visit {number}    {', '.join(told) or 'as usual'}")
        return "\n".join(lines)


def _pick(dice: random.Random, weights: dict[str, float]) -> str:
    return dice.choices(list(weights), list(weights.values()))[0]


def _visit(dice: random.Random, number: int, size: tuple[int, int], batch: int, inputs: tuple[str, ...]) -> Visit:
    edits = number > 0 and dice.random() < 0.6
    if dice.random() < 0.15:
        size, batch = (dice.randint(8, 20), dice.randint(8, 20)), dice.randint(1, 3)
    grad = _pick(dice, {"train": 6, "grad": 1, "no_grad": 2, "inference_mode": 1})
    mode = _pick(dice, {"": 5, "eval": 1, "train": 1})
    if grad in ("no_grad", "inference_mode") and dice.random() < 0.5:
        mode = "eval"
    elif grad == "train" and dice.random() < 0.5:
        mode = "train"
    return Visit(
        changes=tuple(_part(dice, changes.CHANGES) for _ in range(dice.choice([1, 1, 2]))) if edits else (),
        mode=mode,
        grad=grad,
        size=size,
        batch=batch,
        style=_pick(dice, {"positional": 3, "keyword": 2, "mixed": 1} if inputs else {"positional": 24, "keyword": 1}),
        image=_pick(dice, {"leaf": 4, "plain": 4, "inner": 1}),
        layout=_pick(dice, {"plain": 8, "channels_last": 1, "strided": 1}),
        loss=_pick(dice, {"all": 6, "first": 1, "last": 1}),
        touch=_pick(dice, {"": 12, "relu_": 1, "add_": 1, "detached": 1}),
        calls=dice.choice([1] * 8 + [2]),
        clear=_pick(dice, {"none": 6, "zero": 1, "keep": 1}),
    )


def _part(dice: random.Random, among: dict[str, object]) -> Part:
    weights = {name: getattr(one, "weight", 1) for name, one in among.items()}
    return Part(_pick(dice, weights), dice.randrange(1000))


def draw(seed: int) -> Spec:
    """The spec of a seed."""
    dice = random.Random(seed)
    pieces = tuple(_part(dice, PIECES) for _ in range(dice.randint(2, 6)))
    heads = tuple(_part(dice, outputs.HEADS) for _ in range(dice.choice([1, 1, 1, 2, 3])))
    container = "tensor" if len(heads) == 1 and dice.random() < 0.5 else dice.choice(sorted(outputs.CONTAINERS))
    inputs: tuple[str, ...] = ()
    if dice.random() < 0.25:
        inputs = tuple(dice.sample(["other", "mask", "meta", "scale", "flag"], dice.choice([1, 1, 2])))
    size, batch = (dice.randint(8, 24), dice.randint(8, 24)), dice.randint(1, 3)
    return Spec(
        seed=seed,
        channels=dice.randint(1, 3),
        width=dice.randint(2, 4),
        pieces=pieces,
        skips=tuple(n for n in range(len(pieces)) if dice.random() < 0.25),
        heads=heads,
        container=container,
        roots=tuple(dice.sample(sorted(roots.ROOTS), 1)) if dice.random() < 0.25 else (),
        inputs=inputs,
        fitted=tuple(_part(dice, hooks.FITTINGS) for _ in range(dice.choice([0, 0, 0, 1, 1, 2]))),
        optimizer=dice.choice(["SGD", "SGD", "AdamW"]),
        tile=(dice.randint(3, 12), dice.randint(3, 12)),
        visits=tuple(_visit(dice, n, size, batch, inputs) for n in range(dice.randint(2, 4))),
    )


def smaller(spec: Spec) -> Iterator[Spec]:
    """Specs with one thing less, the largest steps first."""
    for n in range(len(spec.visits)):
        if len(spec.visits) > 1:
            yield replace(spec, visits=_without(spec.visits, n))
    for n in range(len(spec.pieces)):
        skips = tuple(s - (s > n) for s in spec.skips if s != n)
        yield replace(spec, pieces=_without(spec.pieces, n), skips=skips)
    for n in range(len(spec.heads)):
        if len(spec.heads) > 1:
            yield replace(spec, heads=_without(spec.heads, n))
    for name in ("skips", "roots", "inputs", "fitted"):
        for n in range(len(getattr(spec, name))):
            yield replace(spec, **{name: _without(getattr(spec, name), n)})
    for name, value in (
        ("container", "tensor"),
        ("optimizer", "SGD"),
        ("heads", (Part("vector"),)),
        ("heads", (Part("map"),)),
        ("tile", (5, 7)),
        ("channels", 2),
        ("width", 3),
    ):
        if getattr(spec, name) != value and (name != "heads" or spec.heads not in ((Part("vector"),), (Part("map"),))):
            yield replace(spec, **{name: value})
    usual = Visit()
    for n, visit in enumerate(spec.visits):

        def put(n: int = n, visit: Visit = visit, **new: object) -> Spec:
            return replace(spec, visits=(*spec.visits[:n], replace(visit, **new), *spec.visits[n + 1 :]))

        for k in range(len(visit.changes)):
            yield put(changes=_without(visit.changes, k))
        for name in vars(usual):
            if name not in ("changes", "grad") and getattr(visit, name) != getattr(usual, name):
                yield put(**{name: getattr(usual, name)})
        if visit.grad != "train":
            yield put(grad="train")


def _without(parts: tuple, n: int) -> tuple:
    return (*parts[:n], *parts[n + 1 :])
