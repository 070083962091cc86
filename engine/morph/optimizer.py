"""Training state of a grown network: the optimizer's state, by the adjoint rule, and averaged weights.

If every consumer splits a space's copies with the same shares s (sum 1), the gradients of the child are those of the
parent, g' = diag(s_o) g[ro][:, ri]: rows are scaled by their shares, columns are copied. A momentum is a sum of
gradients and maps like them, and a second moment maps with s_o^2. Both then equal the state of a child that was trained
from the start. Mapping them like weights is wrong by a third, and clearing them makes the loss jump.

With `lr="commute"` each tensor also gets its own rates, so that training commutes with the morph: the child remains the
widened parent in every step (to check a set-up, or to compare widths at equal rates). Its copies then stay equal and
training gains nothing. `lr="plain"` does not change the rates, and copies differ after the first step.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.swa_utils import AveragedModel

from ..errors import MorphError
from .copies import ParameterMap
from .copying import duplicate
from .labels import along
from .lookup import FREE
from .merge import MergeStep
from .running import failures
from .splits import by_copies, kraft_lengths
from .step import Report, Step
from .stock import stock
from .verify import require_equal
from .widen import WidenStep

RATES = (SGD, Adam, AdamW)  # optimizers with known rates per tensor that make training commute
# State with a parameter's shape -> the power of the gradient in this mean. It covers SGD, the Adam family with NAdam,
# RAdam, Adamax and LAMB, Lion, Adagrad and RMSprop.
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
# Momentum of steps that are divided by the gradient's magnitude, so the shares cancel.
STEPS = {"RMSprop": {"momentum_buffer": 0}, "RMSpropTF": {"momentum_buffer": 0}, "Adadelta": {"acc_delta": 0}}

Rates = Literal["plain", "commute"]


@dataclass(frozen=True)
class _RateFactors:
    """Factors of the rates of one tensor."""

    lr: float = 1.0
    weight_decay: float = 1.0
    eps: float = 1.0


@torch.inference_mode(False)
def grow_optimizer(
    optimizer: Optimizer, parent: nn.Module, child: nn.Module, report: Report, lr: Rates = "plain"
) -> Optimizer:
    """Create an optimizer for the child that continues the state of the parent's optimizer.

    Args:
        optimizer: an optimizer of the parameters of `parent`; it is not changed. Its state must consist of means of
            gradients or of their squares: all of torch.optim except Adafactor, ASGD, LBFGS, Muon, Rprop and SparseAdam,
            and timm's LAMB.
        parent: the network before the morph, with its weights of that time.
        child: the network after the morph, with its weights of that time, on the device of its training.
        report: the report of the morph. Widening maps all state. After other morphs a parameter that still exists with
            its values retains its state, also under a new name. New parameters, and those that `merge` folded, start
            without state at step 0.
        lr: "plain" does not change learning rates, weight decays and groups. "commute" groups tensors with the same
            factors of learning rate, weight decay and eps, also in `initial_lr`. With "plain" a schedule continues
            after `scheduler.optimizer = ...`, which must also be set inside a SequentialLR. With "commute" create a new
            schedule, which may change the rates at once.

    Returns:
        An optimizer of the same class. A parameter that replaces one of the parent's (a grown head, the two halves of a
        split layer) is in the same group, or in none if that one was in none. A new parameter is in the group of the
        nearest one with the same number of axes.

    Raises:
        MorphError: the optimizer has other state, or holds a parameter that is not the parent's; the child was trained
            after another morph than widening; with "plain" copies would stay equal; or with "commute" no factor per
            tensor makes training commute (another optimizer than SGD, Adam and AdamW, uneven copies, other splits than
            equal powers of two, new channels, Adam with coupled weight decay, other morphs).
    """
    if not isinstance(optimizer, Optimizer) or not isinstance(report, Report):
        kinds = f"{type(optimizer).__name__} and {type(report).__name__}"
        raise MorphError(f"grow_optimizer got {kinds}; give the parent's optimizer and the morph's report")
    if lr not in ("plain", "commute"):
        raise MorphError(f"unknown lr '{lr}'; choose 'plain' or 'commute'")
    if lr == "commute" and type(optimizer) not in RATES:
        known = ", ".join(o.__name__ for o in RATES)
        raise MorphError(f"optimizer {type(optimizer).__name__}: lr='commute' supports {known}; use lr='plain'")
    powers = _powers(optimizer)
    parent, child = stock(parent), stock(child)
    names = _names(optimizer, parent)
    growth = _ParameterMapping.of(report.step, parent, child)
    _require_rates(lr, report.step, growth.maps)

    groups: list[dict[str, Any]] = []
    origin: list[dict[str, Any]] = []  # the parent's group of each of `groups`
    state: dict[Tensor, dict[str, Any]] = {}
    for group in optimizer.param_groups:
        made: dict[_RateFactors, list[str]] = {}
        for p in group["params"]:
            name = names[id(p)]
            if name not in growth.heirs:
                continue
            target, change = growth.target(name, p), growth.maps.get(name)
            factors = _rate_factors(type(optimizer), group, change, name) if lr == "commute" else _RateFactors()
            made.setdefault(factors, []).append(growth.heirs[name])
            if p in optimizer.state:
                state[target] = _grown_state(optimizer.state[p], powers, target, change, growth.split)
        for factors, members in (made or {_RateFactors(): []}).items():
            groups.append(_scaled(group, factors) | {"params": members})
            origin.append(group)
    _add_new(growth, names, groups, origin)
    return _construct(optimizer, groups, growth.targets, state)


def gradient_shares(made: ParameterMap, split: str) -> Tensor | None:
    """Return the share s_o of each row of a widened tensor in the gradient of the row that it copies.

    Args:
        made: the map of the tensor.
        split: "kraft": exact, except after a flip (it changes the order of the copies), and for uneven parts under a
            statistic over channels (its gradient reaches all copies equally). "sterbenz": 1/c, the mean of the shares,
            because each weight has its own shares; the sums are exact.

    Returns:
        float64 (rows), zero for new rows, or None if no rows are copied.
    """
    if made.parents is None or made.free is None:
        return None
    shares = torch.zeros(len(made.parents), dtype=torch.float64)
    for _, copies in by_copies(made.parents.masked_fill(made.free, FREE)):
        lengths = kraft_lengths(len(copies))
        for index, length in zip(copies, lengths, strict=False):
            shares[index] = 2.0**-length if split == "kraft" else 1 / len(copies)
    return shares


# --------------------------------------------------------------------------------------------------------------------


def _powers(optimizer: Optimizer) -> dict[str, int]:
    """Return the power of the gradient for each state with a parameter's shape.

    Raises:
        MorphError: a state is unknown.
    """
    name = type(optimizer).__name__
    known = MOMENTS | STEPS.get(name, {})
    for p, state in optimizer.state.items():
        for key, value in state.items():
            if isinstance(value, Tensor) and value.ndim and (key not in known or value.shape != p.shape):
                raise MorphError(
                    f"optimizer {name}: cannot map its state '{key}' to a grown network; create a new optimizer"
                )
    return known


def _names(optimizer: Optimizer, parent: nn.Module) -> dict[int, str]:
    """Return the name of each of the parent's parameters, by id.

    Raises:
        MorphError: the optimizer holds another parameter.
    """
    names = {id(p): name for name, p in parent.named_parameters()}
    for group in optimizer.param_groups:
        for p in group["params"]:
            if id(p) not in names:
                raise MorphError(
                    f"the optimizer holds a parameter of shape {tuple(p.shape)} that is not the parent's; "
                    "give the parent itself, not a copy, grow it without `inplace`, and use a separate optimizer for "
                    "parameters of a loss"
                )
    return names


@dataclass(frozen=True)
class _ParameterMapping:
    """Mapping of the parent's parameters to the child's.

    Attributes:
        targets: the child's parameters by name.
        maps: the map of each widened parameter, by name.
        heirs: parent's name -> child's name, for each parameter that still exists.
        origins: child's name -> parent's name, for each parameter that replaces another; empty for widening.
        split: split of outgoing weights; empty for other morphs than widening.
    """

    targets: Mapping[str, Tensor]
    maps: Mapping[str, ParameterMap]
    heirs: Mapping[str, str]
    origins: Mapping[str, str]
    split: str

    @classmethod
    def of(cls, step: Step, parent: nn.Module, child: nn.Module) -> _ParameterMapping:
        targets = dict(child.named_parameters())
        if isinstance(step, WidenStep):
            same_names = {name: name for name, _ in parent.named_parameters()}
            # The maps depend on the architecture alone; the recorded inputs are float32 on the CPU.
            maps = step.tensor_maps(duplicate(parent).float().cpu())
            return cls(targets, maps, same_names, {}, step.split)
        return cls(targets, {}, *descent(step, parent, child), "")

    def target(self, name: str, p: Tensor) -> Tensor:
        """Return the child's parameter for one of the parent's."""
        target = self.targets.get(self.heirs[name])
        shape = self.maps[name].shape(p.shape) if name in self.maps else tuple(p.shape)
        if target is None or tuple(target.shape) != shape:
            raise MorphError(
                f"'{name}' of the child does not have the shape {shape} of this report; give its own child"
            )
        return target


def _require_rates(lr: Rates, step: Step, maps: Mapping[str, ParameterMap]) -> None:
    """Refuse "commute" if it needs rates per element, and "plain" if copies would stay equal."""
    if not isinstance(step, WidenStep):
        if lr == "commute":
            raise MorphError(f"training commutes with widening only, not with '{step.op}'; use lr='plain'")
    elif lr == "commute":
        if step.split != "kraft" or step.noise or any(any(n) for n in step.free.values()):
            raise MorphError(
                "training commutes only with widen(split='kraft') without noise or new channels; use lr='plain'"
            )
    elif step.split == "kraft" and not step.noise and maps:
        raise MorphError(
            "copies with equal powers of two would always stay equal with lr='plain'; widen with split='sterbenz' or "
            "noise"
        )


def _rate_factors(
    kind: type[Optimizer], group: Mapping[str, Any], made: ParameterMap | None, name: str
) -> _RateFactors:
    rows = columns = 1.0
    if made is not None:
        shares = gradient_shares(made, "kraft")
        if shares is not None:
            rows = _uniform_power(shares, name)
        if made.columns is not None:
            counts = torch.bincount(made.columns)
            columns = _uniform_power(1.0 / counts[made.columns].double(), name)
    if kind is SGD:
        return _RateFactors(lr=columns / rows, weight_decay=rows / columns)
    if group["weight_decay"] and not group.get("decoupled_weight_decay", kind is AdamW):
        raise MorphError("Adam's coupled weight decay does not commute with widening; use AdamW or no weight decay")
    return _RateFactors(lr=columns, weight_decay=1.0 / columns, eps=rows)


def _uniform_power(values: Tensor, name: str) -> float:
    if bool((values != values[0]).any()) or math.frexp(float(values[0]))[0] != 0.5:
        raise MorphError(
            f"the copies of channels of '{name}' are uneven or not a power of two, so no rate per tensor makes "
            "training commute; widen each space by a factor of 2, 4, ..."
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
            result[key] = value.clone() if isinstance(value, Tensor) else copy.deepcopy(value)  # e.g. the step number
    return result


def _grown_moment(moment: Tensor, made: ParameterMap, power: int, split: str) -> Tensor:
    """Map a mean of gradients (power 1) or of their squares (power 2) to the child.

    New channels have no gradient yet. Their first moment is zero. Their second moment is the mean of the others,
    because from zero Adam's first step would be (1 - beta1) / sqrt(1 - beta2), about three, times the learning rate.
    """
    result = moment
    fresh = torch.zeros((), dtype=torch.bool, device=moment.device)
    if made.columns is not None and made.columns_axis is not None:
        columns = made.columns.to(moment.device)
        result = result.index_select(made.columns_axis, columns.clamp(min=0))
        fresh = fresh | along(columns < 0, made.columns_axis, moment.ndim)
    shares = gradient_shares(made, split)
    if shares is not None and made.parents is not None and made.free is not None and made.axis is not None:
        result = result.index_select(made.axis, made.parents.to(moment.device))
        result = result * along(shares.to(moment.device, moment.dtype) ** power, made.axis, moment.ndim)
        fresh = fresh | along(made.free.to(moment.device), made.axis, moment.ndim)
    if bool(fresh.any()):
        fresh = fresh.expand(result.shape)
        typical = result[~fresh].double().mean().item() if power == 2 else 0.0
        result = result.masked_fill(fresh, typical)
    return result


def _scaled(group: Mapping[str, Any], factors: _RateFactors) -> dict[str, Any]:
    result = {k: v for k, v in group.items() if k not in ("params", "param_names")}
    by = {"lr": factors.lr, "initial_lr": factors.lr, "weight_decay": factors.weight_decay, "eps": factors.eps}
    for key, factor in by.items():
        if key in result:
            result[key] = result[key] * factor
    return result


def _add_new(
    growth: _ParameterMapping, names: Mapping[int, str], groups: list[dict[str, Any]], origin: list[dict[str, Any]]
) -> None:
    """Add each parameter that is not an heir to a group.

    A parameter that replaces one of the parent's belongs to that one's group, or to none if the optimizer does not hold
    that one. A new parameter belongs to the group of the nearest trained one of its kind, so that it gets the rates of
    its part of the network.
    """
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
    """Order trained parameters by distance from a new one: number of axes, whether a vector, names in common."""
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
    if named:  # PyTorch allows no empty group next to named ones; without names it stays in lists of rates
        groups = [group for group in groups if group["params"]]
    kind = type(optimizer).__name__
    with failures(f"optimizer {kind} cannot be rebuilt from its groups and defaults; create a new optimizer"):
        result = type(optimizer)(groups, **defaults)
    for target, entries in state.items():
        result.state[target] = entries
    return result


def descent(step: Step, parent: nn.Module, child: nn.Module) -> tuple[dict[str, str], dict[str, str]]:
    """Find the parameters that still exist, and those that replace others, after another morph than a widening.

    The morph is repeated on a copy without weights. A module that is still in the copy retains its parameters, under
    any name. A missing module was replaced by the module that is now at its path. Names alone are ambiguous: after a
    block with the layer `block.1` is followed by a new layer, the new one is `block.1` and the old one is `block.0.1`.

    Args:
        step: the step of the morph.
        parent: the network before the morph, with its weights of that time; it is not changed.
        child: the network after the morph, with its weights of that time.

    Returns:
        Parent's name -> child's name, for each parameter that still exists with its values; and child's name ->
        parent's name, for every other parameter that replaces one of the parent's: grown, split, or computed from it.
        A parameter in neither is new.

    Raises:
        MorphError: a parameter that the morph does not change has other values in the child.
    """
    moved = _moved(step, parent)
    old, new = dict(parent.named_parameters()), dict(child.named_parameters())
    heirs: dict[str, str] = {}
    origins: dict[str, str] = {}
    unreplaced = {_join(where, leaf) for where in moved.values() for leaf in _leaves(child, where)}
    for name, p in old.items():
        path, _, leaf = name.rpartition(".")
        mine = _join(moved[path], leaf) if path in moved else ""
        nearby = [n for n in new if n not in unreplaced and n.startswith(f"{path}.") and n.rpartition(".")[2] == leaf]
        if mine not in new:
            equal = [n for n in nearby if _shares_values(new[n], p)]
            if len(equal) == 1:
                heirs[name] = equal[0]
            origins |= dict.fromkeys((n for n in nearby if n not in equal or len(equal) > 1), name)
        elif _shares_values(new[mine], p):
            heirs[name] = mine
        else:
            # If a weight lost a part of its values but not its shape, other parameters below the path hold the rest.
            rest = [n for n in nearby if new[n].shape == p.shape == new[mine].shape]
            if new[mine].shape == p.shape and not rest:
                raise MorphError(
                    f"'{mine}' of the child has other values than '{name}' of the parent, but this morph does not "
                    "change it; call grow_optimizer before either network is trained or cast"
                )
            origins |= dict.fromkeys([mine, *rest], name)
    return heirs, origins


def shared_prefix(a: str, b: str) -> int:
    """Return the number of leading components that two names have in common."""
    parts = [x == y for x, y in zip(a.split("."), b.split("."), strict=False)]
    return parts.index(False) if False in parts else len(parts)


def _moved(step: Step, parent: nn.Module) -> dict[str, str]:
    """Return parent's path -> child's path, for each module that the morph does not replace."""
    if isinstance(step, MergeStep):  # it runs the network, which needs weights, and moves nothing
        return {path: path for path, _ in parent.named_modules()}
    copy = duplicate(parent, {id(p): nn.Parameter(torch.empty_like(p, device="meta")) for p in parent.parameters()})
    before = {module: path for path, module in copy.named_modules()}
    return {before[module]: path for path, module in step.repeat(copy).named_modules() if module in before}


def _leaves(model: nn.Module, path: str) -> list[str]:
    return [name for name, _ in model.get_submodule(path).named_parameters(recurse=False)]


def _join(path: str, leaf: str) -> str:
    return f"{path}.{leaf}" if path else leaf


def _shares_values(child: Tensor, parent: Tensor) -> bool:
    return child.shape == parent.shape and torch.equal(child.to(parent), parent)


Averaged = TypeVar("Averaged", bound=nn.Module)


@torch.inference_mode(False)
def grow_ema(average: Averaged, parent: nn.Module, child: nn.Module, report: Report) -> Averaged:
    """Widen an average of the parent's weights by the same linear map as the weights.

    Seed and tensor name determine the shares, so the average of widened weights equals the widened average. New
    channels have no history and get the child's weights.

    Args:
        average: a network of the parent's architecture (an EMA or momentum copy) or an `AveragedModel` of one; it is
            not changed.
        parent: the network before the widening.
        child: the network after the widening.
        report: the report of the widening.

    Raises:
        MorphError: the morph is not a widening, the average has another architecture, or a check fails.
    """
    parent, child = stock(parent), stock(child)
    average = stock(average)  # pyright: ignore[reportAssignmentType]  the same class, or the network it accelerates
    step = report.step
    if not isinstance(step, WidenStep):
        raise MorphError(f"averages can follow a widening only, not '{report.transform}'; start a new average")
    if isinstance(average, AveragedModel):
        grown = grow_ema(average.module, parent, child, report)
        return copy.deepcopy(average, {id(average.module): grown})  # takes the grown network in place of a copy
    shapes = [{n: t.shape for n, t in m.state_dict().items()} for m in (parent, average)]
    if shapes[0] != shapes[1]:
        raise MorphError("the average has other parameters than the parent; give an average of the parent's weights")
    # The recorded inputs are float32 on the CPU, so the architecture is rebuilt there before the weights are set.
    grown = step.repeat(duplicate(average).float().cpu())
    maps = step.tensor_maps(duplicate(parent).float().cpu())
    targets, sources = child.state_dict(), average.state_dict()
    for name, tensor in [*grown.named_parameters(), *grown.named_buffers()]:
        if name not in sources:
            continue
        value, made = sources[name], maps.get(name)
        if made is None:
            value = value.detach().clone()
        else:
            value, _ = step.grow_tensor(name, value, made)
            if made.free is not None and made.axis is not None and bool(made.free.any()):
                at = made.free.nonzero().reshape(-1).to(value.device)
                value.index_copy_(made.axis, at, targets[name].to(value).index_select(made.axis, at))
        tensor.data = value
    device = next((p.device for p in average.parameters()), torch.device("cpu"))
    given = step.inputs()
    example = replace(given, tensors=tuple(x.to(device) for x in given.tensors))
    require_equal(average, grown, example)
    return grown.train(average.training)
