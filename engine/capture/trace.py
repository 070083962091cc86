"""Capture: run the unmodified forward once on fake tensors of the true image size and write down every call.

The result is one flat list of API-level calls (`torch.nn.functional.conv2d`, `Tensor.add`, ...) in single-assignment
form: each tensor is a numbered value, in-place calls give a new number. Nothing of the model is changed, moved or
computed; parameters are replaced by fake twins at the moment a call uses them. What a forward does besides is recorded
as well (`capture/`): gradient modes, writes through views, state that it changes; or it is refused.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes

from ..errors import GigamorphError, UnsupportedError
from . import process
from .call_trees import Ref, bind, refs, tree_leaves
from .guard import Guard, Read, inside_of, replaced
from .leaks import let_go
from .lines import raised_at
from .program import Given, Op, Program, Value, changes_unasked, place
from .program import name_of as _name
from .random_state import put_back, random_state, same_state
from .reach import mentioned
from .recorder import Recorder
from .refusals import as_refusal
from .state import Place, Snapshot
from .trees import TakenApart
from .unseen import Unseen
from .values import Values
from .walk import imports_of_others, walk

__all__ = ["Op", "Program", "Ref", "Value", "_name", "bind", "capture", "module_paths", "place", "refs"]

_CACHED_SHAPES = 4_000  # entries of PyTorch's cache, of some 2 KB: a network of a new image size makes hundreds


@contextlib.contextmanager
def module_paths(model: nn.Module, path: list[str]) -> Iterator[None]:
    """Keep `path` equal to the stack of modules whose forward is running in this thread."""
    mine = threading.get_ident()  # the hooks are the whole process's
    names = {id(module): name for name, module in model.named_modules()}

    def enter(module: nn.Module, _args: Any) -> None:
        if threading.get_ident() == mine:
            path.append(names.get(id(module), type(module).__name__))

    def leave(_module: nn.Module, _args: Any, _result: Any) -> None:
        if threading.get_ident() == mine:
            path.pop()

    hooks = [
        nn.modules.module.register_module_forward_pre_hook(enter),
        nn.modules.module.register_module_forward_hook(leave, always_call=True),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def refuse_backward_hooks(model: nn.Module) -> None:
    """Hooks of the old kind, which PyTorch hangs on whatever node a module's output comes from.

    Raises:
        UnsupportedError: naming the module.
    """
    for name, module in model.named_modules():
        if module._backward_hooks and not module._is_full_backward_hook:
            where = f"module '{name}'" if name else "the model"
            raise UnsupportedError(
                f"{where} has a backward hook by register_backward_hook, which PyTorch has given up; use "
                "register_full_backward_hook"
            )


def capture(
    model: nn.Module,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device | str,
    call: Callable[..., Any] | None = None,
    inputs: Sequence[Given] = (),
    vectors: Sequence[Given] = (),
    image_grad: bool | str = False,
    branches: Sequence[bool] | None = None,
    strides: tuple[int, ...] | None = None,
    given: Sequence[Any] = (),
) -> Program:
    """Record a call of the model, its own hooks included, on an image batch, in the gradient mode that is on.

    One recording runs at a time in a process. After it, finished or not, network and process are as they were before.

    Args:
        model: the network, in the training or evaluation mode that is to be recorded.
        shape: (N, C, H, W) of the image batch; any size, nothing of it is allocated.
        dtype: dtype of the image as the network gets it.
        device: device of the image; on a machine without it the fake tensors still carry it.
        call: what is recorded in place of the model's call, given the image, the `inputs` and the `vectors`.
        inputs: shapes and dtypes of further maps, with the image axes last, and whether a gradient of them is wanted.
        vectors: the same of further tensors that have no image axes.
        image_grad: whether a gradient of the image is wanted; "made" if it is no leaf of the graph.
        branches: which way the forward goes where it branches by the image's values, as far as that is known; behind
            them a way is looked for that ends without an error. None refuses such branches.
        strides: of the image, in elements, if it has gaps or another order than NCHW.
        given: the tensors themselves, image first, as far as there are any: the network may keep them.

    Raises:
        UnsupportedError: for what cannot be recorded or done again: TorchScript, Python random numbers, data-dependent
            control flow, changes of parameters and layers, tensors left where nothing finds them.
    """
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            where = f"module '{name}'" if name else "the model"
            raise UnsupportedError(f"{where} is TorchScript; give the plain eager module")
        if isinstance(module, nn.modules.lazy.LazyModuleMixin) and module.has_uninitialized_params():  # pyright: ignore
            raise UnsupportedError(f"module '{name}' is lazy; run the model once before")
    way, failed = branches, None
    with process.LOCK:
        while True:
            taken: list[bool] = []
            make = functools.partial(_Recording, model, torch.device(device), call, way, taken)
            try:
                image = Given(tuple(shape), dtype, image_grad, strides)
                return _recorded(lambda make=make, image=image: make().run(image, inputs, vectors, given))
            except Exception as error:
                failed = error if failed is None or isinstance(error, UnsupportedError) else failed
                way = _turned(taken, len(branches or ()))
                if way is None and failed is error:
                    raise
                if way is None:
                    raise failed from None


def _recorded(record: Callable[[], Program]) -> Program:
    """A recording, made anew where it has imported what the walk had not seen, or another thread has drawn numbers."""
    for tries in range(3, 0, -1):
        files = set(sys.modules)
        try:
            program = record()
            if tries == 1 or not imports_of_others(files):
                return program
        except _DrewError:
            if tries == 1:
                raise
    raise AssertionError


def _turned(taken: list[bool], known: int) -> list[bool] | None:
    """The next way behind the branches that are known: the last that was not taken is; None if there is no more."""
    for last in reversed(range(known, len(taken))):
        if not taken[last]:
            return [*taken[:last], True]
    return None


class _DrewError(UnsupportedError):
    """A random generator has another state after a recording."""


class _Recording:
    """One recording: what was there before, the recorder, and putting everything back.

    Args:
        way: see `capture`.
        taken: gets the truths that the recording supposes, also if it fails.
    """

    def __init__(
        self,
        model: nn.Module,
        device: torch.device,
        call: Callable[..., Any] | None,
        way: Sequence[bool] | None,
        taken: list[bool],
    ):
        self.model, self.call, self.taken = model, call, taken
        self.snapshot = Snapshot(walk(model, () if call is None else (call,)))
        for name, iterator in self.snapshot.found.iterators.items():
            raise UnsupportedError(
                f"{name} is a {type(iterator).__name__} that lasts from call to call; keep a list and a counter in "
                "attributes instead"
            )
        self.generators = self.snapshot.found.generators
        self.random = random_state(self.generators)
        if len(FakeTensorMode.cache) > _CACHED_SHAPES:  # PyTorch keeps what every op gave of every shape, for good
            FakeTensorMode.cache_clear()
        fake = FakeTensorMode(allow_non_fake_inputs=False)
        self.fake, self.values = fake, Values(model, fake, device)
        self.recorder = Recorder(self.values, self.snapshot, way)

    def run(self, what: Given, inputs: Sequence[Given], vectors: Sequence[Given], given: Sequence[Any] = ()) -> Program:
        values, program = self.values, self.values.program
        weak = values.weak
        try:
            # A mode of the caller's, which counts FLOPs or logs calls, is shown what tiles compute, and no tensors
            # without values.
            with _disable_current_modes(), self.fake, enable_python_dispatcher():
                image = values.given(what)
                maps = [values.given(spec) for spec in inputs]
                rest = [values.given(spec) for spec in vectors]
                program.image = values.numbers[id(image)]
                program.inputs = tuple(values.numbers[id(t)] for t in maps)
                program.vectors = tuple(values.numbers[id(t)] for t in rest)
                self._find_kept(given, (image, *maps, *rest))
                self._forward(image, [*maps, *rest])
                del image, maps, rest
            if not same_state(self.random, random_state(self.generators)):
                raise _DrewError(
                    "the model's forward draws Python or numpy random numbers or seeds torch's, so it is another "
                    "program at each call; draw them outside of the forward and give them as arguments, and seed there"
                )
        except BaseException as error:
            self.taken[:] = [branch.taken for branch in program.branches]
            put_back(self.random, self.generators)
            traceback.clear_frames(error.__traceback__)  # their variables would keep tensors without values
            values.forget()
            let_go(weak, refuse=False)
            raise
        program.guard = self._guard(program, given)
        values.forget()
        let_go(weak, refuse=True, changes=lambda tensor: changes_unasked(program, values.numbers[id(tensor)]))
        return program

    def _find_kept(self, given: Sequence[Any], stands_for: Sequence[Tensor]) -> None:
        """Put what stands for the tensors of the call where the network keeps these very tensors."""
        found = {
            id(tensor): twin
            for tensor, twin in zip(given, stands_for, strict=False)
            if isinstance(tensor, Tensor) and self.snapshot.was_there(tensor)
        }
        for tensor in given:
            if id(tensor) in found and isinstance(tensor, nn.Parameter):
                found[id(tensor)]._is_param = True  # pyright: ignore[reportAttributeAccessIssue]
        self.values.twins.update(found)
        self.snapshot.replace(found)

    def _forward(self, image: Tensor, further: Sequence[Tensor]) -> None:
        """Run the forward; note what it returns and changes; put back what it has changed."""
        recorder, program = self.recorder, self.values.program
        around = process.recording(Unseen(recorder), list(self._asking()))
        plain = torch.compiler.set_stance("force_eager")  # what is compiled is recorded as what it was compiled from
        log = logging.getLogger("torch._subclasses.fake_tensor")
        told, log.disabled = log.disabled, True  # it prints whole tracebacks of errors that are the network's own
        saved = contextlib.nullcontext()
        if torch._C._autograd._saved_tensors_hooks_is_enabled():  # pyright: ignore[reportAttributeAccessIssue]
            saved = torch.autograd.graph.saved_tensors_hooks(_nothing, _nothing)  # a user's hooks would keep them
        caching = torch.is_autocast_cache_enabled()
        torch.set_autocast_cache_enabled(False)  # it would keep weights without values
        try:
            with saved, around, module_paths(self.model, self.values.path), plain, recorder:
                result = (self.model if self.call is None else self.call)(image, *further)
            if recorder.refusal is not None:  # the network's own code has caught it
                raise recorder.refusal
            recorder.arrays.finish()
            self._finish(program, result, [image, *further])
        except Exception as error:
            if recorder.refusal is not None:  # the network's own code, or a scripted function, raises another one
                raise recorder.refusal from None
            refusal = as_refusal(error, recorder.last)
            raise (self._ended(error) if refusal is error else refusal) from error
        finally:
            torch.set_autocast_cache_enabled(caching)
            log.disabled = told
            recorder.arrays.forget()
            self.snapshot.restore()

    def _ended(self, error: Exception) -> Exception:
        """The network's own error; a refusal where stock keeps what the forward has done until then.

        A caller may catch it: hooks that have seen enough end a forward so.
        """
        raised, values = raised_at(error), self.values
        if isinstance(error, GigamorphError) or not raised:
            return error
        carries = any(isinstance(leaf, Tensor) for leaf in tree_leaves((error.args, vars(error))))
        if not carries and not values.updates() and not any(self.snapshot.changes(values.twins)):
            return error
        behind = place(values.program.ops[-1].module if values.program.ops else "", raised)
        text = " ".join([type(error).__name__, *(f"({line})" for line in str(error).splitlines()[:1])])
        return UnsupportedError(
            f"the forward ends behind {behind} by {text}, and what it has kept or changed until then would be lost; "
            "return what is wanted of it, or accelerate a network that ends there"
        )

    def _asking(self) -> Iterator[dict[str, Any]]:
        """The globals of the network's own code in which `type` is Python's own, and is called."""
        for function in self.snapshot.found.functions:
            space = function.__globals__
            if "type" in mentioned(function.__code__) and "type" not in space:
                yield space

    def _finish(self, program: Program, result: Any, given: Sequence[Tensor]) -> None:
        values, snapshot = self.values, self.snapshot
        usual, left = vars(torch.empty(())), list[Tensor]()

        def leaf(tensor: Tensor) -> Ref:
            own = [name for name in vars(tensor) if name not in usual and not name.startswith("_")]
            if own and self.fake.is_our_fake(tensor):
                raise UnsupportedError(
                    f"the model sets an attribute '{own[0]}' of a tensor that it is given, returns or keeps; return it"
                )
            twin = values.twin(tensor)
            self.recorder.arrays.read(twin)
            left.append(twin)
            number = values.present(twin)
            program.reached[number] = values.reached(twin)
            return Ref(number)

        for tensor in given:
            leaf(tensor)
        left.clear()
        apart = TakenApart(leaf, snapshot.kept)
        output = apart.tree(result, "the result of the model")
        if not refs(output):
            raise UnsupportedError(
                f"the model returns a {type(result).__name__} without tensors that can be seen; "
                "return a tensor, or a tuple, list or dict of tensors"
            )
        program.effects = snapshot.effects(apart, values.twins)
        for array, where in apart.arrays:
            self.recorder.arrays.hand_out(array, where, left)
        program.output = apart.settled(output)
        for effect in program.effects:
            effect.contents, effect.appended, effect.keys = apart.settled(effect.tree)
        program.hooks = self.recorder.hooks.finish(leaf)
        program.updates = values.updates()

    def _guard(self, program: Program, given: Sequence[Any]) -> Guard:
        """What the recording depends on; constants that each call replaces are looked up where they are."""
        snapshot = self.snapshot
        loose = replaced(program.effects)
        below = inside_of(snapshot.found, loose)
        places = {
            id(content): Place.of(holder, key)
            for holder, contents in zip(snapshot.found.holders, snapshot.contents, strict=True)
            if not isinstance(holder.owner, set)  # what is in a set has no place of its own
            for key, content in contents.items()
            if isinstance(content, Tensor) and (id(holder) in below or key in loose.get(id(holder), ()))
        }
        for value in program.values:
            if value.constant is not None and id(value.constant) in places:
                value.find = places[id(value.constant)]
                value.constant = torch.empty_like(value.constant, device="meta")  # its memory is the caller's to free
        state = _State(self.model, program)
        reads = [Read(functools.partial(take, state), value) for take, value in program.reads]
        constants = [v.constant for v in program.values if v.constant is not None and v.find is None]
        return Guard(snapshot, program.effects, reads, constants, self.values.twins, given)


def _nothing(_saved: Any) -> Any:
    """In the place of what is saved for a backward: of a recording there is none."""


class _State:
    """The tensors of the network's state by value number, as they are now."""

    def __init__(self, model: nn.Module, program: Program):
        self.model, self.program = model, program

    def __call__(self, number: int) -> Tensor:
        value = self.program.values[number]
        if value.name is None:
            found = value.constant if value.find is None else value.find()
            assert found is not None
            return found
        *path, last = value.name.split(".")
        owner = self.model.get_submodule(".".join(path))
        found = owner._parameters.get(last)
        found = owner._buffers.get(last) if found is None else found
        assert found is not None
        return found
