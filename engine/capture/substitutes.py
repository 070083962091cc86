"""Substitutes for calls that Dynamo cannot record in their original form.

Some calls are recorded under another name, because their result's shape cannot be computed from the call itself:
`F.batch_norm` with `momentum=None`, whose momentum depends on a counter without a value; and recurrent layers, for
which PyTorch would compute every step of a sequence on fake tensors. Prints, warnings and logs run after the graph.
"""

from __future__ import annotations

import functools
import inspect
import logging
import sys
import warnings
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx
from torch.nn import functional as F

from ..torch_private import dynamo, dynamo_config
from .gaps import READS, break_graph, is_on, patch
from .replacements import RECURRENT, of_one_step

SAYING = frozenset({print, warnings.warn, logging.debug, logging.info, logging.warning, logging.error})
"""Functions that are called after the graph if Dynamo's configuration lists them, but not in pieces."""

_SIGNATURE = inspect.signature(F.batch_norm)


def batch_norm(*args: Any, **kwargs: Any) -> Tensor:
    """`F.batch_norm` whose momentum may be symbolic while Dynamo records it."""
    given = _SIGNATURE.bind(*args, **kwargs)
    if isinstance(given.arguments.get("momentum"), torch.SymFloat):
        given.arguments["momentum"] = 0.1
    return F.batch_norm(*given.args, **given.kwargs)


def _has_symbolic_momentum(args: Any, kwargs: Any) -> bool:
    momentum = _SIGNATURE.bind(*args, **kwargs).arguments.get("momentum")
    return type(momentum).__name__ == "SymNodeVariable"


def _layer(name: str) -> Callable[..., Any]:
    """A recurrent layer's call, with its key in `higher_order.CALLED` as name."""
    func = getattr(torch, name)

    def layer(*args: Any, **kwargs: Any) -> Any:
        result = of_one_step(name, func, args, kwargs)
        return func(*args, **kwargs) if result is None else result

    layer.__name__ = layer.__qualname__ = name
    return layer


@functools.cache
def install_substitutes() -> None:
    """Add substitutes to Dynamo's handlers; they have no effect outside of recordings."""
    _substitute(F.batch_norm, batch_norm, _has_symbolic_momentum)
    for name in RECURRENT:
        _substitute(getattr(torch, name), _layer(name), lambda args, kwargs: True)
    torch.compiler.allow_in_graph(new_full)
    for path, other in SUBSTITUTES.items():
        patch(path, functools.partial(_call_other, other))


def _call_other(other: Callable[..., Any], method: Any, *args: Any, **kwargs: Any) -> Any:
    """Call `other`; if it returns None, call the method."""
    result = other(*args, **kwargs)
    return method(*args, **kwargs) if result is None else result


def _substitute(function: Any, other: Callable[..., Any], applies: Callable[[Any, Any], bool]) -> None:
    torch.compiler.allow_in_graph(other)
    calls = dynamo("variables").TorchInGraphFunctionVariable

    def record(_variable: Any, tx: Any, *args: Any, **kwargs: Any) -> Any:
        if not is_on() or not applies(args, kwargs):
            return None
        return calls(other).call_function(tx, list(args), kwargs)

    calls._get_handlers().setdefault(function, record)


def _defer(function: Any, tx: Any, args: Any, kwargs: Any) -> Any:
    """Defer a print, warning or log; Dynamo alone would drop keywords, and calls of inlined functions."""
    if not all(map(_is_constant, (*args, *kwargs.values()))):
        break_graph(f"{function.value.__name__} in the forward", "its arguments are known only in the call")
    given = {name: one.as_python_constant() for name, one in kwargs.items()}
    name = tx.output.install_global("said", functools.partial(function.value, **given))
    source = dynamo("source").GlobalSource(name)
    tx.output.root_tx.debug_locals.append((type(function)(function.value, source=source), list(args)))
    return dynamo("variables").ConstantVariable.create(None)


def _log(logger: Any, tx: Any, name: str, args: Any, kwargs: Any) -> Any:
    levels = ("debug", "info", "warning", "warn", "error", "critical", "log")
    if name not in levels or not dynamo_config().reorderable_logging_functions:
        return None
    misc = dynamo("variables.misc")
    return _defer(misc.DebuggingVariable(getattr(logger.value, name)), tx, args, kwargs)


def _is_constant(variable: Any) -> bool:
    """Whether a variable is a constant, a size, or a text of constants and sizes."""
    parts = getattr(variable, "sym_args", None)
    if parts is not None:
        return all(map(_is_constant, (*parts, *variable.sym_kwargs.values())))
    if type(variable).__name__ in ("SizeVariable", "TupleVariable"):
        return all(map(_is_constant, variable.items))
    if variable.is_python_constant():  # except for containers, which the forward may still change
        return not isinstance(variable.as_python_constant(), list | dict | set | deque)
    return variable.is_symnode_like()


