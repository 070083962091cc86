"""Steps that are captured as a whole give what others give, and leave nothing in the memory of a graph.

On the CPU a captured function is one that is called again. What an earlier call of it has made is poisoned before, as a
graph writes over it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from captures import poison
from exactness import LIMIT, errors, named, randomize, step, step_errors
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from gigamorph import accelerate, plan
from gigamorph.engine.cuda_graphs import buffers, step_checks
from gigamorph.engine.cuda_graphs.step_checks import MARGIN
from gigamorph.engine.cuda_graphs.whole_passes import MEMORY_SHARE
from gigamorph.engine.errors import ChangedError, GigamorphError
from gigamorph.engine.execution import prepared
from gigamorph.engine.planning.estimate import Estimator


class Graphs:
    """Captures by remembering the function; `refuse` is the capture that fails.

    A backward may only follow the forward that it was captured with: it reads what that has left.
    """

    def __init__(self) -> None:
        self.captured = self.replayed = self.refuse = 0
        self.left: Any = None

    def apart(self) -> Graphs:
        return self

    def capture(self, run: Any) -> Callable[[], None]:
        self.captured += 1
        if self.captured == self.refuse:
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")
        pair, forward = run.args[0], len(run.args) == 1

        def again() -> None:
            self.replayed += 1
            assert forward or self.left is pair, "a backward without its forward"
            self.left = pair if forward else None
            for tensor in (pair.results if forward else pair.grads).values():
                poison(tensor.detach())
            run()

        return again


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Graphs:
    found = Graphs()
    monkeypatch.setattr(buffers, "executor", lambda device: found)
    return found


class Net(nn.Module):
    """Two outputs, of which one is a map; a residual block and a head."""

    def __init__(self, drop: float = 0.0) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU())
        self.block = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8))
        self.map, self.head, self.drop = nn.Conv2d(8, 2, 1), nn.Linear(8, 3), nn.Dropout(drop)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.stem(x)
        x = F.relu(self.block(x) + x)
        return self.head(self.drop(x.mean((2, 3)))), self.map(x)


def build(live: bool, drop: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    return randomize(Net(drop)).double().train(live)


def image(seed: int = 1) -> Tensor:
    return torch.randn(2, 1, 41, 34, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def is_captured(net: nn.Module) -> bool:
    return any(one._work is not None for prepared in net._runner.programs for one in prepared.steps)  # pyright: ignore


def assert_same_after(nets: Sequence[nn.Module], act: Callable[[nn.Module], Any]) -> None:
    """Gradients and buffers, once the same was done with stock and with the accelerated network."""
    found = []
    for net in nets:
        net.zero_grad(set_to_none=True)
        act(net)
        found.append({name: p.grad for name, p in net.named_parameters()} | dict(net.named_buffers()))
    assert max(errors(*found).values()) < LIMIT, act


@pytest.mark.parametrize("live", [False, True])
@pytest.mark.parametrize("tile", [None, (24, 40)])
def test_steps_with_an_optimizer(
    graphs: Graphs, monkeypatch: pytest.MonkeyPatch, live: bool, tile: tuple[int, int] | None
) -> None:
    """Parameters and running statistics are read and written where they lie."""
    monkeypatch.setattr(step_checks, "MOST_TILES", 8)
    stock = build(live)
    fast = accelerate(copy.deepcopy(stock), tile=tile)
    optimizers = [torch.optim.SGD(net.parameters(), 1e-3, momentum=0.9) for net in (stock, fast)]
    for number in range(4):
        made = [step(net, image(number), seed=number, image_gradient=False) for net in (stock, fast)]
        assert max(step_errors(*made).values()) < LIMIT
        for net, optimizer, one in zip((stock, fast), optimizers, made, strict=True):
            for name, parameter in net.named_parameters():
                parameter.grad = one.gradients[name]
            optimizer.step()
        assert is_captured(fast) == (number > 0)
    assert graphs.captured == 2 and graphs.replayed == 6
    with torch.no_grad():
        for _ in range(3):
            assert max(errors(named(stock(image())), named(fast(image()))).values()) < LIMIT


class Activations(TorchDispatchMode):
    """Counts ReLUs that are computed, not differentiated."""

    sees_tiles = True

    found = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found += func._schema.name in ("aten::relu", "aten::relu_")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("budget", [False, True])
@pytest.mark.parametrize("ample", [True, False])
def test_tiles_keep_their_graphs_where_memory_allows(
    graphs: Graphs, monkeypatch: pytest.MonkeyPatch, ample: bool, budget: bool
) -> None:
    """Else the backward computes again what follows norms. Under a budget, what it leaves is free."""
    monkeypatch.setattr(Estimator, "_retainable", lambda *args: [])  # as on a GPU
    stock = build(live=True)
    fast = accelerate(copy.deepcopy(stock), tile=64, memory_budget=10**9 if budget else None)
    plan = fast.plan_for((2, 1, 41, 34), torch.float64, torch.device("cpu"))
    needed = plan.parts_bytes
    free = 10**9 if ample else MARGIN * (needed if budget else needed / MEMORY_SHARE) + 1
    monkeypatch.setattr(prepared, "available_bytes", lambda device: free)
    for _ in range(4):
        expected = step(stock, image(), image_gradient=False)
        with Activations() as computed:
            made = step(fast, image(), image_gradient=False)
        assert max(step_errors(expected, made).values()) < LIMIT
    assert is_captured(fast) and (computed.found == 2) == ample


@pytest.mark.parametrize("live", [False, True])
def test_several_backwards_and_forwards(graphs: Graphs, live: bool) -> None:
    """Two backwards of one forward, two forwards before a backward, losses of one output or the other."""
    nets = [build(live)]
    nets.append(accelerate(copy.deepcopy(nets[0])))

    def twice(net: nn.Module) -> None:
        score, maps = net(image())
        (score.square().sum() + maps.sum()).backward(retain_graph=True)
        score.sum().backward()

    def together(net: nn.Module) -> None:
        outputs = [net(image(seed)) for seed in (1, 2)]
        sum(score.square().sum() * (1 + n) + maps.sum() for n, (score, maps) in enumerate(outputs)).backward()

    def one_by_one(net: nn.Module) -> None:
        for place in (0, 1, 0):
            net(image())[place].square().sum().backward()

    def left(net: nn.Module) -> None:
        net(image())
        net(image(3))[0].sum().backward()

    for act in (twice, together, twice, one_by_one, left, twice):
        assert_same_after(nets, act)
    assert is_captured(nets[1])


class Centered(Net):
    """Reads a buffer, then writes to it; of another the other way round."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("center", torch.ones(3))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        score, maps = super().forward(x)
        score = score * self.center.clone()
        self.calls += 1
        with torch.no_grad():
            self.center.lerp_(score.mean(0), 0.5)
        return score, maps / self.calls.clone()


