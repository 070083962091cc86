"""Table of all morphs: the commands of `gigamorph morph`, and the Python functions that they call.

Options, their types and their help come from the signatures and docstrings of the functions, so no argument is missing.
This module imports PyTorch only when a function is requested.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

GIVEN = ("model", "example", "inplace")  # arguments that the command passes to every function
AT = {"path": "at", "paths": "at"}  # argument -> option, where the names differ


@dataclass(frozen=True)
class Argument:
    """An option of a command.

    Attributes:
        option: name of the option.
        annotation: type annotation of the argument.
        defaults: default of the argument by the function's key; `inspect.Parameter.empty` if it has none.
        help: description in the docstring.
    """

    option: str
    annotation: str
    defaults: dict[str, Any]
    help: str


@dataclass(frozen=True)
class Operation:
    """A command.

    Attributes:
        name: name of the command.
        help: description of the command.
        functions: "module.function" in this package by key.
        example: options of an example.
        choice: the option that selects the key. Without it, the required arguments that are given select the function.
        default: the key if that option is omitted.
        names: further pairs of argument and option with different names.
        last_layer: whether the command uses the last layer if no module is named.
    """

    name: str
    help: str
    functions: Mapping[str, str]
    example: str
    choice: str = ""
    default: str = ""
    names: Mapping[str, str] = field(default_factory=dict[str, str])
    last_layer: bool = False

    def function(self, key: str) -> Callable[..., Any]:
        """Import and return the function of a key."""
        module, name = self.functions[key].split(".")
        return getattr(importlib.import_module(f".{module}", __package__), name)

    def parameters(self, key: str) -> dict[str, inspect.Parameter]:
        """Return the arguments of a function by the name of the option."""
        found = inspect.signature(self.function(key)).parameters
        names = {**AT, **self.names}
        return {names.get(name, name): p for name, p in found.items() if name not in GIVEN}

    def arguments(self) -> list[Argument]:
        """Return the options of the command, which are those of all its functions."""
        made: dict[str, Argument] = {}
        for key in self.functions:
            for option, p in self.parameters(key).items():
                fresh = Argument(option, str(p.annotation).removesuffix(" | None"), {}, _help(self, key, p.name))
                made.setdefault(option, fresh).defaults[key] = p.default
        return list(made.values())

    def required(self, key: str) -> set[str]:
        """Return the options that a function requires."""
        missing = {o for o, p in self.parameters(key).items() if p.default is inspect.Parameter.empty}
        return missing - ({"at"} if self.last_layer else set())

    def chosen(self, value: str | None, given: Iterable[str]) -> str | None:
        """Return the key of the selected function; None if the selection is ambiguous."""
        if value or self.default in self.functions:
            return value or self.default
        fitting = [key for key in self.functions if self.required(key) and self.required(key) <= set(given)]
        return fitting[0] if len(fitting) == 1 else None


OPERATIONS = (
    Operation(
        "widen",
        "Widen all channel spaces by a factor, or single spaces by --space; gigamorph morph spaces lists them.",
        {"": "widen.widen"},
        "--factor 1.5",
        names={"counts": "space"},
    ),
    Operation(
        "deepen",
        "Insert a new layer or block after a module. An identity with BatchNorm is exact in eval mode only; all others "
        "are exact in train mode too.",
        {
            "residual": "deepen.insert_residual",
            "pair": "deepen.insert_pair",
            "identity": "deepen.insert_identity",
            "activation": "activation.insert_activation",
            "module": "decompose.insert_module",
        },
        "--at layer1.0",
        "how",
        "residual",
    ),
    Operation(
        "decompose",
        "Split a convolution or linear layer into two in sequence.",
        {"": "decompose.decompose"},
        "--at layer1.0.conv1 --kernels 1,3",
    ),
    Operation(
        "split",
        "Split a convolution or linear layer into the sum of two.",
        {"": "decompose.split_parallel"},
        "--at layer1.0.conv1",
    ),
    Operation(
        "kernel", "Enlarge the kernels of convolutions.", {"": "kernel_size.grow_kernel"}, "--at conv1 --kernel 9"
    ),
    Operation(
        "front",
        "Let a network that was trained on shrunk images read them at full size. The sides of its images must be "
        "multiples of the factor. --size is the size of the small images.",
        {"": "front.front"},
        "--factor 4",
        names={"r": "factor", "size": "image"},
    ),
    Operation(
        "input",
        "Change the image channels that a network reads. With --to grey the network reads grey values, and computes "
        "what the old one computes from three equal channels, normalised by --mean and --std.",
        {"grey": "inputs.to_grey", "rgb": "inputs.to_rgb", "planes": "inputs.add_planes"},
        "--channels 3 --to grey",
        "to",
    ),
    Operation(
        "to-volume",
        "Turn a network for images into one for volumes (N, C, D, H, W) that computes the same slice by slice. "
        "gigamorph morph kernel then gives convolutions a depth.",
        {"": "volume.to_volume"},
        "",
    ),
    Operation(
        "head",
        "Add outputs to the classifier, or split a class into several: --outputs 4, or --split 1 --into 3.",
        {"outputs": "head.grow_head", "split": "head.split_class"},
        "--outputs 4 --kind softmax",
        names={"index": "split"},
        last_layer=True,
    ),
    Operation(
        "merge",
        "Fold exact copies of channels into one. This is the inverse of widen, until the copies are trained.",
        {"": "merge.merge"},
        "",
    ),
)


def import_all() -> None:
    """Import all morphs, which registers their steps for recipes."""
    for operation in OPERATIONS:
        for key in operation.functions:
            operation.function(key)


def _help(operation: Operation, key: str, name: str) -> str:
    """Return the description of an argument in the function's docstring, or in that of another morph with it."""
    own = [operation.function(key), *(operation.function(k) for k in operation.functions)]
    every = [o.function(k) for o in OPERATIONS for k in o.functions]
    return next((text for f in [*own, *every] if (text := _documented(f).get(name))), "")


@cache
def _documented(function: Callable[..., Any]) -> dict[str, str]:
    """Return the arguments described in a docstring, each as one line."""
    doc = inspect.getdoc(function) or ""
    section = re.search(r"^Args:\n((?:    .*\n|\n)*)", f"{doc}\n", re.M)
    entries = re.findall(r"^    (\w[\w, ]*): (.*(?:\n {8}.*)*)", section[1] if section else "", re.M)
    return {name: " ".join(text.split()) for names, text in entries for name in names.split(", ")}
