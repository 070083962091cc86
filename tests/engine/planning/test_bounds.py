"""What a plan holds is counted once, hopeless budgets are refused at once, and no plan that fits is missed."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from random_net import Program as Drawn
from random_net import examples, programs
from torch import Tensor, nn
from torch.nn import functional as F

from gigamorph import BudgetError, accelerate, plan
from gigamorph.engine.capture.program import Program
from gigamorph.engine.capture.recording import capture
from gigamorph.engine.execution.prepared import Prepared
from gigamorph.engine.lowering import onednn
from gigamorph.engine.lowering.nodes import sort
from gigamorph.engine.lowering.rewrites import prepare
from gigamorph.engine.lowering.stages import ProgramStage, lower
from gigamorph.engine.models import create_model
from gigamorph.engine.planning import constants
from gigamorph.engine.planning.candidate_tiles import sides_worth_trying
from gigamorph.engine.planning.estimate import Estimator
from gigamorph.engine.planning.library_overhead import cpu_libraries
from gigamorph.engine.planning.lower_bound import least_bytes
from gigamorph.engine.planning.request import Request
from gigamorph.engine.planning.search import arrange
from gigamorph.engine.planning.simulate import StorageMeter
from gigamorph.engine.planning.strategy import strategies
from gigamorph.engine.tiling.stage import TiledStage

search = sys.modules["gigamorph.engine.planning.search"]
HEADS, SIDE, DEPTH = 2, 16, 3


class Biased(nn.Module):
    """Attention with a bias for each pair of positions, looked up in a table of relative positions as Swin's is."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.norm, self.qkv = nn.GroupNorm(1, width), nn.Conv2d(width, 3 * width, 1)
        self.table = nn.Parameter(torch.randn((2 * SIDE - 1) ** 2, HEADS))
        place = torch.stack(torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")).flatten(1)
        apart = place[:, :, None] - place[:, None] + SIDE - 1
        self.register_buffer("index", apart[0] * (2 * SIDE - 1) + apart[1])

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(1, (HEADS, -1)).flatten(3).transpose(2, 3) for t in self.qkv(self.norm(x)).chunk(3, 1))
        bias = self.table[self.index.view(-1)].view(SIDE**2, SIDE**2, -1).permute(2, 0, 1).unsqueeze(0).contiguous()
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return x + y.transpose(2, 3).flatten(1, 2).unflatten(2, (SIDE, SIDE))


def test_a_bias_for_each_pair_is_counted_once() -> None:
    """Looks at a tensor's memory are no tensors, and what is only copied is not kept: beside a step that is counted."""
    net = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), *(Biased() for _ in range(DEPTH)), nn.AdaptiveAvgPool2d(1))
    net, image = net.double(), torch.randn(1, 1, SIDE, SIDE, dtype=torch.float64)
    fast = accelerate(net, memory_budget="1GiB", tile=SIDE)
    fast(image)  # records
    with StorageMeter() as meter:
        meter.ignore(image, *net.parameters(), *net.buffers())
        fast(image).sum().backward()
    made = plan(net, tuple(image.shape), "1GiB", tile=SIDE, dtype=torch.float64)
    held = sum(t.nbytes for t in (*net.parameters(), *net.buffers()))
    predicted = made.peak_bytes - made.library_bytes - made.record_bytes - held
    bias = HEADS * SIDE**4 * 8
    assert (DEPTH + 1) * bias < meter.peak and 0.9 * meter.peak < predicted < 1.2 * meter.peak
    assert (DEPTH + 1) * bias < made.stored_bytes < (DEPTH + 1.5) * bias, "each bias, and the gradient of one"


@settings(max_examples=examples(6), deadline=None, suppress_health_check=list(HealthCheck))
@given(programs(statistics=True), st.booleans())
def test_no_plan_holds_less_than_what_is_refused_at_once(drawn: Drawn, training: bool) -> None:
    """Over random networks: every choice of stored maps, every tile, every place of the halos."""
    program = capture(drawn.build(), drawn.shape, torch.float64, "cpu")
    maps, nodes = sort(program)
    request = Request(None, None, training)
    least = least_bytes(maps, nodes, request)
    records = len(program.values) * (constants.VALUE_BYTES + constants.CHOICE_BYTES)
    for strategy in strategies(maps, nodes, training, False):
        prepare(strategy.staged, training)
        estimate = Estimator(strategy.staged, training, False, records=records)
        for side in sides_worth_trying(strategy.staged, None, training):
            for place in ("device", "disk"):
                bare = estimate.plan(side, place, 1, count_tile=False).peak_bytes
                whole = estimate.plan(side, place, 1, exact=False).peak_bytes
                assert estimate.floor(count_tile=False) <= bare and least <= estimate.floor() <= whole


def test_what_no_plan_can_hold_is_refused_before_the_search(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels, copies and whole results count besides parameters; a little more is for the search to decide."""
    net = create_model("resnet18", num_classes=2, in_channels=1).train()
    program, other = (capture(net, (1, 1, 512, 512), torch.float32, "cpu") for _ in range(2))
    request = Request(None, None, True)
    least = least_bytes(*sort(other), request)
    own = sum(p.nbytes for p in net.parameters())
    assert least > 2 * own + 20_000_000
    monkeypatch.setattr(search, "strategies", None)
    with pytest.raises(BudgetError, match=r"needs at least 1\d\d MiB .* the budget is 1\d\d MiB"):
        arrange(program, replace(request, budget=int(least / 1.01)))
    with pytest.raises(TypeError):  # there is nothing to search among
        arrange(program, replace(request, budget=int(1.05 * least)))


class Excited(nn.Module):
    """A residual block whose channels are weighed by their mean over the image, with a frozen norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.gate = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x))
        return torch.relu(x + y * self.gate(y.mean((2, 3), keepdim=True)).sigmoid())


