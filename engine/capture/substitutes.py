"""Calls that Dynamo records otherwise than the forward makes them.

By another name, since the result's shape cannot be found of the call itself: `F.batch_norm` of a norm whose running
statistics are means over all batches (`momentum=None`), so that its momentum comes of a counter, a number without a
value; recurrent layers, of which PyTorch without values goes through every step of a sequence. After the graph: what
the forward prints, warns and logs.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import sys
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx
from torch.nn import functional as F

from .gaps import break_graph, of_dynamo
from .recurrent import LAYERS, of_one_step

SAYING = frozenset({print, warnings.warn, logging.debug, logging.info, logging.warning, logging.error})
"""Functions that are called after the graph, where Dynamo's setting names them: not in pieces."""

_SIGNATURE = inspect.signature(F.batch_norm)
_on: list[None] = []  # an item for each context that is open


def batch_norm(*args: Any, **kwargs: Any) -> Tensor:
    """`F.batch_norm`, whose momentum may be a number without a value while Dynamo records it."""
    given = _SIGNATURE.bind(*args, **kwargs)
    if isinstance(given.arguments.get("momentum"), torch.SymFloat):
        given.arguments["momentum"] = 0.1
    return F.batch_norm(*given.args, **given.kwargs)


def _has_no_value(args: Any, kwargs: Any) -> bool:
    momentum = _SIGNATURE.bind(*args, **kwargs).arguments.get("momentum")
    return type(momentum).__name__ == "SymNodeVariable"


def _layer(name: str) -> Callable[..., Any]:
    """A recurrent layer's call under the name by which `higher_order.CALLED` knows it."""
    func = getattr(torch, name)

    def layer(*args: Any, **kwargs: Any) -> Any:
        result = of_one_step(name, func, args, kwargs)
        return func(*args, **kwargs) if result is None else result

    layer.__name__ = layer.__qualname__ = name
    return layer


@contextlib.contextmanager
def substitutes() -> Iterator[None]:
    """What Dynamo records meanwhile."""
    _install()
    _on.append(None)
    try:
        yield
    finally:
        _on.pop()


@functools.cache
def _install() -> None:
    """Add to the calls that Dynamo handles by themselves; without a context it does what it did."""
    _substitute(F.batch_norm, batch_norm, _has_no_value)
    for name in LAYERS:
        _substitute(getattr(torch, name), _layer(name), lambda args, kwargs: True)
    misc = of_dynamo("variables.misc")
    _instead(misc.DebuggingVariable, "call_function", _say)
    _instead(misc.LoggingLoggerVariable, "call_method", _log)
    functions = of_dynamo("variables.functions")
    _instead(functions.SkipFunctionVariable, "call_function", _isinstance)
    _instead(misc.NumpyVariable, "call_function", _product)
    torch.compiler.allow_in_graph(new_full)
    _instead(of_dynamo("variables").TensorVariable, "call_method", _filled)
    _instead(functions.UserFunctionVariable, "call_function", _captured)
    _instead(of_dynamo("variables").TensorVariable, "as_python_constant", _known)
    if sys.version_info < (3, 12):  # since then without a lock
        kind = of_dynamo("variables").UserDefinedObjectVariable
        _instead(kind, "tp_getattro_impl" if hasattr(kind, "tp_getattro_impl") else "var_getattr", _property)


def _substitute(function: Any, other: Callable[..., Any], applies: Callable[[Any, Any], bool]) -> None:
    torch.compiler.allow_in_graph(other)
    calls = of_dynamo("variables").TorchInGraphFunctionVariable

    def record(_variable: Any, tx: Any, *args: Any, **kwargs: Any) -> Any:
        if not _on or not applies(args, kwargs):
            return None
        return calls(other).call_function(tx, list(args), kwargs)

    calls._get_handlers().setdefault(function, record)


def _say(function: Any, tx: Any, args: Any, kwargs: Any) -> Any:
    """Dynamo alone would forget keywords, and what inlined functions say."""
    if not all(map(_is_sayable, (*args, *kwargs.values()))):
        break_graph(f"{function.value.__name__} in the forward", "its arguments are known only in the call")
    given = {name: one.as_python_constant() for name, one in kwargs.items()}
    name = tx.output.install_global("said", functools.partial(function.value, **given))
    source = of_dynamo("source").GlobalSource(name)
    tx.output.root_tx.debug_locals.append((type(function)(function.value, source=source), list(args)))
    return of_dynamo("variables").ConstantVariable.create(None)


