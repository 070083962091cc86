"""What of a step is there at the same time: its peak is one moment's, not the sum of what each part has at most."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Moment:
    """What is there at one moment of a step, in bytes.

    Attributes:
        maps: whole maps and their gradients.
        graphs: of retained tiles.
        work: what the stage at work has besides.
        stage: its number; None in the calls between stages.
    """

    maps: int
    graphs: int
    work: int
    stage: int | None


class AtOnce:
    """Whole maps through a step, with what its stages have in work.

    Args:
        stored: (place among the steps, bytes of whole maps), see `lifetimes.stored_times`.
        places: of the stages among the steps.
    """

    def __init__(self, stored: Sequence[tuple[int, int]], places: Sequence[int]):
        self._stored, self._places = stored or [(place, 0) for place in places], places
        at: dict[int, int] = {}
        for place, held in self._stored:
            at[place] = max(held, at.get(place, 0))
        self.stored = max(at.values())
        self.beside = [at.get(place, 0) for place in places]  # whole maps while each stage is at work

    def most(self, works: Sequence[int], graphs: Sequence[int] = (), since: int = 0) -> int:
        """The most bytes of whole maps, of what a stage has in work, and of graphs, at any one moment.

        Most whole maps get their gradient when the graphs of later stages are gone already, and the heaviest tile is
        often one of the first stage.

        Args:
            works: what each stage has in work; in the calls between stages nothing is.
            graphs: bytes of its tiles' graphs.
            since: a stage, from which on.
        """
        return self._peak(works, graphs, since)[0]

    def moment(self, works: Sequence[int], graphs: Sequence[int] = ()) -> Moment:
        """When that is."""
        total, maps, now = self._peak(works, graphs, 0)
        stage = self._places.index(now) if now in self._places else None
        work = 0 if stage is None else works[stage]
        return Moment(maps, total - maps - work, work, stage)

    def _peak(self, works: Sequence[int], graphs: Sequence[int], since: int) -> tuple[int, int, int]:
        """The most bytes, those of whole maps among them, and the place among the steps."""
        kept = [0, *itertools.accumulate(graphs or [0] * len(works))]
        there = {place: kept[n + 1] + works[n] for n, place in enumerate(self._places)}
        return max(
            (held + there.get(now, kept[bisect.bisect(self._places, now)]), held, now)
            for now, held in self._stored
            if now >= self._places[since]
        )

    def apart(self, works: Sequence[int], most_work: int) -> int:
        """What of the most whole maps and of `most_work` is never there at the same time."""
        return self.stored + most_work - self.most(works)
