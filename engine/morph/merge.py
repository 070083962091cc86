"""Merging: the exact inverse of widening, as long as the copies of a channel are still equal.

Channels are folded if all of their stored numbers are equal: rows of weights, biases, norm parameters, running
statistics. Their outgoing weights are added. The proof is the check of a widening in reverse: the given network must
pass, op by op, as a widening of the returned one, with the same rows and columns. Other similar channels do not change.
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
from .fold import Folds, Units, find_ties, fold, width_after_fold
from .other_sizes import other_inputs
from .spaces import GROUPS, Spaces, find_spaces
from .step import Certificate, Report, Step
from .stock import as_given, stock
from .tracer import Mismatch
from .verify import verified_report
from .widen import replace_contents


@torch.inference_mode(False)
@freed_pages_kept()
def merge(model: nn.Module, example: Example, *, inplace: bool = False) -> tuple[nn.Module, Report]:
    """Fold every set of tied channels into one; the narrower network computes the same function.

    Args:
        model: any eager network, e.g. a widened one; it is not changed unless `inplace`.
        example: its input, a tuple of positional or a dict of keyword arguments. A small image is enough unless a
            linear layer needs the real size.
        inplace: put the result into `model` after all checks.

    Returns:
        The narrower network and the report. Sums of outgoing weights are exact after a Kraft or Sterbenz split. If
        some must be rounded (after training), the report states how many and has no certificate.

    Raises:
        MorphError: no channels are tied, or folding any of them would change the function; nothing is changed.
    """
    inputs = as_inputs(example)
    given, model = model, stock(model, inplace)
    others = other_inputs(model, inputs)
    followed = inputs.and_calls(others.branching)
    child, found = _merge(model, followed)
    step = MergeStep(followed.shapes, tuple(found.passes), tuple(found.groups), followed.kinds, followed.form)
    changes, certificate = [*found.changes, *head_changes(model, child)], found.certificate
    if certificate.violations:  # compare in float64, where this rounding hides nothing
        changes.append(f"{certificate.violations} of {certificate.entries} sums of outgoing weights are rounded")
        exact = cast(duplicate(model), torch.float64)
        report = verified_report(step, exact, _merge(exact, followed)[0], example, changes=changes, others=others)
    else:
        report = verified_report(step, model, child, example, changes=changes, certificate=certificate, others=others)
    return (replace_contents(model, child) if inplace else as_given(child, given)), report


@dataclass(frozen=True)
class MergeStep(Step, op="merge"):
    """Step of `merge`.

    Attributes:
        example: shapes of the inputs.
        passes: the passes in order; for each folded space, by its key, the first equal unit of each unit.
        groups: the `groups` argument of `find_spaces` in each pass.
        kinds: dtypes of the inputs, if not all are floating.
        form: positions of the inputs among the arguments, if they are not the positional ones; see `Inputs`.
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
                    raise MorphError(f"space {key} has another width than in the merged network; use its architecture")
            try:
                model, _ = fold(spaces, folds, tied=False)
            except Mismatch as error:
                raise MorphError(f"this merge does not fit the network: {error}") from None
        return model


@dataclass
class _Passes:
    """Result of all passes: folds, `groups` arguments, report lines, and the certificate of the sums of weights."""

    passes: list[Folds] = field(default_factory=list)
    groups: list[str] = field(default_factory=list)
    changes: list[str] = field(default_factory=list)
    certificate: Certificate = field(default_factory=Certificate)


def _merge(model: nn.Module, inputs: Inputs) -> tuple[nn.Module, _Passes]:
    """Fold in passes until nothing can be folded; return the child and the passes."""
    child, done = model, _Passes()
    reason = "no two channels are exact copies of each other; there is nothing to merge"
    untried = list(GROUPS)
    while untried:  # copies in one layer may only become equal after the previous layer is folded
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
                width = width_after_fold(spaces, space, folds)
                done.changes.append(f"space {space.id} ({space.key}): {space.width} -> {width}")
        done.passes.append(folds)
        done.groups.append(groups)
        done.certificate += certificate
        untried = [groups, *(g for g in GROUPS if g != groups)]
    if not done.passes:
        raise MorphError(reason)
    return child, done


def _fold_most(spaces: Spaces, ties: Mapping[str, list[Folds]]) -> tuple[nn.Module, Folds, Certificate] | None:
    """Fold all tied channels, or those spaces that pass the proof; None if nothing is tied.

    Frozen spaces are folded only if no other space can be. If a shuffle needs an even number of channels, the tried
    widths decide whether a space counts as frozen; the proof does not depend on them.

    Raises:
        Mismatch: no space passes.
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
    """Fold the spaces that pass the proof one after the other; None if none passes."""
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
