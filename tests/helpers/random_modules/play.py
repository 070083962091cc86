"""Visits to a network, and everything that can be seen of it afterwards."""

from __future__ import annotations

import dataclasses
import enum
import functools
import random
import types
import warnings
import weakref
from collections import deque
from collections.abc import Callable, KeysView, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from . import changes, state
from .foreign.harness import around
from .spec import Spec, Visit

_INTERNAL = frozenset(vars(nn.Module()))
_APPLY = torch.autograd.Function.__dict__.get("apply")
_RATE = 0.01
_PLAIN = (type(None), bool, int, str, bytes, torch.dtype, torch.device, complex, enum.Enum, type)
_VALUES = (*_PLAIN, float, tuple, frozenset, nn.Module)  # which one of equal ones it is does not count


@dataclass
class Seen:
    """What can be seen after a visit: facts that are equal or not, and tensors by kind and name."""

    facts: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    met: dict[int, tuple[str, Any]] = field(default_factory=dict)

    def add(self, kind: str, name: str, value: Any, depth: int = 0) -> None:
        """Everything within a value."""
        full = f"{kind} {name}".strip()
        if kind != "gradient" and not isinstance(value, _VALUES):
            first, _ = self.met.setdefault(id(value), (full, value))
            if first != full:
                self.facts[f"{full} is"] = first
        if isinstance(value, FakeTensor):
            self.facts[full] = "a FakeTensor"
        elif isinstance(value, Tensor):
            kept = value.detach()
            self.facts[full] = (
                type(value).__name__,
                tuple(value.shape),
                str(value.dtype),
                "wants gradient" if value.requires_grad else "constant",
                "inference" * value.is_inference(),
            )
            self.tensors.setdefault(kind, {})[name] = kept.clone()
            if value.is_leaf and value.requires_grad:
                self.add("gradient", f"of {full}", value.grad)
        elif isinstance(value, np.ndarray):
            self.facts[full] = ("array", value.shape, str(value.dtype))
            self.tensors.setdefault(kind, {})[name] = torch.as_tensor(value).clone()
        elif isinstance(value, float):
            self.facts[full] = "float"
            self.tensors.setdefault(kind, {})[name] = torch.tensor(value, dtype=torch.float64)
        elif isinstance(value, _PLAIN):
            self.facts[full] = (type(value).__name__, repr(value))
        elif depth > 8:
            return
        elif isinstance(value, nn.Module):
            self.facts[full] = f"module {type(value).__name__}"
        elif isinstance(value, Mapping):
            self.facts[full] = (type(value).__name__, [repr(k) for k in value])
            for key, one in value.items():
                self.add(kind, f"{name}[{key!r}]", one, depth + 1)
        elif isinstance(value, (list, tuple, deque)):
            self.facts[full] = (type(value).__name__, len(value))
            for number, one in enumerate(value):
                self.add(kind, f"{name}[{number}]", one, depth + 1)
        elif isinstance(value, (set, frozenset)):
            self.facts[full] = (type(value).__name__, sorted(map(repr, value)))
        else:
            inside, kind_of = _inside(value), type(value).__name__
            told = f"function {getattr(value, '__name__', kind_of)}" if callable(value) else kind_of
            self.facts[full] = (told, sorted(inside))
            for key, one in inside.items():
                self.add(kind, f"{name}.{key}", one, depth + 1)


def _inside(value: Any) -> dict[str, Any]:
    """What an object holds, by names."""
    if isinstance(value, types.MethodType):
        return {} if isinstance(value.__self__, nn.Module) else {"self": value.__self__}
    if isinstance(value, functools.partial):
        return {"func": value.func, "args": value.args, "keywords": value.keywords}
    if isinstance(value, weakref.ref):
        return {"of": value()}
    if isinstance(value, torch._ops.OpOverload):  # holds PyTorch's caches
        return {}
    if isinstance(value, KeysView):
        return {"keys": list(value)}
    inside = {name: getattr(value, name) for name in getattr(type(value), "__slots__", ()) if hasattr(value, name)}
    if isinstance(value, types.FunctionType):
        names = value.__code__.co_freevars
        inside = {name: cell.cell_contents for name, cell in zip(names, value.__closure__ or (), strict=True)}
    return inside | getattr(value, "__dict__", {})


