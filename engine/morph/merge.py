"""Merging: the exact inverse of widening, where the copies of a channel are still copies.

Channels are folded if everything that belongs to them is equal in the stored numbers: rows of weights, biases, norm
parameters, running statistics. Their outgoing weights are added. The proof is that of widening, read backwards: the
network that was given must pass, op by op, as a widening of the one that is returned, and its rows and columns must be
that widening's. So channels that only look alike are left as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..errors import MorphError
from ..tiling.memory import freed_pages_kept
from .attributes import head_changes
from .copying import cast, duplicate
from .example import Example, Inputs, as_inputs, stand_ins
from .fold import fold
from .other_sizes import other_inputs
from .report import Certificate, Report
from .spaces import GROUPS, Spaces, find_spaces
from .step import Step
from .stock import as_given, stock
from .ties import Folds, Units, find_ties, kept_width
from .tracer import Mismatch
from .verify import verified_report
from .widen import replace_contents


@torch.inference_mode(False)
@freed_pages_kept()
def merge(model: nn.Module, example: Example, *, inplace: bool = False) -> tuple[nn.Module, Report]:
    """A narrower network that computes the same function, with every set of tied channels folded into one.

    Args:
        model: any eager network, e.g. one that was widened; untouched unless `inplace`.
        example: its input, a tuple of positional or a dict of keyword arguments; a small image will do unless a linear
            layer wants the real size.
        inplace: put the result into `model` after all checks have passed.

    Returns:
        The narrower network and the report. Sums of outgoing weights are exact after a Kraft or Sterbenz split; if
        some had to be rounded (trained since), the report says how many, and has no certificate.

    Raises:
        MorphError: no channels are tied, or folding any of them would change the function; nothing has been changed.
    """
    inputs = as_inputs(example)
    given, model = model, stock(model, inplace)
    others = other_inputs(model, inputs)
    followed = inputs.and_calls(others.ways)
    child, found = _merge(model, followed)
    step = MergeStep(followed.shapes, tuple(found.passes), tuple(found.groups), followed.kinds, followed.form)
    changes, certificate = [*found.changes, *head_changes(model, child)], found.certificate
    if certificate.violations:  # the function is compared where that rounding does not hide anything
        changes.append(f"{certificate.violations} of {certificate.entries} sums of outgoing weights are rounded")
        exact = cast(duplicate(model), torch.float64)
        report = verified_report(step, exact, _merge(exact, followed)[0], example, changes=changes, others=others)
    else:
        report = verified_report(step, model, child, example, changes=changes, certificate=certificate, others=others)
    return (replace_contents(model, child) if inplace else as_given(child, given)), report


@dataclass(frozen=True)
class MergeStep(Step, op="merge"):
    """See `merge`; its passes in order, each with the meaning of groups under which its spaces were found.

    Attributes:
        example: shapes of the inputs.
        kinds: their dtypes, if not all are floating.
        form: their places among the arguments, if they are not the positional ones; see `Inputs`.
        passes: of each space that is folded, by its key, for each unit the first one that is equal.
    """

    example: tuple[tuple[int, ...], ...]
    passes: tuple[Folds, ...]
    groups: tuple[str, ...]
    kinds: tuple[str, ...] = ()
    form: Any = None

    def repeat(self, model: nn.Module) -> nn.Module:
        inputs = stand_ins(self.example, self.kinds, self.form)
        for folds, groups in zip(self.passes, self.groups, strict=True):
            spaces = find_spaces(model, inputs, groups=groups)
            for key, first in folds.items():
                if len(first) not in (len(Units.of(spaces, spaces[key], fine).names) for fine in (False, True)):
                    raise MorphError(f"space {key} has another width than in the network that was merged")
            try:
                model, _ = fold(spaces, folds, tied=False)
            except Mismatch as error:
                raise MorphError(f"this merge does not fit the network: {error}") from None
        return model


@dataclass
class _Passes:
    """What was folded in each pass, with which meaning of groups, in words, and the sums of weights."""

    passes: list[Folds] = field(default_factory=list)
    groups: list[str] = field(default_factory=list)
    changes: list[str] = field(default_factory=list)
    certificate: Certificate = field(default_factory=Certificate)


def _merge(model: nn.Module, inputs: Inputs) -> tuple[nn.Module, _Passes]:
    """The child, after as many passes as fold something."""
    child, done = model, _Passes()
    reason = "no two channels are exact copies of each other; there is nothing to merge"
    untried = list(GROUPS)
    while untried:  # copies in one layer may become equal only after those in the layer before have been folded
        groups, *others = untried
        spaces = find_spaces(child, inputs, groups=groups)
        try:
            result = _fold_most(spaces, find_ties(spaces))
        except Mismatch as error:
            result, reason = None, str(error)
        if result is None:
            untried = others if spaces.found.has_groups else []
            continue
        child, folds, certificate = result
        for space in spaces:
            if space.key in folds:
                width = kept_width(spaces, space, folds)
                done.changes.append(f"space {space.id} ({space.key}): {space.width} -> {width}")
        done.passes.append(folds)
        done.groups.append(groups)
        done.certificate += certificate
        untried = [groups, *(g for g in GROUPS if g != groups)]
    if not done.passes:
        raise MorphError(reason)
    return child, done


def _fold_most(spaces: Spaces, ties: Mapping[str, list[Folds]]) -> tuple[nn.Module, Folds, Certificate] | None:
    """Fold all that is tied, or as many spaces as pass the proof; None if nothing is tied.

    Spaces that cannot grow are folded when no other can be: where a shuffle wants an even number of channels, whether
    a space is found free depends on the widths that were tried. The proof does not.

    Raises:
        Mismatch: none passes.
    """
    reason: Mismatch | None = None
    for frozen in (False, True):
        tied = [kinds for key, kinds in ties.items() if bool(spaces[key].frozen) == frozen]
        if not tied:
            continue
        folds: Folds = {key: fold for kinds in tied for key, fold in kinds[0].items()}
        try:
            child, certificate = fold(spaces, folds)
            return child, folds, certificate
        except Mismatch as error:
            reason = reason or error
        if (result := _fold_some(spaces, tied)) is not None:
            return result
    if reason is not None:
        raise Mismatch(f"channels are equal, but folding them would change the function: {reason}")
    return None


def _fold_some(spaces: Spaces, tied: list[list[Folds]]) -> tuple[nn.Module, Folds, Certificate] | None:
    """Fold one space after the other, those that pass the proof; None if none does."""
    done: Folds = {}
    best = None
    for kinds in tied:
        for kind in kinds:
            try:
                best = fold(spaces, done | kind)
            except Mismatch:
                continue
            done |= kind
            break
    return None if best is None else (best[0], done, best[1])
