"""Optimizer state of a network that has grown, by the adjoint rule.

If every consumer splits a space's copies with the same shares s (sum 1), the gradients of the child are those of the
parent, g' = diag(s_o) g[ro][:, ri]: rows scaled by their shares, columns copied unscaled. A momentum is a sum of
gradients and grows like them, a second moment with s_o^2; both are then what the child would have had, had it been
trained from the start. Mapping them like weights is wrong by a third, and clearing them makes the loss jump.

With `lr="commute"` each tensor gets its own rates as well, so that training commutes with the morph: the child stays
the widened parent, step by step (to check a set-up, or to compare widths at equal rates). Its copies then stay copies
and nothing is gained; `lr="plain"` keeps the rates, and copies part in the first step.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from ..errors import MorphError
from .copies import ParameterMap
from .copying import duplicate
from .descent import descent, shared_prefix
from .report import Report
from .running import failures
from .splits import kraft_lengths
from .step import Step
from .stock import stock
from .widen import WidenStep

RATES = (SGD, Adam, AdamW)  # whose rates per tensor are known under which training commutes
# State of a parameter's shape -> power of the gradient that it is a mean of. Of any optimizer that keeps no other:
# SGD, the Adam family with NAdam, RAdam, Adamax and LAMB, Lion, Adagrad, RMSprop.
MOMENTS = {
    "momentum_buffer": 1,
    "exp_avg": 1,
    "exp_avg_sq": 2,
    "max_exp_avg_sq": 2,
    "exp_inf": 1,
    "grad_avg": 1,
    "square_avg": 2,
    "sum": 2,
}
# Momentum of steps that have been divided by the gradient's size, in which the shares cancel.
STEPS = {"RMSprop": {"momentum_buffer": 0}, "RMSpropTF": {"momentum_buffer": 0}, "Adadelta": {"acc_delta": 0}}

Rates = Literal["plain", "commute"]


@dataclass(frozen=True)
class _Factors:
    """By what the rates of one tensor are multiplied."""

    lr: float = 1.0
    weight_decay: float = 1.0
    eps: float = 1.0


@torch.inference_mode(False)
def grow_optimizer(
    optimizer: Optimizer, parent: nn.Module, child: nn.Module, report: Report, lr: Rates = "plain"
) -> Optimizer:
    """An optimizer for the child that goes on where the parent's stands.

    Args:
        optimizer: on parameters of `parent`; it is not changed. Any whose state is means of gradients or of their
            squares: of torch.optim all but Adafactor, ASGD, LBFGS, Muon, Rprop and SparseAdam, timm's LAMB.
        parent: the network before the morph, with the weights that it had then.
        child: the network after it, with the weights that it had then, on the device where it will be trained.
        report: of that morph. Widening maps all state, see above. After other morphs a parameter that is still there
            with its values keeps its state, also under a new name; new ones start without, at step 0, and so do those
            that `merge` has folded.
        lr: "plain" keeps learning rates, weight decays and the groups. "commute" makes groups of tensors with the same
            factors of learning rate, weight decay and eps; the factors are in `initial_lr` too. With "plain" a schedule
            goes on if it is given the result, `scheduler.optimizer = ...`, and so are those inside of a SequentialLR;
            with "commute" it has to be made anew, which may set rates at once.

    Returns:
        An optimizer of the same class. A parameter that stands where one of the parent's stood (a grown head, the two
        halves of a split layer) is in that one's group, or left out as that one was; a new one is in the group of the
        nearest one with as many axes.

    Raises:
        MorphError: an optimizer with other state; a parameter that is not the parent's; a child that has been trained
            on, of another morph than widening; "plain" where copies would
            never part; or "commute" where no factor per tensor makes training commute (another optimizer than SGD, Adam
            and AdamW, uneven copies, other splits than equal powers of two, new channels, Adam with coupled weight
            decay, other morphs).
    """
    if not isinstance(optimizer, Optimizer) or not isinstance(report, Report):
        kinds = f"{type(optimizer).__name__} and {type(report).__name__}"
        raise MorphError(f"grow_optimizer got {kinds}; give the parent's optimizer and the morph's report")
    if lr not in ("plain", "commute"):
        raise MorphError(f"lr '{lr}' is unknown; take 'plain' or 'commute'")
    if lr == "commute" and type(optimizer) not in RATES:
        known = ", ".join(o.__name__ for o in RATES)
        raise MorphError(f"optimizer {type(optimizer).__name__}: lr='commute' knows {known}; take lr='plain'")
    powers = _powers(optimizer)
    parent, child = stock(parent), stock(child)
    names = _names(optimizer, parent)
    growth = _Growth.of(report.step, parent, child)
    _require_rates(lr, report.step, growth.maps)

    groups: list[dict[str, Any]] = []
    origin: list[dict[str, Any]] = []  # the parent's group of each
    state: dict[Tensor, dict[str, Any]] = {}
    for group in optimizer.param_groups:
        made: dict[_Factors, list[str]] = {}
        for p in group["params"]:
            name = names[id(p)]
            if name not in growth.heirs:
                continue
            target, change = growth.target(name, p), growth.maps.get(name)
            factors = _factors(type(optimizer), group, change, name) if lr == "commute" else _Factors()
            made.setdefault(factors, []).append(growth.heirs[name])
            if p in optimizer.state:
                state[target] = _grown_state(optimizer.state[p], powers, target, change, growth.split)
        for factors, members in (made or {_Factors(): []}).items():
            groups.append(_scaled(group, factors) | {"params": members})
            origin.append(group)
    _add_new(growth, parent, groups, origin)
    return _construct(optimizer, groups, growth.targets, state)


def gradient_shares(made: ParameterMap, split: str) -> Tensor | None:
    """Share s_o of each row of a widened tensor in the gradient of the row that it copies; zero for new rows.

    Args:
        made: of the tensor.
        split: "kraft": exact, but not after a flip (it changes the order of the copies), nor for uneven parts under
            a statistic over channels (its gradient reaches all copies alike).
            "sterbenz": 1/c, since each weight has shares of its own: the mean, and the sums are exact.

    Returns:
        float64 (rows), or None if no rows are copied.
    """
    if made.parents is None or made.free is None:
        return None
    kept = ~made.free
    counts = torch.bincount(made.parents[kept])
    shares = torch.zeros(len(made.parents), dtype=torch.float64)
    if split != "kraft":
        shares[kept] = 1.0 / counts[made.parents[kept]].double()
        return shares
    rows = kept.nonzero().reshape(-1)
    order = rows[torch.argsort(made.parents[rows], stable=True)]
    starts = torch.cumsum(counts, 0) - counts
    rank = torch.arange(len(order)) - starts[made.parents[order]]
    for copies in torch.unique(counts[counts > 0]).tolist():
        parts = torch.tensor([2.0**-length for length in kraft_lengths(copies)], dtype=torch.float64)
        here = counts[made.parents[order]] == copies
        shares[order[here]] = parts[rank[here]]
    return shares


# --------------------------------------------------------------------------------------------------------------------


def _powers(optimizer: Optimizer) -> dict[str, int]:
    """Of each state of a parameter's shape the power of the gradient.

    Raises:
        MorphError: one of them is not known.
    """
    name = type(optimizer).__name__
    known = MOMENTS | STEPS.get(name, {})
    for p, state in optimizer.state.items():
        for key, value in state.items():
            if isinstance(value, Tensor) and value.ndim and (key not in known or value.shape != p.shape):
                raise MorphError(
                    f"optimizer {name}: what its state '{key}' becomes of a grown network is not known; begin a new one"
                )
    return known


def _names(optimizer: Optimizer, parent: nn.Module) -> dict[int, str]:
    """The name of each of the parent's parameters, by id.

    Raises:
        MorphError: the optimizer holds another one.
    """
    names = {id(p): name for name, p in parent.named_parameters()}
    for group in optimizer.param_groups:
        for p in group["params"]:
            if id(p) not in names:
                raise MorphError(
                    f"the optimizer holds a parameter of shape {tuple(p.shape)} that is not the parent's; "
                    "give the parent itself, not a copy, and grow it without `inplace`; what a loss learns needs an "
                    "optimizer of its own"
                )
    return names


@dataclass(frozen=True)
class _Growth:
    """What a morph makes of the parent's parameters.

    Attributes:
        targets: the child's parameters by name.
        maps: of each that is widened, by name.
        heirs: the child's name of each that is still there.
        origins: the parent's name of each of the child's that stands where another stood; empty for widening.
        split: of outgoing weights; empty for other morphs than widening.
    """

    targets: Mapping[str, Tensor]
    maps: Mapping[str, ParameterMap]
    heirs: Mapping[str, str]
    origins: Mapping[str, str]
    split: str

    @classmethod
    def of(cls, step: Step, parent: nn.Module, child: nn.Module) -> _Growth:
        targets = dict(child.named_parameters())
        if isinstance(step, WidenStep):
            same_names = {name: name for name, _ in parent.named_parameters()}
            # The maps depend on the architecture alone; the recorded inputs are float32 on the CPU.
            maps = step.tensor_maps(duplicate(parent).float().cpu())
            return cls(targets, maps, same_names, {}, step.split)
        found = descent(step, parent, child)
        return cls(targets, {}, found.heirs, found.origins, "")

    def target(self, name: str, p: Tensor) -> Tensor:
        """The child's parameter that one of the parent's has become."""
        target = self.targets.get(self.heirs[name])
        shape = self.maps[name].shape(p.shape) if name in self.maps else tuple(p.shape)
        if target is None or tuple(target.shape) != shape:
            raise MorphError(f"'{name}' of the child has not the shape {shape} of this report; give its own child")
        return target


def _require_rates(lr: Rates, step: Step, maps: Mapping[str, ParameterMap]) -> None:
    """Refuse "commute" where only rates per element would do, and "plain" where copies would stay copies."""
    if not isinstance(step, WidenStep):
        if lr == "commute":
            raise MorphError(f"training commutes with widening only, not with '{step.op}'; take lr='plain'")
    elif lr == "commute":
        if step.split != "kraft" or step.noise or any(any(n) for n in step.free.values()):
            raise MorphError("training commutes only with widen(split='kraft') without noise or new channels")
    elif step.split == "kraft" and not step.noise and maps:
        raise MorphError(
            "copies with equal powers of two would stay equal for good under lr='plain'; widen with split='sterbenz' "
            "or noise"
        )


def _factors(kind: type[Optimizer], group: Mapping[str, Any], made: ParameterMap | None, name: str) -> _Factors:
    rows = columns = 1.0
    if made is not None:
        shares = gradient_shares(made, "kraft")
        if shares is not None:
            rows = _one(shares, name)
        if made.columns is not None:
            counts = torch.bincount(made.columns)
            columns = _one(1.0 / counts[made.columns].double(), name)
    if kind is SGD:
        return _Factors(lr=columns / rows, weight_decay=rows / columns)
    if group["weight_decay"] and not group.get("decoupled_weight_decay", kind is AdamW):
        raise MorphError("Adam's coupled weight decay does not commute with widening; use AdamW or no weight decay")
    return _Factors(lr=columns, weight_decay=1.0 / columns, eps=rows)


def _one(values: Tensor, name: str) -> float:
    if bool((values != values[0]).any()) or math.frexp(float(values[0]))[0] != 0.5:
        raise MorphError(
            f"'{name}' has channels that are copied unevenly or to another number than a power of two: no rate per "
            "tensor makes training commute; widen each space by a factor of 2, 4, ..."
        )
    return float(values[0])


def _grown_state(
    state: Mapping[str, Any], powers: Mapping[str, int], new: Tensor, made: ParameterMap | None, split: str
) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in state.items():
        if isinstance(value, Tensor) and value.ndim:
            moment = value.detach() if made is None else _grown_moment(value.detach(), made, powers[key], split)
            result[key] = moment.clone().to(new.device)
        else:
            result[key] = value.clone() if isinstance(value, Tensor) else copy.deepcopy(value)  # the step's number
    return result


def _grown_moment(moment: Tensor, made: ParameterMap, power: int, split: str) -> Tensor:
    """A mean of gradients (power 1) or of their squares (power 2), as the child would have it.

    New channels have no gradient yet. Their first moment is zero; their second is the mean of the others, because
    from zero Adam's first step would be (1 - beta1) / sqrt(1 - beta2), about three, times the learning rate.
    """
    result = moment
    fresh = torch.zeros((), dtype=torch.bool, device=moment.device)
    if made.columns is not None and made.columns_axis is not None:
        columns = made.columns.to(moment.device)
        result = result.index_select(made.columns_axis, columns.clamp(min=0))
        fresh = fresh | _along(columns < 0, made.columns_axis, moment.ndim)
    shares = gradient_shares(made, split)
    if shares is not None and made.parents is not None and made.free is not None and made.axis is not None:
        result = result.index_select(made.axis, made.parents.to(moment.device))
        result = result * _along(shares.to(moment.device, moment.dtype) ** power, made.axis, moment.ndim)
        fresh = fresh | _along(made.free.to(moment.device), made.axis, moment.ndim)
    if bool(fresh.any()):
        fresh = fresh.expand(result.shape)
        typical = result[~fresh].double().mean().item() if power == 2 else 0.0
        result = result.masked_fill(fresh, typical)
    return result


def _along(values: Tensor, axis: int, ndim: int) -> Tensor:
    return values.reshape([-1 if a == axis else 1 for a in range(ndim)])


def _scaled(group: Mapping[str, Any], factors: _Factors) -> dict[str, Any]:
    result = {k: v for k, v in group.items() if k not in ("params", "param_names")}
    by = {"lr": factors.lr, "initial_lr": factors.lr, "weight_decay": factors.weight_decay, "eps": factors.eps}
    for key, factor in by.items():
        if key in result:
            result[key] = result[key] * factor
    return result


def _add_new(
    growth: _Growth,
    parent: nn.Module,
    groups: list[dict[str, Any]],
    origin: list[dict[str, Any]],
) -> None:
    """Put each parameter that is no heir into a group.

    One that stands where a parent's stood belongs to that one's group, or to none if the optimizer had left that out.
    Another is new: it goes to the nearest trained one of its kind, so that the rates of its part of the network
    hold for it.
    """
    names = {id(p): name for name, p in parent.named_parameters()}
    trained = {names[id(p)]: (p, group) for group, old in zip(groups, origin, strict=True) for p in old["params"]}
    heirs = set(growth.heirs.values())
    for name, p in growth.targets.items():
        if name in heirs:
            continue
        if name in growth.origins:
            _, group = trained.get(growth.origins[name], (None, None))
        elif p.requires_grad and trained:
            _, group = min(trained.items(), key=lambda item: _distance(name, p, item[0], item[1][0]))[1]
        else:
            group = None
        if group is not None:
            group["params"].append(name)


def _distance(name: str, p: Tensor, other: str, q: Tensor) -> tuple[bool, bool, int]:
    """Of a new parameter from a trained one: as many axes, a vector or not, near in the network."""
    vector = [sum(side > 1 for side in t.shape) <= 1 for t in (p, q)]
    return p.ndim != q.ndim, vector[0] != vector[1], -shared_prefix(name, other)


def _construct(
    optimizer: Optimizer,
    groups: list[dict[str, Any]],
    targets: Mapping[str, Tensor],
    state: dict[Tensor, dict[str, Any]],
) -> Optimizer:
    named = any("param_names" in g for g in optimizer.param_groups)
    wanted = inspect.signature(type(optimizer).__init__).parameters
    defaults = {k: v for k, v in optimizer.defaults.items() if k in wanted}
    for group in groups:
        members = group["params"]
        group["params"] = [(n, targets[n]) for n in members] if named else [targets[n] for n in members]
    if named:  # PyTorch has no empty group beside named ones; elsewhere it keeps its place in lists of rates
        groups = [group for group in groups if group["params"]]
    kind = type(optimizer).__name__
    with failures(f"optimizer {kind} cannot be made anew of its groups and defaults; begin a new one"):
        result = type(optimizer)(groups, **defaults)
    for target, entries in state.items():
        result.state[target] = entries
    return result


__all__ = ["gradient_shares", "grow_optimizer"]
