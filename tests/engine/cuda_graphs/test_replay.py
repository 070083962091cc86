"""Replayed tiles give what tiles computed op by op give, and read nothing but their graph buffers.

On the CPU a captured function is one that is called again, with the place of the first tile of its kind. Before every
load all graph buffers are filled with NaN, and during a replay every op is watched.
"""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from captures import Watch, poison, storage
from exactness import LIMIT, assert_exact, errors, named, randomize, step, step_errors
from hypothesis import HealthCheck, assume, given, settings
from random_net import Program, examples, programs
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from gigamorph import accelerate, dense_loss, plan
from gigamorph.engine.cuda_graphs import buffers, recording, replay, signature, step_checks, whole_passes
from gigamorph.engine.execution import forward
from gigamorph.engine.execution.programs import Programs
from gigamorph.engine.planning.plan import Plan
from gigamorph.engine.tiling.scan import Scan
from gigamorph.kernels import choice

if not torch.cuda.is_available():
    import interpreter

    interpreter.install()

CHECKS = {"deadline": None, "derandomize": True, "suppress_health_check": list(HealthCheck)}


class Remembered:
    """Captures by remembering the function, and replays by calling it."""

    def __init__(self) -> None:
        self.on = True
        self.captured = self.replayed = 0
        self.benches: list[recording.RecordingPool] = []

    def tensors(self) -> list[Tensor]:
        found: list[Tensor] = []
        for bench in self.benches:
            for holder in (bench.step, *bench.recordings.values()):
                found += [*holder.inputs.values(), *holder.outputs.values()]
            found += bench.sums.values()
        return found

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        self.captured += 1
        there = {tensor.data_ptr() for tensor in self.tensors()}

        def again() -> None:
            self.replayed += 1
            assert there <= {tensor.data_ptr() for tensor in self.tensors()}, "a graph buffers has moved"
            with Watch({storage(tensor) for tensor in self.tensors()}):
                run()

        return again


@pytest.fixture
def remembered(monkeypatch: pytest.MonkeyPatch) -> Remembered:
    """Tiles that are alike are replayed on the CPU while `on`, however few there are."""
    executor = Remembered()
    plain_load = buffers.GraphBuffers.load

    class Bench(recording.RecordingPool):
        def __init__(self, *args: Any):
            super().__init__(*args)
            executor.benches.append(self)

    def load(self: buffers.GraphBuffers, tensors: dict[buffers.Name, Tensor]) -> None:
        for tensor in (*self.inputs.values(), *self.outputs.values()):
            poison(tensor)
        plain_load(self, tensors)

    monkeypatch.setattr(replay, "RecordingPool", Bench)
    monkeypatch.setattr(whole_passes, "MOST_TILES", 0)
    monkeypatch.setattr(step_checks, "MOST_TILES", 0)
    monkeypatch.setattr(buffers.GraphBuffers, "load", load)
    monkeypatch.setattr(buffers, "executor", lambda device: executor if executor.on else None)
    monkeypatch.setattr(Plan, "replayed", property(lambda plan: True))
    return executor