def test_a_forward_that_is_replayed_for_its_backward_reads_what_it_read(graphs: Graphs) -> None:
    """Where other results have gradients than before, or some for the second time."""
    stock = Centered().double()
    fast = accelerate(copy.deepcopy(stock))

    def act(places: Sequence[int], net: nn.Module) -> None:
        outputs = net(image())
        for place in places:
            outputs[place].square().sum().backward(retain_graph=True)

    for places in ((0,), (0,), (1,), (0,), (0, 1, 0), (1, 0)):
        assert_same_after((stock, fast), partial(act, places))
    assert is_captured(fast)


def test_parameters_that_move_are_captured_anew(graphs: Graphs) -> None:
    stock = build(live=True)
    fast = accelerate(copy.deepcopy(stock))
    for number in range(6):
        made = [step(net, image(), image_gradient=False) for net in (stock, fast)]
        assert max(step_errors(*made).values()) < LIMIT
        if number == 2:
            for net in (stock, fast):
                net.get_parameter("head.weight").data = 2 * net.get_parameter("head.weight").data
    assert graphs.captured == 4


@pytest.mark.parametrize("frozen", [False, True])
def test_weights_changed_before_the_backward_are_told(graphs: Graphs, frozen: bool) -> None:
    fast = accelerate(build(live=False))
    weight = fast.get_parameter("head.weight").requires_grad_(not frozen)
    for _ in range(2):
        step(fast, image(), image_gradient=False)
    output = fast(image())[0].sum()
    with torch.no_grad():
        weight.add_(1)
    with pytest.raises(ChangedError):
        output.backward()


def test_a_forward_that_nobody_differentiates_is_not_waited_for(graphs: Graphs) -> None:
    """Not even the one that the step was captured for: the first backward is captured with a forward of its own.

    Autograd would refuse the other, for the weights may have changed.
    """
    fast = accelerate(build(live=True))
    step(fast, image(), image_gradient=False)
    for _ in range(2):
        fast(image())
    for number in range(3):
        step(fast, image(), image_gradient=False)
        assert graphs.replayed == 5 + 2 * number and graphs.captured == 3