def excited(depth: int, width: int = 32, side: int = 512) -> Program:
    net = nn.Sequential(nn.Conv2d(1, width, 3, 2, 1), *(Excited(width) for _ in range(depth)), nn.AdaptiveAvgPool2d(1))
    with torch.no_grad():
        return capture(net.eval(), (1, 1, side, side), torch.float32, "cpu")


def test_a_choice_that_stores_less_and_needs_more_hides_no_plan() -> None:
    """Every layer again in each stage takes folded weights for each: more than the maps on disk before it."""
    program = excited(6, 256, 32)
    request = Request(1, None, False)
    maps, nodes = sort(program)
    options = search.PlanSearch(program, request)
    for strategy in strategies(maps, nodes, False, False):
        options.add(strategy)
    needs = []
    for number in range(1, len(options.options)):
        estimate = options._estimate(number)
        sides = sides_worth_trying(estimate.staged, None, False)[: constants.COARSE]
        needs.append(min(estimate.plan(side, "disk", 1).peak_bytes for side in sides))
    assert needs[-1] > min(needs), "the last choice stores least"
    options.request = replace(request, budget=int(1.1 * min(needs)))
    found = options.slower()
    assert found is not None
    assert found.tile in sides_worth_trying(options.options[found.choice][0], None, False)[: constants.COARSE]


def test_records_are_those_of_the_network() -> None:
    """Not of the values that rewriting other choices of stored maps makes: they grow with the square of the depth."""
    program = excited(10)
    before = len(program.values)
    _, made = arrange(program, Request(15_000_000, None, False))
    each = constants.VALUE_BYTES + constants.CHOICE_BYTES * len(made.choices)
    assert len(made.choices) > 1 and before * each <= made.record_bytes < 1.8 * before * each


def test_kernels_of_equal_convolutions_are_one_in_inference() -> None:
    """oneDNN keeps a compiled kernel for a shape, not for a layer."""
    size = [
        cpu_libraries([TiledStage(stage, (64, 64)) for stage in lower(excited(n)).stages], 0, False) for n in (2, 9)
    ]
    assert size[0] == size[1] < 40 * constants.KERNEL_BYTES + constants.CODE_BYTES[False]


def test_kernels_in_sixteen_bits_are_larger() -> None:
    """oneDNN compiles kernels that bring maps into its order besides: a U-Net took 9 % more than its budget."""
    tiled = [TiledStage(stage, (64, 64)) for stage in lower(excited(2)).stages]
    float32 = cpu_libraries(tiled, 0, True)
    with torch.autocast("cpu", torch.bfloat16):
        kernels = cpu_libraries(tiled, 0, True) - constants.CODE_BYTES[True]
    assert kernels > 1.5 * (float32 - constants.CODE_BYTES[True]) > 0


def test_kernels_of_other_sizes_do_not_pile_up() -> None:
    """oneDNN kept up to 1024 of former image sizes, 90 MB beside every budget."""
    code = """
import os
from gigamorph import accelerate
from gigamorph.engine.planning.library_overhead import _kernel_bytes
print(os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"], _kernel_bytes(1000))
"""
    env = {name: value for name, value in os.environ.items() if name != "ONEDNN_PRIMITIVE_CACHE_CAPACITY"}
    found = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["256", str(256 * constants.KERNEL_BYTES)]


def test_folded_weights_go_after_their_stage() -> None:
    staged = lower(excited(2))
    prepare(staged, False)
    tiled = tuple(TiledStage(stage, (64, 64)) for stage in staged.stages)
    prepared = Prepared(staged, tiled, arrange(excited(2), Request(None, None, False))[1])
    for number, step in enumerate(staged.steps):
        if isinstance(step, ProgramStage) and step.prelude:
            assert {v for op in step.prelude for v in op.outputs} <= set(prepared.last_use[number])


def test_kernels_are_counted_that_the_libraries_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    """One thread computes convolutions of a pixel without oneDNN in training; in inference weights are packed."""
    net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.Conv2d(8, 24, 1), nn.Conv2d(24, 8, 1), nn.AdaptiveAvgPool2d(1)).eval()

    def kernels(batch: int, training: bool, threads: int) -> int:
        monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
        staged = lower(capture(net, (batch, 1, 64, 64), torch.float32, "cpu"))
        prepare(staged, training)
        tiled = [TiledStage(stage, (64, 64)) for stage in staged.stages]
        return (cpu_libraries(tiled, 0, training) - constants.CODE_BYTES[training]) // constants.KERNEL_BYTES

    assert kernels(1, True, 2) == kernels(16, True, 1) == 9
    assert kernels(1, True, 1) == 3
    assert kernels(1, False, 1) == 3 + 2 * onednn.runs()  # of one channel and 8 filters is not packed