def new_weights(model: nn.Module, seed: int) -> None:
    """Other parameters in other memory; what still reads the old ones gets NaN."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        old = parameter.data
        parameter.data = old + 0.05 * torch.randn(old.shape, generator=generator, dtype=torch.float64).to(old.dtype)
        poison(old)


def assert_replays_agree(
    remembered: Remembered,
    model: nn.Module,
    x: Tensor,
    rounds: int = 3,
    image_gradient: bool = True,
    limit: float = 0.0,
    **options: Any,
) -> None:
    """Several steps with changing parameters, then inference, replayed and not: outputs, all gradients and buffers.

    They are equal bit for bit, except (`limit`) that parts of stored maps and of their gradients are dense where tiles
    are replayed, and views where not, so that PyTorch may add up in another order.
    """
    net = accelerate(copy.deepcopy(model), **options)
    programs = {False: Programs(), True: Programs()}  # of the same recordings
    for number in range(rounds + 1):
        results: list[dict[str, Tensor | None]] = []
        before = copy.deepcopy(dict(net.named_buffers()))
        for remembered.on, net._runner.programs in programs.items():
            for name, buffer in net.named_buffers():
                buffer.copy_(before[name])
            if number < rounds:
                made = step(net, x * (1 + number), seed=number, image_gradient=image_gradient)
                found = made.gradients | named(made.outputs) | {"image": made.image}
            else:
                with torch.no_grad():
                    found = named(tree_leaves(net(x)))
            results.append(found | {name: buffer.clone() for name, buffer in net.named_buffers()})
        new_weights(net, number)
        wrong = {name: error for name, error in errors(*results).items() if not error <= limit}
        assert not wrong, f"round {number}: {wrong}"


class Net(nn.Module):
    """Stem with pooling, a residual block, two branches, two kinds of pooling over the image."""

    def __init__(self, norm: type[nn.Module] = nn.Identity):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 8, 7, 2, 3), norm(8), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
        self.a = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), norm(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1))
        self.b = nn.Conv2d(8, 16, 3, 2, 1)
        self.head = nn.Linear(32, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.b(F.relu(self.a(x) + x))
        return self.head(torch.cat((x.mean((2, 3)), F.adaptive_max_pool2d(x, 1).flatten(1)), 1))


def build(norm: type[nn.Module] = nn.Identity) -> nn.Module:
    torch.manual_seed(0)
    return randomize(Net(norm)).double()


def image(height: int, width: int) -> Tensor:
    return torch.randn(1, 1, height, width, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_interior_tiles_are_replayed(remembered: Remembered) -> None:
    """Of 6 x 5 tiles the first row and column, the last and those between them are kinds of their own."""
    net = accelerate(build(), tile=32)
    net(image(6 * 32, 5 * 32)).sum().backward()
    (bench,) = remembered.benches
    assert len(bench.recordings) == 2 * 9
    assert remembered.captured == 2 * 5  # each pass: the interior and four edges; the corners are seen once
    assert remembered.replayed == 2 * (30 - 9)
    net(image(6 * 32, 5 * 32)).sum().backward()
    assert remembered.captured == 2 * 9
    assert remembered.replayed == 2 * (30 - 9) + 2 * 30


@pytest.mark.parametrize("tile", [16, 24, 200])
def test_steps_agree(remembered: Remembered, tile: int) -> None:
    assert_replays_agree(remembered, build(), image(77, 62), tile=tile)
    assert remembered.replayed > 0 or tile == 200


@pytest.mark.parametrize("halos", ["device", "host", "disk"])
def test_without_a_gradient_of_the_image(remembered: Remembered, halos: str) -> None:
    assert_replays_agree(remembered, build(), image(64, 64), image_gradient=False, tile=16, halos=halos)


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, lambda channels: nn.GroupNorm(2, channels)])
def test_live_norms(remembered: Remembered, norm: Any) -> None:
    """Several stages, whose sources are stored maps, and moments."""
    assert_replays_agree(remembered, build(norm).train(), image(64, 80), limit=LIMIT, tile=16)
    assert len(remembered.benches) > 2 and remembered.replayed > 0


class Strips(nn.Module):
    """Sums, maxima and moments of rows and columns, which gate the map."""

    def __init__(self):
        super().__init__()
        self.conv, self.rows, self.last = nn.Conv2d(1, 4, 3, 2, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 2, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x = self.conv(x)
        rows = self.rows(x.mean(3, keepdim=True)).sigmoid() * x.std(2, keepdim=True) + x.max(3, keepdim=True).values
        x = self.last(x * rows * x.amax(2, keepdim=True))
        return x.sum(3), x.var(2), x.max(2).values, F.adaptive_max_pool2d(x, (3, 4)), F.adaptive_avg_pool2d(x, (2, 5))


def test_rows_columns_and_grids(remembered: Remembered) -> None:
    assert_replays_agree(remembered, Strips().double(), image(64, 80), limit=LIMIT, tile=16)
    assert remembered.replayed > 0


def test_live_norms_are_exact(remembered: Remembered) -> None:
    assert_exact(build(nn.BatchNorm2d).train(), image(64, 80), tile=(32, 16))


def test_random_networks(remembered: Remembered) -> None:
    @settings(max_examples=examples(8), **CHECKS)
    @given(programs(max_steps=10))
    def check(program: Program) -> None:
        model = program.build()
        x = torch.randn(program.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            assume(all(leaf.isfinite().all() for leaf in tree_leaves(model(x))))
        remembered.benches.clear()
        options = {"tile": program.tile, "halos": program.halos}
        assert_replays_agree(remembered, model, x, rounds=2, limit=LIMIT, **options)

    check()
    assert remembered.replayed > 60


def test_fused_blocks(remembered: Remembered, fused_with_stock_ops: None) -> None:
    """Convolutions that add to the sums themselves, windows in margins, the stem as one op."""
    model = nn.Sequential(build().eval(), nn.Softmax(1))
    assert_replays_agree(remembered, model, image(77, 62), image_gradient=False, tile=24)
    assert remembered.replayed > 0


def test_fused_live_norms(remembered: Remembered, fused_with_stock_ops: None) -> None:
    """Statistics that come with a convolution's output, and gradients that norms add to the sums themselves."""
    model = build(nn.BatchNorm2d).train()
    assert_replays_agree(remembered, model, image(64, 80), image_gradient=False, limit=LIMIT, tile=16)
    assert remembered.replayed > 0


