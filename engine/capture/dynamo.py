"""TorchDynamo as the recorder: a backend of `torch.compile` receives the graph of a network's call.

Dynamo interprets every operation of the forward, refuses operations that it cannot model, guards the values that it
read, and applies side effects (attributes, lists, counters) after the graph. A backend that raises has therefore
changed nothing; `record` uses one. The graphs of a `Compiled` go to a backend that computes.
"""

from __future__ import annotations

import builtins
import contextlib
import functools
import itertools
import logging
import math
import mmap
import os
import re
import time
import traceback
import types
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from ..errors import ForwardError, GigamorphError, UnsupportedError, by_name, forward_error
from ..parsing import parse_literal
from ..torch_private import (
    TorchDispatchMode,
    dispatch_modes,
    dynamo_config,
    dynamo_error,
    function_modes,
    mark_static,
    recompile_limit_error,
    reset_code,
    stance,
    tree_leaves,
)
from .gaps import Unguarded, end_recording_at, gaps_closed, refuse_generators
from .graph import Graph, quiet
from .recording_state import recorded
from .refusals import BACKBONE
from .rollback import Rollback
from .substitutes import SAYING, install_substitutes
from .synchronized import synchronized
from .tracebacks import TORCH, frames, module_of, users

Serve = Callable[[Graph, Sequence[Any]], Sequence[Any]]

GRAPHS = 64
"""Limit on the stored recordings of one network; one more drops all, and the current one is made again."""
PIECES = 1024
"""Limit on the stored recordings of pieces of all networks. Dynamo stores them by the code of the user's modules, which
networks share, and checks all recordings of a code in each call."""
SYMBOLIC_COST, SYMBOLIC_SECONDS = 4.0, 10.0
"""A recording of symbolic sizes may take this many times the first recording's processor time, but at least these
seconds. Otherwise each size is recorded by itself: those of window attention can take minutes."""

_numbers = itertools.count()
log = logging.getLogger("gigamorph")


@contextlib.contextmanager
def settings(pieces: bool = False) -> Iterator[None]:
    """Set Dynamo's configuration for a recording or a call, and restore it afterwards.

    Args:
        pieces: whether the graph may break. Numbers taken from tensors break it, and no limit ends a call between two
            pieces.
    """
    config = dynamo_config()
    wanted = {
        "skip_nnmodule_hook_guards": False,  # hooks may be added later
        "skip_no_tensor_aliasing_guards_on_parameters": False,  # weights may be tied later
        "optimize_ddp": False,  # it splits the graph
        "recompile_limit": 1 << 20 if pieces else GRAPHS,
        "accumulated_recompile_limit": 1 << 20,
        "fail_on_recompile_limit_hit": True,
        "capture_scalar_outputs": not pieces,
        "skip_tensor_guards_with_matching_dict_tags": False,
        "skip_guards_on_constant_func_defaults": False,
        "use_recursive_dict_tags_for_guards": False,
        "specialize_float": True,
        "allow_rnn": True,
        "suppress_errors": False,
        "disable": False,
        "allow_unspec_int_on_nn_module": True,  # counters
        "enable_dynamo_decompositions": False,  # they replace addcmul_ by a call that rounds differently
        "reorderable_logging_functions": set() if pieces else set(SAYING),
        "inline_torch_dispatch_torch_compile": True,  # see `_dispatch_modes_off`
    }
    install_substitutes()
    # With compilation off, the whole image would run at once, which may not fit in memory.
    if config.disable:
        _warn_once("torch._dynamo.config.disable")
    if stance() == "force_eager":
        _warn_once('torch.compiler.set_stance("force_eager")')
    with (
        config.patch(**{name: value for name, value in wanted.items() if hasattr(config, name)}),
        torch.compiler.set_stance("default"),
        gaps_closed(),
        recorded(),
        synchronized(),
    ):
        yield


@functools.cache
def _warn_once(setting: str) -> None:
    log.warning("%s turns torch.compile off, but accelerated networks are still computed by tiles", setting)


