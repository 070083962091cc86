"""Rules of contractions that name their dimensions: einsum, tensordot, mm; and conv1d.

Every dimension of every operand has a label. The labels of the image axes decide how a contraction is computed:

    nchw,oc->nohw     both are in the result: per pixel, a 1x1 convolution
    nchw,ndhw->ncd    both are summed: a sum over tiles (Gram matrices, class activation, attention pooling); factors
                      that do not depend on the position are multiplied afterwards
    nchw,vw->nchv     one is summed, or they meet positions of another map: needs the whole map
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from string import ascii_letters

import torch
from torch import Tensor

from ...capture.program import Op
from .attention import take_whole
from .base import Block, Env, Local, Maps, Node, Reduction, Refusal, VectorOp, Whole, arguments, part_of, replay, rule
from .promote import promoted, vector

Term = list[str]  # one label for each dimension


@rule("einsum")
def einsum(op: Op, maps: Maps) -> Local | Whole | list[Node]:
    equation, *operands = op.args
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = list(operands[0])
    values = [ref.value for ref in operands]
    terms, output = labels(equation, [len(maps.shape(v)) for v in values])
    return contraction(op, maps, values, terms, output)


def labels(equation: str, ranks: Sequence[int]) -> tuple[list[Term], Term]:
    """The labels of the operands and of the result; those of an ellipsis are numbers, counted from the last one."""
    left, arrow, right = equation.replace(" ", "").replace("...", ".").partition("->")
    terms: list[Term] = []
    for term, rank in zip(left.split(","), ranks, strict=True):
        more = rank - len(term) + 1
        terms.append([x for label in term for x in (map(str, range(more, 0, -1)) if label == "." else label)])
    longest = max((sum(x.isdigit() for x in term) for term in terms), default=0)
    dots = [str(i) for i in range(longest, 0, -1)]
    if arrow:
        return terms, [x for label in right for x in (dots if label == "." else label)]
    every = [x for term in terms for x in term if not x.isdigit()]
    return terms, [*dots, *sorted(x for x in set(every) if every.count(x) == 1)]


@rule("tensordot")
def tensordot(op: Op, maps: Maps) -> Local | Whole | list[Node]:
    given = arguments(op, "a b dims out", dims=2)
    values, dims = [given["a"].value, given["b"].value], given["dims"]
    if given["out"] is not None:
        raise Refusal("'tensordot' cannot write to out=; drop that argument")
    ranks = [len(maps.shape(v)) for v in values]
    if isinstance(dims, int):
        dims = list(range(ranks[0] - dims, ranks[0])), list(range(dims))
    pairs = zip(*([dims[i]] if isinstance(dims[i], int) else dims[i] for i in (0, 1)), strict=True)
    terms = [[f"{side}{d}" for d in range(rank)] for side, rank in zip("ab", ranks, strict=True)]
    contracted = set()
    for a, b in pairs:
        contracted.add(terms[0][a])
        terms[1][b] = terms[0][a]
    return contraction(op, maps, values, terms, [x for term in terms for x in term if x not in contracted])


@rule("mm", "spmm", "mv")
def mm(op: Op, maps: Maps) -> Local | Whole | list[Node]:
    """Dynamo records `torch.mm` as `torch.spmm`, which is the same function."""
    values = [arg.value for arg in (*op.args, *op.kwargs.values())][:2]
    right = ["k"] if op.name == "mv" else ["k", "j"]
    return contraction(op, maps, values, [["i", "k"], right], ["i", *right[1:]])


@rule("addmm")
def addmm(op: Op, maps: Maps) -> Local:
    """A product with one matrix for all positions, plus a bias, where positions are rows."""
    left = arguments(op, "input mat1 mat2")["mat1"].value
    if maps.inputs(op) != [left] or maps.axes[left] != (0, 0) or maps.shape(op.args[0].value)[:-1] not in ((), (1,)):
        raise Refusal("'addmm' cannot contract positions of the image; use a product and a sum")
    return Local(op, {left: maps.pointwise(left)}, ((0, 0),), replay(op))


def contraction(
    op: Op, maps: Maps, values: Sequence[int], terms: Sequence[Term], output: Term
) -> Local | Whole | list[Node]:
    """A sum of products over all labels that are not in the output.

    Args:
        values: value numbers of the operands.
        terms: their labels.
        output: the labels of the result.
    """
    values, terms = list(values), [list(term) for term in terms]
    found = {tuple(terms[i][axis] for axis in maps.axes[v]) for i, v in enumerate(values) if v in maps}
    extents = {maps.extent(v) for v in values if v in maps}
    if len(found) > 1:
        return _with_whole_operands(op, maps, values, terms, output)
    image = found.pop()
    if len(extents) > 1 or any(term.count(x) > 1 for term in terms for x in image):
        return Whole(op)
    first = next(v for v in values if v in maps)
    if maps.program.values[first].dtype.is_complex:
        return Whole(op)
    nodes: list[Node] = []
    for i, value in enumerate(values):
        if value in maps or not set(image) & set(terms[i]):
            continue
        terms[i] = [*(x for x in dict.fromkeys(image) if x not in terms[i]), *terms[i]]
        axes = terms[i].index(image[0]), terms[i].index(image[1])
        own = replace(op, args=(), kwargs={}, inputs=(value, first))
        own, made = promoted(own, maps, axes, len(terms[i]), among=(value,))
        values[i], nodes = own.inputs[0], [*nodes, *made]
        if not made:  # of size one: it is broadcast over the image
            keep = [d for d, x in enumerate(terms[i]) if x not in image]
            values[i] = maps.new_value([maps.shape(value)[d - len(terms[i])] for d in keep], like=value)
            nodes.append(vector((value,), values[i], partial(torch.reshape, shape=maps.shape(values[i]))))
            terms[i] = [terms[i][d] for d in keep]
    if set(image) <= set(output):
        return [*nodes, _per_pixel(op, maps, values, terms, output, image)]
    if set(image) & set(output):
        return Whole(op)
    return [*nodes, *_summed(op, maps, values, terms, output, image)]


def _with_whole_operands(op: Op, maps: Maps, values: list[int], terms: list[Term], output: Term) -> Whole | list[Node]:
    """The operand whose positions remain in the result is computed by tile; the others are read whole."""
    of_maps = [i for i, v in enumerate(values) if v in maps]
    image = {i: {terms[i][axis] for axis in maps.axes[values[i]]} for i in of_maps}
    stays = next((i for i in of_maps if image[i] <= set(output)), None)
    if stays is None or any(image[i] & image[stays] for i in of_maps if image[i] != image[stays]):
        return Whole(op)
    others = [values[i] for i in of_maps if image[i] != image[stays]]
    if any(values[i] in others or maps.merged(values[i]) for i in of_maps if image[i] == image[stays]):
        return Whole(op)
    own, nodes = take_whole(op, maps, others)
    names = dict(zip(op.inputs, own.inputs, strict=True))
    made = contraction(own, maps, [names.get(v, v) for v in values], terms, output)
    return [*nodes, *(made if isinstance(made, list) else [made])]


def _equation(terms: Sequence[Term], output: Term) -> str:
    letters = dict(zip(dict.fromkeys(x for term in terms for x in term), ascii_letters, strict=False))
    return ",".join("".join(letters[x] for x in term) for term in terms) + "->" + "".join(letters[x] for x in output)


def _per_pixel(
    op: Op, maps: Maps, values: Sequence[int], terms: Sequence[Term], output: Term, image: tuple[str, ...]
) -> Local:
    equation = _equation(terms, output)
    axes = output.index(image[0]), output.index(image[1])
    own = replace(op, args=(), kwargs={}, inputs=tuple(dict.fromkeys(values)))

    def run(env: Env, _block: Block) -> tuple[Tensor, ...]:
        return (torch.einsum(equation, *(env[v] for v in values)),)

    return Local(own, {v: maps.pointwise(v) for v in values if v in maps}, (axes,), run)


def _summed(
    op: Op, maps: Maps, values: Sequence[int], terms: Sequence[Term], output: Term, image: tuple[str, ...]
) -> list[Node]:
    """The maps' part, with all labels that are still needed, as a sum over tiles; the other factors in a vector op."""
    of_maps = [i for i, v in enumerate(values) if v in maps]
    rest = [i for i, v in enumerate(values) if v not in maps]
    wanted = {*output, *(x for i in rest for x in terms[i])}
    inner = [[x for x in terms[i] if x not in image] for i in of_maps]
    labels_of_sum = list(dict.fromkeys(x for term in inner for x in term if x in wanted))
    sizes = [[maps.shape(values[i])[d] for d, x in enumerate(terms[i]) if x not in image] for i in of_maps]
    joined, pair = _joined(op, maps, [values[i] for i in of_maps], [terms[i] for i in of_maps], image)
    info = maps.program.values[op.outputs[0]]
    length = dict.fromkeys(labels_of_sum, 1)
    for term, size in zip(inner, sizes, strict=True):
        length |= {x: max(length[x], n) for x, n in zip(term, size, strict=True) if x in length}
    own = torch.promote_types(info.dtype, torch.float32)
    total = maps.new_value([length[x] for x in labels_of_sum], own, like=op.outputs[0])
    product = _equation([[*term, "position"] for term in inner], labels_of_sum)
    counts = [torch.Size(size).numel() for size in sizes]

    def form(block: Tensor) -> Tensor:
        x = block.flatten(1).to(torch.promote_types(block.dtype, torch.float32))
        parts = [part.reshape(*size, -1) for part, size in zip(x.split(counts), sizes, strict=True)]
        with torch.autocast(block.device.type, enabled=False):
            return torch.einsum(product, *parts)

    behind = _equation([labels_of_sum, *(terms[i] for i in rest)], output)
    vectors = [values[i] for i in rest]

    def finish(env: Env) -> tuple[Tensor, ...]:
        return (torch.einsum(behind, env[total], *(env[v].to(own) for v in vectors)).to(info.dtype),)

    reduction = Reduction(op, pair, "sum", 1, (), True, outputs=(total,), form=form)
    return [joined, reduction, VectorOp(finish, (total, *dict.fromkeys(vectors)), op.outputs)]


