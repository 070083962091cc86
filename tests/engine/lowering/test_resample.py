"""interpolate in all its modes against stock, and its geometry at many sizes."""

import itertools

import pytest
import torch
from around import Around, image
from exactness import assert_exact, step
from torch import nn
from torch.nn import functional as F

from gigamorph import accelerate
from gigamorph.engine.capture.call_trees import Ref
from gigamorph.engine.capture.program import Op, Program, Value
from gigamorph.engine.capture.recording import capture
from gigamorph.engine.lowering.ops import Block, Local, Maps
from gigamorph.engine.lowering.ops.window import interpolate
from gigamorph.engine.lowering.stages import lower
from gigamorph.engine.planning.simulate import tile_peak
from gigamorph.engine.tiling.stage import TiledStage

MODES = {
    "bicubic": {"mode": "bicubic"},
    "bicubic corners": {"mode": "bicubic", "align_corners": True},
    "area": {"mode": "area"},
    "antialiased": {"mode": "bilinear", "antialias": True},
    "antialiased corners": {"mode": "bilinear", "antialias": True, "align_corners": True},
    "antialiased bicubic": {"mode": "bicubic", "antialias": True},
    "antialiased bicubic corners": {"mode": "bicubic", "antialias": True, "align_corners": True},
    "nearest-exact": {"mode": "nearest-exact"},
    "bilinear": {"mode": "bilinear"},
    "bilinear corners": {"mode": "bilinear", "align_corners": True},
    "nearest": {"mode": "nearest"},
}
TARGETS = [
    {"size": (31, 9)},
    {"size": (8, 33)},
    {"scale_factor": 2},
    {"scale_factor": (0.7, 1.6)},
    {"scale_factor": 0.45, "recompute_scale_factor": True},
]


@pytest.mark.parametrize("mode", MODES)
def test_networks(mode):
    for target in TARGETS:
        assert_exact(Around(lambda x, t=target: F.interpolate(x, **t, **MODES[mode])).double(), image(), tile=(5, 4))


def test_modules():
    up = nn.Sequential(nn.Upsample(scale_factor=1.5, mode="bicubic"), nn.Upsample((40, 30), mode="nearest-exact"))
    assert_exact(Around(up).double(), image(), tile=(5, 4))
    assert_exact(Around(lambda x: x + F.interpolate(x, 1, mode="area")).double(), image(), tile=(5, 4))


@pytest.mark.parametrize("mode", MODES)
def test_geometry(mode):
    """At every place of a block, for many sizes: the block is that of the whole, from nothing but its window."""
    sizes = [1, 2, 3, 7, 16, 29, 64]
    for n, m in itertools.product(sizes, [1, 2, 5, 13, 28, 64, 97]):
        check(n, 3, {"size": (m, 4)}, mode)
    for n, factor in itertools.product(sizes, [0.3, 0.5, 0.77, 1.0, 1.9, 3]):
        for recompute in (None, True):
            if int(n * factor) > 0:
                check(n, 5, {"scale_factor": (factor, 1.0), "recompute_scale_factor": recompute}, mode)


def check(height: int, width: int, target: dict, mode: str) -> None:
    options = {**target, **MODES[mode]}
    x = torch.rand(1, 1, height, width, dtype=torch.float64)
    whole = F.interpolate(x, **options)
    values = [Value(t.shape, t.dtype, t.device) for t in (x, whole)]
    op = Op(F.interpolate, "interpolate", (Ref(0),), options, (0,), (1,), (), "")
    local = interpolate(op, Maps(Program(0, values=values), {0: (2, 3)}))
    if not isinstance(local, Local):
        return  # the mean of all
    (value,) = local.reads
    rows, cols = local.reads[value]
    edges = sorted({0, whole.shape[2] // 3, whole.shape[2] // 2, whole.shape[2]})
    for lo, hi in itertools.pairwise(edges):
        spans = rows.span(lo, hi), cols.span(0, whole.shape[3])
        window = x[:, :, slice(*spans[0]), slice(*spans[1])]
        (block,) = local.run({value: window}, Block((lo, hi), (0, whole.shape[3])))
        assert (block - whole[:, :, lo:hi]).abs().max() < 1e-13, (height, options, lo, hi)
        ready = rows.ready(spans[0][1])
        assert hi <= ready or spans[0][1] == height
    starts = [rows.span(o, o + 1) for o in range(whole.shape[2])]
    assert starts == sorted(starts) and [e for _, e in starts] == sorted(e for _, e in starts)


@pytest.mark.parametrize("mode", ["bicubic", "antialiased", "area"])
def test_low_precision(mode):
    """The sums run in float32: no further from float64 than stock is, over so many outputs that chance is no part."""
    net, images = Around(lambda x: F.interpolate(x, (31, 9), **MODES[mode])), image(64, 2, 19, 14)
    truth = step(net.double(), images).outputs[0]
    for dtype in (torch.float32, *([torch.bfloat16] if mode != "antialiased" else [])):  # which stock has not
        net = net.to(dtype)
        stock = (step(net, images.to(dtype)).outputs[0] - truth).norm()
        tiled = (step(accelerate(net, tile=8), images.to(dtype)).outputs[0] - truth).norm()
        assert tiled <= max(1.5 * stock, torch.finfo(dtype).eps * truth.norm())
        net = net.double()


@pytest.mark.parametrize("mode", ["nearest", "bilinear"])
def test_maps_keep_their_memory_order_and_are_made_once(mode: str) -> None:
    """The next convolution would copy a map of another order; a blend of two maps holds no third one."""
    net = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.Upsample(scale_factor=2, mode=mode), nn.Conv2d(16, 16, 1))
    (stage,) = lower(capture(net.eval(), (1, 1, 256, 256), torch.float32, "cpu")).stages
    (local,) = [local for local in stage.locals if local.op.name == "interpolate"]
    peak, _ = tile_peak(stage, TiledStage(stage, (256, 256)), False, set())
    assert peak < 2.9 * 16 * 512 * 512 * 4
    x = torch.randn(1, 16, 256, 256).to(memory_format=torch.channels_last)
    (y,) = local.run({local.op.inputs[0]: x}, Block((0, 512), (0, 512)))
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert torch.allclose(y, F.interpolate(x, scale_factor=2, mode=mode), atol=1e-6)


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last], ids=["plain", "channels last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", ["nearest", "nearest-exact"])
def test_where_two_inputs_meet_the_nearest_is_stocks(mode, dtype, order):
    """PyTorch rounds to one or the other by dtype, memory order and size."""
    targets = [(62, (198, 198)), (50, (171, 171)), (26, (97, 97)), (56, (92, 30)), (31, 2.3), (77, 2.3), (7, (31, 120))]
    for side, target in targets:
        x = torch.randn(2, 4, side, side).to(dtype).contiguous(memory_format=order)
        net = nn.Upsample(target) if isinstance(target, tuple) else nn.Upsample(scale_factor=target)
        net.mode = mode
        assert torch.equal(accelerate(net, tile=16)(x), net(x)), (side, target)