class Compiled:
    """A callable whose graphs are computed by `serve`.

    Args:
        function: a plain Python function at module level; its arguments determine the recording.
        serve: computes the outputs of a graph for its inputs (tensors and numbers).
        pieces: whether the graph may break; code between the pieces runs as plain Python.
        dynamic: as in `torch.compile`; None makes sizes symbolic once they change.
    """

    stored_pieces = 0  # of all networks

    def __init__(self, function: types.FunctionType, serve: Serve, pieces: bool = False, dynamic: bool | None = None):
        self.function, self.serve, self.pieces, self.dynamic = function, serve, pieces, dynamic
        self._call: Callable[..., Any] | None = None
        self._name = function.__name__ if dynamic is False else f"{function.__name__}_{next(_numbers)}"
        self._end: weakref.finalize[..., Compiled] | None = None  # frees the compiled code
        self._served: Exception | None = None  # an error that the computation raised
        self._modes: Sequence[Any] = ()  # dispatch modes of the caller
        self._hooks: list[Any] = []  # global module hooks, which Dynamo does not guard
        self._unguarded = Unguarded()
        self._graphs, self._static = 0, False  # recordings, and whether each is of one size
        self._began = self._first_seconds = 0.0  # processor time of this thread
        self._stored = 0  # recordings since the last reset

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The function's result.

        Raises:
            UnsupportedError: Dynamo refuses an operation; the message names the line of the user's code.
        """
        before = Rollback(_network_of(args, kwargs)) if self.pieces else None
        try:
            return self._call_compiled(*args, **kwargs)
        except (UnsupportedError, ForwardError) as error:
            if before is not None:
                before.undo()
            if self._static or not self._graphs or self._served is not None:
                raise
            self._static = True  # Dynamo may support known sizes where it does not support symbolic ones
            try:
                result = self._call_compiled(*args, **kwargs)
            except (UnsupportedError, ForwardError):
                self._static = False
                if before is not None:
                    before.undo()
                raise
            log.info("each image size is recorded separately: %s", error)
            return result
        finally:
            self._served = None
            end_recording_at(math.inf)

    def _call_compiled(self, *args: Any, **kwargs: Any) -> Any:
        self._served, self._began = None, time.thread_time()
        may_be_symbolic = self._graphs and not self._static and not self.pieces
        limit = max(SYMBOLIC_SECONDS, SYMBOLIC_COST * self._first_seconds) if may_be_symbolic else math.inf
        end_recording_at(self._began + limit)
        if self.pieces and (self._stored >= GRAPHS or Compiled.stored_pieces >= PIECES):
            torch.compiler.reset()  # before the call, not between two of its pieces
            self._call, self._stored, Compiled.stored_pieces = None, 0, 0
        try:
            with (
                settings(self.pieces),
                quiet(),
                _dispatch_modes_off() as self._modes,
                _global_hooks() as hooks,
            ):
                if hooks != self._hooks or self._unguarded.is_other():
                    self._call, self._hooks, self._unguarded = None, hooks, Unguarded()
                with _static_sizes(args, kwargs) if self._static else contextlib.nullcontext():
                    try:
                        return self._compiled()(*args, **kwargs)
                    except recompile_limit_error():
                        self._call = None
                        return self._compiled()(*args, **kwargs)
        except dynamo_error() as error:
            raise refusal(error, _network_of(args, kwargs)) from None
        except Exception as error:
            of_dynamo = any(part in str(error) for part in (_FROM, *_OUTSIDE)) or not self.pieces
            if isinstance(error, GigamorphError) or error is self._served or not of_dynamo:
                raise  # an error of gigamorph, of the computation, or of the network itself
            raise outside(error) from error

    def _compiled(self) -> Callable[..., Any]:
        if self._call is None:
            # Dynamo stores graphs per code object, and per function name which sizes and numbers became symbolic. Both
            # are unique for each `Compiled`: its graphs are freed with it, and networks do not affect each other.
            code = self.function.__code__.replace(co_name=self._name)
            # Dynamo itself would never free the code and its compiled graphs.
            if self._end is not None:
                self._end()
            self._end = weakref.finalize(self, reset_code, code)
            self._end.atexit = False
            own = types.FunctionType(code, self.function.__globals__, self.function.__name__)
            own.__kwdefaults__, own.__defaults__ = self.function.__kwdefaults__, self.function.__defaults__
            held = weakref.ref(self)  # Dynamo never frees backends, and stores their results with the code

            def backend(module: fx.GraphModule, examples: Sequence[Any]) -> Callable[..., Any]:
                return _dereference(held)._backend(module, examples)  # pyright: ignore

            off = os.environ.pop("TORCHDYNAMO_DISABLE", None)  # with it, the whole image would run at once
            try:
                self._call = torch.compile(own, backend=backend, fullgraph=not self.pieces, dynamic=self.dynamic)
            finally:
                if off is not None:
                    os.environ["TORCHDYNAMO_DISABLE"] = off
            if off == "1":
                _warn_once("TORCHDYNAMO_DISABLE=1")
        return self._call

    def _backend(self, module: fx.GraphModule, _examples: Sequence[Any]) -> Callable[..., Any]:
        refuse_generators()
        self._unguarded.note()
        graph, held = Graph.of(module), weakref.ref(self)
        self._first_seconds = self._first_seconds or time.thread_time() - self._began
        self._graphs += 1
        self._stored += self.pieces
        Compiled.stored_pieces += self.pieces

        def run(*inputs: Any) -> Sequence[Any]:
            compiled = _dereference(held)  # pyright: ignore
            try:
                with _dispatch_modes_on(compiled._modes), _function_modes_off():
                    return compiled.serve(graph, inputs)
            except Exception as error:
                compiled._served = error
                raise

        return run


@contextlib.contextmanager
def _static_sizes(args: Any, kwargs: Any) -> Iterator[None]:
    """Mark the sizes of tensor arguments as static inside the `with` block."""
    tensors = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
    before = [set(vars(tensor)) for tensor in tensors]
    for tensor in tensors:
        mark_static(tensor)
    marked = [set(vars(tensor)) - names for tensor, names in zip(tensors, before, strict=True)]
    try:
        yield
    finally:
        for tensor, names in zip(tensors, marked, strict=True):
            for name in names:
                vars(tensor).pop(name, None)


def _dereference(held: weakref.ref[Compiled]) -> Compiled:
    """The referenced object, whose call is running."""
    compiled = held()
    assert compiled is not None
    return compiled


@contextlib.contextmanager
def _dispatch_modes_off() -> Iterator[Sequence[Any]]:
    """Disable the caller's `TorchDispatchMode`s, under which Dynamo records nothing.

    They will see the ops of tiles, which only makes sense for counters and logs: PyTorch's own (`FlopCounterMode`), and
    classes with an attribute `sees_tiles = True`.

    Raises:
        UnsupportedError: another mode is active.
    """
    modes = dispatch_modes()
    for kind in map(type, modes):
        if not kind.__module__.startswith("torch.") and not getattr(kind, "sees_tiles", False):
            raise UnsupportedError(
                f"the TorchDispatchMode {kind.__name__} around the network's call would see the ops of tiles; exit it "
                "before the call, or set sees_tiles = True in its class if it only counts or logs"
            )
    with _exited(TorchDispatchMode, modes):
        yield modes


@contextlib.contextmanager
def _dispatch_modes_on(modes: Sequence[Any]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for mode in modes:
            TorchDispatchMode.__enter__(mode)
            stack.push(functools.partial(TorchDispatchMode.__exit__, mode))
        yield


@contextlib.contextmanager
def _function_modes_off() -> Iterator[None]:
    """Disable the caller's `TorchFunctionMode`s, whose effect is already in the graph."""
    with _exited(TorchFunctionMode, function_modes()):
        yield


