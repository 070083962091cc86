"""Without a budget on the CPU, a training step runs PyTorch's own ops on the whole image, with the same effects."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import pytest
import torch
from exactness import assert_exact, compare, distance, randomize, step
from hypothesis import HealthCheck, assume, given, settings
from random_net import Program, examples, programs
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from gigamorph import Accelerated, accelerate, plan
from gigamorph.engine.errors import ChangedError, UnsupportedError
from gigamorph.engine.tiling.arena import arena

CHECKS = {"deadline": None, "derandomize": True, "suppress_health_check": list(HealthCheck)}


class Shuffled(nn.Module):
    """Convolutions with norms, and a channel shuffle by `view`, which channels-last maps do not allow."""

    def __init__(self, channels: int = 3, view: bool = True):
        super().__init__()
        self.first, self.norm = nn.Conv2d(channels, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8)
        self.second = nn.Sequential(nn.Conv2d(8, 12, 3, bias=False), nn.BatchNorm2d(12), nn.ReLU(inplace=True))
        self.head, self.view = nn.Linear(12, 3), view

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.first(x)), inplace=True)
        if self.view:
            n, c, h, w = x.shape
            x = x.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, c, h, w)
        return self.head(self.second(x).mean((2, 3)))


def runs_whole(fast: Accelerated) -> bool:
    (prepared,) = fast._runner.programs
    return prepared.plan.untiled_bytes > 0


def image(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(1))


@settings(max_examples=examples(16), **CHECKS)
@given(programs(max_steps=10, statistics=True))
def test_random_networks(program: Program) -> None:
    model, x = program.build(), image(*program.shape)
    with torch.no_grad():
        assume(all(leaf.isfinite().all() for leaf in tree_leaves(model(x))))
    assert_exact(model, x, inference=False)


@pytest.mark.parametrize("live", [True, False])
@pytest.mark.parametrize("shape", [(1, 3, 19, 23), (2, 1, 32, 17), (2, 3, 8, 8)])
def test_steps_are_exact(shape: tuple[int, ...], live: bool) -> None:
    model, x = randomize(Shuffled(shape[1])).double().train(live), image(*shape)
    fast = accelerate(copy.deepcopy(model))
    found = compare(model, x, fast=fast, inference=False)
    assert max(found.values()) <= 1e-12 and runs_whole(fast)
    folds = [fold is not None for prepared in fast._runner.programs for _, fold, *_ in prepared.whole_ops]
    assert sum(folds) == (0 if live else 2)


@pytest.mark.parametrize("live", [True, False])
@pytest.mark.parametrize("shape", [(1, 3, 19, 23), (2, 1, 33, 17)])
def test_float32_rounds_as_stock_does(shape: tuple[int, ...], live: bool) -> None:
    """Also for one image, whose strides do not say the order of its map, and a grey one."""
    model = randomize(Shuffled(shape[1])).train(live)
    truth = step(copy.deepcopy(model).double(), image(*shape))
    fast = accelerate(copy.deepcopy(model))
    ours, stock = (step(net, image(*shape, dtype=torch.float32)) for net in (fast, copy.deepcopy(model)))
    assert runs_whole(fast)
    for own, other in zip(distance(truth, ours), distance(truth, stock), strict=True):
        assert own <= max(4 * other, 1e-6)


def test_dropout_draws_the_numbers_of_stock() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Dropout(0.5), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Dropout2d(0.3))
    assert_exact(model.double().train(), image(2, 3, 17, 19), seed=3, inference=False)
    x = image(2, 3, 17, 19, dtype=torch.float32)
    assert max(compare(model.float().train(), x, seed=3, inference=False).values()) < 1e-4


@pytest.mark.parametrize("live", [True, False])
def test_an_ample_budget_means_the_whole_image(live: bool) -> None:
    model, x = randomize(Shuffled()).double().train(live), image(2, 3, 40, 40)
    fast = accelerate(copy.deepcopy(model), memory_budget="200MiB")
    assert max(compare(model, x, fast=fast, inference=False).values()) <= 1e-12 and runs_whole(fast)
    assert plan(model, x.shape, memory_budget="200MiB").untiled_bytes


@pytest.mark.parametrize("options", [{"tile": 16}, {"memory_budget": "64MiB"}])
def test_a_tile_or_tight_budget_means_tiles(options: dict[str, object]) -> None:
    fast = accelerate(Shuffled(), **options)  # pyright: ignore[reportArgumentType]
    fast(image(2, 3, 40, 40, dtype=torch.float32)).sum().backward()
    assert not runs_whole(fast)
    assert not plan(Shuffled(), (40, 40), **options).untiled_bytes  # pyright: ignore[reportArgumentType]


def test_the_plan_has_the_peak_of_stock() -> None:
    made = plan(Shuffled().train(), (256, 256))
    assert made.peak_bytes == made.untiled_bytes > (made.stock_bytes or 0) > 0 and made.work == 1
    assert "the whole image at once" in str(made) and "tile" not in str(made)


def test_little_memory_means_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gigamorph.engine.planning.request.available_bytes", lambda device: 400 * 2**20)
    assert not plan(Shuffled().train(), (2000, 2000)).untiled_bytes


class Case(nn.Module):
    """Two convolutions, the second of what `body` makes of the first one's output."""

    def __init__(self, body: Callable[..., object]):
        super().__init__()
        self.first, self.norm, self.second = nn.Conv2d(3, 8, 3), nn.BatchNorm1d(8), nn.Conv2d(8, 2, 3)
        self.body = body

    def forward(self, x: Tensor, *further: Tensor) -> object:
        return self.body(self, self.first(x), *further)


