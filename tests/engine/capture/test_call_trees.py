"""Trees of arguments are PyTorch's."""

from collections import OrderedDict, namedtuple

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils import _pytree

from gigamorph.engine.capture import call_trees
from gigamorph.engine.capture.call_trees import Ref

Pair = namedtuple("Pair", "a b")
_TENSOR = torch.zeros(2)
LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(0, 9),
    st.floats(allow_nan=False),
    st.sampled_from([torch.float32, "same", _TENSOR, slice(1, 2), ..., torch.Size([1, 2]), torch.device("cpu")]),
    st.integers(0, 9).map(Ref),
)
KEYS = st.sampled_from("abcde")
TREES = st.recursive(
    LEAVES,
    lambda parts: st.one_of(
        st.lists(parts, max_size=4),
        st.lists(parts, max_size=4).map(tuple),
        st.dictionaries(KEYS, parts, max_size=4),
        st.dictionaries(KEYS, parts, max_size=4).map(OrderedDict),
        st.tuples(parts, parts).map(lambda pair: Pair(*pair)),
    ),
    max_leaves=12,
)


def same(a: object, b: object) -> bool:
    leaves, form = _pytree.tree_flatten(a)
    others, other_form = _pytree.tree_flatten(b)
    return form == other_form and all(
        type(x) is type(y) and (x is y or x == y) for x, y in zip(leaves, others, strict=True)
    )


@given(tree=TREES)
def test_trees_are_those_of_pytorch(tree):
    assert same(call_trees.tree_leaves(tree), _pytree.tree_leaves(tree))
    box = lambda leaf: ("leaf", repr(leaf))  # noqa: E731
    assert repr(call_trees.tree_map(box, tree)) == repr(_pytree.tree_map(box, tree))


@given(tree=TREES)
def test_numbers_and_what_stands_for_them(tree):
    flat = _pytree.tree_leaves(tree)
    assert call_trees.refs(tree) == [leaf.value for leaf in flat if isinstance(leaf, Ref)]
    env = [f"value {n}" for n in range(10)]
    expected = _pytree.tree_map(lambda leaf: env[leaf.value] if isinstance(leaf, Ref) else leaf, tree)
    assert same(call_trees.bind(tree, env), expected)