def test_hooks_of_parameters_see_gradients_alone(graphs: Graphs) -> None:
    """A captured step is one function of all parameters: where a loss does not reach one, autograd visits it still."""
    stock = build(live=True)
    fast = accelerate(copy.deepcopy(stock))
    for net in (stock, fast):
        net.get_parameter("head.weight").register_hook(lambda grad: 2 * grad)
    for place in (1, 1, 1, 0):
        for net in (stock, fast):
            net.zero_grad()
            net(image())[place].square().sum().backward()
        made = ({name: p.grad for name, p in net.named_parameters()} for net in (stock, fast))
        assert max(errors(*made).values()) < LIMIT
    fast = accelerate(build(live=True))
    step(fast, image(), image_gradient=False)
    maps = fast(image())[1]
    fast.get_parameter("head.weight").register_hook(lambda grad: 2 * grad)
    with pytest.raises(GigamorphError, match=r"'head.weight' has a hook"):
        maps.sum().backward()


def test_a_parameter_with_a_hook_that_every_loss_reaches(graphs: Graphs) -> None:
    class Score(Net):
        def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
            return super().forward(x)[0]

    for live in (False, True):
        stock = Score().double().train(live)
        fast = accelerate(copy.deepcopy(stock))
        for net in (stock, fast):
            net.get_parameter("stem.0.weight").register_hook(lambda grad: 2 * grad)
        for _ in range(3):
            made = [step(net, image(), image_gradient=False) for net in (stock, fast)]
            assert max(step_errors(*made).values()) < LIMIT
        assert is_captured(fast)


def test_checkpoint_sees_what_it_saw_before(graphs: Graphs) -> None:
    stock = build(live=False)
    fast = accelerate(copy.deepcopy(stock))

    def act(number: int, net: nn.Module) -> None:
        outputs = checkpoint(net, image(), use_reentrant=False) if number > 1 else net(image())
        sum(one.square().sum() for one in outputs).backward()

    for number in range(4):
        assert_same_after((stock, fast), partial(act, number))


class Given(Net):
    """Returns a parameter, a view of a buffer and one of a result."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(2))
        self.register_buffer("mean", torch.zeros(2))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        score, maps = super().forward(x)
        return score, maps, self.scale, self.mean[1:], score[:, 1:]


class Clamped(Net):
    """Writes to a parameter before it is read."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        with torch.no_grad():
            self.head.weight.clamp_(-0.1, 0.1)
        return super().forward(x)


class Kept(Net):
    """Leaves a score in a buffer, with its graph."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("last", torch.zeros(2, 3))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        score, maps = super().forward(x)
        self.last.copy_(score)
        return score, maps


@pytest.mark.parametrize("kind", [Given, Clamped, Kept])
def test_what_reaches_beyond_the_step_is_not_captured(graphs: Graphs, kind: type[Net]) -> None:
    """Results that lie in the memory of parameters, buffers or other results; writes that autograd hears of."""
    stock = kind().double()
    fast = accelerate(copy.deepcopy(stock))
    kept: list[list[Tensor]] = []
    for number in range(4):
        found = []
        for net in (stock, fast):
            net.zero_grad()
            outputs = net(image(number))
            outputs[0].mul_(2)
            (sum(one.square().sum() for one in outputs) + sum(b.sum() for b in net.buffers())).backward()
            kept.append(outputs)
            found.append({name: p.grad for name, p in net.named_parameters()} | dict(net.named_buffers()))
            for buffer in net.buffers():
                buffer.detach_()
            with torch.no_grad():
                for tensor in (*net.parameters(), *net.buffers()):
                    tensor.add_(1)
        assert max(errors(*found).values()) < LIMIT
        assert max(errors(*(named(outputs) for outputs in kept[-4:-2] or kept)).values()) < LIMIT
    assert not is_captured(fast)


def test_parts_of_a_result_that_lie_side_by_side_are_captured(graphs: Graphs) -> None:
    class Halves(Net):
        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            return self.head(self.stem(x).mean((2, 3))).split((1, 2), 1)

    stock = Halves().double()
    fast = accelerate(copy.deepcopy(stock))
    for _ in range(3):
        made = [step(net, image(), image_gradient=False) for net in (stock, fast)]
        assert max(step_errors(*made).values()) < LIMIT
    assert is_captured(fast)


def test_pixels_of_files_and_tensors_in_turn(graphs: Graphs) -> None:
    """Files give float32 to a network in float64."""

    class Source:
        name, shape = "image", image().shape[1:]

        def read(self, top: int, bottom: int, left: int, right: int) -> Tensor:
            return image()[0, :, top:bottom, left:right].float()

    stock = build(live=False)
    fast = accelerate(copy.deepcopy(stock))
    for own, theirs in ((Source(), image()[:1].float().double()), (image()[:1], image()[:1])):
        for _ in range(3):
            with torch.no_grad():
                outputs = fast([own] if isinstance(own, Source) else own)
            assert max(errors(named(stock(theirs)), named(outputs)).values()) < LIMIT


def test_an_output_that_gets_no_gradient(graphs: Graphs) -> None:
    """What only it depends on has none, not zeros."""

    class Stop(torch.autograd.Function):
        @staticmethod
        def forward(_ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(_ctx: Any, *_grads: Tensor) -> None:
            return None

    fast = accelerate(build(live=True))
    for _ in range(3):
        fast.zero_grad()
        score, maps = fast(image())
        (Stop.apply(score).sum() + maps.sum()).backward()
        assert fast.get_parameter("head.weight").grad is None and fast.get_parameter("map.weight").grad is not None
    assert is_captured(fast)


def test_progress_does_not_prevent_a_capture(graphs: Graphs, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that is replayed reports its forward as one tile."""
    monkeypatch.setattr(step_checks, "MOST_TILES", 8)
    fast = accelerate(build(live=True), tile=(24, 40))
    steps: list[list[Any]] = []
    for _ in range(4):
        steps.append([])
        fast.on_tile = steps[-1].append
        step(fast, image(), image_gradient=False)
    assert is_captured(fast) and graphs.replayed
    assert {event.phase for event in steps[0]} == {"forward", "backward"} and len(steps[0]) > 2
    (last,) = steps[-1]
    assert (last.phase, last.done, last.total, last.pixels) == ("forward", 1, 1, 2 * 41 * 34)