def _log(logger: Any, tx: Any, name: str, args: Any, kwargs: Any) -> Any:
    levels = ("debug", "info", "warning", "warn", "error", "critical", "log")
    if name not in levels or not torch._dynamo.config.reorderable_logging_functions:
        return None
    misc = of_dynamo("variables.misc")
    return _say(misc.DebuggingVariable(getattr(logger.value, name)), tx, args, kwargs)


def _is_sayable(variable: Any) -> bool:
    """Constants, sizes, and texts of them."""
    parts = getattr(variable, "sym_args", None)
    if parts is not None:
        return all(map(_is_sayable, (*parts, *variable.sym_kwargs.values())))
    if type(variable).__name__ in ("SizeVariable", "TupleVariable"):
        return all(map(_is_sayable, variable.items))
    if variable.is_python_constant():  # but for what the forward may still change
        return not isinstance(variable.as_python_constant(), list | dict | set | deque)
    return variable.is_symnode_like()


def _instead(kind: Any, name: str, other: Callable[..., Any]) -> None:
    """`other` is called while something of ours is recorded, unless it returns None."""
    method = getattr(kind, name)

    @functools.wraps(method)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        result = other(*args, **kwargs) if _on else None
        return method(*args, **kwargs) if result is None else result

    setattr(kind, name, wrapped)


def _isinstance(function: Any, tx: Any, args: Any, kwargs: Any) -> Any:
    """`torch.jit.isinstance` with a class is Python's."""
    if function.value is not torch.jit.isinstance or not isinstance(args[1].as_python_constant(), type):
        return None
    return of_dynamo("variables").BuiltinVariable(isinstance).call_function(tx, args, kwargs)


def _product(function: Any, tx: Any, args: Any, kwargs: Any) -> Any:
    """`numpy.prod` of sizes is a number; Dynamo would make a tensor of it."""
    if function.value is not np.prod or kwargs or len(args) != 1 or not _is_sayable(args[0]):
        return None
    return of_dynamo("variables").UserFunctionVariable(_times).call_function(tx, args, {})


def _times(sizes: Any) -> Any:
    result = 1
    for size in sizes:
        result *= size
    return result


def _property(one: Any, tx: Any, name: str) -> Any:
    """A `functools.cached_property` that is read for the first time, without its lock, which Dynamo does not know."""
    found = inspect.getattr_static(type(one.value), name, None)
    if not isinstance(found, functools.cached_property) or name in vars(one.value):
        return None
    variables = of_dynamo("variables")
    given = [one, variables.UserFunctionVariable(found.func), variables.ConstantVariable.create(name)]
    return variables.UserFunctionVariable(_once).call_function(tx, given, {})


def _once(instance: Any, func: Callable[..., Any], name: str) -> Any:
    held = instance.__dict__
    if name not in held:
        held[name] = func(instance)
    return held[name]


def _known(x: Any) -> bool | None:
    """A condition of tensors or arrays that nothing given changes, as of sizes; Dynamo would not branch on it."""
    asking = sys._getframe(2)
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
    """What a node gives: of constants alone, and not written to since."""
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
    """The code of Dynamo that branches."""
    translator = of_dynamo("symbolic_convert").InstructionTranslatorBase
    return {vars(translator)[name].__code__ for name in vars(translator) if "JUMP" in name and "_IF_" in name}


def _filled(x: Any, tx: Any, name: str, args: Any, kwargs: Any) -> Any:
    """`Tensor.new_full` of a tensor's number, which has no value yet."""
    fill = args[1] if len(args) > 1 else kwargs.get("fill_value")
    if name != "new_full" or fill is None or not fill.is_tensor():
        return None
    calls = of_dynamo("variables").TorchInGraphFunctionVariable
    return calls(new_full).call_function(tx, [x, *args], kwargs)


def new_full(x: Tensor, size: Any, fill_value: Any, **kwargs: Any) -> Tensor:
    return x.new_empty(size, **kwargs)


def _captured(function: Any, tx: Any, args: Any, kwargs: Any) -> Any:
    """Hooks of transformers that capture outputs are installed now, once, with a lock that Dynamo does not know."""
    named = getattr(function.fn, "__module__", ""), getattr(function.fn, "__name__", "")
    if named != ("transformers.utils.output_capturing", "maybe_install_capturing_hooks"):
        return None
    function.fn(args[0].value)
    return of_dynamo("variables").ConstantVariable.create(None)
