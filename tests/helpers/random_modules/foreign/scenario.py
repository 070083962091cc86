"""Scenarios of one foreign piece: three calls, and changes between them."""

from __future__ import annotations

import itertools
import random

from ..spec import Part, Spec, Visit
from .base import variations
from .harness import foreign_pieces


def foreign_names() -> list[str]:
    """All variations of all pieces, as `Piece.variation`."""
    return [f"{name}.{how}" for name, kind in foreign_pieces().items() for how in variations(kind)]


def draw_foreign(name: str, seed: int) -> Spec:
    """The scenario of a variation, always the same for a seed.

    Args:
        name: one of `foreign_names()`.
        seed: chooses the layers around the piece, sizes, modes, and before which calls there are changes.
    """
    dice = random.Random(f"{name} {seed}")
    piece, _, how = name.partition(".")
    ways = variations(foreign_pieces()[piece])
    start = dice.randrange(1000)
    part = Part(piece, next(n for n in itertools.count(start) if random.Random(n).choice(ways) == how))
    around = [Part("ConvNormRelu", dice.randrange(1000)) for _ in range(2)]
    pieces = ([part], [part, around[0]], [around[0], part], [around[0], part, around[1]])[dice.randrange(4)]
    heads = ((Part("vector"),), (Part("map", 1),), (Part("vector"), Part("map", 2)))[dice.randrange(3)]
    changed = dice.choice([(1,), (2,), (1, 2), (1, 2)])
    size, other = (dice.randint(10, 18), dice.randint(10, 18)), (dice.randint(8, 20), dice.randint(8, 20))
    third = dice.choice(["train", "train", "no_grad", "inference_mode"])
    image = dice.choice(["leaf", "plain", "plain"])
    return Spec(
        seed=dice.randrange(10**6),
        width=dice.randint(2, 4),
        pieces=tuple(pieces),
        heads=heads,
        container="tensor" if len(heads) == 1 else dice.choice(["tuple", "dict"]),
        fitted=(Part("foreign"),),
        tile=(dice.randint(3, 9), dice.randint(3, 9)),
        visits=tuple(
            Visit(
                changes=(Part(f"foreign_{number}"),) if number in changed else (),
                mode="eval" if number == 2 and third != "train" else dice.choice(["", "train"]) if number else "train",
                grad=third if number == 2 else "train",
                size=other if number == 2 and dice.random() < 0.25 else size,
                image=image,
                layout="strided" if dice.random() < 0.1 else "plain",
            )
            for number in range(3)
        ),
    )
