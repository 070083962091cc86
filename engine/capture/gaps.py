"""What TorchDynamo itself gets wrong, corrected or refused; the cases are in tests/engine/capture.

It does otherwise than the forward what is corrected or refused here (`_break_at_...`: such a call breaks the graph, so
it is refused, or runs as plain Python with ``fallback="whole"``). It does not guard everything on which a recording
depends: guards are added here, and `Unguarded` is compared at each call where Dynamo has no guard to be had.
"""

from __future__ import annotations

import contextlib
import enum
import functools
import importlib
import inspect
import math
import os
import random
import re
import sys
import threading
import types
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..errors import UnsupportedError
from .graph import dotted

_BEFORE_2_13 = torch.__version__ < "2.13"  # versions are compared as such
_open = threading.local()


def _is_on() -> bool:
    """Whether this thread records a network of ours: to other users of Dynamo nothing is changed."""
    return bool(getattr(_open, "count", 0))


@contextlib.contextmanager
def gaps_closed() -> Iterator[None]:
    """What this thread traces meanwhile is corrected, guarded or refused as this file says."""
    _install()
    _open.count = getattr(_open, "count", 0) + 1
    _open.set, _open.kinds = set[tuple[type, str]](), set[type]()  # attributes of classes, and classes that are asked
    _open.cached = list[tuple[Callable[[], Any], Any]]()  # calls of functools.lru_cache, and what they return
    _open.ordered = list[OrderedDict[Any, Any]]()  # that the forward reads
    _open.filled = list[Any]()  # functions of functools.lru_cache that had cached nothing before
    _open.builtins = dict[tuple[int, str], tuple[dict[str, Any], dict[str, Any]]]()  # and where code looks for them
    _open.caller = ""  # the package of what calls PyTorch
    try:
        yield
    except BaseException:
        for function in _open.filled:
            function.cache_clear()
        raise
    finally:
        _open.count -= 1


def of_dynamo(name: str) -> Any:
    return importlib.import_module(f"torch._dynamo.{name}")