def look(net: nn.Module, usual: frozenset[str], seen: Seen | None = None) -> Seen:
    """What can be seen of a network: parameters, gradients, buffers, attributes, modes, hooks; and of the process.

    Args:
        usual: attributes of what `accelerate` returns that are its own.
        seen: what has been seen of its call.
    """
    seen = seen or Seen()
    network = net.__dict__.get("_network", net)
    for name, parameter in net.named_parameters(remove_duplicate=False):
        seen.add("parameter", name, parameter)
    for name, buffer in net.named_buffers(remove_duplicate=False):
        seen.add("buffer", name, buffer)
    for name, module in network.named_modules(remove_duplicate=False):
        held = vars(module)
        if module is network:
            own = {k for k in vars(net) if k not in usual and not k.startswith("_")} if net is not network else set()
            held = {k: getattr(net, k) for k in {*held, *own} if k not in _INTERNAL}
            held["training"] = net.training
        seen.facts[f"type of '{name}'"] = type(module).__name__
        held_by = (net, network) if module is network else (module,)  # what `accelerate` returned has hooks of its own
        hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
        found = [{id(kind): len(kind) for kind in (vars(one)[key] for one in held_by)} for key in hooks]
        seen.facts[f"hooks of '{name}'"] = [sum(kinds.values()) for kinds in found]
        for key, value in held.items():
            if key not in _INTERNAL or key == "training":
                seen.add("attribute", f"{name}.{key}", value)
    for key, value in state.left_behind().items():
        seen.add("global", key, value)
    seen.facts["the process"] = process()
    return seen


def process() -> dict[str, Any]:
    """Settings of the process that no forward may leave changed."""
    registry = nn.modules.module
    return {
        "function modes": torch._C._len_torch_function_stack(),
        "dispatch modes": torch._C._len_torch_dispatch_stack(),
        "Function.apply is PyTorch's": torch.autograd.Function.__dict__.get("apply") is _APPLY,
        "global hooks": len(registry._global_forward_hooks) + len(registry._global_forward_pre_hooks),
        "gradients": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "dtype": str(torch.get_default_dtype()),
    }


def inputs(spec: Spec, visit: Visit, number: int, bits: int = 0) -> dict[str, Any]:
    """What the network gets at a visit, by the names of its arguments.

    Args:
        bits: not 0: the image differs in its last bits.
    """
    dice = torch.Generator().manual_seed(1000 * spec.seed + number)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=dice, dtype=torch.float64)

    (h, w), n, c = visit.size, visit.batch, spec.channels
    image = normal(n, c, h, w)
    given: dict[str, Any] = {"image": image}
    if "other" in spec.inputs:
        given["other"] = normal(n, c, h, w).requires_grad_(visit.image == "leaf")
    if "mask" in spec.inputs:
        given["mask"] = (normal(n, 1, h, w) > 0).double()
    if "meta" in spec.inputs:
        given["meta"] = normal(n, 3).requires_grad_(visit.image == "leaf")
    if "scale" in spec.inputs:
        given["scale"] = (0.5, 2.0, 3)[number % 3]
    if "flag" in spec.inputs:
        given["flag"] = number % 2 == 0
    if bits:
        other = torch.Generator().manual_seed(bits)
        image = image * (
            1 + torch.finfo(image.dtype).eps * torch.randn(image.shape, generator=other, dtype=image.dtype)
        )
    if visit.layout == "channels_last":
        image = image.contiguous(memory_format=torch.channels_last)
    elif visit.layout == "strided":
        image = image.repeat_interleave(2, 3)[..., ::2]
    if visit.image != "plain":
        image = image.detach().requires_grad_()
    given["image"] = image
    return given


