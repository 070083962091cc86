"""TorchDynamo as the recorder: how often it records, under which settings, what breaks a graph, and the backend."""

from __future__ import annotations

import contextlib
import copy
import logging
import math
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from exactness import errors, randomize
from torch import Tensor, nn

from gigamorph import GigamorphError, TileEvent, UnsupportedError, accelerate
from gigamorph.engine.capture.dynamo import _warn_once
from gigamorph.engine.capture.graph import Graph

SIZES = [(33, 29), (40, 26), (21, 38)]


class Net(nn.Module):
    """Two convolutions around `middle`, a norm in training mode, dropout of a vector, a counter and what it keeps."""

    def __init__(self, middle: Callable[[Any, Tensor], Tensor] = lambda _net, x: x) -> None:
        super().__init__()
        self.first, self.norm, self.act = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.SiLU()
        self.second, self.head = nn.Conv2d(4, 4, 3, 2), nn.Linear(4, 2)
        self.middle, self.calls, self.seen = middle, 0, []

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        x = self.act(self.norm(self.first(x)))
        self.seen.append(x.mean((0, 2, 3)).detach())
        return self.head(self.second(self.middle(self, x)).mean((2, 3)))


class Sized(nn.Module):
    """A number of the map's size, and of how often it is called."""

    def __init__(self, of_sizes: Callable[[int, int], int]) -> None:
        super().__init__()
        self.of_sizes, self.calls = of_sizes, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return (x * self.of_sizes(*x.shape[2:]) + self.calls) / 100


def network(middle: Callable[[Any, Tensor], Tensor] = lambda _net, x: x) -> Net:
    torch.manual_seed(0)
    return randomize(Net(middle)).double().train()


def image(size: tuple[int, int] = SIZES[0]) -> Tensor:
    return torch.randn(2, 1, *size, dtype=torch.float64)


def agree(stock: nn.Module, ours: Any, own: nn.Module, sizes: Any = SIZES) -> None:
    """Steps of both: outputs, gradients of weights and image, buffers."""
    optimizers = [torch.optim.SGD(net.parameters(), 1e-2) for net in (stock, own)]
    for size in sizes:
        x, found = image(size), []
        for called, net, optimizer in ((stock, stock, optimizers[0]), (ours, own, optimizers[1])):
            given = x.clone().requires_grad_()
            optimizer.zero_grad()
            y = called(given)
            y.square().mean().backward()
            optimizer.step()
            grads = {name: parameter.grad for name, parameter in net.named_parameters()}
            found.append({"output": y.detach(), "image": given.grad, **grads, **dict(net.named_buffers())})
        assert max(errors(*found).values()) <= 1e-11


# -- how often it records -------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def no_graphs_of_other_tests() -> None:
    """PyTorch runs a forward without a backend, and without a word, once its code has eight graphs."""
    torch._dynamo.reset()


def test_the_second_size_makes_sizes_symbolic(graphs: list[Graph]) -> None:
    stock = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3, 2)).double()
    twin = copy.deepcopy(stock)
    ours, counts = accelerate(twin, tile=9), []
    for size in (*SIZES, (52, 31), SIZES[0], (17, 23)):
        agree(stock, ours, twin, [size, size])
        counts.append(len(graphs))
    assert counts == [1, 2, 2, 2, 2, 2]