@functools.cache
def _install() -> None:
    """Wrap functions of Dynamo; where nothing of ours is recorded they do what they did."""
    variables, functions, guards = of_dynamo("variables"), of_dynamo("variables.functions"), of_dynamo("guards")
    missing = of_dynamo("exc").ObservedAttributeError
    attribute = "tp_getattro_impl" if hasattr(variables.VariableTracker, "tp_getattro_impl") else "var_getattr"
    for name in (
        "UserDefinedClassVariable",
        "UserDefinedObjectVariable",
        "NNModuleVariable",
        "UnspecializedNNModuleVariable",
        "PythonModuleVariable",
        "UserFunctionVariable",
    ):
        _failing(getattr(variables, name), attribute, missing, _guard_attribute)
        _after(getattr(variables, name), "call_obj_hasattr", _guard_asked)
    _before(variables.UserDefinedClassVariable, attribute, lambda one, *_given: _open.kinds.add(one.value))
    if _BEFORE_2_13:
        _before(variables.UserDefinedClassVariable, attribute, _guard_literal)
        _before(variables.GetAttrVariable, "call_method", _guard_own_key)
        _before(variables.AutogradFunctionVariable, "call_apply", _break_at_twins)
        _before(variables.UserDefinedObjectVariable, attribute, _break_at_truth)
    for name in ("mp_subscript_impl", "getitem_const_raise_exception_if_absent"):  # of some versions both
        _failing(variables.ConstDictVariable, name, of_dynamo("exc").ObservedKeyError, _guard_item)
    _after(getattr(of_dynamo("variables.dicts"), "DunderDictVariable", None), "install_dict_contains_guard", _guard_key)
    _after(variables.UnspecializedNNModuleVariable, attribute, _guard_shadow)
    _guard_twice(of_dynamo("variables.builder"), guards)
    _after(guards.GuardBuilder, "EQUALS_MATCH", _guard_sign)
    _after(of_dynamo("variables.builder").VariableBuilder, "wrap_listlike", _keep_length)
    _before(of_dynamo("variables.builder").VariableBuilder, "_wrap", _note_value)
    _before(of_dynamo("side_effects").SideEffects, "codegen_update_mutated", _forget_length)
    _after(getattr(variables, "OrderedDictVariable", variables.ConstDictVariable), "call_method", _keep_order)
    for name in ("WrapperUserFunctionVariable", "WrapperUserMethodVariable"):
        _keep_cached(getattr(functions, name))
    _keep_effects(variables.TensorVariable)
    _before(functions.LocalGeneratorObjectVariable, "reconstruct", _break_at_generator)
    _before(of_dynamo("variables.dicts").DictViewVariable, "reconstruct", _break_at_view)
    _before(of_dynamo("side_effects").SideEffects, "store_attr", _note_class)
    _before(variables.UserDefinedObjectVariable, attribute, _break_at_class)
    _before(variables.TorchInGraphFunctionVariable, "call_function", _note_caller)
    _before(variables.UserDefinedClassVariable, "call_function", _break_at_metaclass)
    _before(variables.TensorVariable, attribute, _break_at_version)
    _before(variables.UserDefinedObjectVariable, attribute, _guard_delegated)
    _after(variables.UserDefinedObjectVariable, "_check_for_getattr", _as_function)
    _before(variables.SymNodeVariable, attribute, _break_at_class_of_size)
    _before(variables.BuiltinVariable, "_call_min_max_binary", _break_at_extreme)
    translator = of_dynamo("symbolic_convert").InstructionTranslatorBase
    _before(translator, "load_builtin_from_argval", _note_builtin)
    _before(translator, "COMPARE_OP", _guard_compared)
    checkpoints = of_dynamo("variables.higher_order_ops").CheckpointHigherOrderVariable
    _before(checkpoints, "_call_function", _break_at_reentrant)
    for name in ("call_str", "call_repr"):
        _before(variables.BuiltinVariable, name, _break_at_text)
    _before(variables.ExceptionVariable, attribute, _break_at_arguments)
    _before(variables.ExceptionVariable, "reconstruct", _break_at_exception)
    _after(of_dynamo("variables.torch"), "tracing_state_functions", _without_compiler)
    _without_size_guards()
    _instead(guards, "profile_guard_manager", 0.0)  # it empties the processor's caches with 32 MiB
    _instead(of_dynamo("symbolic_convert"), "get_funcname", None)  # for a log that is off it reads whole files, 40 MB
    _instead(of_dynamo("utils"), "warn_once", None)  # what it says is in the refusal, or about options of Dynamo's
    _instead(variables.TensorVariable, "_warn_capture_scalar_outputs", None)


def _failing(kind: Any, name: str, error: type[Exception], then: Callable[..., None]) -> None:
    """Where a method raises the error, `then` is called with its arguments first."""
    method = getattr(kind, name, None)
    if method is None:
        return

    @functools.wraps(method)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        try:
            return method(*args, **kwargs)
        except error:
            if _is_on():
                then(*args)
            raise

    setattr(kind, name, wrapped)


def _before(kind: Any, name: str, first: Callable[..., None]) -> None:
    method = getattr(kind, name, None)
    if method is None:
        return

    @functools.wraps(method)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if _is_on():
            first(*args)
        return method(*args, **kwargs)

    setattr(kind, name, wrapped)


def _after(owner: Any, name: str, then: Callable[..., Any]) -> None:
    """`then` is called with the result and the arguments; what it returns, if anything, is the result."""
    function = getattr(owner, name, None)
    if function is None:
        return

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        other = then(result, *args) if _is_on() else None
        return result if other is None else other

    setattr(owner, name, wrapped)


def _instead(owner: Any, name: str, answer: Any) -> None:
    """A function is not called; it has this answer."""
    function = getattr(owner, name, None)
    if function is None:
        return

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return answer if _is_on() else function(*args, **kwargs)

    setattr(owner, name, staticmethod(wrapped) if isinstance(owner, type) else wrapped)


def break_graph(what: str, why: str) -> None:
    """Break the graph here."""
    errors = of_dynamo("exc")
    errors.unimplemented(gb_type=what, context="", explanation=why, hints=[])


# Missing names. Dynamo guards that something is missing where the forward asks for it (`hasattr`, `in`), but not where
# the forward catches the error (`try: self.scale ... except AttributeError`), nor in an object's `__dict__`.


