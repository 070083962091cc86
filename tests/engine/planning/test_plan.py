"""The plan: what it promises, what it refuses, and that every choice it makes leaves the results exact."""

import math
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from exactness import assert_exact, randomize
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from gigamorph import BudgetError, GigamorphError, accelerate, dense_loss, plan
from gigamorph.engine.capture.recording import capture
from gigamorph.engine.lowering.stages import lower
from gigamorph.engine.models import create_model
from gigamorph.engine.planning import preview, request
from gigamorph.engine.planning.plan import Plan
from gigamorph.engine.planning.simulate import heaviest_tile, tile_peak, tile_weights
from gigamorph.engine.tiling.memory import format_enough, parse_bytes
from gigamorph.engine.tiling.stage import TiledStage


class CountCalls(TorchDispatchMode):
    """Convolutions that are computed forward."""

    sees_tiles = True

    def __init__(self):
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += func is torch.ops.aten.convolution.default
        return func(*args, **(kwargs or {}))


def count_calls(net: nn.Module, image: torch.Tensor) -> int:
    net(image)  # records
    with CountCalls() as found:
        net(image).sum().backward()
    return found.calls


def small_net() -> nn.Module:
    net = nn.Sequential(
        nn.Conv2d(1, 8, 7, 2, 3, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, 1),
        nn.Conv2d(8, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, 2, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 3),
    )
    return randomize(net).double().eval()


def test_a_budget_is_kept_and_used():
    net = small_net()
    tight = plan(net, (1, 600, 600), tile=64, dtype=torch.float64)
    assert tight.retained == 0 and tight.tiles == (10, 10)
    roomy = plan(net, (1, 600, 600), tight.peak_bytes + 8 * tight.tile_bytes, tile=64, dtype=torch.float64)
    assert 1 < roomy.retained < 100
    assert roomy.peak_bytes <= roomy.budget and roomy.fits
    assert roomy.stock_bytes is not None and roomy.stock_bytes > tight.tile_bytes


@pytest.mark.parametrize("extra", [4, 10, 1000])
def test_retained_tiles_change_nothing(extra):
    net = small_net()
    image = torch.randn(1, 1, 211, 163, dtype=torch.float64)
    base = plan(net, tuple(image.shape), tile=32, dtype=torch.float64)
    budget = base.peak_bytes + extra * base.tile_bytes
    chosen = plan(net, tuple(image.shape), budget, tile=32, dtype=torch.float64)
    assert chosen.retained > 1
    assert_exact(net, image, tile=32, memory_budget=budget)


def test_an_image_of_one_tile_is_computed_once():
    """Its graph is kept as stock's is; twice in a step likewise."""
    net, image = small_net(), torch.randn(1, 1, 200, 163, dtype=torch.float64)
    assert plan(net, tuple(image.shape), dtype=torch.float64).retained == 1
    assert count_calls(accelerate(net), image) == 3, "three convolutions, once each"
    assert_exact(net, image)


def test_without_a_budget_a_gpu_retains_all_tiles_or_replays_them(monkeypatch: pytest.MonkeyPatch):
    """Smaller ones, rather than to wait for the host. Where a tile is given, none is retained."""
    net = nn.Sequential(*small_net(), nn.Softmax(1)).float()
    size = (1, 1, 9000, 12000)
    roomy, small = (plan(net, size, device="cuda", tile=tile) for tile in (None, 1024))
    assert roomy.tiles == (3, 3) and roomy.retained == 9 and not roomy.replayed
    assert small.retained == 0
    free = roomy.peak_bytes - 5.5 * roomy.retained_bytes / 8
    monkeypatch.setattr(preview, "ENDLESS", int(free / 0.8))  # of which a share is taken
    some = plan(net, size, device="cuda")
    assert some.replayed and not (some.retained or some.op_by_op) and some.peak_bytes <= free


def test_without_a_budget_graphs_fill_a_part_of_the_memory_of_a_cpu(monkeypatch: pytest.MonkeyPatch):
    """A fifth of what is free, for others use it too; processes that train together share that."""
    net, size = small_net().float(), (1, 1, 4096, 3000)
    free = 40 << 30
    monkeypatch.setattr(request, "available_bytes", lambda _: free)

    def planned(shape: tuple[int, ...], **options: Any) -> Plan:
        return accelerate(net, **options).plan_for(shape, by_region=True)

    roomy, tiled = planned(size), planned(size, tile=512)
    assert roomy.retained == roomy.tiles[0] * roomy.tiles[1] and tiled.retained == 0
    free = 5 * (roomy.peak_bytes - roomy.retained_bytes // 2)
    some = planned(size)
    assert 0 < some.retained < math.prod(some.tiles) and some.peak_bytes <= free // 5
    # Maps of few values a pixel get strips of a million pixels, however many graphs are kept.
    assert roomy.tile == some.tile == (320, 3000)
    assert planned((1, 1, 40000, 30000)).tile == (1024, 1024)  # of low strips the halos would not fit
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "64")
    assert planned(size).retained == 0