def _isinstance(function: Any, tx: Any, args: Any, kwargs: Any) -> Any:
    """`torch.jit.isinstance` with a class, as Python's `isinstance`."""
    if function.value is not torch.jit.isinstance or not isinstance(args[1].as_python_constant(), type):
        return None
    return dynamo("variables").BuiltinVariable(isinstance).call_function(tx, args, kwargs)


def _product(function: Any, tx: Any, args: Any, kwargs: Any) -> Any:
    """`numpy.prod` of sizes as a number; Dynamo would make a tensor."""
    if function.value is not np.prod or kwargs or len(args) != 1 or not _is_constant(args[0]):
        return None
    return dynamo("variables").UserFunctionVariable(_times).call_function(tx, args, {})


def _times(sizes: Any) -> Any:
    result = 1
    for size in sizes:
        result *= size
    return result


def _property(one: Any, tx: Any, name: str) -> Any:
    """The first read of a `functools.cached_property`, without its lock, which Dynamo does not support."""
    found = inspect.getattr_static(type(one.value), name, None)
    if not isinstance(found, functools.cached_property) or name in vars(one.value):
        return None
    variables = dynamo("variables")
    given = [one, variables.UserFunctionVariable(found.func), variables.ConstantVariable.create(name)]
    return variables.UserFunctionVariable(_get_or_compute).call_function(tx, given, {})


def _get_or_compute(instance: Any, func: Callable[..., Any], name: str) -> Any:
    held = instance.__dict__
    if name not in held:
        held[name] = func(instance)
    return held[name]


def _known(x: Any) -> bool | None:
    """The value of a condition on constant tensors or arrays, as of sizes; Dynamo would not branch on it."""
    asking = sys._getframe(3)
    if not {asking.f_code, asking.f_back.f_code if asking.f_back else None} & _jumps():
        return None
    before = torch.get_rng_state()
    try:
        value = bool(_value(x.proxy.node))
    except (ValueError, RuntimeError):
        return None
    drawn = not torch.equal(before, torch.get_rng_state())
    torch.set_rng_state(before)
    return None if drawn else value


def _value(node: fx.Node) -> Any:
    """The value of a node that depends only on constants and was not written to since."""
    example = node.meta.get("example_value")
    tensor = getattr(example, "tensor", example)  # of an array
    if node.op not in ("call_function", "call_method") or example is None:
        raise ValueError(node.op)
    if isinstance(tensor, Tensor) and (tensor._version or tensor.device.type != "cpu"):
        raise ValueError("written to")
    args, kwargs = fx.map_arg((node.args, node.kwargs), _value)
    return node.target(*args, **kwargs) if callable(node.target) else getattr(args[0], node.target)(*args[1:], **kwargs)


@functools.cache
def _jumps() -> set[Any]:
    """The code objects of Dynamo that handle branches."""
    translator = dynamo("symbolic_convert").InstructionTranslatorBase
    return {vars(translator)[name].__code__ for name in vars(translator) if "JUMP" in name and "_IF_" in name}


def _filled(x: Any, tx: Any, name: str, args: Any, kwargs: Any) -> Any:
    """`Tensor.new_full` with a tensor as fill value, which has no value yet."""
    fill = args[1] if len(args) > 1 else kwargs.get("fill_value")
    if name != "new_full" or fill is None or not fill.is_tensor():
        return None
    calls = dynamo("variables").TorchInGraphFunctionVariable
    return calls(new_full).call_function(tx, [x, *args], kwargs)


def new_full(x: Tensor, size: Any, fill_value: Any, **kwargs: Any) -> Tensor:
    return x.new_empty(size, **kwargs)


def _captured(function: Any, tx: Any, args: Any, kwargs: Any) -> Any:
    """Install the output-capturing hooks of transformers now; their lock is not supported by Dynamo."""
    named = getattr(function.fn, "__module__", ""), getattr(function.fn, "__name__", "")
    if named != ("transformers.utils.output_capturing", "maybe_install_capturing_hooks"):
        return None
    function.fn(args[0].value)
    return dynamo("variables").ConstantVariable.create(None)


SUBSTITUTES = {
    "variables.misc.DebuggingVariable.call_function": _defer,
    "variables.misc.LoggingLoggerVariable.call_method": _log,
    "variables.functions.SkipFunctionVariable.call_function": _isinstance,
    "variables.misc.NumpyVariable.call_function": _product,
    "variables.TensorVariable.call_method": _filled,
    "variables.functions.UserFunctionVariable.call_function": _captured,
    "variables.TensorVariable.as_python_constant": _known,
}
if sys.version_info < (3, 12):  # since then without a lock
    SUBSTITUTES[f"variables.UserDefinedObjectVariable.{READS}"] = _property