def _guard_attribute(variable: Any, _tx: Any, name: str) -> None:
    if variable.source is None:
        return
    guards = of_dynamo("guards")
    if "attr" in inspect.signature(guards.GuardBuilder.HASATTR).parameters:
        _guard(variable, "HASATTR", attr=name)
    else:  # before PyTorch 2.13
        source = of_dynamo("source").AttrSource(variable.source, name)
        guards.install_guard(source.make_guard(guards.GuardBuilder.HASATTR))


def _guard_asked(_result: Any, variable: Any, tx: Any, name: str) -> None:
    _guard_attribute(variable, tx, name)


def _guard_item(variable: Any, tx: Any, key: Any) -> None:
    variable.install_dict_contains_guard(tx, [key])


def _guard_key(_result: Any, variable: Any, _tx: Any, args: Any) -> None:
    if variable.source and args[0].is_python_constant():
        key = args[0].as_python_constant()
        _guard(variable, "DICT_CONTAINS" if key in variable.items.item_dict else "DICT_NOT_CONTAINS", key=key)


# Before PyTorch 2.13 literals of classes were taken for constants, and keys that a `__dict__` has not for missing.


def _guard_literal(variable: Any, _tx: Any, name: str) -> None:
    value = inspect.getattr_static(variable.value, name, None)
    if variable.source is not None and isinstance(value, int | float | complex | str | bytes | enum.Enum):
        guards = of_dynamo("guards")
        kind = guards.GuardBuilder.ID_MATCH if isinstance(value, enum.Enum) else guards.GuardBuilder.CONSTANT_MATCH
        guards.install_guard(of_dynamo("source").AttrSource(variable.source, name).make_guard(kind))


def _guard_own_key(variable: Any, _tx: Any, name: str, args: Any, *_given: Any) -> None:
    owner = variable.obj
    if variable.name == "__dict__" and name in ("get", "__contains__") and owner.source and hasattr(owner, "value"):
        key = args[0].as_python_constant()
        if key not in vars(owner.value):
            _guard(owner, "NOT_PRESENT_IN_GENERIC_DICT", attr=key)


def _break_at_twins(_variable: Any, _tx: Any, args: Any, *_given: Any) -> None:
    nodes = [one.as_proxy().node for one in args if one.is_tensor()]
    if len(set(nodes)) < len(nodes):
        break_graph("autograd.Function.apply of one tensor twice", "only one of its gradients would be recorded")


def _break_at_truth(variable: Any, _tx: Any, name: str) -> None:
    if name == "__bool__" and hasattr(type(variable.value), name):
        break_graph("the truth value of an object with __bool__", "what it depends on would not be guarded")


def _guard_shadow(_result: Any, variable: Any, _tx: Any, name: str) -> None:
    """An entry of a module's `__dict__` hides its parameter of that name."""
    held = vars(variable.value)
    if variable.source and name not in held and any(name in held.get(part, ()) for part in _HELD):
        _guard(variable, "NOT_PRESENT_IN_GENERIC_DICT", attr=name)


_HELD = ("_parameters", "_buffers", "_modules")


def _guard_delegated(variable: Any, _tx: Any, name: str) -> None:
    """An attribute that a class's own `__getattr__` finds, until the object has one itself."""
    kind = type(variable.value)
    if variable.source is None or getattr(kind, "__getattr__", nn.Module.__getattr__) is nn.Module.__getattr__:
        return
    if name not in getattr(variable.value, "__dict__", {name}) and not hasattr(kind, name):
        _guard(variable, "NOT_PRESENT_IN_GENERIC_DICT", attr=name)


# Attributes of a dict that are its items: Dynamo calls Python functions alone for what an object has not.


def _as_function(found: Any, variable: Any) -> Any:
    """For `__getattr__ = dict.get`, and for `self.__dict__ = self`."""
    if getattr(variable.value, "__dict__", None) is variable.value:
        return _own_item
    return {dict.get: _got, dict.__getitem__: _item}.get(found) if type(found) is type(dict.get) else None


def _got(self: Any, name: str) -> Any:
    return dict.get(self, name)


def _item(self: Any, name: str) -> Any:
    return dict.__getitem__(self, name)


def _own_item(self: Any, name: str) -> Any:
    if name not in self:
        raise AttributeError(name)
    return self[name]


def _guard(variable: Any, kind: str, **what: Any) -> None:
    guards = of_dynamo("guards")
    guards.install_guard(variable.source.make_guard(functools.partial(getattr(guards.GuardBuilder, kind), **what)))