def _joined(
    op: Op, maps: Maps, values: Sequence[int], terms: Sequence[Term], image: tuple[str, ...]
) -> tuple[Local, int]:
    """A map with the channels of several maps: (channels, height, width), or (channels, positions)."""
    places = list(dict.fromkeys(image))
    orders = [[d for d, x in enumerate(t) if x not in image] + [t.index(x) for x in places] for t in terms]
    ends = [maps.shape(values[0])[terms[0].index(x)] for x in places]
    channels = sum(maps.shape(v).numel() // torch.Size(ends).numel() for v in values)
    dtype = maps.program.values[values[0]].dtype
    flat = maps.flat.get(values[0])
    pair = maps.new_map((1, len(places)), (channels, *ends), dtype, like=values[0], flat=flat)

    def join(env: Env, _block: Block) -> tuple[Tensor, ...]:
        blocks = [env[v].permute(order) for v, order in zip(values, orders, strict=True)]
        return (torch.cat([x.reshape(-1, *x.shape[x.dim() - len(places) :]) for x in blocks]),)

    reads = {v: maps.pointwise(v) for v in values}
    return Local(part_of(op, "joined", reads, (pair,)), reads, (maps.axes[pair],), join), pair


@rule("conv1d")
def conv1d(op: Op, maps: Maps) -> Local:
    """Per pixel: a kernel of one along the positions, or any kernel along another dimension."""
    given = arguments(op, "input weight bias stride padding dilation groups", stride=1, padding=0)
    value, weight = given["input"].value, given["weight"].value
    if maps.inputs(op) != [value]:
        raise Refusal("'conv1d' cannot use weights that depend on the image")
    behind = {axis - len(maps.shape(value)) for axis in maps.axes[value]}
    plain = given["padding"] in ("same", "valid", 0, (0,), [0]) and given["stride"] in (1, (1,), [1])
    if -2 in behind or (-1 in behind and not (plain and maps.shape(weight)[-1] == 1)):
        raise Refusal("'conv1d' cannot run along positions of the image; use conv2d on the map with both image axes")
    return Local(op, {value: maps.pointwise(value)}, (maps.axes[value],), replay(op))