def test_triton_kernels(remembered: Remembered) -> None:
    """In the interpreter: of five strips the three in the middle are alike."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3, 2, 1), nn.AdaptiveAvgPool2d(1))
    with choice.override("triton"):
        assert_replays_agree(remembered, model.double(), image(40, 8), rounds=1, image_gradient=False, tile=8)
    assert remembered.captured == 3 and remembered.replayed == 6


def test_autocast(remembered: Remembered) -> None:
    """Weights are cast once per step, to other memory each time; their gradients are summed in float32."""
    model, x = build().float(), image(77, 62).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_replays_agree(remembered, model, x, tile=24)
    assert remembered.replayed > 0


def test_recordings_are_few(remembered: Remembered, monkeypatch: pytest.MonkeyPatch) -> None:
    """The oldest goes when there are too many; other settings let all of the former ones go."""
    net = accelerate(build().eval(), tile=24)
    x = image(101, 86)
    first = step(net, x)
    (bench,) = remembered.benches
    monkeypatch.setattr(recording, "MOST_RECORDINGS", len(bench.recordings))
    oldest, *others = list(bench.recordings)
    i, j = oldest[1]
    bench.recording(i, j, ("another output", (i, j)), lambda recording: None)
    assert list(bench.recordings) == [*others, ("another output", (i, j))]
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", not torch.backends.cudnn.deterministic)
    again = step(net, x)
    assert len(remembered.benches) == 2
    (prepared,) = net._runner.programs
    (replays,) = prepared.replays.values()
    assert list(replays.benches.values()) == [remembered.benches[1]]
    assert all(torch.equal(a, b) for a, b in zip(first.outputs, again.outputs, strict=True))


def test_retained_tiles_are_not_replayed(remembered: Remembered, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last seven tiles keep their graph from pass 1."""
    monkeypatch.setattr(forward, "Scan", lambda **given: Scan(**{**given, "retained": 7}))
    assert_replays_agree(remembered, build(), image(96, 96), tile=16)
    assert remembered.replayed > 0


def test_a_program_of_few_tiles_is_replayed_from_its_third_step_on(remembered: Remembered) -> None:
    """One tile in inference, two in training; where all keep their graph there is nothing to replay."""
    net, x = accelerate(build().eval(), tile=(96, 48)), image(96, 96)
    for _ in range(3):
        net(x).sum().backward()
    assert remembered.captured == 4 and remembered.replayed == 8
    one = accelerate(build().eval(), tile=96)
    for _ in range(3):
        one(x).sum().backward()
    assert remembered.captured == 4, "its graph is retained"
    with torch.no_grad():
        results = [one(x) for _ in range(3)]
    assert remembered.captured == 5 and remembered.replayed == 10
    assert torch.equal(results[0], results[2])


def test_two_forwards_before_their_backwards(remembered: Remembered) -> None:
    """The second forward loads other vectors into the same graph buffers."""
    grads = []
    for remembered.on in (False, True):
        model = build(nn.BatchNorm2d).train()
        net = accelerate(model, tile=16)
        first = net(image(96, 96)).square().sum()
        second = net(2 * image(96, 96) + 1).square().sum()
        second.backward()
        first.backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    assert remembered.replayed > 0
    assert all(error <= LIMIT for error in errors(*grads).values())


def test_evidence_sees_every_block(remembered: Remembered) -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    maps = []
    for remembered.on in (False, True):
        maps.append(accelerate(model.double(), tile=16).evidence(image(96, 96), 1))
    assert remembered.replayed > 0
    assert torch.equal(*maps)