def test_symbolic_sizes_that_take_too_long_are_given_up(
    graphs: list[Graph], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As with window attention: then each size is recorded by itself, once."""
    monkeypatch.setattr("gigamorph.engine.capture.dynamo.SYMBOLIC_COST", 0.0)
    monkeypatch.setattr("gigamorph.engine.capture.dynamo.SYMBOLIC_SECONDS", 0.0)
    stock = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3, 2)).double()
    twin = copy.deepcopy(stock)
    ours, counts = accelerate(twin, tile=9), []
    with caplog.at_level(logging.INFO, "gigamorph"):
        for size in (*SIZES, (52, 31), SIZES[0], (17, 23), (52, 31)):
            agree(stock, ours, twin, [size, size])
            counts.append(len(graphs))
    # The first size is recorded once more where its recording was not for this size alone (not in PyTorch 2.11).
    assert counts in ([1, 2, 3, 4, 5, 6, 6], [1, 2, 3, 4, 4, 5, 5])
    assert "each image size is recorded separately" in caplog.text and "take too long to record" in caplog.text


def test_sizes_at_which_pytorch_chooses_another_convolution(graphs: list[Graph]) -> None:
    """In float32 of one image it does so at 20,480 values; that makes no graph of its own."""
    ours = accelerate(nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3)).eval(), tile=64)
    for size in ((60, 60), (61, 62), (80, 81), (150, 170), (40, 41)):
        ours(torch.randn(1, 1, *size)).sum().backward()
    assert len(graphs) == 2


@pytest.mark.parametrize(
    "of_sizes",
    [
        lambda h, w: len(str((h, w))),
        lambda h, w: {"30": 2, "41": 3}.get(str(h), 5),
        lambda h, w: divmod(h, 7)[1] + math.gcd(h, w) + sorted((h, w))[0],
        lambda h, w: len(f"{h:d} {w:04d}"),
    ],
)
def test_sizes_that_must_be_known(of_sizes: Callable[[int, int], int], graphs: list[Graph]) -> None:
    """Each is recorded by itself, once; the counter of the network stays symbolic."""
    stock = nn.Sequential(nn.Conv2d(1, 4, 3), Sized(of_sizes), nn.Conv2d(4, 2, 3)).double()
    twin = copy.deepcopy(stock)
    ours = accelerate(twin, tile=9)
    sizes = ((30, 26), (41, 26), (30, 26), (101, 33), (41, 26), (30, 26))
    agree(stock, ours, twin, sizes)
    made = len(graphs)
    agree(stock, ours, twin, sizes)
    assert len(graphs) == made <= 2 * len(set(sizes))
    x = image()
    ours(x)
    assert not vars(x)


# -- settings of TorchDynamo ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def stance(name: str) -> Iterator[None]:
    with torch.compiler.set_stance(name):
        yield


@contextlib.contextmanager
def config(**changes: Any) -> Iterator[None]:
    with torch._dynamo.config.patch(**changes):
        yield


@contextlib.contextmanager
def variable(name: str) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(name, "1")
        yield
        assert os.environ[name] == "1"


@pytest.mark.parametrize(
    "around",
    [
        lambda: variable("TORCHDYNAMO_DISABLE"),
        lambda: stance("force_eager"),
        lambda: stance("eager_on_recompile"),
        lambda: stance("fail_on_recompile"),
        lambda: config(disable=True),
        lambda: config(suppress_errors=True),
        lambda: config(recompile_limit=1, fail_on_recompile_limit_hit=False),
    ],
    ids=[
        "variable",
        "force_eager",
        "eager_on_recompile",
        "fail_on_recompile",
        "disable",
        "suppress_errors",
        "recompile_limit",
    ],
)
def test_settings_of_the_process_do_not_turn_tiling_off(around: Callable[[], Any]) -> None:
    tiles: list[TileEvent] = []
    stock = network()
    twin = copy.deepcopy(stock)
    ours = accelerate(twin, tile=9)
    ours.on_tile = tiles.append
    for size in SIZES:
        with around():
            agree(stock, ours, twin, [size])
        assert len(tiles) > 8
        tiles.clear()


@pytest.mark.parametrize(
    "around",
    [lambda: variable("TORCHDYNAMO_DISABLE"), lambda: stance("force_eager"), lambda: config(disable=True)],
)
def test_settings_that_turn_compilation_off_are_told_once(
    around: Callable[[], Any], caplog: pytest.LogCaptureFixture
) -> None:
    _warn_once.cache_clear()
    net = accelerate(network(), tile=9)
    for _ in range(2):
        with around():
            net(image())
    (said,) = [one.getMessage() for one in caplog.records if one.name == "gigamorph"]
    assert "turns torch.compile off, but accelerated networks are still computed by tiles" in said


def settings() -> dict[str, Any]:
    return {name: copy.deepcopy(value) for name, value in torch._dynamo.config.get_config_copy().items()}


def refused(net: Any, x: Tensor) -> Tensor:
    net.calls += 10
    net.seen.append(x)
    net.norm(x)
    noise = torch.rand(4, 1, 1, dtype=x.dtype)
    return x * noise * 2 if x.mean() > 0 else x


def test_settings_are_as_before_after_a_call() -> None:
    with torch._dynamo.config.patch(recompile_limit=3, skip_nnmodule_hook_guards=True):
        before = settings()
        accelerate(network(), tile=9)(image()).sum().backward()
        assert settings() == before
        with pytest.raises(UnsupportedError):
            accelerate(network(refused), tile=9)(image())
        assert settings() == before


def test_a_refused_forward_has_changed_nothing() -> None:
    net = network(refused)
    net.seen, net.calls = [torch.ones(1)], 4
    buffers, weights = copy.deepcopy(dict(net.named_buffers())), copy.deepcopy(dict(net.named_parameters()))
    x = image()
    random, ours = torch.get_rng_state(), accelerate(net, tile=9)
    for _ in range(2):
        with pytest.raises(UnsupportedError, match=r"test_dynamo.py:\d+ \(in refused\)") as caught:
            ours(x)
        assert "\n" not in str(caught.value)
        assert net.calls == 4 and len(net.seen) == 1
        assert all(torch.equal(buffer, buffers[name]) for name, buffer in net.named_buffers())
        assert all(torch.equal(weight, weights[name]) for name, weight in net.named_parameters())
        assert torch.equal(torch.get_rng_state(), random)
        assert net.norm.num_batches_tracked == buffers["norm.num_batches_tracked"]


@contextlib.contextmanager
def traced(start: Callable[[Any], None]) -> Iterator[None]:
    """Under a debugger's or profiler's function."""

    def see(_frame: Any, _event: str, _arg: Any) -> Any:
        return see

    start(see)
    try:
        yield
    finally:
        start(None)


@contextlib.contextmanager
def reset() -> Iterator[None]:
    torch.compiler.reset()
    yield


@pytest.mark.parametrize(
    "around",
    [
        lambda: traced(sys.settrace),
        lambda: traced(sys.setprofile),
        reset,
        lambda: torch.autograd.detect_anomaly(),
        lambda: torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]),
        warnings.catch_warnings,
    ],
    ids=["settrace", "setprofile", "torch.compiler.reset", "detect_anomaly", "profiler", "warnings"],
)
@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_around_a_step(around: Callable[[], Any]) -> None:
    stock = network()
    twin = copy.deepcopy(stock)
    ours = accelerate(twin, tile=9)
    for size in SIZES:
        with around():
            if around is warnings.catch_warnings:
                warnings.simplefilter("error")
            agree(stock, ours, twin, [size])


WITHOUT_A_FILE = """
from torch import nn
class Typed(nn.Conv2d):
    def forward(self, x):
        x = super().forward(x) * 2
        return x if self.padding[0] or x.mean() > 0 else -x
"""


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("<string>", "<string>:6 (in forward)"),
        ("<ipython-input-12-0123456789ab>", "cell 12, line 6 (in forward)"),
        ("/tmp/ipykernel_4711/1234567.py", "cell of the notebook, line 6 (in forward)"),
    ],
)
def test_code_without_a_file(name: str, said: str) -> None:
    """Of a notebook's cell, or of `exec`."""
    made: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(WITHOUT_A_FILE, name, "exec"), made)
    stock = made["Typed"](1, 2, 3, padding=1).double()
    x = image()
    torch.testing.assert_close(accelerate(copy.deepcopy(stock), tile=9)(x), stock(x), rtol=1e-11, atol=1e-11)
    with pytest.raises(UnsupportedError, match=re.escape(said)):
        accelerate(made["Typed"](1, 2, 3).double(), tile=9)(x)