def pixelwise(_net: Case, c: Tensor) -> Tensor:
    y = c.permute(0, 2, 3, 1).contiguous()  # a copy of contiguous maps, not of channels-last ones
    y.relu_()
    return y.mean((1, 2)) + c.mean((2, 3))


def image_axes_as_channels(net: Case, c: Tensor) -> Tensor:
    return net.norm(F.adaptive_avg_pool2d(c, 8)[0].transpose(0, 1)).mean((1, 2))


def returned(net: Case, c: Tensor) -> tuple[Tensor, Tensor]:
    c = F.relu(c)
    return c, net.second(c)


def written_argument(_net: Case, c: Tensor, scale: Tensor) -> Tensor:
    scale.add_(1)
    return c.mean((2, 3)) * scale


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    "body",
    [pixelwise, image_axes_as_channels, returned, written_argument, lambda net, c: net.second(c).flatten(2)],
    ids=["pixelwise", "unbatched norm", "returned", "written", "flat"],
)
def test_memory_formats(body: Callable[..., object], order: torch.memory_format) -> None:
    results = []
    model = Case(body).eval()
    for make in (accelerate, lambda net: net):
        net, x = make(copy.deepcopy(model)), image(2, 3, 20, 24, dtype=torch.float32).contiguous(memory_format=order)
        scale = torch.ones(2, 8)
        outputs = net(x.requires_grad_(), *([scale] if body is written_argument else []))
        outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
        for output in outputs if body is returned else []:
            output.register_hook(lambda grad: 0.5 * grad)
        (slope,) = torch.autograd.grad(sum(output.square().sum() for output in outputs), x, retain_graph=True)
        sum(output.sum() for output in outputs).backward()
        results.append([*outputs, slope, scale, *(p.grad for p in net.parameters() if p.grad is not None)])
    for ours, stock in zip(*results, strict=True):
        torch.testing.assert_close(ours, stock, rtol=1e-4, atol=1e-5)
        assert ours.stride() == stock.stride()


def test_tensors_of_the_caller_get_no_hooks() -> None:
    class Returns(nn.Conv2d):
        def forward(self, x: Tensor, further: Tensor) -> object:  # pyright: ignore[reportIncompatibleMethodOverride]
            return super().forward(x), x, further, self.weight

    x, further = image(1, 3, 9, 9).requires_grad_() * 2, image(4).requires_grad_() * 2
    fast = accelerate(Returns(3, 4, 3).double())
    sum(output.sum() for output in fast(x, further)).backward()
    assert runs_whole(fast)
    assert not (x._backward_hooks or further._backward_hooks or fast.weight._backward_hooks)


def test_folds_of_computed_weights() -> None:
    weight_norm = torch.nn.utils.parametrizations.weight_norm
    model = randomize(nn.Sequential(weight_norm(nn.Conv2d(3, 4, 3)), nn.BatchNorm2d(4))).double().eval()
    assert_exact(model, image(2, 3, 9, 9), inference=False)


def test_statistics_of_many_pixels_are_those_of_stock() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, momentum=1.0))
    fast, x = accelerate(copy.deepcopy(model)), image(1, 3, 600, 600, dtype=torch.float32)
    fast(x).mean().backward()
    model(x)
    assert runs_whole(fast)
    torch.testing.assert_close(fast[1].running_var, model[1].running_var, rtol=1e-7, atol=0)


