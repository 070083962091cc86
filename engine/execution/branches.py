"""Branches of a forward that hang on the image's values: `if x.max() > 1`, `assert not y.isnan().any()`.

A recording follows one of them, by the truth that it supposes; each call computes what was supposed, and compares.
Where it does not hold, nothing has been changed yet: the network is recorded along the other branch, and the call
begins anew.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
from torch import Tensor

from ..capture.program import Program
from ..errors import UnsupportedError
from .random_numbers import generators_of, random_state, set_random_state, set_states, states_of

T = TypeVar("T")
MOST = 64  # branches that one call may turn to


class BranchError(UnsupportedError):
    """A forward takes another branch than its recording.

    Attributes:
        branches: the truths up to the one that is another, with its own.
    """

    def __init__(self, where: str, branches: tuple[bool, ...]):
        super().__init__(f"{where} branches by the image's values, and here it takes another branch than was recorded")
        self.branches = branches


def following(attempt: Callable[[tuple[bool, ...]], T]) -> T:
    """The result of an attempt that is told the branches which the image takes, as far as they are known."""
    branches: tuple[bool, ...] = ()
    for _ in range(MOST):
        try:
            return attempt(branches)
        except BranchError as error:
            branches = error.branches
    raise UnsupportedError(f"the forward takes more than {MOST} branches by the image's values; do so outside of it")


class Supposed:
    """What a forward supposes, from its beginning until its results are there."""

    def __init__(self, program: Program, device: torch.device):
        self.program, self.device = program, device
        self._generators = generators_of(program) if program.branches else []
        self._before = (random_state(device), states_of(self._generators)) if program.branches else None

    def check(self, env: Mapping[int, Tensor]) -> None:
        """Raise a `BranchError` at the first truth that is another; random generators are as they were before then."""
        if self._before is None:
            return
        for number, branch in enumerate(self.program.branches):
            if bool(env[self.program.form(branch.value)]) != branch.taken:
                set_random_state(self._before[0], self.device)
                set_states(self._generators, self._before[1])
                earlier = tuple(each.taken for each in self.program.branches[:number])
                raise BranchError(branch.where, (*earlier, not branch.taken))
