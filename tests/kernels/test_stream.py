"""Pixels folded into channels, blocks of channels, parts that are merged and added chunk by chunk."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import DEVICE, Guarded, assert_close, assert_order_free, doubled, random_map, window
from kernel_references import normalize_act_gradients_reference, normalize_act_reference
from torch import Tensor

from gigamorph.kernels import batch_norm, stream, tiles
from gigamorph.kernels import moments as moments_module
from gigamorph.kernels.batch_norm import (
    add_parts,
    launch_live_norm,
    launch_normalize_act,
    launch_normalize_act_gradients,
    normalize_act_gradients,
)
from gigamorph.kernels.moments import (
    launch_moments,
    launch_moments_backward,
    merge_parts,
    moments_backward_reference,
    moments_reference,
)
from gigamorph.kernels.tiles import MOST_BLOCK_CHANNELS, StreamConfig, stream_config

CHANNELS = [1, 3, 8, 24, 88, 96, 120, 144, 208, 288, 352, 720]
# Those that kernels run on: the others are folded as these are, into more blocks.
COMPUTED = [1, 3, 8, 24, 88, 96, 144, 288]
DTYPES = [torch.float64, torch.float32, torch.bfloat16]
# Images, rows, columns: all pixels may be folded, or 16, or 2, or none.
SIZES = [(1, 16, 8), (2, 4, 6), (3, 2, 7), (1, 5, 7), (3, 3, 3)]


def statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    mean, m2 = moments_reference(x.double())
    wide = torch.promote_types(x.dtype, torch.float32)
    return mean.to(wide), (m2 / (x.numel() // x.shape[1]) + 1e-5).rsqrt().to(wide)


def check_sums(results, oracles, dy: Tensor, x: Tensor, dtype: torch.dtype) -> None:
    """Signs differ: a sum may be small beside its terms."""
    scale = (dy.double().abs() * (1 + x.double().abs())).sum((0, 2, 3)) * 4
    for result, oracle in zip(results, oracles, strict=True):
        assert ((result - oracle).abs() <= (1e-14 if dtype == torch.float64 else 1e-6) * scale).all()


def check_ops(channels, size, dtype, put, act="silu") -> None:
    """Every kernel that folds, its maps laid out by `put`."""
    n, h, w = size
    g, guard = torch.Generator().manual_seed(channels), Guarded()
    x, dy, more = (random_map(n, channels, h, w, dtype, g) + 1 for _ in range(3))
    weight, bias = (torch.rand(2, channels, generator=g, dtype=torch.float64) + 0.5).to(DEVICE)
    mean, rstd = statistics(x)
    vectors = [guard(t.to(mean.dtype)) for t in (mean, rstd, weight, bias)]
    wide = doubled(*vectors)
    y, dx, dz = (put(torch.full_like(x, float("nan")), guard) for _ in range(3))
    given_x, given_dy = put(x, guard), put(dy, guard)

    for name, result, oracle in zip(
        ("mean", "m2"), launch_moments(given_x), moments_reference(x.double()), strict=True
    ):
        assert_close(name, result, oracle)
    launch_normalize_act(given_x, *vectors, put(more, guard), act, y)
    assert_close("y", y, normalize_act_reference(x.double(), *wide, more.double(), act)[0])
    sums = launch_normalize_act_gradients(given_dy, given_x, *vectors, None, act, dx, dz)
    dx_oracle, dz_oracle, *sums_oracle = normalize_act_gradients_reference(dy.double(), x.double(), *wide, None, act)
    assert_close("dx of constant statistics", dx, dx_oracle)
    assert_close("dz", dz, dz_oracle)
    check_sums(sums, sums_oracle, dy, x, dtype)
    launch_live_norm(given_dy, given_x, *vectors, None, act, sums, 1, dx)
    live = normalize_act_gradients_reference(dy.double(), x.double(), *wide, None, act, 1)[0]
    slack = dx_oracle  # dx may cancel against the sums: its error is that of the terms
    assert_close("dx", dx.double() + slack, live + slack, dtype=dtype)
    launch_moments_backward(given_x, vectors[0], vectors[2], vectors[3], 7 * n * h * w, put(more, guard), dx)
    oracle = moments_backward_reference(x.double(), wide[0], wide[2], wide[3], 7 * n * h * w, more.double())
    assert_close("gradient of moments", dx, oracle)
    guard.check()


LAYOUTS = {
    "dense": lambda x, guard: guard(x),
    "window": lambda x, guard: window(x),
    "whole rows": lambda x, guard: guard(torch.cat([x, x], 2).contiguous(memory_format=torch.channels_last))[
        :, :, : x.shape[2]
    ].copy_(x),
}


@settings(max_examples=14, deadline=None, derandomize=True)
@given(
    channels=st.sampled_from(COMPUTED),
    size=st.sampled_from(SIZES),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(sorted(LAYOUTS)),
    small=st.booleans(),
    act=st.sampled_from(["none", "silu", "gelu"]),
)
def test_any(channels, size, dtype, layout, small, act):
    with pytest.MonkeyPatch.context() as patch:
        if small:
            patch.setattr(stream, "stream_config", lambda pixels, *_: StreamConfig(4, 128, 3, 4))
        check_ops(channels, size, dtype, LAYOUTS[layout], act)


@pytest.mark.parametrize("channels", COMPUTED)
def test_every_number_of_channels(channels):
    check_ops(channels, (1, 2, 8), torch.bfloat16, LAYOUTS["dense"])


@pytest.mark.parametrize("channels", [3, 24])
@pytest.mark.parametrize("small", [False, True])
def test_order_of_programs(channels, small, monkeypatch):
    if small:
        monkeypatch.setattr(stream, "stream_config", lambda *_: StreamConfig(2, 32, 1, 4))
    g = torch.Generator().manual_seed(3)
    x, dy = (random_map(1, channels, 16, 8, torch.bfloat16, g) for _ in range(2))
    mean, rstd = statistics(x)
    assert_order_free(
        lambda: (
            *launch_moments(x),
            *normalize_act_gradients(dy, x, mean, rstd, None, None, None, "silu", True, 1),
        )
    )


@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("pixels", [1, 6, 49, 128, 4096])
def test_folds(channels, pixels):
    """Full blocks where pixels allow it; none of a window or of a map beside one."""
    x = torch.empty(1, channels, 1, pixels, device="meta").contiguous(memory_format=torch.channels_last)
    k = stream.folds(pixels, 128, x, None, x)
    assert pixels % k == 0
    assert channels * k % 128 == 0 or pixels // k % 2 == 1, "as many as pixels can be halved"
    assert channels * k <= math.lcm(channels, 128), "no more than needed"
    if pixels > 1:
        apart = torch.empty(1, 2 * channels, 1, pixels, device="meta").contiguous(memory_format=torch.channels_last)
        assert stream.folds(pixels, 128, x, apart[:, :channels]) == 1


def test_a_kernel_across_channels_does_not_fold():
    x = torch.empty(1, 24, 16, 8, device="meta").contiguous(memory_format=torch.channels_last)
    assert stream.Stream("layer_norm", 8192, x).share.C == 24


def test_maps_too_large_are_refused_before_they_are_folded():
    x = torch.empty(2, 8, 32768, 32768, device="meta").contiguous(memory_format=torch.channels_last)
    with pytest.raises(ValueError, match="too large"):
        stream.Stream("moments", 128, x, fold=True)


# -- tiles of a GPU -----------------------------------------------------------------------------------------------


@pytest.fixture
def on_gpu(monkeypatch):
    monkeypatch.setattr(tiles, "interpreting", lambda: False)


def test_tiles_cover_every_pixel(on_gpu):
    for pixels in (1, 7, 49, 4096, 3328 * 2560, 2**30):
        for channels in (*CHANNELS, 128, 1152, 2048, 5760):
            config = stream_config(pixels, channels, MOST_BLOCK_CHANNELS)
            assert (config.programs(pixels) - 1) * config.share < pixels <= config.programs(pixels) * config.share
            assert config.steps <= 1024 and 4 <= config.block_c <= 128
            idle = tiles._padded(channels, config.block_c) - channels
            assert channels <= 128 or idle < tiles._padded(channels, 128) / 4


def test_small_maps_leave_few_parts(on_gpu):
    """16,384 pixels of 208 channels, 8 of them folded into one: some hundred programs of four tiles."""
    config = stream_config(2048, 208 * 8, MOST_BLOCK_CHANNELS)
    assert 256 <= config.programs(2048) * 13 <= 512 and config.steps == 4
    large = stream_config(2**20 // 8, 144 * 8, MOST_BLOCK_CHANNELS)
    assert 2000 <= large.programs(2**20 // 8) * 9 <= 2100


# -- parts --------------------------------------------------------------------------------------------------------


def parts_of(x: Tensor, length: int) -> Tensor:
    return torch.stack([torch.stack(moments_reference(part)) for part in x.split(length, 3)], 1)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    parts=st.sampled_from([1, 2, 31, 512, 513, 1024, 1500, 5000]),
    channels=st.sampled_from([1, 3, 8, 24]),
    rest=st.integers(1, 3),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    rows=st.sampled_from([2, 128]),
)
def test_many_parts(parts, channels, rest, dtype, rows):
    """Several levels of chunks; the last part is shorter than the others."""
    pixels = 3 * (parts - 1) + rest
    x = random_map(1, channels, 1, pixels, torch.float64, torch.Generator().manual_seed(parts)) + 3
    with pytest.MonkeyPatch.context() as patch:
        if parts < 100:
            patch.setattr(moments_module, "merge_blocks", lambda count, c: (min(rows, 4), 4))
        given_ = parts_of(x, 3).to(dtype)
        assert_order_free(lambda: merge_parts(given_, (1, 3), (1, pixels)))
        mean, m2 = merge_parts(given_, (1, 3), (1, pixels))
    oracle_mean, oracle_m2 = moments_reference(x)
    assert_close("mean", mean, oracle_mean)
    assert_close("m2", m2, oracle_m2)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    parts=st.sampled_from([1, 2, 31, 300, 2048]),
    channels=st.sampled_from([1, 3, 8, 24, 144]),
    folds=st.sampled_from([1, 2, 8, 128]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_many_sums(parts, channels, folds, dtype):
    if parts * folds > 5000:
        folds = 2
    given_ = torch.rand(parts, 2, folds * channels, generator=torch.Generator().manual_seed(parts), dtype=torch.float64)
    given_ = given_.to(dtype).to(DEVICE)
    oracle = given_.double().unflatten(2, (folds, channels)).sum((0, 2))
    assert_order_free(lambda: add_parts(given_, folds))
    for result, wanted in zip(add_parts(given_, folds), oracle, strict=True):
        assert_close("sum", result, wanted)


class TestPlantedErrors:
    """Mistakes the checks above must see."""

    def test_window_folded(self, monkeypatch):
        monkeypatch.setattr(stream, "is_dense", lambda x: True)
        with pytest.raises(AssertionError):
            check_ops(24, (1, 16, 8), torch.float32, LAYOUTS["window"])

    def test_sums_of_one_fold_alone(self, monkeypatch):
        monkeypatch.setattr(
            batch_norm, "add_parts", lambda sums, folds: add_parts(sums[:, :, : sums.shape[2] // folds], 1)
        )
        with pytest.raises(AssertionError):
            check_ops(24, (1, 16, 8), torch.float32, LAYOUTS["dense"])

    def test_parts_of_a_fold_counted_as_those_of_a_row(self, monkeypatch):
        monkeypatch.setattr(stream, "stream_config", lambda *_: StreamConfig(8, 128, 1, 4))
        monkeypatch.setattr(
            moments_module, "merge_parts", lambda p, box, size: merge_parts(p, box[::-1], (1, size[0] * size[1]))
        )
        with pytest.raises(AssertionError):
            check_ops(24, (1, 12, 16), torch.float32, LAYOUTS["dense"])
