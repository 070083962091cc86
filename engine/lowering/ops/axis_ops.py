"""Rules of ops along one dimension: per pixel along channels; along an image axis a window, reductions or whole map.

`diff` along rows reads each row and the next ones. A mirror image reads the last row first, so no tile can compute it
before the map is complete: it needs the whole map. Joined to the map itself it is a padding (`padding.py`). A softmax
over the image, and a division by its norm, are reductions and a local op that reads their results.

A quantile is not a sum over tiles, so order statistics over the image need the whole map, which is stored.
Multiple-instance heads pool maps of one channel or a few in this form.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...capture.program import Op, Ref
from ..geometry import Gather, Window
from .base import (
    Block,
    Env,
    Local,
    Maps,
    Node,
    Reduction,
    Refusal,
    Whole,
    arguments,
    axes_after,
    dimensions,
    integers,
    part_of,
    replay,
    rule,
)
from .padding import circular_pad
from .pointwise import aligned_axes, only_maps
from .promote import mapped, promoted, vector
from .reductions import ReductionCall, root, shifted_exp, squared, wide


def _per_pixel(op: Op, maps: Maps, value: int) -> Local:
    return Local(op, {value: maps.pointwise(value)}, (maps.axes[value],) * len(op.outputs), replay(op))


@rule("sort", "argsort", "msort", "cumprod", "cummax", "cummin")
def ordered(op: Op, maps: Maps) -> Local | Whole:
    value = op.inputs[0]
    given = arguments(op, "input dim" if op.name != "msort" else "input", dim=-1 if "sort" in op.name else None)
    dim = 0 if op.name == "msort" else given["dim"]
    if dim % len(maps.shape(value)) in maps.axes[value]:
        raise Refusal(f"'{op.name}' cannot run along an image axis; pool over that axis first")
    return _per_pixel(op, maps, value)


@rule("softmax", "log_softmax", "softmin", "normalize", "glu", "cumsum", "flip", "logcumsumexp")
def along_dims(op: Op, maps: Maps) -> Local | list[Node]:
    """Ops along given dimensions that preserve the rank: per pixel if no image axis is among them."""
    value = op.inputs[0]
    given: dict[str, Any] = {}
    if op.name == "flip":
        dims = integers(op, "dims")
    elif op.name == "normalize":
        given = arguments(op, "input p dim eps", p=2.0, dim=1, eps=1e-12)
        dims = given["dim"]
    else:
        given = arguments(op, "input dim", dim=-1 if op.name == "glu" else None)
        dims = given["dim"]
    if dims is None:
        raise Refusal(f"'{op.name}' needs a dimension; name it with dim=")
    only_maps(op, maps, value)
    dims, axes = dimensions(dims, len(maps.shape(value))), set(maps.axes[value])
    if not set(dims) & axes:
        return _per_pixel(op, maps, value)
    if op.name == "normalize" and given["p"] == 2 and given.get("out") is None:
        return normalize_over_image(op, maps, value, dims, given["eps"])
    if set(dims) <= axes and op.name in ("softmax", "log_softmax"):
        return softmax_over_image(op, maps, value, dims[0], op.name == "log_softmax")
    if op.name == "flip" and len(dims) == 1 and value not in maps.flat:
        maps.mirrors[op.outputs[0]] = value, dims[0]
    return [Whole(op)]


@rule("diff")
def diff(op: Op, maps: Maps) -> Local:
    """Differences of neighbours: per pixel along channels, a window of n + 1 along rows."""
    given = arguments(op, "input n dim prepend append", n=1, dim=-1)
    value, n = op.inputs[0], given["n"]
    shape, axes = maps.shape(value), maps.axes[value]
    dim = given["dim"] % len(shape)
    if given["prepend"] is not None or given["append"] is not None:
        raise Refusal("'diff' with prepend or append is not supported; join them with torch.cat first")
    if dim not in axes:
        return _per_pixel(op, maps, value)
    if value in maps.flat:
        raise Refusal("'diff' cannot run along the positions of a flattened map; call it before flattening")
    reads = list(maps.pointwise(value))
    reads[axes.index(dim)] = Window(shape[dim], shape[dim] - n, n + 1)

    def run(env: Env, _block: Block) -> tuple[Tensor, ...]:
        return (torch.diff(env[value], n, dim),)

    return Local(op, {value: (reads[0], reads[1])}, (axes,), run)


@rule("cosine_similarity")
def cosine_similarity(op: Op, maps: Maps) -> Local | list[Node]:
    """Cosine similarity of the channels of two maps, or of a map and a vector."""
    given = arguments(op, "x1 x2 dim", dim=1)
    rank = max(len(maps.shape(v)) for v in op.inputs)
    axes, dim = aligned_axes(op, maps, rank), given["dim"] % rank
    if dim in axes:
        raise Refusal(f"'{op.name}' cannot run along an image axis; pool the products and the squares")
    op, made = promoted(op, maps, axes, rank)
    after = axes_after(axes, (dim,), False)
    return [*made, Local(op, {v: maps.pointwise(v) for v in maps.inputs(op)}, (after,), replay(op))]


@rule("cdist")
def distances(op: Op, maps: Maps) -> Local:
    """Distances of the channels at each position, (..., positions, C), to the rows of a codebook, (..., rows, C)."""
    given = arguments(op, "x1 x2 p compute_mode", p=2.0, compute_mode="use_mm_for_euclid_dist_if_necessary")
    value, table = given["x1"], given["x2"]
    rank = len(maps.shape(op.outputs[0]))
    axes = (rank - 2, rank - 2)
    if maps.axes.get(value.value) != axes or len(maps.shape(value.value)) != rank or table.value in maps:
        raise Refusal(
            "'cdist' cannot compare positions of the image with each other; pass (N, positions, C) and a table"
        )
    if given["compute_mode"] == "use_mm_for_euclid_dist_if_necessary":  # PyTorch decides by the rows of the whole map
        many = max(maps.shape(value.value)[-2], maps.shape(table.value)[-2]) > 25
        given["compute_mode"] = f"{'' if many else 'donot_'}use_mm_for_euclid_dist"
    own = replace(op, args=(), kwargs=given)
    return Local(own, {value.value: maps.pointwise(value.value)}, (axes,), replay(own))


@rule("roll")
def roll(op: Op, maps: Maps) -> Local | Whole | list[Node]:
    """Roll of rows and columns: a circular padding on one side and a crop on the other."""
    given = arguments(op, "input shifts dims")
    value = op.inputs[0]
    shape, axes = maps.shape(value), maps.axes[value]
    shifts, dims = (tuple(n) if isinstance(n, (tuple, list)) else (n,) for n in (given["shifts"], given["dims"]))
    if dims in ((), (None,)):
        raise Refusal("'roll' needs a dimension; name it with dims=")
    dims = [d % len(shape) for d in dims]
    if not set(dims) & set(axes):
        return _per_pixel(op, maps, value)
    if value in maps.flat or not set(dims) <= set(axes) or len(set(dims)) < len(dims):
        return Whole(op)
    steps = [dict(zip(dims, shifts, strict=True)).get(axis, 0) % shape[axis] for axis in axes]
    steps = [
        n - shape[axis] if 2 * n > shape[axis] else n for n, axis in zip(steps, axes, strict=True)
    ]  # the shorter direction
    amounts = [amount for n in steps for amount in (max(n, 0), max(-n, 0))]
    longer = list(shape)
    for n, axis in zip(steps, axes, strict=True):
        longer[axis] += abs(n)
    padded = maps.new_value(longer, like=value)
    nodes = circular_pad(replace(op, outputs=(padded,)), maps, value, (amounts[0], amounts[1], amounts[2], amounts[3]))
    rows, cols = (Window(longer[a], shape[a], pad=min(n, 0)) for n, a in zip(steps, axes, strict=True))
    own = replace(op, name="rolled", args=(), kwargs={}, inputs=(padded,))
    return [*nodes, Local(own, {padded: (rows, cols)}, (axes,), lambda env, _block: (env[padded],))]


@rule("rot90", "fliplr", "flipud")
def rotate_or_flip(op: Op, maps: Maps) -> Local | Whole:
    value = op.inputs[0]
    rank, axes = len(maps.shape(value)), maps.axes[value]
    given = arguments(op, "input k dims", k=1, dims=(0, 1))
    dims = {"fliplr": (1,), "flipud": (0,)}.get(op.name) or dimensions(given["dims"], rank)
    if set(dims) & set(axes):
        return Whole(op)
    return _per_pixel(op, maps, value)


def softmax_over_image(op: Op, maps: Maps, value: int, dim: int, logarithm: bool) -> list[Node]:
    """Softmax along an image axis, or along the positions of a flattened map."""
    call = ReductionCall(op, maps, value, (dim,), {"keepdim": True})
    nodes, made, top, total = shifted_exp(call, torch.Tensor.detach)
    dtype = call.dtype
    found, sums = call.keepdim_result(total)
    if logarithm:
        more, most = call.keepdim_result(top)

        def finish(x: Tensor, most: Tensor, sums: Tensor) -> Tensor:
            return (x.to(sums.dtype) - most.detach() - sums.log()).to(dtype)

        last, _ = mapped(op, maps, "log_softmax", (value,), finish, dtype, (most, sums), call.output)
        return [*nodes, *found, *more, last]
    last, _ = mapped(op, maps, "softmax", (made,), lambda e, sums: (e / sums).to(dtype), dtype, (sums,), call.output)
    return [*nodes, *found, last]


def normalize_over_image(op: Op, maps: Maps, value: int, dims: tuple[int, ...], eps: float) -> list[Node]:
    """x / max(|x|, eps) with the Euclidean norm over the image, or over one of its axes."""
    call = ReductionCall(op, maps, value, dims, {"keepdim": True})
    own, dtype = wide(maps.program.values[value].dtype), call.dtype
    local, made = call.mapped("square", lambda x: squared(x.to(own)), own)
    sizes = [1 if d in call.dims else n for d, n in enumerate(call.shape)]
    total, length = (maps.new_value(sizes, own, like=value) for _ in range(2))
    scale = vector((total,), length, lambda t: root(t).clamp_min(eps))
    found, norms = call.keepdim_result(length)
    last, _ = mapped(op, maps, "normalized", (value,), lambda x, n: (x / n).to(dtype), dtype, (norms,), call.output)
    return [local, call.reduce(made, "sum", total, keepdim=True), scale, *found, last]


@rule("median", "nanmedian", "quantile", "nanquantile", "mode")
def quantile(op: Op, maps: Maps) -> Local | Whole:
    value = op.inputs[0]
    quantiles = "quantile" in op.name
    dim = -1 if op.name == "mode" else None
    given = arguments(op, "input q dim keepdim" if quantiles else "input dim keepdim", dim=dim, keepdim=False)
    asked = given.get("q")
    only_maps(op, maps, value)
    dims = dimensions(given["dim"], len(maps.shape(value)))
    if set(dims) & set(maps.axes[value]):
        return Whole(op)
    h, w = axes_after(maps.axes[value], dims, given["keepdim"])
    if isinstance(asked, Ref) and maps.shape(asked.value):  # several quantiles: a new first dimension
        h, w = h + 1, w + 1
    return Local(op, {value: maps.pointwise(value)}, ((h, w),) * len(op.outputs), replay(op))


@rule("topk", "kthvalue")
def largest(op: Op, maps: Maps) -> Local | Whole:
    """The largest values along a dimension."""
    value = op.inputs[0]
    only_maps(op, maps, value)
    given = arguments(op, "input k dim keepdim", dim=-1, keepdim=False)
    dim = given["dim"] % len(maps.shape(value))
    if dim in maps.axes[value]:
        return Whole(op)
    axes = maps.axes[value] if op.name == "topk" else axes_after(maps.axes[value], (dim,), bool(given["keepdim"]))
    return Local(op, {value: maps.pointwise(value)}, (axes,) * 2, replay(op))


def _one(value: object) -> object:
    return value[0] if isinstance(value, (tuple, list)) and len(value) == 1 else value


@rule("avg_pool1d")
def avg_pool1d(op: Op, maps: Maps) -> Local | list[Node]:
    """Along the positions of a flattened map in row-major order (NextViT's keys): runs that do not overlap.

    A run of k positions is part of a row, or several rows and parts of two. All runs are few values, so each tile adds
    its part of every run. Along another dimension: per pixel.
    """
    given = arguments(op, "input kernel_size stride padding ceil_mode", padding=0, ceil_mode=False)
    value, length = given["input"].value, _one(given["kernel_size"])
    rank, axes = len(maps.shape(value)), maps.axes[value]
    if rank - 1 not in axes:
        return Local(op, {value: maps.pointwise(value)}, (axes,), replay(op))
    stride = _one(given["stride"]) or length
    if value not in maps.flat or maps.merged(value):
        raise Refusal("'avg_pool1d' cannot run along one image axis; use avg_pool2d")
    if stride != length or _one(given["padding"]) != 0 or given["ceil_mode"]:
        raise Refusal("'avg_pool1d' along positions of the image must have no padding and no overlapping windows")
    assert isinstance(length, int)
    return _of_runs(op, maps, value, length)


def _of_runs(op: Op, maps: Maps, value: int, length: int) -> list[Node]:
    """The nodes of a pooling: a channel with the run of each position, the sums of runs, and their means."""
    height, width = maps.size(value)
    *batch, channels, positions = maps.shape(value)
    runs, dtype = positions // length, maps.program.values[op.outputs[0]].dtype
    own = wide(maps.program.values[value].dtype)
    if runs + 1 > 1 / torch.finfo(own).eps:
        raise Refusal(f"'avg_pool1d' makes more than {runs} runs of positions, too many to be numbered in {own}")
    shape = *batch, channels + 1, positions
    with_runs = maps.new_map(maps.axes[value], shape, own, like=value, flat=maps.flat[value])

    def append_runs(env: Env, block: Block) -> tuple[Tensor, ...]:
        x = env[value].to(own)
        rows, cols = (torch.arange(*span, device=x.device) for span in (block.rows, block.cols))
        run = torch.div((rows[:, None] * width + cols).flatten(), length, rounding_mode="floor")
        return (torch.cat([x, run.to(own).expand(*x.shape[:-2], 1, -1)], -2),)

    def sums(block: Tensor) -> Tensor:
        x = block.flatten(-2)
        run = x[..., -1, :].detach().reshape(-1, x.shape[-1])[0].long()
        total = x.new_zeros(*x.shape[:-2], channels, runs + 1)  # the last run is incomplete
        return total.index_add(-1, run, x[..., :-1, :])[..., :runs]

    # Gathers, though each position reads itself: the values of a block depend on its position.
    reads = Gather(height, height, tuple(range(height))), Gather(width, width, tuple(range(width)))
    named = part_of(op, "runs", (value,), (with_runs,))
    total = maps.new_value(dtype=own, like=op.outputs[0])
    return [
        Local(named, {value: reads}, (maps.axes[with_runs],), append_runs),
        Reduction(op, with_runs, "sum", 1, (), True, outputs=(total,), form=sums),
        vector((total,), op.outputs[0], lambda t: (t / length).to(dtype)),
    ]
