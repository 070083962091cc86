"""Peak memory of a step: the maximum over time of its parts together, not the sum of their maxima."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Moment:
    """Resident bytes at one moment of a step.

    Attributes:
        maps: whole maps and their gradients.
        graphs: graphs of retained tiles.
        work: strips and tile of the running stage.
        stage: index of the running stage; None during calls between stages.
    """

    maps: int
    graphs: int
    work: int
    stage: int | None


class AtOnce:
    """Combines the bytes of whole maps over a step with those of the running stages.

    Args:
        stored: (index of the step, bytes of whole maps), see `lifetimes.stored_times`.
        places: indices of the stages among the steps.
    """

    def __init__(self, stored: Sequence[tuple[int, int]], places: Sequence[int]):
        self._stored, self._places = stored or [(place, 0) for place in places], places
        at: dict[int, int] = {}
        for place, held in self._stored:
            at[place] = max(held, at.get(place, 0))
        self.stored = max(at.values())
        self.whole_maps = [at.get(place, 0) for place in places]  # whole maps while each stage runs

    def most(self, works: Sequence[int], graphs: Sequence[int] = (), since: int = 0) -> int:
        """The peak over time of whole maps, the running stage and graphs together.

        Most whole maps get their gradient after the graphs of later stages are freed, and the heaviest tile is often in
        the first stage.

        Args:
            works: bytes of the strips and tile of each stage while it runs.
            graphs: bytes of the retained graphs of each stage.
            since: index of the first stage that is considered.
        """
        return self._peak(works, graphs, since)[0]

    def moment(self, works: Sequence[int], graphs: Sequence[int] = ()) -> Moment:
        """The moment of the peak."""
        total, maps, now = self._peak(works, graphs, 0)
        stage = self._places.index(now) if now in self._places else None
        work = 0 if stage is None else works[stage]
        return Moment(maps, total - maps - work, work, stage)

    def _peak(self, works: Sequence[int], graphs: Sequence[int], since: int) -> tuple[int, int, int]:
        """The peak, the bytes of whole maps in it, and the index of its step."""
        kept = [0, *itertools.accumulate(graphs or [0] * len(works))]
        there = {place: kept[n + 1] + works[n] for n, place in enumerate(self._places)}
        return max(
            (held + there.get(now, kept[bisect.bisect(self._places, now)]), held, now)
            for now, held in self._stored
            if now >= self._places[since]
        )

    def apart(self, works: Sequence[int], most_work: int) -> int:
        """The bytes by which the peak is smaller than the largest whole maps plus `most_work`."""
        return self.stored + most_work - self.most(works)
