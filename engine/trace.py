"""Capture: run the unmodified forward once on fake tensors of the true image size and write down every call.

The result is one flat list of API-level calls (`torch.nn.functional.conv2d`, `Tensor.add`, ...) in single-assignment
form: each tensor is a numbered value, in-place calls give a new number. Nothing of the model is changed, moved or
computed; parameters are replaced by fake twins at the moment a call uses them.
"""

from __future__ import annotations

import contextlib
import copy
import os
import random
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import BuiltinFunctionType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._pytree import tree_flatten, tree_map

from .corrected import CORRECTED
from .errors import UnsupportedError
from .processes import world


@dataclass(frozen=True, slots=True)
class Ref:
    """A value's number, standing where a tensor stood among the arguments of a call."""

    value: int


class CumulativeAverage(float):
    """Stands for the momentum of a BatchNorm that averages all batches: one over what its counter says.

    Attributes:
        counter: the name of the buffer `num_batches_tracked`.
    """

    counter: str


@dataclass(slots=True)
class Value:
    """What is known of one tensor of the program: its shape and dtype at the captured image size."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    name: str | None = None  # parameter or buffer name
    constant: Tensor | None = None  # a tensor that the model holds as a plain attribute
    trainable: bool = False  # a parameter or constant that wants a gradient


@dataclass(slots=True)
class Op:
    """One recorded call. `args` and `kwargs` hold `Ref`s in place of tensors."""

    func: Callable[..., Any]
    name: str  # the last part of its public name, e.g. "conv2d", "add_", "__getitem__"
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    mutated: tuple[int, ...]  # inputs that the call wrote to
    module: str  # path of the module that made the call
    autocast: tuple[bool, torch.dtype] | None = None  # where it differs from the state the forward began in
    line: str = ""  # file and line of the call in the network's own code
    group: Any = None  # the processes that a SyncBatchNorm shares its statistics with

    def __str__(self) -> str:
        return f"{self.name} in {self.module or 'the model'}"


@dataclass
class Program:
    """The recorded forward.

    Attributes:
        inputs: further maps that are given from outside, with the image axes last.
    """

    image: int
    inputs: tuple[int, ...] = ()
    ops: list[Op] = field(default_factory=list)
    values: list[Value] = field(default_factory=list)
    output: Any = None  # the forward's result with Refs in place of tensors


def refs(tree: Any) -> list[int]:
    """Numbers of all values in a tree of arguments, in order."""
    return [leaf.value for leaf in tree_flatten(tree)[0] if isinstance(leaf, Ref)]


def bind(tree: Any, env: Any) -> Any:
    """The tree with every `Ref` replaced by `env[number]`."""
    return tree_map(lambda leaf: env[leaf.value] if isinstance(leaf, Ref) else leaf, tree)


# Functions of these names in `torch` take their arguments in another order than those of torch.nn.functional.
_OTHER_ORDER = frozenset({"batch_norm", "instance_norm", "dropout", "alpha_dropout", "feature_dropout", "kl_div"})


def _name(func: Callable[..., Any]) -> str:
    """What rules know a call by: the last part of its public name, or all of it where it has that part by chance."""
    whole = str(resolve_name(func) or getattr(func, "__name__", func)).removesuffix(".__get__")
    last, home = whole.rsplit(".", 1)[-1], getattr(func, "__module__", None) or "torch"
    if home.startswith("torch._ops"):
        return whole
    plain = last.removesuffix("_")
    other_order = plain in _OTHER_ORDER or plain.endswith(("_loss", "_logits", "_entropy"))
    chance = not home.startswith(("torch", "gigamorph")) or (other_order and isinstance(func, BuiltinFunctionType))
    return f"{home}.{last}" if chance else last


def place(module: str, line: str) -> str:
    """What messages call a place in the network."""
    where = f"module '{module}'" if module else "the model"
    return f"{where} ({line})" if line else where


_TORCH, _ENGINE = os.path.dirname(torch.__file__), os.path.dirname(__file__)


def _line() -> str:
    """File and line of the innermost running code that is neither PyTorch's nor the engine's; empty if none is."""
    frame = sys._getframe(2)
    while frame is not None and frame.f_code is not capture.__code__:
        name = frame.f_code.co_filename
        if not name.startswith(_TORCH) and name != contextlib.__file__ and os.path.dirname(name) != _ENGINE:
            return f"{os.path.basename(name)}:{frame.f_lineno}"
        frame = frame.f_back
    return ""


class _Recorder(TorchFunctionMode):
    def __init__(self, model: nn.Module, fake: FakeTensorMode, device: torch.device):
        self.fake = fake
        self.device = device
        self.program = Program(image=0)
        self.names: dict[int, str] = {}
        for name, tensor in [
            *model.named_buffers(remove_duplicate=False),
            *model.named_parameters(remove_duplicate=False),
        ]:
            self.names[id(tensor)] = name
        self.numbers: dict[int, int] = {}  # id of a tensor -> its present value
        self.twins: dict[int, Tensor] = {}  # id of a real tensor -> fake twin
        self.alive: list[Any] = []  # ids stay unique only while their objects live
        self.storages: dict[int, set[int]] = {}  # storage -> values that look at it
        self.stale: dict[int, str] = {}  # values whose storage was written through another name
        self.path: list[str] = []
        self.line = ""  # of the call that is being recorded
        self.last = ""  # module of the latest call, for errors that come to light after its hooks have run
        self.leak: UnsupportedError | None = None
        self.entry_autocast = self._autocast()
        self.group: Any = None  # of the SyncBatchNorm whose forward is running

    def _autocast(self) -> tuple[bool, torch.dtype]:
        kind = self.device.type
        return torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)

    def new_value(self, tensor: Tensor, name: str | None = None, constant: Tensor | None = None) -> int:
        values = self.program.values
        number = len(values)
        values.append(Value(tensor.shape, tensor.dtype, tensor.device, name, constant))
        self.numbers[id(tensor)] = number
        self.alive.append(tensor)
        self.storages.setdefault(tensor.untyped_storage()._cdata, set()).add(number)
        return number

    def _twin(self, tensor: Tensor) -> Tensor:
        """The fake tensor that stands for `tensor`; itself if it was made during the capture."""
        if id(tensor) in self.numbers:
            return tensor
        if id(tensor) in self.twins:
            return self.twins[id(tensor)]
        if self.fake.is_our_fake(tensor):
            raise UnsupportedError(
                f"{self.where()} uses a tensor that was made outside of any recorded call (a scripted or compiled "
                "part?); give the plain eager module"
            )
        if tensor.is_inference() or tensor.is_meta:  # a twin must tell when it is written to, and be on the device
            device = self.device if tensor.is_meta else tensor.device
            twin = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
        else:
            twin = self.fake.from_tensor(tensor, static_shapes=True)
        self.alive.append(tensor)
        self.twins[id(tensor)] = twin
        name = self.names.get(id(tensor))
        number = self.new_value(twin, name, None if name else tensor)
        self.program.values[number].trainable = tensor.requires_grad
        return twin

    def where(self) -> str:
        return place(self.path[-1] if self.path else "", self.line)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.line = _line()
        self.last = self.where()
        args, kwargs = tree_map(lambda a: self._twin(a) if isinstance(a, Tensor) else a, (args, kwargs))
        tensors = [a for a in tree_flatten((args, kwargs))[0] if isinstance(a, Tensor)]
        before = [(t, t._version) for t in tensors]
        result = func(*args, **kwargs)
        outputs = [r for r in tree_flatten(result)[0] if isinstance(r, Tensor)]
        written = [t for t, version in before if t._version != version]
        fresh = [r for r in outputs if id(r) not in self.numbers or any(r is w for w in written)]
        if not fresh and not written:
            return result  # a host read (shape, dtype, ...) or the very object that came in
        self._refuse_leaks(func)
        self._record(func, args, kwargs, outputs, written)
        return result

    def _record(self, func: Any, args: Any, kwargs: Any, outputs: list[Tensor], written: list[Tensor]) -> None:
        as_ref = lambda a: Ref(self.numbers[id(a)]) if isinstance(a, Tensor) else a  # noqa: E731
        ref_args, ref_kwargs = tree_map(as_ref, (args, kwargs))
        inputs = tuple(dict.fromkeys(refs((ref_args, ref_kwargs))))
        name = _name(func)
        where = self.where()
        for number in inputs:
            if number in self.stale:
                raise UnsupportedError(
                    f"{where} reads a tensor in '{name}' after it was changed in place through another view "
                    f"({self.stale[number]}); write that change out of place"
                )
        mutated = tuple(dict.fromkeys(self.numbers[id(w)] for w in written))
        numbers = []
        for tensor in dict.fromkeys([*outputs, *written]):
            if id(tensor) in self.numbers and not any(tensor is w for w in written):
                numbers.append(self.numbers[id(tensor)])
                continue
            if any(tensor is w for w in written):
                mates = self.storages.get(tensor.untyped_storage()._cdata, set())
                for mate in mates - {self.numbers[id(tensor)]}:
                    self.stale[mate] = f"'{name}' in {where}"
                mates.clear()
            numbers.append(self.new_value(tensor, self._name_of(tensor)))
        state = self._autocast()
        self.program.ops.append(
            Op(
                func=CORRECTED.get(func, func),  # pyright: ignore[reportArgumentType]
                name=name,
                args=ref_args,
                kwargs=ref_kwargs,
                inputs=inputs,
                outputs=tuple(numbers),
                mutated=mutated,
                module=self.path[-1] if self.path else "",
                line=self.line,
                autocast=None if state == self.entry_autocast else state,
                group=self.group,
            )
        )

    def _name_of(self, tensor: Tensor) -> str | None:
        number = self.numbers.get(id(tensor))
        return None if number is None else self.program.values[number].name

    def _refuse_leaks(self, func: Any) -> None:
        # TorchScript runs in C++ and shows only the Python pieces of the fake kernels: a garbage program, no error.
        frame = sys._getframe(2)
        for _ in range(12):
            if frame is None:
                return
            if frame.f_code.co_filename.endswith(("_subclasses/fake_tensor.py", "_subclasses/fake_impls.py")):
                self.leak = UnsupportedError(
                    f"{self.where()} runs TorchScript, whose calls cannot be seen; give the plain eager module"
                )
                raise self.leak
            frame = frame.f_back

    def finish(self, result: Any) -> Program:
        def as_ref(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            number = self.numbers.get(id(self._twin(leaf)))
            assert number is not None
            if number in self.stale:
                raise UnsupportedError(
                    f"the model returns a tensor that was changed in place through another view "
                    f"({self.stale[number]}); write that change out of place"
                )
            return Ref(number)

        self.program.output = tree_map(as_ref, result)
        if not refs(self.program.output):
            raise UnsupportedError(
                f"the model returns a {type(result).__name__} without tensors that can be seen; "
                "return a tensor, or a tuple, list or dict of tensors"
            )
        return self.program


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


@contextlib.contextmanager
def refuse_custom_functions(refusal: Callable[[str], Exception]) -> Iterator[None]:
    """Custom autograd.Functions do not pass through a function mode: calling one raises `refusal(its name)`."""

    def apply(cls: type, *_args: Any, **_kwargs: Any) -> Any:
        raise refusal(cls.__name__)

    original = torch.autograd.Function.__dict__.get("apply")
    torch.autograd.Function.apply = classmethod(apply)  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        if original is None:
            del torch.autograd.Function.apply
        else:
            torch.autograd.Function.apply = original


def refuse_backward_hooks(model: nn.Module) -> None:
    """Hooks on a module's gradients would not run: the backward goes through tiles, not through modules.

    Raises:
        UnsupportedError: naming the module.
    """
    for name, module in model.named_modules():
        if module._backward_hooks or module._backward_pre_hooks:
            where = f"module '{name}'" if name else "the model"
            raise UnsupportedError(
                f"{where} has a backward hook, which would see no gradients of the whole image; remove it, or use "
                "a hook on the parameter (Tensor.register_hook)"
            )


@contextlib.contextmanager
def cumulative_averages(model: nn.Module) -> Iterator[None]:
    """For BatchNorms without momentum: their forward would turn the counter into a Python number, once and for all."""
    changed: list[nn.modules.batchnorm._BatchNorm] = []
    try:
        for name, module in model.named_modules():
            if not isinstance(module, nn.modules.batchnorm._BatchNorm) or module.num_batches_tracked is None:
                continue
            if module.momentum is None:
                mark = CumulativeAverage(1.0)
                mark.counter = f"{name}.num_batches_tracked" if name else "num_batches_tracked"
                module.momentum = mark  # pyright: ignore[reportAttributeAccessIssue]
                changed.append(module)
        yield
    finally:
        for module in changed:
            module.momentum = None  # pyright: ignore[reportAttributeAccessIssue]


@contextlib.contextmanager
def attributes_kept(model: nn.Module) -> Iterator[None]:
    """What a forward puts into its modules (caches, counters) is taken out again; it has tensors without values."""
    kept: list[tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = []
    for module in model.modules():
        own = vars(module)
        inside = {key: copy.copy(value) for key, value in own.items() if isinstance(value, (dict, list, set))}
        kept.append((own, dict(own), inside))
    try:
        yield
    finally:
        for own, before, inside in kept:
            for key in own.keys() - before.keys():
                del own[key]
            own.update(before)
            for key, content in inside.items():
                before[key].clear()
                (before[key].extend if isinstance(content, list) else before[key].update)(content)


@contextlib.contextmanager
def synchronized_norms(recorder: _Recorder) -> Iterator[None]:
    """Records a SyncBatchNorm as the BatchNorm that it is, with its processes: its own forward runs on GPUs alone."""
    original = nn.SyncBatchNorm.forward

    def forward(module: nn.SyncBatchNorm, x: Tensor) -> Tensor:
        group = (module.process_group or dist.group.WORLD) if module.training and world() > 1 else None
        recorder.group = group if group is not None and dist.get_world_size(group) > 1 else None
        try:
            return nn.modules.batchnorm._BatchNorm.forward(module, x)
        finally:
            recorder.group = None

    nn.SyncBatchNorm.forward = forward  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        nn.SyncBatchNorm.forward = original


def capture(
    model: nn.Module, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str,
    call: Callable[..., Any] | None = None, inputs: Sequence[tuple[Sequence[int], torch.dtype]] = (),
) -> Program:  # fmt: skip
    """Record a call of the model, its own hooks included, on an image batch.

    Args:
        model: the network, in the training or evaluation mode that is to be recorded.
        shape: (N, C, H, W) of the image batch; any size, nothing of it is allocated.
        dtype: dtype of the image as the network gets it.
        device: device of the image; on a machine without it the fake tensors still carry it.
        call: what is recorded in place of the model's call, given the image and the `inputs`.
        inputs: shapes and dtypes of further maps, with the image axes last.

    Raises:
        UnsupportedError: for TorchScript, custom autograd functions, Python random numbers, data-dependent control
            flow and reads of tensors that were changed through a view.
    """
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise UnsupportedError(f"module '{name}' is TorchScript; give the plain eager module")
        if isinstance(module, nn.modules.lazy.LazyModuleMixin) and module.has_uninitialized_params():  # pyright: ignore
            raise UnsupportedError(f"module '{name}' is lazy; run the model once before")
    device = torch.device(device)
    fake = FakeTensorMode(allow_non_fake_inputs=False)
    recorder = _Recorder(model, fake, device)
    dice = random.getstate(), np.random.get_state()
    with torch.inference_mode(False), torch.no_grad(), fake, enable_python_dispatcher():
        image = torch.empty(shape, dtype=dtype, device=device)
        recorder.program.image = recorder.new_value(image)
        further = [torch.empty(tuple(size), dtype=kind, device=device) for size, kind in inputs]
        recorder.program.inputs = tuple(recorder.new_value(tensor) for tensor in further)
        # One would be recorded by its forward alone and lose its own backward.
        custom = refuse_custom_functions(
            lambda name: UnsupportedError(
                f"{place(''.join(recorder.path[-1:]), _line())} calls the custom "
                f"autograd.Function '{name}', whose backward cannot be recorded; use the plain PyTorch form of it"
            )
        )
        norms = cumulative_averages(model), synchronized_norms(recorder)
        plain = torch.compiler.set_stance("force_eager")  # what is compiled is recorded as what it was compiled from
        with attributes_kept(model), module_paths(model, recorder.path), norms[0], norms[1], custom, plain, recorder:
            try:
                result = (model if call is None else call)(image, *further)  # a module may have no truth value
            except (DataDependentOutputException, DynamicOutputShapeException) as error:
                raise UnsupportedError(
                    f"{recorder.last} takes a Python value or a shape from the image ({error.func}); "  # pyright: ignore
                    "such data-dependent control flow cannot be recorded"
                ) from error
            except RuntimeError:
                if recorder.leak is not None:  # a scripted function wraps what is raised inside of it
                    raise recorder.leak from None
                raise
        program = recorder.finish(result)
    state = np.random.get_state()
    if random.getstate() != dice[0] or any(
        not np.array_equal(a, b)
        for a, b in zip(state, dice[1], strict=True)  # pyright: ignore
    ):
        raise UnsupportedError(
            "the model's forward draws Python or numpy random numbers, so it is another program at each call; "
            "draw them with torch"
        )
    return program