@contextlib.contextmanager
def _exited(kind: Any, modes: Sequence[Any]) -> Iterator[None]:
    """Exit modes, the innermost of which is the last, without the code that their classes run on exit."""
    for mode in reversed(modes):
        kind.__exit__(mode, None, None, None)
    try:
        yield
    finally:
        for mode in modes:
            kind.__enter__(mode)


_GLOBAL_HOOKS = ("forward_pre_hooks", "forward_hooks", "backward_pre_hooks", "backward_hooks")


@contextlib.contextmanager
def _global_hooks() -> Iterator[list[Any]]:
    """The caller's global module hooks; hooks of `FlopCounterMode`, which Dynamo refuses, are removed meanwhile."""
    registries = [getattr(torch.nn.modules.module, f"_global_{kind}") for kind in _GLOBAL_HOOKS]
    before = [dict(hooks) for hooks in registries]
    for hooks in registries:
        for key, hook in list(hooks.items()):
            if str(getattr(hook, "__module__", "")).startswith("torch."):
                del hooks[key]
    try:
        yield [list(hooks.items()) for hooks in registries]
    finally:
        for hooks, all_of_them in zip(registries, before, strict=True):
            hooks.clear()
            hooks.update(all_of_them)


@torch.compiler.substitute_in_graph(os.getenv)
def _getenv(key: Any, default: Any = None) -> Any:
    """`os.getenv` for Dynamo, which does not guard values that functions of the standard library read."""
    return os.environ.get(key, default)


class _Recorded(BaseException):  # Dynamo would wrap an `Exception` of a backend
    """Ends the compilation with the graph of a call, before anything runs and before guards are made."""

    def __init__(self, graph: Graph, inputs: Sequence[Any]):
        super().__init__("recorded")
        self.graph, self.inputs = graph, inputs


