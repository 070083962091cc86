"""The private names of PyTorch that the engine uses; no other file of the engine has one (tests/gates.py).

PyTorch may remove a private name in any release. The import of this file does not fail then: another way replaces the
name, or an object that raises one clear error on its first use. `missing_names` looks for all of them, for ``gigamorph
doctor``. The kernels have a file of their own, `kernels/torch_private.py`.
"""

from __future__ import annotations

import functools
import getpass
import importlib
import os
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from types import CodeType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .errors import UnsupportedError
from .versions import TESTED

BEFORE_2_13 = torch.__version__ < "2.13"  # a TorchVersion, which compares as a version
_REFUSED = "what needs it raises an error"

try:
    getpass.getuser()
except (KeyError, OSError):  # a container's uid without an account: PyTorch 2.12 cannot name its folder of caches
    os.environ["LOGNAME"] = f"uid{os.getuid()}"


@dataclass(frozen=True)
class PrivateName:
    """A private name of PyTorch.

    Attributes:
        path: the name, from ``torch`` on.
        purpose: what gigamorph uses it for.
        without: what happens if PyTorch does not have it.
        look: finds it, if the path does not.
    """

    path: str
    purpose: str
    without: str = _REFUSED
    look: Callable[[], Any] | None = None

    def find(self) -> Any:
        """The object.

        Raises:
            UnsupportedError: the installed PyTorch does not have it.
        """
        try:
            return self.look() if self.look is not None else pkgutil.resolve_name(self.path)
        except (ImportError, AttributeError):
            raise self.error() from None

    def find_or(self, otherwise: Any) -> Any:
        """The object, or `otherwise` if the installed PyTorch does not have it."""
        try:
            return self.find()
        except UnsupportedError:
            return otherwise

    def error(self) -> UnsupportedError:
        tested = TESTED["torch"]
        return UnsupportedError(
            f"PyTorch {torch.__version__} has no {self.path}, which gigamorph needs to {self.purpose}; install torch "
            f"{tested.oldest} to {tested.newest}, with which it is tested"
        )


_NONE = object()
NAMES: dict[str, PrivateName] = {}
"""All names, by path."""


def missing_names() -> list[PrivateName]:
    """The names that the installed PyTorch does not have."""
    return [name for name in NAMES.values() if name.find_or(_NONE) is _NONE]


class _Missing:
    """Stands for a name that PyTorch does not have; every use raises the name's error."""

    def __init__(self, name: PrivateName):
        self.__dict__["_name"] = name

    def __getattr__(self, attribute: str) -> Any:
        raise AttributeError(attribute) if attribute.startswith("__") else self._name.error()

    def __call__(self, *_args: Any, **_kwargs: Any) -> Any:
        raise self._name.error()

    def __instancecheck__(self, _instance: Any) -> bool:
        raise self._name.error()

    def __mro_entries__(self, _bases: Any) -> tuple[type, ...]:
        return (_of_missing(self._name),)


def _of_missing(name: PrivateName) -> type:
    def __init__(*_args: Any, **_kwargs: Any) -> None:  # noqa: N807
        raise name.error()

    return type(name.path.rpartition(".")[2], (), {"__init__": __init__})


def _name(path: str, purpose: str, without: str = _REFUSED) -> PrivateName:
    name = NAMES[path] = PrivateName(path, purpose, without)
    return name


def _private(path: str, purpose: str, without: str = _REFUSED, otherwise: Any = _NONE) -> Any:
    """The object of this name; `otherwise`, or an object whose use raises an error, if PyTorch does not have it."""
    name = _name(path, purpose, without)
    return name.find_or(_Missing(name) if otherwise is _NONE else otherwise)


def _checked(
    path: str,
    purpose: str,
    function: Callable[..., Any],
    example: Callable[[], tuple[Any, ...]],
    is_right: Callable[[Any], bool] = lambda _result: True,
) -> Any:
    """A function that uses an attribute of an object, tried on an example."""

    def find() -> Any:
        if not is_right(function(*example())):
            raise AttributeError(path)
        return function

    name = NAMES[path] = PrivateName(path, purpose, _REFUSED, find)
    return name.find_or(_Missing(name))


