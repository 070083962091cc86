"""Families of ops by name; an op in none of them is a barrier.

Names are the last part of the public name without underscores, so `add`, `add_` and `__iadd__` are `add` and `iadd`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import resolve_name

from ..errors import MorphError
from ..lowering.ops import names

# Data movement: these ops run on the labels.
MOVE = frozenset(
    """
    view reshape view_as reshape_as flatten unflatten ravel squeeze unsqueeze permute transpose t T mT H swapaxes
    swapdims movedim moveaxis contiguous clone detach alias cat concat concatenate stack hstack vstack chunk split
    tensor_split unbind narrow select getitem flip fliplr flipud roll rot90 expand expand_as broadcast_to repeat tile
    repeat_interleave pixel_shuffle pixel_unshuffle channel_shuffle native_channel_shuffle index_select pad unfold
    diagonal adjoint split_with_sizes unsafe_chunk unsafe_split
    """.split()
)
# Ops of MOVE that pick by fixed indices: they fix the size of a channel axis.
PICKS = frozenset(
    """
    split tensor_split unbind narrow select getitem roll index_select repeat tile repeat_interleave unfold rot90
    diagonal split_with_sizes unsafe_split
    """.split()
)
CHUNKS = frozenset(["chunk", "unsafe_chunk"])

# Each output element is a function of the elements at the same (broadcast) position.
ELEMENTWISE = {*(name.strip("_") for name in names.ELEMENTWISE), "log_sigmoid", "rrelu", "fill", "zero"}
ELEMENTWISE -= {"data", "rand"}  # `torch.rand` is none, though `__rand__` is
# Ops of MOVE that move all of their tensors.
JOINS = frozenset("cat concat concatenate stack hstack vstack view_as reshape_as expand_as".split())
FACTORIES = frozenset("new_zeros new_ones new_full new_empty new_tensor".split())
DROPOUT = frozenset("dropout dropout1d dropout2d dropout3d alpha_dropout feature_dropout feature_alpha_dropout".split())
# Each output channel is a function of the same input channel along the image axes: op -> number of image axes.
SPATIAL = {
    **{f"{kind}_pool{n}d": n for kind in ("avg", "max", "lp", "adaptive_avg", "adaptive_max") for n in (1, 2, 3)},
    **{f"{kind}_pool{n}d_with_indices": n for kind in ("max", "adaptive_max", "fractional_max") for n in (1, 2, 3)},
}
RESIZE = frozenset("interpolate upsample upsample_nearest upsample_bilinear".split())
# Reductions and scans along given axes. Over channels, a mean is preserved if all channels are copied equally often,
# and a maximum always; the others need unchanged channels.
MEANS = frozenset(["mean"])
EXTREMES = frozenset("amax amin".split())
ROWS = frozenset(
    """
    mean amax amin sum max min prod std var std_mean var_mean norm logsumexp softmax log_softmax softmin cumsum cumprod
    argmax argmin all any median nansum nanmean count_nonzero normalize topk sort argsort aminmax logcumsumexp
    """.split()
)
# Convolutions: op -> number of image axes.
CONVOLUTIONS = {f"conv{kind}{n}d": n for kind in ("", "_transpose") for n in (1, 2, 3)}
# Products; with a stored matrix as one operand they are linear ops on channels.
PRODUCTS = frozenset("matmul mm rmatmul addmm einsum".split())
# Ops that return the transpose of a stored matrix.
TRANSPOSES = frozenset("t T mT transpose swapaxes swapdims permute".split())
# Variances; over channels they are a mean of squares if they divide by the count without a correction.
VARIANCES = frozenset("var std var_mean std_mean".split())
DECLARED: dict[str, str] = {}  # custom Functions by name -> "elementwise" or "channelwise", see `declare`
NORMS = frozenset("batch_norm instance_norm layer_norm group_norm rms_norm".split())

# Ops that read no values.
METADATA = frozenset(
    """
    size shape dim ndim ndimension numel nelement stride dtype device layout requires_grad len element_size itemsize
    nbytes get_device storage_offset names has_names grad grad_fn version hash untyped_storage storage
    retain_grad output_nr can_cast result_type promote_types requires_grad_ dim_order sym_size backward register_hook
    """.split()
)


def op_name(func: Callable[..., Any]) -> tuple[str, str]:
    """Return the name as in these families, and the name as written."""
    full = resolve_name(func) or getattr(func, "__name__", repr(func))
    written = full.removesuffix(".__get__").removesuffix(".__set__").rsplit(".", 1)[-1]
    return written.strip("_") or written, written


def writes(written: str) -> bool:
    """Return whether an op, by its name as written, changes its first tensor in place."""
    if not written.startswith("__"):
        return written.endswith("_")
    return written in ("__setitem__", "__imatmul__") or written in names.ASSIGNMENTS


def reads_no_values(name: str) -> bool:
    """Return whether the op reads only the shape, type or state of a tensor."""
    return name in METADATA or (name.startswith("is_") and name not in ("is_nonzero", "is_same_size"))


def declare(function: type[torch.autograd.Function], kind: str) -> None:
    """Declare how a custom Function maps its inputs, so that channels that pass through it can grow.

    Channels that meet an undeclared Function are frozen. The numeric check of each morph finds a wrong declaration if
    its random inputs expose it.

    Args:
        function: the subclass of `torch.autograd.Function` that the forward applies.
        kind: "elementwise": each element of the single output depends on the elements of the input tensors at the
            same (broadcast) position. "channelwise": the first tensor is a map (N, C, ...), and the single output has
            these channels on axis 1. Each output channel depends on that channel of the map and of the other tensors,
            which are vectors (C).

    Raises:
        MorphError: `function` is not a subclass of `torch.autograd.Function`, or `kind` is unknown.
    """
    if not (isinstance(function, type) and issubclass(function, torch.autograd.Function)):
        raise MorphError(f"{function!r} is not a subclass of torch.autograd.Function")
    if kind not in ("elementwise", "channelwise"):
        raise MorphError(f"unknown kind {kind!r}; choose from elementwise, channelwise")
    DECLARED[custom_name(function)] = kind


def custom_name(function: type) -> str:
    """Return the name of the Function in the trace."""
    return f"{function.__module__}.{function.__qualname__}"
