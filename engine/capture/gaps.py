"""Corrections of TorchDynamo for constructs that it records wrongly; tests/engine/capture has the cases.

A construct that Dynamo records wrongly is corrected here, or breaks the graph (`_break_at_...`). A graph break is
refused, or runs as plain Python with ``fallback="untiled"``. Dynamo does not guard everything on which a recording
depends: guards are added here, and `Unguarded` compares at each call what Dynamo cannot guard.
"""

from __future__ import annotations

import contextlib
import enum
import functools
import inspect
import math
import os
import random
import re
import sys
import threading
import time
import types
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UnsupportedError
from ..torch_private import BEFORE_2_13, PrivateName, dynamo, replace_conv_backend, tree_leaves
from .graph import dotted

_open = threading.local()


def is_on() -> bool:
    """Whether this thread records a network for gigamorph: other users of Dynamo are unaffected."""
    return bool(getattr(_open, "count", 0))


@contextlib.contextmanager
def gaps_closed() -> Iterator[None]:
    """Apply the corrections of this file to recordings of this thread inside the `with` block."""
    _install()
    for owner, names in map(_found, _OF_CLASSES):
        for name in names:
            getattr(owner, name).cache_clear()
    _open.count = getattr(_open, "count", 0) + 1
    _open.set = set[tuple[type, str]]()  # class attributes that are set
    _open.kinds = set[type]()  # classes that are read
    _open.cached = list[tuple[Callable[[], Any], Any]]()  # calls of functools.lru_cache, and their results
    _open.ordered = list[OrderedDict[Any, Any]]()  # OrderedDicts that the forward reads
    _open.filled = list[Any]()  # functions of functools.lru_cache whose cache was empty before
    _open.builtins = dict[tuple[int, str], tuple[dict[str, Any], dict[str, Any]]]()  # names of builtins -> namespaces
    _open.caller = ""  # top-level package of the code that calls PyTorch
    try:
        yield
    except BaseException:
        for function in _open.filled:
            function.cache_clear()
        raise
    finally:
        _open.count -= 1


# Caches of the special methods that classes have, such as `__len__`; a class may have got or lost some since.
_OF_CLASSES = ("variables.base._tp_type|_compute_slotdefs", "variables.object_protocol._get_cached_slots")


def end_recording_at(seconds: float) -> None:
    """Refuse recordings of this thread from this `time.thread_time` on."""
    _open.deadline = seconds


Around = Callable[..., Any]
"""Called as ``around(method, *args, **kwargs)`` instead of a method of Dynamo."""

READS = "tp_getattro_impl|var_getattr"  # the method that reads an attribute; the second before PyTorch 2.14