def test_what_depends_on_the_place_is_not_replayed(remembered: Remembered) -> None:
    for layer in (nn.Upsample(scale_factor=2, mode="bilinear"), nn.Dropout(0.5), nn.ReflectionPad2d(1)):
        net = accelerate(nn.Sequential(nn.Conv2d(1, 2, 3), layer, nn.AdaptiveAvgPool2d(1)).double(), tile=16)
        net(image(96, 96)).sum().backward()
    assert remembered.captured == 0


def test_counts_of_an_average_pooling_are_not_captured(remembered: Remembered, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are made on the host at the border; replayed anyway, the watch sees it."""
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.AvgPool2d(3, 2, 1, count_include_pad=False), nn.AdaptiveAvgPool2d(1))
    assert_replays_agree(remembered, model.double(), image(96, 96), tile=16)
    assert remembered.replayed > 0
    monkeypatch.setattr(signature, "_AT_BORDERS", frozenset())
    with pytest.raises(AssertionError, match="cannot be captured"):
        assert_replays_agree(remembered, model.double(), image(96, 96), tile=16)


def test_circular_padding_is_replayed_inside_alone(remembered: Remembered, monkeypatch: pytest.MonkeyPatch) -> None:
    circular = nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular")
    model = nn.Sequential(nn.Conv2d(1, 2, 3), circular, nn.Tanh(), nn.AdaptiveAvgPool2d(1)).double()
    assert_replays_agree(remembered, model, image(66, 66), tile=16, limit=LIMIT)
    assert remembered.replayed > 0
    monkeypatch.setattr(signature, "_AT_BORDERS", frozenset())
    with pytest.raises(AssertionError, match="round 0"):
        assert_replays_agree(remembered, model, image(66, 66), tile=16, limit=LIMIT)


@pytest.mark.parametrize("kind", [torch.Tensor, np.ndarray])
def test_labels_of_each_tile(remembered: Remembered, kind: type) -> None:
    """Other labels in each step, by region and as a tensor."""
    model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 1)).double()
    nets, x = [accelerate(copy.deepcopy(model), tile=16) for _ in range(2)], image(96, 96)
    for seed in range(3):
        y = torch.randint(0, 3, (1, 96, 96), generator=torch.Generator().manual_seed(seed))
        found = []
        for net, remembered.on in zip(nets, (False, True), strict=True):
            net.zero_grad()
            loss = dense_loss(net, x, y if kind is torch.Tensor else y.numpy(), nn.CrossEntropyLoss(ignore_index=2))
            loss.backward()
            found.append({"loss": loss.detach(), **{name: p.grad for name, p in net.named_parameters()}})
        assert max(errors(*found).values()) <= LIMIT
    assert remembered.replayed > 0


@pytest.mark.parametrize("kind", ["window", "halo", "grad", "back"])
def test_a_stale_input_is_seen(remembered: Remembered, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Planted: one input is not loaded again."""
    load = buffers.GraphBuffers.load

    def forgetful(self: buffers.GraphBuffers, tensors: dict[buffers.Name, Tensor]) -> None:
        stale = next((name for name in self.inputs if name[0] == kind and name in tensors), None)
        load(self, {name: tensor for name, tensor in tensors.items() if name != stale})

    monkeypatch.setattr(buffers.GraphBuffers, "load", forgetful)
    with pytest.raises(AssertionError, match="NaN"):
        assert_replays_agree(remembered, build(), image(96, 96), tile=16)


def test_a_tensor_of_the_step_is_seen(remembered: Remembered, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: the work reads a vector where this step has it."""
    monkeypatch.setattr(recording.RecordingPool, "vectors", lambda bench: {v: t.clone() for v, t in kept.items()})
    kept: dict[int, Tensor] = {}
    begin = replay.Replays.forward

    def forward(self: replay.Replays, scan: Any, vectors: dict[int, Tensor]) -> Any:
        kept.update(vectors)
        return begin(self, scan, vectors)

    monkeypatch.setattr(replay.Replays, "forward", forward)
    with torch.no_grad(), pytest.raises(AssertionError, match="not static"):
        accelerate(build(), tile=16)(image(96, 96))


def test_a_capture_that_fails_leaves_the_tile_op_by_op(
    remembered: Remembered, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A kernel or library that cannot be captured costs speed, with one warning, not the step."""

    def capture(run: Callable[[], None]) -> Callable[[], None]:
        remembered.captured += 1
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(remembered, "capture", capture)
    buffers.warn_once.cache_clear()
    model, x = build().double(), image(60, 60).double()
    wanted = step(copy.deepcopy(model), x)
    net = accelerate(model, tile=8)
    with caplog.at_level("WARNING", "gigamorph"):
        steps, counts = [], []
        for _ in range(3):
            steps.append(step(net, x))
            counts.append(remembered.captured)
    for got in steps:
        assert max(step_errors(wanted, got).values()) <= LIMIT
    assert counts[1] == counts[2] > 0, "none is tried twice"
    assert [record.name for record in caplog.records] == ["gigamorph"] and "not permitted" in caplog.text


def test_recordings_are_bounded(remembered: Remembered, monkeypatch: pytest.MonkeyPatch) -> None:
    """The most frequent kinds of tiles are recorded."""
    monkeypatch.setattr(replay, "MOST_KINDS", 3)
    assert_replays_agree(remembered, build(), image(128, 128), rounds=1, tile=16)
    assert all(len(bench.recordings) in (3, 6) for bench in remembered.benches)
    assert remembered.replayed > 50


def test_recordings_of_another_image_size_are_let_go(remembered: Remembered) -> None:
    net = accelerate(build(), tile=16)
    for side in (96, 112):
        net(image(side, side)).sum().backward()
    first, second = net._runner.programs
    assert not first.replays and second.replays
    assert not first.arena.chunks and second.arena.chunks


def test_the_captured_work_keeps_no_image(remembered: Remembered) -> None:
    net, x = accelerate(build(), tile=16), image(96, 96)
    gone = weakref.ref(x)
    net(x).sum().backward()
    del x
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("norm", [nn.Identity, nn.BatchNorm2d])
def test_the_plan_counts_static_tensors(remembered: Remembered, norm: type[nn.Module]) -> None:
    net = accelerate(build(norm).train(), tile=32)
    net(image(6 * 32, 6 * 32)).sum().backward()
    (prepared,) = net._runner.programs
    held = [
        sum(t.nbytes for t in (*recording.inputs.values(), *recording.outputs.values()))
        for bench in remembered.benches
        for recording in bench.recordings.values()
    ]
    planned = max(replay.buffer_bytes(tiled, True) for tiled in prepared.stages)
    assert 0.7 * planned < max(held) < 2 * planned
    assert len(prepared.arena.chunks) == 1


def test_an_arena_is_used_from_its_beginning_by_each() -> None:
    arena, pattern = buffers.SharedBuffers(), torch.zeros(3, 5, 1000)
    holders = [buffers.GraphBuffers(arena) for _ in range(2)]
    for holder in holders:
        for name in range(3):
            holder.load({(name,): pattern + name})
            holder.give((name,), pattern.permute(2, 0, 1) - name)
        for name in range(3):
            assert torch.equal(holder.inputs[name,], pattern + name)
            assert torch.equal(holder.outputs[name,], pattern.permute(2, 0, 1) - name)
    places = [[t.data_ptr() for t in (*h.inputs.values(), *h.outputs.values())] for h in holders]
    assert places[0] == places[1] and len(set(places[0])) == 6
    large = torch.zeros(buffers.CHUNK_BYTES // 4 + 1)
    holders[0].load({("large",): large})
    assert len(arena.chunks) == 2 and holders[0].inputs["large",].data_ptr() == arena.chunks[1].data_ptr()


def test_the_plan_has_room_for_replays(remembered: Remembered, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within a budget tiles are replayed, not retained, however roomy it is; where that does not fit, neither."""
    monkeypatch.setattr(Plan, "replayed", property(lambda plan: plan.replay_bytes > 0))
    monkeypatch.setattr(buffers, "CHUNK_BYTES", 2**16)
    model, shape = build().eval(), (1, 600, 600)

    def planned(budget: int) -> Plan:
        return plan(model, shape, budget, tile=64, dtype=torch.float64, halos="device")

    remembered.on = False
    least = planned(2**40)
    least_bytes = least.peak_bytes - least.retained_bytes - least.heap_bytes
    tight = planned(2 * least_bytes)
    assert not tight.replayed
    remembered.on = True
    both = planned(2 * least_bytes)
    assert both.replayed and both.replay_bytes > both.tile_bytes and both.peak_bytes <= 2 * least_bytes
    assert both.retained == 0 < tight.retained
    neither = planned(least_bytes + both.replay_bytes // 2)
    assert not neither.replayed and neither.peak_bytes <= least_bytes + both.replay_bytes // 2
    assert planned(2**40).replayed and planned(2**40).retained == 0