def test_anomalies_are_looked_for(graphs: Graphs) -> None:
    """A graph would not: what it computes has no nodes."""
    fast = accelerate(build(live=True))
    for _ in range(3):
        with torch.autograd.set_detect_anomaly(True):
            step(fast, image(), image_gradient=False)
    assert graphs.captured == 0


@pytest.mark.parametrize("refuse", [1, 2])
def test_a_capture_that_fails(graphs: Graphs, refuse: int, caplog: pytest.LogCaptureFixture) -> None:
    """The forward's leaves the step to others; without its backward a step is lost, by an error that says so."""
    graphs.refuse = refuse
    stock = build(live=True)
    fast = accelerate(copy.deepcopy(stock))
    for number in range(4):
        if number == 1 and refuse == 2:
            with pytest.raises(RuntimeError, match="call the network again"):
                step(fast, image(), image_gradient=False)
            step(stock, image(), image_gradient=False)
            continue
        made = [step(net, image(), image_gradient=False) for net in (stock, fast)]
        assert max(step_errors(*made).values()) < LIMIT
    assert not is_captured(fast) and graphs.captured == refuse


def test_what_draws_random_numbers_is_not_captured(graphs: Graphs) -> None:
    for live, captured in ((True, False), (False, True)):
        fast = accelerate(build(live, drop=0.5))
        for _ in range(3):
            step(fast, image(), image_gradient=False)
        assert is_captured(fast) == captured


def test_a_gradient_of_the_image_goes_another_way(graphs: Graphs) -> None:
    stock = build(live=False)
    fast = accelerate(copy.deepcopy(stock))
    for _ in range(3):
        assert max(step_errors(*(step(net, image()) for net in (stock, fast))).values()) < LIMIT
    assert not any(one._work for prepared in fast._runner.programs for one in prepared.steps)


class Deep(nn.Module):
    """Residual blocks, of which the ends alone are kept if memory is short."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.blocks = nn.ModuleList(map(self.block, range(4)))
        self.head = nn.Linear(8, 3)

    def block(self, _number: int) -> nn.Module:
        first, second = (nn.Conv2d(8, 8, 3, padding=1, bias=False) for _ in range(2))
        return nn.Sequential(first, nn.BatchNorm2d(8), nn.SiLU(), second, nn.BatchNorm2d(8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = F.silu(x + block(x))
        return self.head(x.mean((2, 3)))


def test_blocks_that_are_computed_again_are_captured(graphs: Graphs) -> None:
    """Under a budget that has no room for all maps, rather than to keep more of them and wait for the host."""
    torch.manual_seed(0)
    stock, size = randomize(Deep()).double().train(), (210, 190)
    x = torch.randn(1, 1, *size, dtype=torch.float64)
    roomy = plan(stock, tuple(x.shape), 2**40, dtype=torch.float64, tile=size)
    fast = accelerate(copy.deepcopy(stock), tile=size, memory_budget=int(0.4 * roomy.peak_bytes))
    found = fast.plan_for(tuple(x.shape), torch.float64, torch.device("cpu"))
    assert found.choice > 0 and found.capture_bytes and found.budget and found.peak_bytes <= found.budget
    for _ in range(3):
        made = [step(net, x, image_gradient=False) for net in (stock, fast)]
        assert max(step_errors(*made).values()) < LIMIT
    assert is_captured(fast) and graphs.replayed == 4