def _corrections() -> Iterator[tuple[str, Around]]:
    """Functions of Dynamo and what is called instead, the outermost last; `patch` describes the paths."""
    classes = (
        "UserDefinedClassVariable",
        "UserDefinedObjectVariable",
        "NNModuleVariable",
        "UnspecializedNNModuleVariable",
        "PythonModuleVariable",
        "UserFunctionVariable",
    )
    for name in classes:
        yield f"variables.{name}.{READS}", _on_error("ObservedAttributeError", _guard_attribute)
        yield f"variables.{name}.call_obj_hasattr", _after(lambda _found, *given: _guard_attribute(*given))
    yield f"variables.UserDefinedClassVariable.{READS}", _before(lambda one, *_given: _open.kinds.add(one.value))
    if BEFORE_2_13:
        yield f"variables.UserDefinedClassVariable.{READS}", _before(_guard_literal)
        yield "variables.GetAttrVariable.call_method", _before(_guard_own_key)
        yield "variables.AutogradFunctionVariable.call_apply", _before(_break_at_repeated_tensor)
        yield f"variables.UserDefinedObjectVariable.{READS}", _before(_break_at_bool)
    items = "mp_subscript_impl|getitem_const_raise_exception_if_absent"
    yield f"variables.ConstDictVariable.{items}", _on_error("ObservedKeyError", _guard_item)
    yield "variables.dicts.DunderDictVariable.install_dict_contains_guard?", _after(_guard_key)  # since PyTorch 2.13
    yield f"variables.UnspecializedNNModuleVariable.{READS}", _after(_guard_shadow)
    yield "variables.builder.make_dupe_guard", _guard_twice
    yield "guards.GuardBuilder.EQUALS_MATCH", _after(_guard_sign)
    yield "variables.builder.VariableBuilder.wrap_listlike", _after(_keep_length)
    yield "variables.builder.VariableBuilder._wrap", _before(_note_value)
    yield "side_effects.SideEffects.codegen_update_mutated", _before(_forget_length)
    yield "variables.ConstDictVariable.call_method", _after(_keep_order)
    yield "variables.OrderedDictVariable.call_method?", _after(_keep_order)  # since PyTorch 2.14
    yield "variables.functions.WrapperUserFunctionVariable.call_function", _keep_cached
    yield "variables.TensorVariable._method_register_hook|method_register_hook", _keep_effects
    yield "variables.functions.LocalGeneratorObjectVariable.reconstruct", _before(_break_at_generator)
    yield "variables.dicts.DictViewVariable.reconstruct", _before(_break_at_view)
    yield "side_effects.SideEffects.store_attr", _before(_note_class)
    yield f"variables.UserDefinedObjectVariable.{READS}", _before(_break_at_class)
    yield "variables.TorchInGraphFunctionVariable.call_function", _before(_note_caller)
    yield "variables.UserDefinedClassVariable.call_function", _before(_break_at_metaclass)
    yield f"variables.TensorVariable.{READS}", _before(_break_at_version)
    yield f"variables.UserDefinedObjectVariable.{READS}", _before(_guard_delegated)
    yield "variables.UserDefinedObjectVariable._check_for_getattr", _after(_as_function)
    yield f"variables.SymNodeVariable.{READS}", _before(_break_at_class_of_size)
    yield "variables.BuiltinVariable._call_min_max_binary", _before(_break_at_extreme)
    yield "symbolic_convert.InstructionTranslatorBase.load_builtin_from_argval", _before(_note_builtin)
    yield "symbolic_convert.InstructionTranslatorBase.COMPARE_OP", _before(_guard_compared)
    yield "variables.higher_order_ops.CheckpointHigherOrderVariable._call_function", _before(_break_at_reentrant)
    yield "variables.BuiltinVariable.call_str", _before(_break_at_text)
    yield "variables.BuiltinVariable.call_repr", _before(_break_at_text)
    yield f"variables.ExceptionVariable.{READS}", _before(_break_at_arguments)
    yield "variables.ExceptionVariable.reconstruct", _before(_break_at_exception)
    yield "variables.torch.tracing_state_functions", _after(_without_compiler)
    yield "guards.profile_guard_manager?", _instead(0.0)  # it flushes CPU caches with 32 MiB
    yield "symbolic_convert.get_funcname?", _instead(None)  # it reads whole files (40 MB) for a disabled log
    yield "utils.warn_once?", _instead(None)  # its text is in the refusal, or about Dynamo's options
    yield "variables.TensorVariable._warn_capture_scalar_outputs?", _instead(None)
    if sys.version_info[:3] == (3, 13, 0):  # it warns at each recording that guards are slower on this Python
        yield "guards.GuardBuilder._get_generic_dict_manager_example_value?", _instead(None)


@functools.cache
def _install() -> None:
    for path, around in _corrections():
        patch(path, around)
    replace_conv_backend(functools.partial(_wrapped, around=_without_size_guards))


def patch(path: str, around: Around) -> None:
    """Call `around` instead of a function of Dynamo, in recordings of this thread.

    Args:
        path: path of the function in ``torch._dynamo``; alternatives of its name are separated by ``|``, and a final
            ``?`` marks a function that not every version has.
        around: called with the original function and its arguments.

    Raises:
        UnsupportedError: this PyTorch does not have the function, so recordings could be wrong.
    """
    owner, found = _found(path)
    if not found and not path.endswith("?"):
        raise _name(path).error()
    for name in found:
        wrapped = _wrapped(getattr(owner, name), around)
        is_static = isinstance(inspect.getattr_static(owner, name), staticmethod)
        setattr(owner, name, staticmethod(wrapped) if is_static else wrapped)


def _wrapped(function: Any, around: Around) -> Any:
    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if not is_on():
            return function(*args, **kwargs)
        if time.thread_time() > getattr(_open, "deadline", math.inf):
            raise UnsupportedError("symbolic sizes take too long to record")
        return around(function, *args, **kwargs)

    return wrapped


def _found(path: str) -> tuple[Any, list[str]]:
    """The class or module of a path, and those of the path's names that it has."""
    owner_path, _, names = path.removesuffix("?").rpartition(".")
    owner = PrivateName(f"torch._dynamo.{owner_path}", "").find_or(None)
    return owner, [name for name in names.split("|") if hasattr(owner, name)]