# -- graphs that break ----------------------------------------------------------------------------------------------


def branching(_net: Any, x: Tensor) -> Tensor:
    return x.relu() * 2 if x.mean() > 0 else x.sigmoid()


def printing(_net: Any, x: Tensor) -> Tensor:
    y = x.tanh()
    sys.stdout.write(f"a map of {y.shape[1]} channels\n")
    return y + x


@pytest.mark.parametrize("middle", [branching, printing], ids=lambda middle: middle.__name__)
def test_a_graph_that_breaks(
    middle: Callable[[Any, Tensor], Tensor], capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "gigamorph")
    stock = network(middle)
    twin = copy.deepcopy(stock)
    with pytest.raises(UnsupportedError, match=rf"test_dynamo.py:\d+ \(in {middle.__name__}\)") as caught:
        accelerate(twin, tile=9)(image())
    assert "\n" not in str(caught.value) and 'fallback="untiled"' in str(caught.value)
    tiles: list[TileEvent] = []
    ours = accelerate(twin, tile=9, fallback="untiled")
    ours.on_tile = tiles.append
    capsys.readouterr()
    agree(stock, ours, twin, [SIZES[0], SIZES[0], *SIZES])
    assert twin.calls == stock.calls and len(tiles) > 5 * 8
    lines = capsys.readouterr().out.splitlines()
    assert lines == (["a map of 4 channels"] * 10 if middle is printing else [])
    told = [one.getMessage() for one in caplog.records if "a piece of the forward ends" in one.getMessage()]
    assert re.search(r"test_dynamo.py:\d+: .*; \d+\.?\d* KiB of tensors are stored", told[0]), told
    for mean, wanted in zip(twin.seen, stock.seen, strict=True):
        torch.testing.assert_close(mean, wanted, rtol=1e-11, atol=1e-11)