def test_folded_weights_that_are_replaced_before_the_backward_are_refused() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    result = accelerate(model)(image(2, 3, 9, 9, dtype=torch.float32))
    model[0].weight.data = model[0].weight.data * 2
    with pytest.raises(ChangedError, match="was replaced"):
        result.sum().backward()


def test_hooks_on_saved_tensors_see_real_ones() -> None:
    def pack(tensor: Tensor) -> object:
        return tensor.detach().numpy().copy()

    with torch.autograd.graph.saved_tensors_hooks(pack, torch.from_numpy):
        accelerate(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()))(image(1, 3, 9, 9)[:, :].float()).sum().backward()


def test_larger_images_run_whole_in_the_format_of_stock_and_in_tiles_in_nchw() -> None:
    model = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3))
    for order, whole in ((torch.channels_last, True), (torch.contiguous_format, False)):
        fast = accelerate(model)
        program = fast._open(torch.randn(1, 3, 2000, 2000).contiguous(memory_format=order)).prepared.plan
        assert (program.untiled_bytes > 0) == whole


@pytest.mark.parametrize("options", [{}, {"tile": 8}])
def test_ops_that_read_memory_get_the_order_of_stock(options: dict[str, int]) -> None:
    class Strided(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            return torch.as_strided(y, (2, 3), (1, 2))

    model = Strided(nn.Conv2d(3, 4, 3), nn.ReLU())
    fast = accelerate(model, fallback="untiled", **options)
    x = image(1, 3, 9, 9, dtype=torch.float32)
    torch.testing.assert_close(fast(x), model(x))


def test_one_tile_is_reported() -> None:
    fast, events = accelerate(Shuffled()), list[tuple[str, int, int, int]]()
    fast.on_tile = lambda event: events.append((event.phase, event.done, event.total, event.pixels))
    fast(image(2, 3, 40, 30, dtype=torch.float32)).sum().backward()
    assert events == [("forward", 1, 1, 2400)]


def test_the_backward_allocates_from_the_arena_and_leaves_it() -> None:
    found = arena()
    if found is None:
        pytest.skip("no arena here")
    fast = accelerate(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)))
    x, grown = image(1, 3, 128, 128, dtype=torch.float32), list[int]()

    def used(make: Callable[[], Tensor]) -> int:
        before = found.counts().in_use
        block = make()
        return found.counts().in_use - before + 0 * block.numel()

    result = fast(x)
    fast[0].weight.register_hook(lambda grad: grown.append(used(lambda: torch.empty(1 << 20))))
    result.sum().backward()
    assert grown == [4 << 20]
    assert used(lambda: torch.empty(1 << 20)) == 0


def test_a_failed_backward_does_not_keep_the_arena() -> None:
    found = arena()
    if found is None:
        pytest.skip("no arena here")
    fast = accelerate(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()))
    x = image(1, 3, 32, 32, dtype=torch.float32)

    def fail(_grad: Tensor) -> None:
        raise ValueError("a hook of the user")

    hook = fast[0].weight.register_hook(fail)
    with pytest.raises(ValueError, match="a hook of the user"):
        fast(x).sum().backward()
    hook.remove()
    fast(x).sum().backward()
    before = found.counts().in_use
    block = torch.empty(1 << 20)
    assert found.counts().in_use == before and block.numel()


@pytest.mark.filterwarnings("error")
def test_outputs_can_be_saved() -> None:
    result = accelerate(Shuffled())(image(2, 3, 16, 16, dtype=torch.float32))
    torch.save(result, file := io.BytesIO())
    assert torch.equal(torch.load(io.BytesIO(file.getvalue())), result)


def penalty(net: nn.Module, x: Tensor) -> list[Tensor]:
    (slope,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
    return list(torch.autograd.grad(slope.square().sum(), list(net.parameters()), allow_unused=True))


@pytest.mark.parametrize("live", [True, False])
def test_second_derivatives_are_those_of_stock(live: bool) -> None:
    model, x = randomize(Shuffled()).double().train(live), image(2, 3, 16, 16).requires_grad_()
    for ours, stock in zip(penalty(accelerate(model), x), penalty(model, x), strict=True):
        torch.testing.assert_close(ours, stock, rtol=1e-10, atol=1e-10)


def test_second_derivatives_of_folded_weights_are_refused() -> None:
    model, x = randomize(Shuffled()).double().eval(), image(2, 3, 16, 16)
    weights = [model.first.weight, model.norm.weight]
    slopes = torch.autograd.grad(accelerate(model)(x).sum(), weights, create_graph=True)
    with pytest.raises(UnsupportedError, match="second derivatives"):
        sum(slope.square().sum() for slope in slopes).backward()
