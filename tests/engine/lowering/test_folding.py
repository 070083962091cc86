"""Frozen norms folded all at once give what they give one by one, and nothing to what no gradient reaches."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from exactness import assert_exact, randomize
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from gigamorph import GigamorphError, accelerate, kernels
from gigamorph.engine.lowering.folding import Fold, Folded, fold_together
from gigamorph.engine.lowering.ops import VectorOp
from gigamorph.engine.tiling.arena import arena, in_arena
from gigamorph.kernels import choice


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The path of a GPU, each op of it computed by PyTorch."""
    monkeypatch.setattr(kernels, "enabled", lambda device: True)
    with choice.override("stock"):
        yield


@pytest.fixture(params=["together", "one by one"])
def either_way(request: pytest.FixtureRequest) -> None:
    """The path of a GPU, and that of the CPU."""
    if request.param == "together":
        request.getfixturevalue("on_gpu")


class Count(TorchDispatchMode):
    """Counts what would be launches."""

    sees_tiles = True

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view and "empty" not in func._schema.name and "detach" not in func._schema.name:
            self.found[func._schema.name] += 1
        return func(*args, **(kwargs or {}))


def problem(
    shapes: list[tuple[int, int, int]], there: tuple[bool, bool, bool], wanted: list[int], dtype: torch.dtype
) -> tuple[list[VectorOp], dict[int, Tensor]]:
    """Folds of convolutions of (filters, channels, side), and their vectors, of which `wanted` want a gradient."""
    generator = torch.Generator().manual_seed(0)
    ops, env = [], {}
    for number, (filters, channels, side) in enumerate(shapes):
        first = 10 * number
        env[first] = torch.randn(filters, channels, side, side, generator=generator, dtype=torch.float64).to(dtype)
        for place in range(1, 6):
            env[first + place] = (torch.rand(filters, generator=generator, dtype=torch.float64) + 0.5).to(dtype)
        bias, gamma, beta = (first + n if has else None for n, has in zip((1, 4, 5), there, strict=True))
        fold = Fold(first, bias, first + 2, first + 3, gamma, beta, 1e-5, dtype)
        ops.append(VectorOp(fold, fold.inputs, (first + 8, first + 9)))
    for value in wanted:
        env[value].requires_grad_()
    return ops, env


@settings(deadline=None, max_examples=60, derandomize=True)
@given(
    shapes=st.lists(st.tuples(st.integers(1, 4), st.integers(1, 3), st.sampled_from([1, 3])), min_size=1, max_size=5),
    there=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    data=st.data(),
)
def test_together_is_one_by_one(shapes: list[tuple[int, int, int]], there: tuple[bool, bool, bool], data: Any) -> None:
    """Values, gradients, and which tensors have none: of any inputs, from any outputs."""
    every = sorted(problem(shapes, there, [], torch.float64)[1])
    wanted = data.draw(st.lists(st.sampled_from(every), unique=True))
    results = []
    asked: list[int] = []
    for together in (False, True):
        ops, env = problem(shapes, there, wanted, torch.float64)
        found = dict(env)
        if together:
            found = fold_together(ops, env)
        else:
            for op in ops:
                found.update(zip(op.outputs, op.run(env), strict=True))
        outputs = [v for op in ops for v in op.outputs]
        graded = {v: found[v].requires_grad for v in outputs}
        can = [v for v in outputs if graded[v]]
        if not together and can:
            asked = data.draw(st.lists(st.sampled_from(can), unique=True))
        used = [v for v in env if env[v].requires_grad]
        roots = [found[v] for v in asked]
        weights = [torch.randn(t.shape, generator=torch.Generator().manual_seed(1), dtype=t.dtype) for t in roots]
        grads = torch.autograd.grad(roots, [env[v] for v in used], weights, allow_unused=True) if asked else ()
        results.append(([found[v].detach() for v in outputs], dict(zip(used, grads, strict=False))))
    (one, grads_one), (all_, grads_all) = results
    assert all(torch.equal(a, b) for a, b in zip(one, all_, strict=True))
    for value, grad in grads_one.items():
        other = grads_all[value]
        # A convolution's own function gives zeros, or nothing, to what its one reached output does not depend on.
        if grad is None or other is None:
            assert all(g is None or not g.any() for g in (grad, other)), value
        else:
            torch.testing.assert_close(other, grad, rtol=1e-12, atol=1e-13)