def record(function: types.FunctionType, *args: Any, **kwargs: Any) -> tuple[Graph, Sequence[Any]]:
    """The graph of a call, for the sizes of its arguments, and its inputs; the call is not run.

    Raises:
        UnsupportedError: Dynamo refuses the call.
    """
    try:
        _Recording(function, _not_served, dynamic=False)(*args, **kwargs)
    except _Recorded as found:
        return found.graph, found.inputs
    raise UnsupportedError("the forward computes no tensor from its arguments; there is nothing to do by tiles")


class _Recording(Compiled):
    def _backend(self, module: fx.GraphModule, examples: Sequence[Any]) -> Callable[..., Any]:
        given = [node.meta.get("grapharg") for node in module.graph.nodes if node.op == "placeholder"]
        inputs = [
            found.example if isinstance(getattr(found, "example", None), Tensor) else example
            for found, example in zip(given, examples, strict=True)
        ]
        refuse_generators()
        raise _Recorded(Graph.of(module), [int(one) if isinstance(one, torch.SymInt) else one for one in inputs])


def _not_served(_graph: Graph, _inputs: Sequence[Any]) -> Sequence[Any]:
    raise AssertionError


def _network_of(args: Any, kwargs: Any) -> nn.Module | None:
    return next((one for one in tree_leaves((args, kwargs)) if isinstance(one, nn.Module)), None)


def refusal(error: Exception, network: nn.Module | None = None) -> Exception:
    """Convert an error of Dynamo to one line: what, in which module and line of the user's code, what to do."""
    inner = getattr(error, "inner_exception", None)  # of a backend
    if isinstance(inner, GigamorphError):
        return inner
    text = str(error)
    if "functorch tracing attempt" in text:
        return UnsupportedError(
            "torch.func (grad, vjp, jvp, vmap, ...) cannot transform an accelerated network, which computes by tiles; "
            "use first gradients (backward, torch.autograd.grad), or the network itself"
        )
    if type(error).__name__ == "TorchRuntimeError" and isinstance(error.__context__, GigamorphError):
        return error.__context__
    where = _user_line(text)
    raised = re.search(r"raised exception (\w+)\((.*)\)\s*$", text, re.MULTILINE)
    if raised is not None:
        return _own_error(raised[1], raised[2], where)
    failed = re.search(r"got (\w+)\((.*)\)\s*$", text, re.MULTILINE)
    if type(error).__name__ == "TorchRuntimeError" and failed is not None:
        return _own_error(failed[1], failed[2], where)
    lines = [line.strip() for line in text.splitlines() if line.strip()] or [type(error).__name__]
    what = lines[0].rstrip(".")
    explained = next((line.removeprefix("Explanation:").strip() for line in lines if line.startswith("Explan")), "")
    context = next((line.partition(":")[2].strip() for line in lines if line.startswith("Developer debug")), "")
    reason = "; ".join(part.rstrip(".") for part in (what, explained or context) if part)
    module = module_of(frames(text.partition(_FROM)[2]), network)
    where = f"{where} in module '{module}'" if module else where
    if "data-dependent" in text and isinstance(getattr(network, "backbone", None), nn.Module):
        return UnsupportedError(f"{where} uses sizes that depend on pixel values, as detectors do (NMS); {BACKBONE}")
    remedy = next((f"; {advice}, {_WHOLE}" for part, advice in _REMEDIES.items() if part in reason), _REMEDY)
    return UnsupportedError(f"{where} cannot be recorded by TorchDynamo: {reason}{remedy}", module or None)


_REMEDIES = {
    "checkpoint_sequential": "call torch.utils.checkpoint.checkpoint for each part",
    "copy.deepcopy()": "copy tensors by clone(), and modules when the network is made",
    "FakeQuantize": "its observers need statistics of whole maps: train the network by tiles before prepare_qat",
    "Observer": "its observers need statistics of whole maps: train the network by tiles before prepare_qat",
}


_OUTSIDE = {  # part of a TorchDynamo error about the surroundings of a call -> message
    "Detected that you are using FX": "an accelerated network computes by tiles, which cannot be traced "
    "(torch.jit.trace, make_fx); trace the network itself, which shares its parameters",
    "Guard failed on the same frame": "the network reads values that TorchDynamo cannot guard in this mode, such as "
    "numpy arrays in inference mode; call it under torch.no_grad()",
    "found no compiled frames": "TorchDynamo records nothing here; a debugger or other code in this process has "
    "disabled it",
}
_FROM = "from user code:"  # Dynamo adds it to errors raised during a recording
_WHOLE = 'or pass fallback="untiled" to compute in pieces around it'
_REMEDY = f"; change that line, {_WHOLE}"