class Player:
    """Visits a network, time after time, as its user.

    Attributes:
        phase: of the visit that is going on: "change", "forward", "backward" or "step".
        call: which of the visit's calls it is, from 0 on.
        before_call: called before each, if there is one.
    """

    def __init__(self, spec: Spec, net: nn.Module, bits: int = 0):
        self.spec, self.net, self.bits = spec, net, bits
        self.usual = frozenset(vars(net)) if "_network" in net.__dict__ else frozenset()
        self.optimizer: torch.optim.Optimizer | None = None
        self.parameters: list[Tensor] = []
        self.phase, self.call = "", 0
        self.before_call: Callable[[], None] | None = None

    @property
    def network(self) -> nn.Module:
        """The plain network."""
        return self.net.__dict__.get("_network", self.net)

    def change(self, number: int) -> None:
        """What the user does before a visit."""
        visit, self.phase = self.spec.visits[number], "change"
        torch.default_generator.manual_seed(self.spec.seed + 17 * number)
        for part in visit.changes:
            self.net = changes.CHANGES[part.name](self.net, random.Random(part.seed)) or self.net
        if visit.mode:
            self.net.train(visit.mode == "train")
        parameters = list(self.net.parameters())
        if len(parameters) != len(self.parameters) or any(
            a is not b for a, b in zip(parameters, self.parameters, strict=True)
        ):
            self.parameters, made = parameters, getattr(torch.optim, self.spec.optimizer)
            settings = {"eps": 1e-3} if self.spec.optimizer == "AdamW" else {"momentum": 0.9}
            self.optimizer = made(parameters, lr=_RATE, **settings) if parameters else None
        if visit.clear != "keep" and visit.grad in ("train", "grad"):
            self.net.zero_grad(set_to_none=visit.clear == "none")

    def visit(self, number: int) -> Seen:
        """The call and what follows it, and what is seen then."""
        visit = self.spec.visits[number]
        torch.default_generator.manual_seed(self.spec.seed + number)
        random.seed(1)
        np.random.seed(1)
        seen = Seen()
        for self.call in range(visit.calls):
            self._once(visit, number + 100 * self.call, seen)
        if self.optimizer is not None and visit.grad == "train":
            self.phase = "step"
            self.optimizer.step()
        self.phase = "look"
        look(self.net, self.usual, seen)
        seen.met.clear()
        dropouts = [m for m in self.net.modules() if isinstance(m, nn.modules.dropout._DropoutNd)]
        if not any(module.training for module in dropouts):  # else others are drawn, tile by tile
            seen.facts["random numbers drawn since"] = hash(
                (tuple(torch.get_rng_state().tolist()), random.getstate(), np.random.get_state()[1].tobytes())
            )
        return seen

    def _once(self, visit: Visit, number: int, seen: Seen) -> None:
        given = inputs(self.spec, visit, number, self.bits)
        leaf = given["image"]
        if visit.image == "inner":
            given["image"] = leaf * 1.0
        image, names = given["image"], list(given)
        modes = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}
        if self.before_call is not None:
            self.before_call()
        self.phase = "forward"
        with modes.get(visit.grad, torch.enable_grad)(), warnings.catch_warnings(), around(self.network):
            warnings.simplefilter("ignore")
            if visit.style == "keyword":
                result = self.net(**given)
            elif visit.style == "mixed" and len(names) > 1:
                result = self.net(image, **{name: given[name] for name in names[1:]})
            else:
                order = ("image", "other", "mask", "meta", "scale", "flag")
                usual = {"scale": 1.0, "flag": False}
                last = max(order.index(name) for name in names)
                result = self.net(*(given.get(name, usual.get(name)) for name in order[: last + 1]))
            seen.add(f"output of call {number}", "", result)
            outputs = [t for t in tensors_in(result) if t.is_floating_point()]
            if visit.touch and outputs and not isinstance(outputs[0], FakeTensor):
                outputs[0] = self._touch(outputs[0], visit.touch)
                seen.add(f"touched output of call {number}", "", result)
        if visit.grad in ("train", "grad"):
            self.phase = "backward"
            self._backward(visit, outputs, number)
        for name, value in given.items():
            seen.add("input", name, value)
        if leaf is not image:
            seen.add("input", "leaf", leaf)

    @staticmethod
    def _touch(output: Tensor, how: str) -> Tensor:
        if how == "relu_":
            return torch.nn.functional.relu(output, inplace=True)
        if how == "add_":
            output += 1
            return output
        return output.detach().requires_grad_() * 1.0 if not output.is_inference() else output

    def _backward(self, visit: Visit, outputs: list[Tensor], number: int) -> None:
        dice = torch.Generator().manual_seed(number)
        terms = []
        for output in outputs:
            weight = torch.randn(output.shape, generator=dice, dtype=torch.float64)
            if output.requires_grad:
                terms.append((output.double() * weight).mean())
        terms = {"all": terms, "first": terms[:1], "last": terms[-1:]}[visit.loss]
        for module in self.net.modules():
            aux = getattr(module, "aux_loss", None)
            if isinstance(aux, Tensor) and aux.requires_grad:
                terms.append(aux)
        if terms:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                sum(terms).backward()


def tensors_in(value: Any, depth: int = 0) -> list[Tensor]:
    """All tensors within an output, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        inside = list(value.values())
    elif isinstance(value, (list, tuple)):
        inside = list(value)
    elif hasattr(value, "__dict__") and not callable(value):
        inside = list(vars(value).values())
    elif dataclasses.is_dataclass(value):  # with slots
        inside = [getattr(value, field.name) for field in dataclasses.fields(value)]
    else:
        return []
    return [t for one in inside for t in tensors_in(one, depth + 1)] if depth < 8 else []