def test_launches_do_not_grow_with_the_layers() -> None:
    """Of 40 convolutions with filters of two shapes as many as of 4."""
    counts = []
    for layers in (2, 20):
        ops, env = problem([(8, 4, 3), (8, 8, 1)] * layers, (False, True, True), [], torch.float32)
        for tensor in env.values():
            tensor.requires_grad_(tensor.dim() == 4)
        with Count() as count:
            found = fold_together(ops, env)
            weights = [found[op.outputs[0]] for op in ops]
            ones = [torch.ones_like(w) for w in weights]
            torch.autograd.grad(weights, [env[op.inputs[0]] for op in ops], ones)
        count.found["aten::ones_like"] = 0
        zeros = count.found.pop("aten::zeros_like")  # of biases, which nothing here has given a gradient
        counts.append(count.found.total())
        assert zeros <= 2 * layers + 1
    assert counts[0] == counts[1] < 40


def test_gradients_and_weights_have_memory_of_their_own_that_lies_as_theirs_does() -> None:
    ops, env = problem([(4, 3, 3), (4, 3, 3), (2, 3, 1)], (True, True, True), [0, 10, 20, 4, 14, 24], torch.float32)
    found = fold_together(ops, env)
    leaves = [env[v] for v in (0, 10, 20, 4, 14, 24)]
    sum(found[op.outputs[0]].square().sum() for op in ops).backward()  # pyright: ignore
    for leaf in leaves:
        grad = leaf.grad
        assert grad is not None and grad.stride() == leaf.stride()
        assert grad.untyped_storage().nbytes() == grad.nbytes


@pytest.mark.skipif(arena() is None, reason="needs the arena, which counts")
def test_gradients_take_no_memory_but_their_own() -> None:
    """At the end of a step each would come on top of the pages that the step has left."""
    ops, env = problem([(512, 256, 3)] * 2, (False, True, True), [0, 4, 10, 14], torch.float32)
    held = arena()
    assert held is not None
    losses = [(op.run(env)[0] * torch.ones(()).expand(512, 256, 3, 3)).sum() for op in ops]
    weight = env[0].nbytes
    with in_arena(torch.device("cpu")):
        before = held.counts().in_use
        for number, loss in enumerate(losses, 1):
            held.reset_most()
            loss.backward()
            incoming = weight  # the gradient of the folded weight
            assert held.counts().most - before <= number * weight + incoming + (3 << 20)
    assert held.counts().in_use - before <= 2 * weight + (1 << 20)


class TwoHeads(nn.Module):
    """Of two outputs a loss may reach one."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (
            nn.Sequential(nn.Conv2d(n, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()) for n in (1, 4, 4)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.a(x)
        return self.b(x).mean((2, 3)), self.c(x).mean((2, 3))


def test_networks_on_a_gpu(on_gpu: None) -> None:
    assert_exact(randomize(TwoHeads()).double().eval(), torch.randn(2, 1, 45, 38, dtype=torch.float64), tile=16)


def test_what_a_loss_does_not_reach_has_no_gradient(either_way: None) -> None:
    """As in stock PyTorch; a hook there is refused by name, and one on a layer that the loss reaches is not."""
    net = accelerate(randomize(TwoHeads()).double().eval(), tile=16)
    x = torch.randn(1, 1, 40, 33, dtype=torch.float64)
    net.a[0].weight.register_hook(lambda grad: None)
    net(x)[0].sum().backward()
    assert all(p.grad is None for p in net.c.parameters())
    assert all(p.grad is not None for p in (*net.a.parameters(), *net.b.parameters()))
    net.c[0].weight.register_hook(lambda grad: None)
    with pytest.raises(GigamorphError, match=r"has a hook, and this loss does not reach it"):
        net(x)[0].sum().backward()


def test_folded_weights_are_those_that_the_network_has_in_each_call(either_way: None) -> None:
    stock = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1)).double().eval()
    ours, x = accelerate(copy.deepcopy(stock), tile=8), torch.randn(1, 1, 20, 20, dtype=torch.float64)
    for seed in range(3):
        randomize(stock, seed)
        ours.load_state_dict(stock.state_dict())
        with torch.no_grad():
            torch.testing.assert_close(ours(x), stock(x), rtol=1e-11, atol=1e-11)


def test_frozen_layers_want_no_gradient(on_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a network of which the last layers are trained, the folded weights of the others want none."""
    net = TwoHeads().double().eval().requires_grad_(False)
    net.b.requires_grad_(True)
    found = []
    apply = Folded.apply
    monkeypatch.setattr(Folded, "apply", lambda *args: found.append(apply(*args)) or found[-1])
    accelerate(net, tile=16)(torch.randn(1, 1, 40, 33, dtype=torch.float64))[0].sum().backward()
    assert sorted(t.requires_grad for made in found for t in made) == [False] * 4 + [True] * 2
