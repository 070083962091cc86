"""The first convolution of a pixel that reads a map takes the gradients of all its readers, in one kernel."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from exactness import assert_each_exact, assert_exact, errors, randomize, step
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from gigamorph import accelerate, kernels
from gigamorph.engine.capture.recording import capture
from gigamorph.engine.lowering.rewrites import prepare
from gigamorph.engine.lowering.stages import ProgramStage, lower
from gigamorph.engine.tiling import tile
from gigamorph.kernels import choice, conv2d


@pytest.fixture(scope="module", autouse=True)
def on_gpu() -> Iterator[None]:
    """The fused graph of a GPU, each op of it computed by PyTorch."""
    with pytest.MonkeyPatch.context() as patch, choice.override("stock"):
        patch.setattr(kernels, "enabled", lambda device: True)
        yield


class Bottleneck(nn.Module):
    def __init__(self, inside: int, width: int, outside: int, stride: int, act: type[nn.Module] = nn.ReLU):
        super().__init__()
        self.a = nn.Sequential(nn.Conv2d(inside, width, 1), nn.BatchNorm2d(width), act())
        self.b = nn.Sequential(nn.Conv2d(width, width, 3, stride, 1), nn.BatchNorm2d(width), act())
        self.c = nn.Sequential(nn.Conv2d(width, outside, 1), nn.BatchNorm2d(outside))
        self.down = nn.Conv2d(inside, outside, 1, stride) if stride > 1 or inside != outside else nn.Identity()
        self.act = act()

    def forward(self, x: Tensor) -> Tensor:
        skipped = self.down(x) if self.skips_first else None
        return self.act(self.c(self.b(self.a(x))) + (self.down(x) if skipped is None else skipped))

    skips_first = False


class Net(nn.Module):
    """Bottlenecks, of which one before the last is an output besides."""

    def __init__(self, act: type[nn.Module] = nn.ReLU):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 4, 3, 2, 1), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
        self.first = nn.Sequential(Bottleneck(4, 2, 8, 1, act), Bottleneck(8, 2, 8, 1, act))
        self.second = nn.Sequential(Bottleneck(8, 3, 8, 2, act), Bottleneck(8, 3, 8, 1, act))
        self.side, self.last = nn.Conv2d(8, 3, 3), Bottleneck(8, 2, 8, 1, act)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.second(self.first(self.stem(x)))
        return self.last(x).mean((2, 3)), self.side(x).mean((2, 3))


def build(act: type[nn.Module] = nn.ReLU) -> nn.Module:
    torch.manual_seed(0)
    return randomize(Net(act)).double().eval()


def image(height: int, width: int) -> Tensor:
    return torch.randn(1, 1, height, width, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def stage_of(model: nn.Module) -> ProgramStage:
    staged = lower(capture(model, (1, 1, 96, 96), torch.float64, "cpu"))
    prepare(staged, training=True)
    (stage,) = staged.stages
    return stage


@pytest.fixture(params=[False, True], ids=["", "skip first"])
def order(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether a block computes its shortcut, here and there with a stride, before the branch that can gather."""
    monkeypatch.setattr(Bottleneck, "skips_first", request.param)


@pytest.mark.usefixtures("order")
def test_ends_of_blocks_are_gathered() -> None:
    """Of the five blocks' outputs four are read by several, as is the pooled map; those without a slope as well."""
    for act, sloped in ((nn.ReLU, 4), (nn.SiLU, 0)):
        gathers = [local.gathers for local in stage_of(build(act)).locals if local.gathers is not None]
        assert len(gathers) == 5
        assert sum(gather.slope is not None for gather in gathers) == sloped


@pytest.mark.usefixtures("order")
@pytest.mark.parametrize(("act", "tiles"), [(nn.ReLU, (16, 200)), (nn.ReLU6, (24,)), (nn.SiLU, (24,))])
def test_networks_are_exact(act: type[nn.Module], tiles: tuple[int, ...]) -> None:
    inference = {"inference": False} if act is nn.ReLU else {}
    assert_each_exact(build(act), [(image(101, 86), tile) for tile in tiles], **inference)


@settings(deadline=None, max_examples=5, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    height=st.integers(20, 60),
    width=st.integers(20, 60),
    tile=st.tuples(st.integers(6, 48), st.integers(6, 48)),
    asked=st.sampled_from([(1.0, 1.0), (1.0, 0.0), (0.0, 1.0)]),
    frozen=st.sampled_from(["", "first", "second.1.a", "last"]),
)
def test_of_any_size_and_loss(
    height: int, width: int, tile: tuple[int, int], asked: tuple[float, float], frozen: str
) -> None:
    """Losses that reach the convolution that gathers or only others; parts that are not trained."""
    model = build()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not frozen or not name.startswith(frozen))
    grads = []
    for net in (model, accelerate(copy.deepcopy(model), tile=tile)):
        outputs = net(image(height, width))
        sum(weight * output.square().sum() for weight, output in zip(asked, outputs, strict=True) if weight).backward()  # pyright: ignore
        grads.append({name: p.grad for name, p in net.named_parameters()})
    assert [g is None for g in grads[0].values()] == [g is None for g in grads[1].values()]
    assert max(errors(*grads).values()) <= 1e-11