def _user_line(text: str) -> str:
    """The innermost line of the user's code."""
    own = users(frames(text.partition(_FROM)[2]))
    if own is None:
        return "the network's forward"
    name, line, function = own
    cell = re.search(r"<ipython-input-(\d+)|ipykernel_\d+", name)
    if cell is not None:
        return f"cell {cell[1] or 'of the notebook'}, line {line} (in {function})"
    return f"{os.path.basename(name)}:{line} (in {function})"


def outside(error: Exception) -> Exception:
    """Convert an error that is not of TorchDynamo's own classes to a refusal."""
    text = next(iter(str(error).splitlines()), "")
    known = next((message for part, message in _OUTSIDE.items() if part in text), None)
    if known is None and _from_call(error):
        return _own_error(type(error).__name__, text, _user_line(str(error)))
    reason = f"{type(error).__name__}: {text}" if text else type(error).__name__
    failed = f"{_user_line(str(error))} cannot be recorded by TorchDynamo: {reason}{_REMEDY}"
    return UnsupportedError(known or failed)


def _from_call(error: Exception) -> bool:
    """Whether a call that Dynamo makes for the forward (`torch._assert`) raised the error, not Dynamo itself."""
    if _FROM not in str(error) or not isinstance(error, AssertionError | ArithmeticError | ValueError | LookupError):
        return False
    last = [frame.f_code.co_filename for frame, _ in traceback.walk_tb(error.__traceback__)][-1]
    return not last.startswith(os.path.join(TORCH, "_dynamo"))


def _own_error(kind: str, arguments: str, where: str) -> Exception:
    """The error that the forward itself raises: both a refusal and an instance of the original class."""
    found = getattr(builtins, kind, RuntimeError)
    found = found if isinstance(found, type) and issubclass(found, Exception) else RuntimeError
    try:
        args = parse_literal(f"({arguments},)") if arguments else ()
    except ValueError:
        args = (arguments,)
    message = next(iter(" ".join(map(str, args)).splitlines()), "") or kind
    own = by_name(kind)
    if own is not None:  # raised by an op of gigamorph, such as `tilewise`
        return own(message)
    if found is Exception or issubclass(found, UnicodeError):
        return UnsupportedError(f"{where} raises {kind}: {message}")
    if issubclass(found, AttributeError | NameError | TypeError):  # seldom raised by the network itself
        text = f"{where} raises {kind} in TorchDynamo: {message}"
        return forward_error(found, f'{text}; if it does not without gigamorph, pass fallback="untiled"')
    return forward_error(found, f"{message} ({where})")


def stand_in(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A contiguous tensor without memory, for images that are read by region; its values are meaningless.

    Args:
        shape: any shape.
        dtype: dtype of the tensor.
        device: device of the network.
    """
    count = 1
    for size in shape:
        count *= size
    nbytes = max(1, count) * torch.empty((), dtype=dtype).element_size()
    if device.type == "meta" or nbytes < 1 << 16:
        return torch.empty(tuple(shape), dtype=dtype, device=device)
    if device.type == "cpu":
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
        memory = mmap.mmap(-1, nbytes, flags=flags)
        return torch.frombuffer(memory, dtype=dtype, count=count).view(tuple(shape))
    return _Window(torch.empty(1, dtype=dtype, device=device), shape).tensor()


class _Window:
    """A GPU tensor that claims more memory than it has; nothing reads it."""

    _KINDS: ClassVar = {
        torch.float32: "<f4",
        torch.float64: "<f8",
        torch.float16: "<f2",
        torch.uint8: "|u1",
        torch.int64: "<i8",
    }

    def __init__(self, first: Tensor, shape: Sequence[int]):
        self.first, self.shape = first, tuple(shape)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        kind = self._KINDS.get(self.first.dtype)
        if kind is None:
            raise GigamorphError(f"an image of dtype {self.first.dtype} cannot be read by region on a GPU")
        return {"shape": self.shape, "typestr": kind, "data": (self.first.data_ptr(), False), "version": 3}

    def tensor(self) -> Tensor:
        if self.first.dtype == torch.bfloat16:
            return _Window(self.first.view(torch.float16), self.shape).tensor().view(torch.bfloat16)
        return torch.as_tensor(self, device=self.first.device)