def _name(path: str) -> PrivateName:
    return PrivateName(f"torch._dynamo.{path}", "record forwards correctly", "every network is refused")


def missing_functions(*others: str) -> list[PrivateName]:
    """The functions of the corrections, and those of other paths, that this PyTorch does not have."""
    paths = dict.fromkeys((*(path for path, _ in _corrections()), *others))
    return [_name(path) for path in paths if not path.endswith("?") and not _found(path)[1]]


def _on_error(error: str, then: Callable[..., None]) -> Around:
    """Call `then` with the arguments of a method that raises this error of Dynamo."""

    def around(method: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return method(*args, **kwargs)
        except getattr(dynamo("exc"), error):
            then(*args)
            raise

    return around


def _before(first: Callable[..., None]) -> Around:
    def around(method: Any, *args: Any, **kwargs: Any) -> Any:
        first(*args)
        return method(*args, **kwargs)

    return around


def _after(then: Callable[..., Any]) -> Around:
    """Call `then` with a function's result and arguments; its result, unless None, replaces the result."""

    def around(function: Any, *args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        other = then(result, *args)
        return result if other is None else other

    return around


def _instead(constant: Any) -> Around:
    return lambda _function, *_args, **_kwargs: constant


def break_graph(what: str, why: str) -> None:
    """Break the graph at the current instruction."""
    errors = dynamo("exc")
    errors.unimplemented(gb_type=what, context="", explanation=why, hints=[])


# Missing names. Dynamo guards absence where the forward tests for it (`hasattr`, `in`), but not where the forward
# catches the error (`try: self.scale ... except AttributeError`), nor in an object's `__dict__`.


def _guard_attribute(variable: Any, _tx: Any, name: str) -> None:
    if variable.source is None:
        return
    guards = dynamo("guards")
    if "attr" in inspect.signature(guards.GuardBuilder.HASATTR).parameters:
        _guard(variable, "HASATTR", attr=name)
    else:  # before PyTorch 2.13
        source = dynamo("source").AttrSource(variable.source, name)
        guards.install_guard(source.make_guard(guards.GuardBuilder.HASATTR))


def _guard_item(variable: Any, tx: Any, key: Any) -> None:
    variable.install_dict_contains_guard(tx, [key])


def _guard_key(_result: Any, variable: Any, _tx: Any, args: Any) -> None:
    if variable.source and args[0].is_python_constant():
        key = args[0].as_python_constant()
        _guard(variable, "DICT_CONTAINS" if key in variable.items.item_dict else "DICT_NOT_CONTAINS", key=key)


# Before PyTorch 2.13, Dynamo did not guard literals of classes, nor the absence of a key in a `__dict__`.


def _guard_literal(variable: Any, _tx: Any, name: str) -> None:
    value = inspect.getattr_static(variable.value, name, None)
    if variable.source is not None and isinstance(value, int | float | complex | str | bytes | enum.Enum):
        guards = dynamo("guards")
        kind = guards.GuardBuilder.ID_MATCH if isinstance(value, enum.Enum) else guards.GuardBuilder.CONSTANT_MATCH
        guards.install_guard(dynamo("source").AttrSource(variable.source, name).make_guard(kind))


def _guard_own_key(variable: Any, _tx: Any, name: str, args: Any, *_given: Any) -> None:
    owner = variable.obj
    if variable.name == "__dict__" and name in ("get", "__contains__") and owner.source and hasattr(owner, "value"):
        key = args[0].as_python_constant()
        if key not in vars(owner.value):
            _guard(owner, "NOT_PRESENT_IN_GENERIC_DICT", attr=key)


def _break_at_repeated_tensor(_variable: Any, _tx: Any, args: Any, *_given: Any) -> None:
    nodes = [one.as_proxy().node for one in args if one.is_tensor()]
    if len(set(nodes)) < len(nodes):
        break_graph("autograd.Function.apply with one tensor twice", "only one of its gradients would be recorded")


def _break_at_bool(variable: Any, _tx: Any, name: str) -> None:
    if name == "__bool__" and hasattr(type(variable.value), name):
        break_graph("the truth value of an object with __bool__", "its dependencies would not be guarded")


def _guard_shadow(_result: Any, variable: Any, _tx: Any, name: str) -> None:
    """Guard that no entry of a module's `__dict__` hides its parameter of that name."""
    held = vars(variable.value)
    if variable.source and name not in held and any(name in held.get(part, ()) for part in _HELD):
        _guard(variable, "NOT_PRESENT_IN_GENERIC_DICT", attr=name)


_HELD = ("_parameters", "_buffers", "_modules")


def _guard_delegated(variable: Any, _tx: Any, name: str) -> None:
    """Guard that the object has no own attribute which would bypass its class's `__getattr__`."""
    kind = type(variable.value)
    if variable.source is None or getattr(kind, "__getattr__", nn.Module.__getattr__) is nn.Module.__getattr__:
        return
    if name not in getattr(variable.value, "__dict__", {name}) and not hasattr(kind, name):
        _guard(variable, "NOT_PRESENT_IN_GENERIC_DICT", attr=name)


# Dicts whose attributes are their items: for missing attributes Dynamo only calls Python functions.


def _as_function(found: Any, variable: Any) -> Any:
    """A Python function for `__getattr__ = dict.get`, and for `self.__dict__ = self`."""
    if getattr(variable.value, "__dict__", None) is variable.value:
        return _own_item
    return {dict.get: _get, dict.__getitem__: _item}.get(found) if type(found) is type(dict.get) else None


def _get(self: Any, name: str) -> Any:
    return dict.get(self, name)


def _item(self: Any, name: str) -> Any:
    return dict.__getitem__(self, name)


def _own_item(self: Any, name: str) -> Any:
    if name not in self:
        raise AttributeError(name)
    return self[name]


def _guard(variable: Any, kind: str, **what: Any) -> None:
    guards = dynamo("guards")
    guards.install_guard(variable.source.make_guard(functools.partial(getattr(guards.GuardBuilder, kind), **what)))


# An object that is read through two names, of the network and of a module's globals: Dynamo guards only the first.


def _guard_twice(make: Any, source: Any, other: Any) -> Any:
    found, guards = make(source, other), dynamo("guards")
    if found is None and other and other != source:
        guards.install_guard(other.make_guard(guards.GuardBuilder.ID_MATCH))
        return guards.GuardBuilder.ID_MATCH
    return found


def _guard_compared(tx: Any, instruction: Any) -> None:
    """Guard the identity of objects that `is` compares; Dynamo only guards their types."""
    if instruction.argval not in ("is", "is not"):
        return
    pair = [variable.realize() for variable in tx.stack[-2:]]
    if not any(variable.is_python_constant() for variable in pair):
        _guard_identity(pair)


def _guard_identity(variables: Any) -> None:
    for variable in variables:
        unguardable = BEFORE_2_13 and issubclass(variable.python_type(), dict)
        if variable.source is not None and _is_mutable(variable) and not unguardable:
            _guard(variable, "ID_MATCH")


def _is_mutable(variable: Any) -> bool:
    """Whether a variable is a list, a dict, a set or an object; modules and tensors have other guards."""
    kinds = [kind.__name__ for kind in type(variable).__mro__]
    known = any(name in kinds for name in ("ListVariable", "ConstDictVariable", "SetVariable", "DequeVariable"))
    return known or (
        "UserDefinedObjectVariable" in kinds and not isinstance(getattr(variable, "value", None), nn.Module)
    )


def _is_persistent(source: Any) -> bool:
    """Whether a value belongs to the network or a global, and is neither an argument nor a module's own table."""
    name = str(source.name() if callable(source.name) else source.name)
    return not name.startswith("L['") or (name.startswith("L['network']") and not _TABLES.search(name))


_TABLES = re.compile(r"\b_(parameters|buffers|modules|\w+_hooks)\b('\])?$")


def _guard_distinct(effects: Any) -> None:
    """Guard the identity of written objects and others of their class: two names may come to mean one object."""
    given = (one for one in effects.id_to_variable.values() if type(one.mutation_type).__name__.endswith("Existing"))
    held = [one for one in given if one.source is not None and _is_mutable(one) and _is_persistent(one.source)]
    for written in filter(effects.is_modified, held):
        alike = [one for one in held if one.python_type() is written.python_type()]
        if len(alike) > 1:
            _guard_identity(alike)


# Numbers are guarded by ==, for which 0.0 and -0.0 are equal.


def _guard_sign(_result: Any, builder: Any, guard: Any, *_hint: Any) -> None:
    value = builder.get(guard)
    if type(value) is float and value == 0:
        sign = math.copysign(1, value)
        code = [f"copysign(1, {builder.arg_ref(guard)}) == {sign}"]
        manager = builder.get_guard_manager(guard)
        manager.add_lambda_guard(lambda one: math.copysign(1, one) == sign, code, guard.user_stack)


# Dynamo ignores the maximum length of a deque, and `OrderedDict.move_to_end`.


def _keep_length(variable: Any, builder: Any, value: Any) -> None:
    length = getattr(value, "maxlen", None)
    if length is not None:
        constant = dynamo("variables").ConstantVariable.create
        variable.maxlen = constant(length)
        source = dynamo("source").AttrSource(builder.source, "maxlen")
        guards = dynamo("guards")
        guards.install_guard(source.make_guard(guards.GuardBuilder.EQUALS_MATCH))


def _forget_length(effects: Any, *_given: Any) -> None:
    """Remove the maximum length at the end: Dynamo refuses to write a deque with a length, and the items are final."""
    constant = dynamo("variables").ConstantVariable.create
    for variable in effects.id_to_variable.values():
        if type(variable).__name__ == "DequeVariable":
            variable.maxlen = constant(None)


def _keep_order(_result: Any, variable: Any, _tx: Any, name: str, *_args: Any) -> None:
    if name == "move_to_end":
        getattr(variable, "_base_vt", variable).should_reconstruct_all = True


# After `Tensor.register_hook`, Dynamo writes the forward's side effects to a copy that nothing reads.


def _keep_effects(method: Any, variable: Any, tx: Any, *args: Any, **kwargs: Any) -> Any:
    before = tx.output.side_effects
    result = method(variable, tx, *args, **kwargs)
    tx.output.side_effects = before
    return result


# Calls that Dynamo traces in another form.


def _keep_cached(method: Any, variable: Any, tx: Any, args: Any, kwargs: Any) -> Any:
    """Call a function of functools.lru_cache during the trace, and compare its result again before each call.

    Dynamo would trace the function itself. Each call would then make a new tensor, although the forward may write to
    the cached one, or its inputs may have changed.
    """
    function = variable.wrapper_obj
    home = str(getattr(function, "__module__", "")).partition(".")[0]
    if not hasattr(function, "cache_info") or home in ("torch", "einops"):  # functions of shapes only
        return method(variable, tx, args, kwargs)
    given = [_known(one) for one in (*variable.self_args(), *args)]
    named = {name: _known(one) for name, one in kwargs.items()}
    effects = _side_effects()
    if any(one.source and effects.is_modified(one) for one in effects.id_to_variable.values()):
        break_graph("functools.lru_cache", "the forward may have changed values that the function reads")
    lookup = functools.partial(function, *given, **named)
    value = _cached_value(lookup)
    _open.cached.append((lookup, value))
    name = tx.output.install_global_by_id("cached", value)
    return dynamo("variables").VariableTracker.build(tx, value, dynamo("source").GlobalSource(name))


def _known(variable: Any) -> Any:
    """An argument's value; a symbolic size becomes a constant."""
    if variable.is_python_constant():
        return variable.as_python_constant()
    if variable.is_symnode_like():
        return variable.evaluate_expr()
    value = getattr(variable, "value", None)
    if not isinstance(value, nn.Module):
        break_graph("functools.lru_cache", f"a {variable.python_type_name()} as its argument is known only in the call")
    return value


def _cached_value(lookup: Callable[[], Any]) -> Any:
    """The result of a cached function; breaks the graph if the result would not be repeated."""
    before = random.getstate(), torch.get_rng_state()
    info = lookup.func.cache_info()
    if not info.hits and not info.misses:
        _open.filled.append(lookup.func)
    value, info = lookup(), lookup.func.cache_info()
    if random.getstate() != before[0] or not torch.equal(torch.get_rng_state(), before[1]):
        lookup.func.cache_clear()  # with fallback="untiled" the function runs and draws again
        break_graph("functools.lru_cache", "the function draws random numbers")
    if lookup() is not value or info.currsize == info.maxsize:
        break_graph("functools.lru_cache", f"its cache of {info.maxsize} is full")
    if any(isinstance(one, Tensor) and not one.is_leaf for one in tree_leaves(value)):
        break_graph("functools.lru_cache", "its tensor depends on weights, and its gradient can be taken only once")
    return value


def _break_at_generator(variable: Any, *_given: Any) -> None:
    code = variable.get_code()
    where = f"{os.path.basename(code.co_filename)}:{code.co_firstlineno}"
    break_graph(f"a generator ({where}) that outlives the forward", "TorchDynamo would consume all of its items")


def _note_builtin(tx: Any, name: str) -> None:
    if not str(tx.f_globals.get("__name__")).startswith("torch."):
        _open.builtins[id(tx.f_globals), name] = tx.f_globals, tx.f_builtins


def _note_value(builder: Any, value: Any) -> None:
    """Note or guard a value that Dynamo reads for the first time."""
    if type(value) is object:  # a plain object has nothing but its identity
        dynamo("guards").install_guard(builder.source.make_guard(dynamo("guards").GuardBuilder.ID_MATCH))
    if isinstance(value, OrderedDict) and len(value) > 1:
        _open.ordered.append(value)
    if type(value).__name__ in ("dict_keys", "dict_values", "dict_items", "odict_keys", "odict_values", "odict_items"):
        break_graph("a stored view of a dict", "TorchDynamo would not see later writes to the dict in it")


def _break_at_view(view: Any, *_given: Any) -> None:
    if any(vars(variable).get("_base_vt") is view.dv_dict for variable in _side_effects().id_to_variable.values()):
        break_graph("a stored view of an OrderedDict", "TorchDynamo would make it from a copy")


def _note_class(_side_effects: Any, variable: Any, name: str, value: Any, *_given: Any) -> None:
    if name == "forward" and type(value).__name__ == "DeletedVariable":
        break_graph("the deletion of a module's forward", "TorchDynamo fails to do it after the call")
    if type(variable).__name__ == "UserDefinedClassVariable":
        _open.set.add((variable.value, name))


def _break_at_metaclass(variable: Any, *_given: Any) -> None:
    kinds = inspect.getmro(type(variable.value))
    if any("__call__" in vars(kind) for kind in kinds if kind.__module__ not in ("builtins", "abc", "enum")):
        break_graph(f"a call of the class {variable.value.__name__}", "TorchDynamo ignores its metaclass's __call__")


def _break_at_version(_variable: Any, _tx: Any, name: str) -> None:
    if name == "_version":
        break_graph("Tensor._version", "the number of writes to a tensor differs by tiles; use a counter")


def _break_at_reentrant(_checkpoint: Any, _tx: Any, args: Any, kwargs: Any) -> None:
    """A reentrant checkpoint computes no gradients if none of its inputs requires one."""
    reentrant = kwargs.get("use_reentrant")
    if reentrant is not None and reentrant.as_python_constant() is False:
        return
    maps = [one.as_proxy().node.meta["example_value"] for one in args[1:] if one.is_tensor()]
    if torch.is_grad_enabled() and not any(one.requires_grad for one in maps):
        break_graph(
            "a reentrant checkpoint of inputs without gradients",
            "stock PyTorch would not compute gradients of its weights; pass use_reentrant=False",
        )


def _break_at_class_of_size(_size: Any, _tx: Any, name: str) -> None:
    if name == "__class__":
        break_graph("__class__ of a size", "TorchDynamo would return one of its own classes; use type()")


def _break_at_extreme(_builtin: Any, _tx: Any, *pair: Any) -> None:
    """`max(size, 0.5)` is an int or a float, depending on the size."""
    if any(one.is_symnode_like() for one in pair) and len({one.python_type() for one in pair}) > 1:
        break_graph("min or max of a size and a float", "TorchDynamo would return a float")


def _break_at_text(_builtin: Any, _tx: Any, value: Any, *_given: Any) -> None:
    if type(value).__name__ in ("ExceptionVariable", "UserDefinedExceptionObjectVariable"):
        _break_at_exception()


def _break_at_arguments(_variable: Any, _tx: Any, name: str) -> None:
    if name == "args":
        _break_at_exception()


def _break_at_exception(*_given: Any) -> None:
    """`raise` and `except` behave as in Python, but `__str__` and the texts of Python's own errors differ."""
    break_graph("the text of an exception", "TorchDynamo's texts differ from Python's; use only its class")


def _break_at_class(variable: Any, _tx: Any, name: str) -> None:
    """A class attribute that the forward sets is not visible through objects of the class."""
    if any((kind, name) in _open.set for kind in type(variable.value).__mro__ if _open.set):
        break_graph(
            f"'{name}' is set on a class and then read from an object",
            "TorchDynamo would read the old value; read it from the class",
        )


# `torch.compiler.is_compiling()` returns False to the forward, as in stock PyTorch. It returns True to libraries that
# then use code which TorchDynamo can trace, with the same results.

_COMPILING = ("is_compiling", "is_dynamo_compiling", "is_exporting")
_ASKING = ("torch", "transformers")


def _note_caller(_variable: Any, tx: Any, *_given: Any) -> None:
    _open.caller = str(tx.f_globals.get("__name__", "")).partition(".")[0]


def _without_compiler(states: Any) -> Any:
    if _open.caller in _ASKING:
        return states
    return {function: False if function.__name__ in _COMPILING else state for function, state in states.items()}


# PyTorch's choice of a convolution backend decides the layout of a fake map, and adds guards on the map's size. The
# layouts of maps by tiles do not depend on it.


def _without_size_guards(select: Any, *args: Any, **kwargs: Any) -> Any:
    x, *rest = args or (kwargs.pop("input"),)
    known = ([n.node.hint if isinstance(n, torch.SymInt) else n for n in of] for of in (x.shape, x.stride()))
    return select(torch.empty_strided(*known, dtype=x.dtype, device=x.device), *rest, **kwargs)


def refuse_generators() -> None:
    """Refuse numbers of a `random.Random` that exists before the forward; called while Dynamo makes a graph.

    Dynamo would repeat the numbers in later calls.

    Raises:
        UnsupportedError: the forward draws from a generator; the message says where it is stored.
    """
    effects = _side_effects()
    for variable in effects.id_to_variable.values():
        drawn = type(variable).__name__ == "RandomVariable" and effects.is_modified(variable)
        if drawn and variable.source is not None:
            raise UnsupportedError(
                f"the forward draws from a random.Random ('{dotted(variable.source.name)}') that exists across calls, "
                "so each call is another program; draw outside of the forward, and pass the number as an argument"
            )


def _side_effects() -> Any:
    return dynamo("symbolic_convert").InstructionTranslator.current_tx().output.side_effects


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
    """State on which a recording depends but that Dynamo does not guard, compared before each call.

    It covers methods of classes (a `forward` that is replaced in the class, `torch.Tensor.relu`), attributes of
    metaclasses, the order of an OrderedDict (such as hooks), and settings of the process that count as constants.
    """

    def __init__(self) -> None:
        self._classes: dict[type, None] = {nn.Module: None, Tensor: None}
        self._metaclasses: dict[type, None] = {}
        self._ordered: dict[int, OrderedDict[Any, Any]] = {}
        self._cached: list[tuple[Callable[[], Any], Any]] = []
        self._builtins: dict[tuple[int, str], tuple[dict[str, Any], dict[str, Any]]] = {}
        self._before: Any = None

    def is_other(self) -> bool:
        """Whether the state has changed since the last call of `note`."""
        if any(lookup() is not value for lookup, value in self._cached):
            return True
        return self._before is not None and self._now() != self._before

    def note(self) -> None:
        """Store the state on which the graph depends that Dynamo is making."""
        held = [vars(variable).get("value") for variable in _side_effects().id_to_variable.values()]
        for one in held:
            if isinstance(one, nn.Module):
                _open.ordered.extend(hooks for name in _HOOKS if len(hooks := vars(one)[name]) > 1)
        self._ordered.update((id(one), one) for one in _open.ordered)
        for kind in (*map(type, held), *_open.kinds):
            self._classes.update((one, None) for one in kind.__mro__ if one.__flags__ & _HEAP_TYPE)
            self._metaclasses.update((one, None) for one in inspect.getmro(type(kind)) if one.__flags__ & _HEAP_TYPE)
        self._cached += _open.cached
        self._builtins.update(_open.builtins)
        _guard_distinct(_side_effects())
        self._before = self._now()

    def _now(self) -> Any:
        found: list[Any] = [sys.getrecursionlimit()]
        for kind in self._classes:
            if not kind.__module__.startswith("torch."):
                found += (name for name in vars(kind) if name not in _PYTHONS)  # names may hide inherited names
            found += [value for value in vars(kind).values() if isinstance(value, _METHODS)]
        for kind in self._metaclasses:
            found += (value for name, value in vars(kind).items() if name not in _PYTHONS)
        found += map(list, self._ordered.values())
        found += [own.get(name, python.get(name)) for (_, name), (own, python) in self._builtins.items()]
        return found