def test_both_ways_of_a_branch() -> None:
    stock = network(branching).eval()
    ours = accelerate(copy.deepcopy(stock), tile=9, fallback="untiled")
    for number in range(4):
        shift = torch.full((1, 4, 1, 1), float(3 * (-1) ** number), dtype=torch.float64).flatten()
        for net in (stock, ours):
            net.norm.bias.data.copy_(shift)
        x = image()
        torch.testing.assert_close(ours(x), stock(x), rtol=1e-11, atol=1e-11)


# -- torch.compile --------------------------------------------------------------------------------------------------


def test_an_accelerated_network_in_a_compiled_function() -> None:
    stock = network()
    twin = copy.deepcopy(stock)
    ours = accelerate(twin, tile=9)

    @torch.compile(backend="eager")
    def step(net: Any, x: Tensor) -> Tensor:
        return net(x * 2).tanh() + 1

    agree(stock, torch.compile(ours, backend="eager"), twin)
    x = image()
    torch.testing.assert_close(step(ours, x), stock(x * 2).tanh() + 1, rtol=1e-11, atol=1e-11)


def test_the_backend() -> None:
    stock = network()
    twin = copy.deepcopy(stock)
    agree(stock, torch.compile(twin, backend="gigamorph", options={"tile": 16}), twin)
    assert twin.calls == stock.calls == len(SIZES)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"tiles": 16}, "choose from memory_budget, tile, halos, fallback"),
        ({"halos": "nowhere"}, "halos"),
        ({"tile": -3}, "tile"),
    ],
)
def test_options_of_the_backend_that_are_not_known(options: dict[str, Any], match: str) -> None:
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match=match) as caught:
        torch.compile(network(), backend="gigamorph", options=options)(image())
    assert isinstance(caught.value.inner_exception, GigamorphError)


def test_the_backend_has_no_mode() -> None:
    with pytest.raises(Exception, match="no mode 'max-autotune'"):
        torch.compile(network(), backend="gigamorph", mode="max-autotune")(image())


@pytest.mark.parametrize("middle", [branching, printing], ids=lambda middle: middle.__name__)
def test_the_backend_and_a_graph_that_breaks(middle: Callable[[Any, Tensor], Tensor]) -> None:
    stock = network(middle)
    twin = copy.deepcopy(stock)
    with pytest.raises(
        Exception, match=r"the forward is not one graph: test_dynamo.py:\d+: .*\"fallback\": \"untiled\""
    ):
        torch.compile(twin, backend="gigamorph", options={"tile": 16})(image())
    options = {"tile": 16, "fallback": "untiled"}
    twin = copy.deepcopy(stock)
    agree(stock, torch.compile(twin, backend="gigamorph", options=options), twin)