# One object that is read in two places, of the network and of a file: Dynamo guards the first alone.


def _guard_twice(builder: Any, guards: Any) -> None:
    make = builder.make_dupe_guard

    def make_dupe_guard(source: Any, other: Any) -> Any:
        found = make(source, other)
        if found is None and _is_on() and other and other != source:
            guards.install_guard(other.make_guard(guards.GuardBuilder.ID_MATCH))
            return guards.GuardBuilder.ID_MATCH
        return found

    builder.make_dupe_guard = make_dupe_guard


def _guard_compared(tx: Any, instruction: Any) -> None:
    """Objects that `is` compares; Dynamo guards their types."""
    if instruction.argval not in ("is", "is not"):
        return
    pair = [variable.realize() for variable in tx.stack[-2:]]
    if not any(variable.is_python_constant() for variable in pair):
        _guard_identity(pair)


def _guard_identity(variables: Any) -> None:
    for variable in variables:
        unguardable = _BEFORE_2_13 and issubclass(variable.python_type(), dict)
        if variable.source is not None and _is_mutable(variable) and not unguardable:
            _guard(variable, "ID_MATCH")


def _is_mutable(variable: Any) -> bool:
    """A list, a dict, a set or an object of a class; modules and tensors are guarded otherwise."""
    kinds = [kind.__name__ for kind in type(variable).__mro__]
    known = any(name in kinds for name in ("ListVariable", "ConstDictVariable", "SetVariable", "DequeVariable"))
    return known or (
        "UserDefinedObjectVariable" in kinds and not isinstance(getattr(variable, "value", None), nn.Module)
    )


def _lasts(source: Any) -> bool:
    """Whether it is of the network or of a file; but for arguments of the call and a module's own tables."""
    name = str(source.name() if callable(source.name) else source.name)
    return not name.startswith("L['") or (name.startswith("L['network']") and not _TABLES.search(name))


_TABLES = re.compile(r"\b_(parameters|buffers|modules|\w+_hooks)\b('\])?$")


def _guard_distinct(effects: Any) -> None:
    """What the forward writes to shows where the same object has another name, which it may get later."""
    given = (one for one in effects.id_to_variable.values() if type(one.mutation_type).__name__.endswith("Existing"))
    held = [one for one in given if one.source is not None and _is_mutable(one) and _lasts(one.source)]
    for written in filter(effects.is_modified, held):
        alike = [one for one in held if one.python_type() is written.python_type()]
        if len(alike) > 1:
            _guard_identity(alike)


# Numbers are guarded by ==, to which 0.0 and -0.0 are the same.


def _guard_sign(_result: Any, builder: Any, guard: Any, *_hint: Any) -> None:
    value = builder.get(guard)
    if type(value) is float and value == 0:
        sign = math.copysign(1, value)
        code = [f"copysign(1, {builder.arg_ref(guard)}) == {sign}"]
        manager = builder.get_guard_manager(guard)
        manager.add_lambda_guard(lambda one: math.copysign(1, one) == sign, code, guard.user_stack)


# A deque with a maximal length is taken for one without, and what was moved within an OrderedDict stays where it was.


def _keep_length(variable: Any, builder: Any, value: Any) -> None:
    length = getattr(value, "maxlen", None)
    if length is not None:
        constant = of_dynamo("variables").ConstantVariable.create
        variable.maxlen = constant(length)
        source = of_dynamo("source").AttrSource(builder.source, "maxlen")
        guards = of_dynamo("guards")
        guards.install_guard(source.make_guard(guards.GuardBuilder.EQUALS_MATCH))


def _forget_length(effects: Any, *_given: Any) -> None:
    """What is left of the items is known; Dynamo refuses to write those of a deque with a length."""
    constant = of_dynamo("variables").ConstantVariable.create
    for variable in effects.id_to_variable.values():
        if type(variable).__name__ == "DequeVariable":
            variable.maxlen = constant(None)


def _keep_order(_result: Any, variable: Any, _tx: Any, name: str, *_args: Any) -> None:
    if name == "move_to_end":
        getattr(variable, "_base_vt", variable).should_reconstruct_all = True


# After `Tensor.register_hook` what the forward sets is written to a copy that nothing reads.


