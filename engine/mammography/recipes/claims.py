"""Tests a paper's claim on a synthetic task: a rule is written down before the seeds are run, and then judged.

Each seed draws new data and networks, so it is the independent unit: rows of one seed are averaged first. An effect is
the difference of two columns, with a Student's t interval over the seeds. A claim holds if every effect's interval is
above zero, nearly every seed shows it by more than rounding, the praised columns are good in themselves (a floor), and
no column is so good that no difference could show (the ceiling).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy import stats

from ...train.run import Run

Row = dict[str, Any]
SEEN = (0, 1, 2)
"""Seeds that were inspected while tasks and settings were chosen, unless a task names others."""
HELD_OUT = (20, 21, 22, 23, 24, 25, 26)
"""Seeds that were not inspected: they are run after task and rule are committed."""
CEILING = 0.98
WINS = 0.8
LEAST = 0.005
"""A seed counts as won if its difference is larger. The same seeds, run with two versions of the code that differ in
rounding, moved by up to 0.004, enough to turn a verdict that depended on one seed (end2end's)."""
FEWEST = 3
"""Number of seeds below which no verdict is given."""


@dataclass(frozen=True)
class Effect:
    """The claim that one column is above another, in the rows with some values."""

    ours: str
    control: str
    where: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Readable name."""
        among = ", ".join(f"{key} {value}" for key, value in self.where.items())
        return f"{self.ours} - {self.control}" + (f" ({among})" if among else "")


@dataclass(frozen=True)
class Rule:
    """The conditions under which a claim holds.

    Attributes:
        effects: all effects that the claim states.
        floors: (column, minimal mean over the seeds).
        beside: effects that are measured and reported, but not part of the claim.
        ceiling: upper bound on the mean of every column of an effect.
    """

    effects: tuple[Effect, ...]
    floors: tuple[tuple[str, float], ...]
    beside: tuple[Effect, ...] = ()
    ceiling: float = CEILING

    def __str__(self) -> str:
        parts = [f"the mean of {column} is at least {least:g}" for column, least in self.floors]
        effects = "; ".join(effect.name for effect in self.effects)
        return (
            f"Over the seeds, with 95 % intervals (Student's t): {'; '.join(parts)}; no mean of a compared column is "
            f"{self.ceiling:g} or more; and each of these differences has an interval above 0 and is above "
            f"{LEAST:g} with {WINS:.0%} of the seeds: {effects}."
        )


@dataclass(frozen=True)
class Synthetic:
    """A synthetic task: the claim, its rule, and the function that makes the rows of a seed."""

    claim: str
    """The paper's sentence, in our words."""
    rule: Rule
    rows: Callable[[Run], list[Row]]
    """(run) -> rows of plain numbers and texts, for `run.seed`; writes into `run.out`."""
    seen: tuple[int, ...] = SEEN
    held_out: tuple[int, ...] = HELD_OUT

    @property
    def seeds(self) -> tuple[int, ...]:
        """All seeds on which the claim is judged."""
        return (*self.seen, *self.held_out)


def over_seeds(rows: Sequence[Row], column: str, where: Mapping[str, Any] | None = None) -> dict[int, float]:
    """Return the mean of a column per seed, over rows with the values of `where`."""
    chosen = [row for row in rows if all(row.get(key) == value for key, value in (where or {}).items())]
    seeds = dict.fromkeys(row["seed"] for row in chosen)
    return {seed: float(np.mean([row[column] for row in chosen if row["seed"] == seed])) for seed in seeds}


def interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float] | None:
    """Return Student's t interval of the mean of independent values; None for fewer than two."""
    if len(values) < 2:
        return None
    mean, error = float(np.mean(values)), float(stats.sem(values))
    half_width = error * float(stats.t.ppf((1 + level) / 2, len(values) - 1))
    return mean - half_width, mean + half_width


def judge(rule: Rule, rows: Sequence[Row]) -> tuple[bool | None, list[Row]]:
    """Return whether the rule holds for rows, and a line per part of it: what, mean, low, high, wins, seeds, holds.

    The verdict is None with too few seeds; so is `holds` in lines of effects that are not part of the claim.
    """
    lines: list[Row] = []
    for column, least in rule.floors:
        values = list(over_seeds(rows, column).values())
        lines.append(_line(f"{column} at least {least:g}", values, float(np.mean(values)) >= least))
    for effect in (*rule.effects, *rule.beside):
        ours, control = (over_seeds(rows, column, effect.where) for column in (effect.ours, effect.control))
        values = [ours[seed] - control[seed] for seed in ours]
        wins = sum(value > LEAST for value in values)
        line = _line(effect.name, values, None, wins)
        if effect in rule.effects:
            line["holds"] = None if line["low"] is None else line["low"] > 0 and wins >= WINS * len(values)
        lines.append(line)
    compared = [(name, e.where) for e in rule.effects for name in (e.ours, e.control)]
    best = max(float(np.mean(list(over_seeds(rows, name, where).values()))) for name, where in compared)
    lines.append({"what": f"best mean below {rule.ceiling:g}", "mean": best, "holds": best < rule.ceiling})
    enough = len({row["seed"] for row in rows}) >= FEWEST
    return all(line["holds"] is not False for line in lines) if enough else None, lines


def _line(what: str, values: Sequence[float], holds: bool | None, wins: int | None = None) -> Row:
    low, high = interval(values) or (None, None)
    line = {"what": what, "mean": float(np.mean(values)), "low": low, "high": high, "wins": wins, "seeds": len(values)}
    return {**line, "holds": holds}