class Given(Net):
    """The end of a block is handed out besides."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        middle = self.first(self.stem(x))
        x = self.second(middle)
        return self.last(x).mean((2, 3)), middle


def stored_and_gathered(model: nn.Module) -> int:
    """How many stored maps there are whose gradients an op gathers with a slope."""
    staged = lower(capture(model, (1, 1, 96, 96), torch.float64, "cpu"))
    prepare(staged, training=True)
    gathers = [(local.gathers, stage.stored) for stage in staged.stages for local in stage.locals]
    return sum(g is not None and g.value in stored and g.slope is not None for g, stored in gathers)


def live(act: type[nn.Module], kind: type[Net] = Net) -> nn.Module:
    torch.manual_seed(0)
    model = kind(act)
    for module in model.modules():
        # Before a live norm a bias does nothing: its gradient would be stock's rounding, or ours.
        if isinstance(module, nn.Sequential) and isinstance(module[1], nn.BatchNorm2d):
            module[0].bias = None
    return randomize(model).double().train()


def test_what_comes_back_for_a_stored_map_is_gathered_too() -> None:
    """With live norms the sum that reads the end of a block stands in another stage."""
    assert stored_and_gathered(live(nn.ReLU)) == 3
    assert stored_and_gathered(live(nn.SiLU)) == 0


@settings(deadline=None, max_examples=5, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    act=st.sampled_from([nn.ReLU, nn.ReLU6, nn.SiLU]),
    kind=st.sampled_from([Net, Given]),
    images=st.integers(1, 2),
    size=st.tuples(st.integers(32, 64), st.integers(32, 64)),
    tile=st.tuples(st.integers(16, 72), st.integers(16, 72)),
    frozen=st.sampled_from(["", "first", "second.1.a", "second.0"]),
)
def test_live_norms(
    act: type[nn.Module],
    kind: type[Net],
    images: int,
    size: tuple[int, int],
    tile: tuple[int, int],
    frozen: str,
) -> None:
    model = live(act, kind)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not frozen or not name.startswith(frozen))
    pixels = torch.randn(images, 1, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    assert_exact(model, pixels, tile=tile)


class Ladder(nn.Module):
    """A map that sums read again, each further behind, and convolutions with windows."""

    def __init__(self, sums: int, windows: int, stride: int):
        super().__init__()
        self.stem, self.pixel = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
        self.steps = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(sums))
        self.sides = nn.ModuleList(nn.Conv2d(4, 2, 1 + 2 * n, stride) for n in range(windows))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.stem(x))
        z, found = self.pixel(y), []
        for convolution in self.steps:
            z = convolution(z)
            found.append(F.silu(z + y).mean((2, 3)))
        return torch.cat([*found, *(F.silu(side(y)).mean((2, 3)) for side in self.sides)], 1)


@settings(deadline=None, max_examples=12, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    sums=st.integers(1, 3),
    windows=st.integers(0, 2),
    stride=st.integers(1, 2),
    size=st.tuples(st.integers(12, 40), st.integers(12, 40)),
    tile=st.tuples(st.integers(4, 40), st.integers(4, 40)),
)
def test_gradients_of_parts(sums: int, windows: int, stride: int, size: tuple[int, int], tile: tuple[int, int]) -> None:
    """Readers of a part of a block give the gradient of that part, some of them, and others one of the whole."""
    torch.manual_seed(sums)
    model = Ladder(sums, windows, stride).double()
    assert any(local.gathers for local in stage_of(model).locals)
    assert_exact(model, image(*size), tile=tile)


def test_a_part_is_added_where_it_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the kernel: of two rows and columns more there are zeros in no memory."""
    given: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
    dgrad = conv2d.conv2d_dgrad

    def noted(*args):
        if args[4] is not None:
            given.append((tuple(args[4].shape[2:]), tuple(args[8])))
        return dgrad(*args)

    monkeypatch.setattr(conv2d, "conv2d_dgrad", noted)
    step(accelerate(Ladder(1, 0, 1).double(), tile=20), image(40, 40), image_gradient=False)
    assert any(part != whole for part, whole in given)


def test_slopes_take_no_pass_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """But for the map that is given away as well."""
    passes: list[tuple[int, ...]] = []
    act_grad = conv2d.act_grad
    monkeypatch.setattr(conv2d, "act_grad", lambda dy, *rest: passes.append(tuple(dy.shape)) or act_grad(dy, *rest))
    step(accelerate(build(), tile=96), image(96, 96), image_gradient=False)
    assert passes == [(1, 8, 12, 12)]


def test_a_stride_reads_blocks_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """A filter of one pixel with a stride leaves a row and a column over: cut off, they cost the gradient a copy."""
    cuts: list[Tensor] = []
    monkeypatch.setattr(tile, "Crop", type("Crop", (), {"apply": lambda tensor, *part: cuts.append(tensor)}))
    step(accelerate(build(), tile=96), image(96, 96), image_gradient=False)
    assert not cuts


def test_a_map_that_goes_on_in_another_way_is_left() -> None:
    """Its first reader has a window, or there is one reader, or the map is an output."""

    class Left(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(1, 4, 1), nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            x = F.relu(self.a(x))
            y = F.relu(self.b(x) + self.c(x))
            return y.mean((2, 3)), self.c(y).mean((2, 3))

    model = Left().double()
    assert not any(local.gathers for local in stage_of(model).locals)
    assert_exact(model, image(40, 33), tile=16)


class Rounded(nn.Module):
    """A float32 map that a convolution rounds under autocast, and something else does not."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.first(x).float() * 1.001
        return self.second(x).mean((2, 3)), x.square().sin().amax((2, 3))


def test_a_map_that_a_convolution_rounds_under_autocast_stays_as_it_is_for_others() -> None:
    torch.manual_seed(0)
    model, image = Rounded(), torch.rand(1, 1, 40, 40)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected, found = model(image)[1], accelerate(model, tile=16)(image)[1]
    assert torch.equal(found, expected)