def _keep_effects(kind: Any) -> None:
    name = "_method_register_hook" if hasattr(kind, "_method_register_hook") else "method_register_hook"
    method = getattr(kind, name)

    @functools.wraps(method)
    def wrapped(variable: Any, tx: Any, *args: Any, **kwargs: Any) -> Any:
        before = tx.output.side_effects
        result = method(variable, tx, *args, **kwargs)
        if _is_on():
            tx.output.side_effects = before
        return result

    setattr(kind, name, wrapped)


# Calls that are traced as others.


def _keep_cached(kind: Any) -> None:
    """A function of functools.lru_cache is called while Dynamo traces, and is asked again before each call.

    Dynamo would trace the function, and so make a tensor that the forward writes to, or that depends on what has
    changed since, at each call.
    """
    method = vars(kind).get("call_function")
    if method is None:
        return

    @functools.wraps(method)
    def wrapped(variable: Any, tx: Any, args: Any, kwargs: Any) -> Any:
        function = variable.wrapper_obj
        home = str(getattr(function, "__module__", "")).partition(".")[0]
        if not _is_on() or not hasattr(function, "cache_info") or home in ("torch", "einops"):  # of shapes alone
            return method(variable, tx, args, kwargs)
        given = [_known(one) for one in (*variable.self_args(), *args)]
        named = {name: _known(one) for name, one in kwargs.items()}
        effects = _effects()
        if any(one.source and effects.is_modified(one) for one in effects.id_to_variable.values()):
            break_graph("functools.lru_cache", "what the function reads, the forward may have changed in the same call")
        ask = functools.partial(function, *given, **named)
        value = _asked(ask)
        _open.cached.append((ask, value))
        name = tx.output.install_global_by_id("cached", value)
        return of_dynamo("variables").VariableTracker.build(tx, value, of_dynamo("source").GlobalSource(name))

    kind.call_function = wrapped


def _known(variable: Any) -> Any:
    """An argument's value; a symbolic size is a number of its own from here on."""
    if variable.is_python_constant():
        return variable.as_python_constant()
    if variable.is_symnode_like():
        return variable.evaluate_expr()
    value = getattr(variable, "value", None)
    if not isinstance(value, nn.Module):
        break_graph("functools.lru_cache", f"a {variable.python_type_name()} as its argument is known only in the call")
    return value


def _asked(ask: Callable[[], Any]) -> Any:
    """What a cached function returns, if it returns that again."""
    before = random.getstate(), torch.get_rng_state()
    info = ask.func.cache_info()
    if not info.hits and not info.misses:
        _open.filled.append(ask.func)
    value, info = ask(), ask.func.cache_info()
    if random.getstate() != before[0] or not torch.equal(torch.get_rng_state(), before[1]):
        ask.func.cache_clear()  # in pieces it draws them now
        break_graph("functools.lru_cache", "the function draws random numbers")
    if ask() is not value or info.currsize == info.maxsize:
        break_graph("functools.lru_cache", f"its cache of {info.maxsize} is full")
    if any(isinstance(one, Tensor) and not one.is_leaf for one in tree_leaves(value)):
        break_graph("functools.lru_cache", "its tensor is made of weights, and its gradient can be taken once only")
    return value


def _break_at_generator(variable: Any, *_given: Any) -> None:
    code = variable.get_code()
    where = f"{os.path.basename(code.co_filename)}:{code.co_firstlineno}"
    break_graph(f"a generator ({where}) that outlives the forward", "TorchDynamo would take all of its items at once")


def _note_builtin(tx: Any, name: str) -> None:
    if not str(tx.f_globals.get("__name__")).startswith("torch."):
        _open.builtins[id(tx.f_globals), name] = tx.f_globals, tx.f_builtins


def _note_value(builder: Any, value: Any) -> None:
    """What Dynamo reads for the first time."""
    if type(value) is object:  # all that can be asked of it is whether it is another
        of_dynamo("guards").install_guard(builder.source.make_guard(of_dynamo("guards").GuardBuilder.ID_MATCH))
    if isinstance(value, OrderedDict) and len(value) > 1:
        _open.ordered.append(value)
    if type(value).__name__ in ("dict_keys", "dict_values", "dict_items", "odict_keys", "odict_values", "odict_items"):
        break_graph("a view of a dict that is kept", "TorchDynamo would not see in it what is written to the dict")