@pytest.mark.parametrize(("tiles", "retained"), [(3, 3), (2.9, 1), (2, 1), (1.5, 0), (0.5, 0)])
def test_what_other_forwards_keep_leaves_room_for_fewer_graphs(tiles: float, retained: int):
    made = plan(small_net().float(), (1, 1, 9000, 12000), device="cuda")
    held = made.retained_bytes // (made.retained - 1)
    made = replace(made, retained=3, retained_bytes=2 * held, tile_bytes=held)
    assert made.retained_within(int(tiles * held)) == retained
    one = replace(made, retained=1, retained_bytes=0)
    assert one.retained_within(int(tiles * held)) == min(1, int(tiles))
    assert replace(one, tile_bytes=0).retained_within(0) == 1  # a tile that was asked for: nothing is predicted


def test_retained_tiles_survive_retain_graph():
    net, image = small_net(), torch.randn(1, 1, 97, 99, dtype=torch.float64)
    fast = accelerate(net, tile=32, memory_budget="2GiB")
    loss = fast(image).sum()
    loss.backward(retain_graph=True)
    first = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    loss.backward()
    for a, b in zip(first, net.parameters(), strict=True):
        assert torch.equal(a, b.grad)


def test_dropout_in_retained_tiles_is_the_same_draw():
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Dropout(0.5), nn.Conv2d(4, 4, 3), nn.AdaptiveAvgPool2d(1)).double()
    image = torch.randn(1, 1, 70, 70, dtype=torch.float64)
    grads = []
    for budget in (None, "2GiB"):
        net.zero_grad()
        torch.manual_seed(3)
        accelerate(net, tile=16, memory_budget=budget)(image).sum().backward()
        grads.append([p.grad.clone() for p in net.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_too_small_a_budget_is_refused_before_any_work():
    net = small_net()
    with pytest.raises(BudgetError, match=r"needs at least .* the budget is 200 KiB"):
        accelerate(net, memory_budget="200KiB")(torch.zeros(1, 1, 2000, 2000, dtype=torch.float64))
    with pytest.raises(BudgetError, match="tile of 512 x 512 does not fit"):
        plan(net, (1, 4096, 4096), "8MiB", tile=512, dtype=torch.float64)


def test_halos_move_to_disk_when_memory_is_short():
    net = create_model("resnet18", num_classes=2, in_channels=1).eval()
    chosen = plan(net, (1, 32768, 32768), "1.2GiB")
    assert chosen.halos == "disk" and chosen.halo_bytes > 2**31
    assert chosen.peak_bytes <= 1.2 * 2**30
    # 608 values per pixel of width and boundary: the rows that 3x3 kernels, the pooling and the skips wait for
    boundaries = chosen.tiles[0] - 1 + chosen.tiles[1] - 1
    assert chosen.halo_bytes == pytest.approx(608 * 32768 * 4 * boundaries, rel=0.02)


def test_halos_grow_with_the_image_and_the_tile_does_not():
    net = small_net()
    plans = [plan(net, (1, 512, side), tile=128, dtype=torch.float64) for side in (2048, 4096, 8192)]
    assert plans[0].tile_bytes == pytest.approx(plans[2].tile_bytes, rel=0.01)
    assert plans[2].halo_bytes == pytest.approx(4 * plans[0].halo_bytes, rel=0.1)


@pytest.mark.parametrize("size", [(0, 5), (5,), (1, 2, 3, 4, 5)])
def test_sizes_that_are_none(size):
    with pytest.raises(GigamorphError, match="image_size"):
        plan(small_net(), size)


def test_plan_reads_well():
    for budget, step in (("64MiB", "tile"), ("1GiB", "the whole image at once")):
        text = str(plan(small_net(), (2, 1, 300, 400), budget, dtype=torch.float64))
        for word in ("2 x 1 x 300 x 400", step, "predicted peak", "budget", "(fits)", "stock PyTorch"):
            assert word in text


def test_a_refused_budget_is_told_what_is_enough() -> None:
    """Over all choices of stored maps, not for one of them."""
    layers = [(nn.Conv2d(1 if n == 0 else 8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()) for n in range(4)]
    net = nn.Sequential(*(m for layer in layers for m in layer), nn.AdaptiveAvgPool2d(1)).train()
    with pytest.raises(BudgetError) as refused:
        plan(net, (512, 512), "8MiB")
    least = re.search(r"needs at least ([0-9.]+ [KM]iB)", str(refused.value))
    assert least is not None
    enough = parse_bytes(least[1].replace(" ", ""))  # rounded up
    assert isinstance(refused.value, MemoryError) and 0 <= enough - refused.value.needed_bytes < 0.01 * enough
    assert plan(net, (512, 512), enough).peak_bytes <= enough
    with pytest.raises(BudgetError):
        plan(net, (512, 512), int(0.97 * enough))


class Excited(nn.Module):
    """A convolution whose channels are weighed by their mean over the image."""

    def __init__(self, channels: int, stride: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, 2, 3, stride, 1)

    def forward(self, x):
        x = self.conv(x).relu()
        return x * x.mean((2, 3), keepdim=True).sigmoid()


def test_sweeps_of_few_layers_take_strips_of_whole_rows():
    net = nn.Sequential(Excited(1, 1), Excited(2, 2), Excited(2, 1), nn.AdaptiveAvgPool2d(1)).double().train()
    made = plan(net, (1500, 600), dtype=torch.float64)
    assert made.tile == (224, 600) and made.tiles == (7, 1)
    assert [width for _, width in made.sides] == [600, 600, 300, 300]
    assert_exact(randomize(net), torch.randn(1, 1, 1500, 600, dtype=torch.float64))
    height, width = plan(net, (1500, 20000), dtype=torch.float64).tile  # strips would be too low
    assert height == width


def test_a_hopeless_budget_is_refused_before_choices_are_thought_about(monkeypatch: pytest.MonkeyPatch) -> None:
    """What does not hold the parameters needs no search: of a network of many stages that would take seconds."""
    monkeypatch.setattr("gigamorph.engine.planning.search.strategies", None)
    net = create_model("resnet18", num_classes=2, in_channels=1).train()
    with pytest.raises(BudgetError, match=r"gradients alone need 85.* MiB, the budget is 60.0 MiB"):
        plan(net, (512, 512), "60MiB")
    with pytest.raises(BudgetError, match=r"the parameters alone need 42.* MiB"):
        plan(net.eval(), (512, 512), "40MiB", training=False)


def test_a_stage_that_only_reduces_the_image_has_a_plan() -> None:
    net = nn.Sequential(nn.BatchNorm2d(1), nn.Conv2d(1, 4, 3), nn.AdaptiveAvgPool2d(1)).train()
    made = plan(net, (1, 300, 200), "60MiB")
    assert len(made.sides) == 2 and made.tile_bytes > 300 * 200 * 4 / (made.tiles[0] * made.tiles[1])
    only_pools = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2))
    assert plan(only_pools, (1, 3, 512, 512), "5MiB").tiles > (1, 1)


def test_the_heaviest_tile_is_the_last_one() -> None:
    """Deep maps lag behind the image; the last tile computes what the others could not yet, and is what is counted."""
    net = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), *(nn.Conv2d(4, 4, 5, padding=2) for _ in range(12)))
    staged = lower(capture(net, (1, 1, 256, 256), torch.float32, "cpu"))
    (tiled,) = (TiledStage(stage, (64, 64)) for stage in staged.stages)
    weights = tile_weights(tiled)
    assert weights.shape == (4, 4) and heaviest_tile(tiled) == (3, 3) and weights[3, 3] > 1.4 * weights[2, 2]
    maps = [staged.program.values[v] for local in tiled.stage.locals for v in local.op.outputs]
    assert weights.sum() == pytest.approx(sum(math.prod(value.shape) * 4 for value in maps))
    peak, held = tile_peak(tiled.stage, tiled, True, staged.wanted(False))
    assert peak > held > weights[3, 3]