class _Identity(torch.autograd.Function):
    @staticmethod
    def forward(_ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(_ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


def _product() -> Any:
    """A node of autograd that saves two tensors."""
    with torch.enable_grad():
        return (torch.ones(1, requires_grad=True) * torch.ones(1, requires_grad=True)).grad_fn


if TYPE_CHECKING:
    from torch._dispatch.python import enable_python_dispatcher as enable_python_dispatcher
    from torch._ops import HigherOrderOperator as HigherOrderOperator
    from torch._prims_common import suggest_memory_format as suggest_memory_format
    from torch._subclasses.fake_tensor import FakeTensor as FakeTensor
    from torch._subclasses.fake_tensor import FakeTensorMode as FakeTensorMode
    from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm
    from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode
    from torch.utils._python_dispatch import _disable_current_modes as without_dispatch_modes
    from torch.utils._pytree import TreeSpec as TreeSpec
    from torch.utils._pytree import tree_flatten as tree_flatten
    from torch.utils._pytree import tree_leaves as tree_leaves
    from torch.utils._pytree import tree_map as tree_map
    from torch.utils._pytree import tree_map_only as tree_map_only
    from torch.utils._pytree import tree_unflatten as tree_unflatten
else:
    _TREE = "torch.utils._pytree."
    _ARGUMENTS = "find tensors in nested arguments and results"
    TreeSpec = _private(_TREE + "TreeSpec", _ARGUMENTS)
    tree_flatten = _private(_TREE + "tree_flatten", _ARGUMENTS)
    tree_leaves = _private(_TREE + "tree_leaves", _ARGUMENTS)
    tree_map = _private(_TREE + "tree_map", _ARGUMENTS)
    tree_map_only = _private(_TREE + "tree_map_only", _ARGUMENTS)
    tree_unflatten = _private(_TREE + "tree_unflatten", _ARGUMENTS)

    _FAKE = "torch._subclasses.fake_tensor."
    _SHAPES = "record and plan with tensors that have shapes and no memory"
    FakeTensor = _private(_FAKE + "FakeTensor", _SHAPES)
    FakeTensorMode = _private(_FAKE + "FakeTensorMode", _SHAPES)

    _DISPATCH = "torch.utils._python_dispatch."
    TorchDispatchMode = _private(_DISPATCH + "TorchDispatchMode", "see the ops of a computation")
    without_dispatch_modes = _private(_DISPATCH + "_disable_current_modes", "compute real values inside a recording")
    enable_python_dispatcher = _private("torch._dispatch.python.enable_python_dispatcher", _SHAPES)
    HigherOrderOperator = _private("torch._ops.HigherOrderOperator", "recognise torch.cond and similar operators")
    suggest_memory_format = _private(
        "torch._prims_common.suggest_memory_format", "plan for maps in channels-last memory"
    )
    BatchNorm = torch.nn.BatchNorm2d.__base__  # of all BatchNorm layers

without_torch_functions = _private(
    "torch._C.DisableTorchFunction", "run code outside of the caller's TorchFunctionMode"
)

# Modes of the caller. Dispatch modes are removed during a recording and active while tiles are computed.
_dispatch_modes = _private(
    "torch.utils._python_dispatch._get_current_dispatch_mode_stack", "record under the caller's TorchDispatchMode"
)
function_modes = _private(
    "torch.overrides._get_current_function_mode_stack", "compute under the caller's TorchFunctionMode"
)
"""The caller's active `TorchFunctionMode`s, the innermost last."""


def dispatch_modes() -> list[Any]:
    """The caller's active `TorchDispatchMode`s, without those of PyTorch's own machinery."""
    return [mode for mode in _dispatch_modes() if not mode.is_infra_mode()]


# Autograd.
_top_hooks = _private("torch._C._autograd._top_saved_tensors_default_hooks", "notice hooks on saved tensors")
why_no_saved_tensors_hooks = _private(
    "torch._C._autograd._saved_tensors_hooks_get_disabled_error_message", "notice that saved-tensor hooks are disabled"
)
enable_saved_tensors_hooks = _private(
    "torch._C._autograd._saved_tensors_hooks_enable", "end disable_saved_tensors_hooks after an error"
)
_checkpoint = _private("torch.utils.checkpoint._checkpoint_hook", "recognise torch.utils.checkpoint")
keeps_graph = _private(
    "torch._C._autograd._get_current_graph_task_keep_graph",
    "free stored maps after a backward",
    "stored maps are kept until the next forward, as with retain_graph=True",
    lambda: True,
)


def saved_tensors_hooks() -> Any:
    """The innermost active hooks on saved tensors, (pack, unpack); None if there are none."""
    return _top_hooks(True)


def inside_checkpoint() -> bool:
    """Whether the innermost hooks on saved tensors are those of `torch.utils.checkpoint`."""
    hooks = saved_tensors_hooks()
    return hooks is not None and getattr(hooks[0], "__qualname__", "").startswith(f"{_checkpoint.__name__}.")


# Nodes of autograd's graph.
_NODE = "torch.autograd.graph.Node."
_ORDER = "call tensor hooks in the order of stock PyTorch"
sequence_number = _checked(_NODE + "_sequence_nr", _ORDER, lambda node: node._sequence_nr(), lambda: (_product(),))
set_sequence_number = _checked(
    _NODE + "_set_sequence_nr",
    _ORDER,
    lambda node, number: node._set_sequence_nr(number),
    lambda: (_product(), 1 << 20),
)
function_of = _checked(
    "torch.autograd.Function._forward_cls",
    "know the class of a node that an autograd.Function made",
    lambda node: type(node)._forward_cls,
    lambda: (_Identity.apply(torch.ones(1, requires_grad=True)).grad_fn,),  # pyright: ignore
)


def _saved_values(node: Any) -> list[Any]:
    return [getattr(node, name) for name in dir(node) if name.startswith("_saved_")]


_saved_by = _checked(
    _NODE + "_saved_self",
    "notice that an earlier backward has freed a node",
    _saved_values,
    lambda: (_product(),),
    lambda values: len(values) == 2,
)


def is_used_up(node: Any) -> bool:
    """Whether an earlier backward freed the node's saved tensors."""
    try:
        _saved_by(node)
    except UnsupportedError:
        raise
    except RuntimeError:
        return True
    return False


after_backward = _private(
    "torch.autograd.Variable._execution_engine.queue_callback",
    "allocate the blocks of a backward on the whole image from the arena",
    "such a backward is slower",
    None,
)

# Tensors.
foreach_copy = _private(
    "torch._foreach_copy_",
    "copy many tensors at once",
    "they are copied one by one",
    lambda targets, sources: [target.copy_(source) for target, source in zip(targets, sources, strict=True)],
)
foreach_zero = _private(
    "torch._foreach_zero_",
    "clear many tensors at once",
    "they are cleared one by one",
    lambda tensors: [tensor.zero_() for tensor in tensors],
)


memory_of = _checked(
    "torch.UntypedStorage._cdata",
    "recognise tensors that share memory",
    lambda tensor: tensor.untyped_storage()._cdata,
    lambda: (torch.empty(0),),
)
"""A number for the memory of a tensor, which its views share; `data_ptr` does not exist for fake tensors."""

# Operators.
_SLOWER = "inference is slower on a CPU"
reorder_convolution_weight = _private(
    "torch.ops.mkldnn._reorder_convolution_weight", "pack weights for oneDNN", _SLOWER, None
)
convolution_pointwise = _private(
    "torch.ops.mkldnn._convolution_pointwise", "compute convolutions and activations by oneDNN", _SLOWER, None
)
cpu_attention = _private(
    "torch.ops.aten._scaled_dot_product_flash_attention_for_cpu", "plan the memory of attention on a CPU"
)
resolve_process_group = _private(
    "torch.distributed.distributed_c10d._resolve_process_group", "share the statistics of SyncBatchNorm"
)

# TorchDynamo, whose import takes a second.
_CONFIG = _name("torch._dynamo.config", "configure TorchDynamo")
_STANCE = _name("torch._dynamo.eval_frame._stance", "notice torch.compiler.set_stance", "a stance is not reported")
_RESET = _name(
    "torch._dynamo.eval_frame.reset_code", "free recordings", "recordings of deleted networks stay in memory"
)
_STATIC = _name("torch._dynamo.mark_static", "record each image size separately")
_ERROR = _name("torch._dynamo.exc.TorchDynamoException", "recognise errors of TorchDynamo")
_LIMIT = _name("torch._dynamo.exc.FailOnRecompileLimitHit", "notice that too many recordings are stored")
_BACKEND = _name(
    "torch._C._select_conv_backend",
    "record convolutions for all sizes at once",
    "each image size may be recorded separately",
)


def dynamo(name: str) -> Any:
    """A module of TorchDynamo."""
    return importlib.import_module(f"torch._dynamo.{name}")


@functools.cache
def dynamo_config() -> Any:
    return _CONFIG.find()


_FUNCTORCH = _name(
    "torch._functorch.config", "limit what a compiled forward of stock stores", "gigamorph bench front lacks these rows"
)


def functorch_config() -> Any:
    return _FUNCTORCH.find()


def stance() -> str:
    """The current `torch.compiler.set_stance`."""
    found = _STANCE.find_or(None)
    return "default" if found is None else found.stance


def reset_code(code: CodeType) -> None:
    """Free the recordings of a code object."""
    _RESET.find_or(lambda _code: None)(code)


def mark_static(tensor: Tensor) -> None:
    """Mark the sizes of a tensor as constants of a recording."""
    _STATIC.find()(tensor)


def dynamo_error() -> type[Exception]:
    """The base class of TorchDynamo's errors."""
    return _ERROR.find()


def recompile_limit_error() -> type[Exception]:
    """The class of the error for a code object with too many recordings."""
    return _LIMIT.find()


def replace_conv_backend(wrap: Callable[[Any], Any]) -> None:
    """Replace the function that chooses the backend of a convolution by a wrapped one."""
    select = _BACKEND.find_or(None)
    if select is not None:
        torch._C._select_conv_backend = wrap(select)  # pyright: ignore[reportAttributeAccessIssue]