def _break_at_view(view: Any, *_given: Any) -> None:
    if any(vars(variable).get("_base_vt") is view.dv_dict for variable in _effects().id_to_variable.values()):
        break_graph("a kept view of an OrderedDict", "TorchDynamo would make it of a copy")


def _note_class(_effects: Any, variable: Any, name: str, value: Any, *_given: Any) -> None:
    if name == "forward" and type(value).__name__ == "DeletedVariable":
        break_graph("the deletion of a module's forward", "TorchDynamo fails at it after the call")
    if type(variable).__name__ == "UserDefinedClassVariable":
        _open.set.add((variable.value, name))


def _break_at_metaclass(variable: Any, *_given: Any) -> None:
    kinds = inspect.getmro(type(variable.value))
    if any("__call__" in vars(kind) for kind in kinds if kind.__module__ not in ("builtins", "abc", "enum")):
        break_graph(f"a call of the class {variable.value.__name__}", "TorchDynamo leaves its metaclass's __call__ out")


def _break_at_version(_variable: Any, _tx: Any, name: str) -> None:
    if name == "_version":
        break_graph("Tensor._version", "how often a tensor was written to is another number by tiles; keep a counter")


def _break_at_reentrant(_checkpoint: Any, _tx: Any, args: Any, kwargs: Any) -> None:
    """Of a reentrant checkpoint PyTorch gives no gradients where none of its inputs wants one."""
    reentrant = kwargs.get("use_reentrant")
    if reentrant is not None and reentrant.as_python_constant() is False:
        return
    maps = [one.as_proxy().node.meta["example_value"] for one in args[1:] if one.is_tensor()]
    if torch.is_grad_enabled() and not any(one.requires_grad for one in maps):
        break_graph(
            "a reentrant checkpoint of inputs without gradients",
            "stock PyTorch leaves out the gradients of its weights; pass use_reentrant=False",
        )


def _break_at_class_of_size(_size: Any, _tx: Any, name: str) -> None:
    if name == "__class__":
        break_graph("__class__ of a size", "TorchDynamo would answer with a class of its own; use type()")


def _break_at_extreme(_builtin: Any, _tx: Any, *pair: Any) -> None:
    """`max(size, 0.5)` is a float, or still an int."""
    if any(one.is_symnode_like() for one in pair) and len({one.python_type() for one in pair}) > 1:
        break_graph("min or max of a size and a float", "TorchDynamo would return a float")


def _break_at_text(_builtin: Any, _tx: Any, value: Any, *_given: Any) -> None:
    if type(value).__name__ in ("ExceptionVariable", "UserDefinedExceptionObjectVariable"):
        _break_at_exception()


def _break_at_arguments(_variable: Any, _tx: Any, name: str) -> None:
    if name == "args":
        _break_at_exception()


def _break_at_exception(*_given: Any) -> None:
    """`raise` and `except` are as in Python, the texts of what Python itself raises are not, nor is `__str__`."""
    break_graph("the text of an exception", "TorchDynamo has other texts than Python; use its class alone")


def _break_at_class(variable: Any, _tx: Any, name: str) -> None:
    """What the forward sets of a class is not seen where an object of the class is asked for it."""
    if any((kind, name) in _open.set for kind in type(variable.value).__mro__ if _open.set):
        break_graph(
            f"'{name}' of a class is set and then read of an object",
            "TorchDynamo would read what it was; read the class's",
        )


# `torch.compiler.is_compiling()` returns False to the forward, as in stock PyTorch. Libraries that then choose what
# TorchDynamo can trace, with the same results, get True.

_COMPILING = ("is_compiling", "is_dynamo_compiling", "is_exporting")
_ASKING = ("torch", "transformers")


def _note_caller(_variable: Any, tx: Any, *_given: Any) -> None:
    _open.caller = str(tx.f_globals.get("__name__", "")).partition(".")[0]


def _without_compiler(states: Any) -> Any:
    if _open.caller in _ASKING:
        return states
    return {function: False if function.__name__ in _COMPILING else state for function, state in states.items()}


# Which of its convolutions PyTorch would choose decides the layout of a fake map, and is guarded by the map's size. The
# layouts of maps by tiles are their own.