@pytest.mark.parametrize("size", [1, 1023, 1025, 15_663_104, 104_857_601, (1 << 30) - 1, (1 << 40) + 1])
def test_what_is_told_to_be_enough_is_enough(size):
    """Rounded to the nearest it was refused as often as not."""
    told = parse_bytes(format_enough(size).replace(" ", ""))
    assert size <= told <= 1.01 * size + 1


def test_a_loss_by_tiles_is_planned_as_it_is_computed() -> None:
    """The network's map and the labels are never whole; without the loss the map is, as a call returns it."""
    net = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 8, 3, padding=1)).eval()
    labels = torch.randint(0, 8, (1, 700, 600))
    made = plan(net, (700, 600), "60MiB", criterion=F.cross_entropy, labels=labels.to("meta"))
    fast = accelerate(net, memory_budget="60MiB")
    dense_loss(fast, torch.rand(1, 1, 700, 600), labels, F.cross_entropy).backward()
    (prepared,) = fast._runner.programs
    assert made.peak_bytes == prepared.plan.peak_bytes and made.tile == prepared.plan.tile
    called = plan(net, (700, 600), "60MiB")
    whole = 8 * 700 * 600 * 4
    assert made.stored_bytes < whole <= called.stored_bytes and made.stock_bytes > called.stock_bytes  # pyright: ignore


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"labels": torch.zeros(1, 9, 9)}, "labels require a criterion"),
        ({"criterion": F.cross_entropy}, "a criterion needs labels"),
        ({"criterion": F.cross_entropy, "labels": 3}, "labels must be tensors, arrays or sources"),
    ],
)
def test_a_loss_is_planned_with_its_labels(given: dict[str, Any], words: str) -> None:
    with pytest.raises(GigamorphError, match=words):
        plan(nn.Conv2d(1, 2, 3, padding=1), (9, 9), **given)