def _without_size_guards() -> None:
    select = torch._C._select_conv_backend

    @functools.wraps(select)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if _is_on():
            x, *rest = args or (kwargs.pop("input"),)
            known = ([n.node.hint if isinstance(n, torch.SymInt) else n for n in of] for of in (x.shape, x.stride()))
            args = (torch.empty_strided(*known, dtype=x.dtype, device=x.device), *rest)
        return select(*args, **kwargs)

    torch._C._select_conv_backend = wrapped  # pyright: ignore[reportAttributeAccessIssue]


def refuse_generators() -> None:
    """Refuse, while Dynamo makes a graph, numbers of a `random.Random` that the forward has not made itself.

    Dynamo repeats them in later calls.

    Raises:
        UnsupportedError: with where the generator is.
    """
    effects = _effects()
    for variable in effects.id_to_variable.values():
        drawn = type(variable).__name__ == "RandomVariable" and effects.is_modified(variable)
        if drawn and variable.source is not None:
            raise UnsupportedError(
                f"the forward draws from a random.Random ('{dotted(variable.source.name)}') that lasts from call to "
                "call, so it is another program at each call; draw outside of the forward, and give the number as an "
                "argument"
            )


def _effects() -> Any:
    return of_dynamo("symbolic_convert").InstructionTranslator.current_tx().output.side_effects


_METHODS = (
    types.FunctionType,
    types.BuiltinFunctionType,
    property,
    classmethod,
    staticmethod,
    functools.cached_property,
)
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_HEAP_TYPE = 1 << 9  # a class whose attributes can be set
_PYTHONS = {"__slotnames__", "__annotations__", "__annotations_cache__"}  # Python adds them on first use, as by a copy


class Unguarded:
    """What a recording depends on and no guard of Dynamo's looks at, to be compared before each call.

    Methods of classes (a `forward` that is replaced in the class, `torch.Tensor.relu`), attributes of metaclasses, the
    order of an OrderedDict, hooks among them, and what of the process is taken for a constant.
    """

    def __init__(self) -> None:
        self._classes: dict[type, None] = {nn.Module: None, Tensor: None}
        self._metaclasses: dict[type, None] = {}
        self._ordered: dict[int, OrderedDict[Any, Any]] = {}
        self._cached: list[tuple[Callable[[], Any], Any]] = []
        self._builtins: dict[tuple[int, str], tuple[dict[str, Any], dict[str, Any]]] = {}
        self._before: Any = None
        slots = getattr(of_dynamo("variables.object_protocol"), "_get_cached_slots", None) if not _BEFORE_2_13 else None
        if slots is not None:
            slots.cache_clear()  # special methods of classes, which may have others now

    def is_other(self) -> bool:
        """Whether something is not as it was when `note` was called last."""
        if any(ask() is not value for ask, value in self._cached):
            return True
        return self._before is not None and self._now() != self._before

    def note(self) -> None:
        """Note what the graph depends on that Dynamo is making."""
        held = [vars(variable).get("value") for variable in _effects().id_to_variable.values()]
        for one in held:
            if isinstance(one, nn.Module):
                _open.ordered.extend(hooks for name in _HOOKS if len(hooks := vars(one)[name]) > 1)
        self._ordered.update((id(one), one) for one in _open.ordered)
        for kind in (*map(type, held), *_open.kinds):
            self._classes.update((one, None) for one in kind.__mro__ if one.__flags__ & _HEAP_TYPE)
            self._metaclasses.update((one, None) for one in inspect.getmro(type(kind)) if one.__flags__ & _HEAP_TYPE)
        self._cached += _open.cached
        self._builtins.update(_open.builtins)
        _guard_distinct(_effects())
        self._before = self._now()

    def _now(self) -> Any:
        found: list[Any] = [sys.getrecursionlimit()]
        for kind in self._classes:
            if not kind.__module__.startswith("torch."):
                found += (name for name in vars(kind) if name not in _PYTHONS)  # they may hide others
            found += [value for value in vars(kind).values() if isinstance(value, _METHODS)]
        for kind in self._metaclasses:
            found += (value for name, value in vars(kind).items() if name not in _PYTHONS)
        found += map(list, self._ordered.values())
        found += [own.get(name, python.get(name)) for (_, name), (own, python) in self._builtins.items()]
        return found
