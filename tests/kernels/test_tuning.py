"""What launches are chosen by."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gigamorph.kernels import tuning


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """A GPU of capability 9.0, which need not be here; kernels are not interpreted."""
    monkeypatch.setattr(tuning, "interpreting", lambda: False)
    monkeypatch.setattr(tuning, "_device_capability", lambda index: 90)
    return torch.device("cuda", 0)


@pytest.mark.parametrize(("hip", "descriptors", "options"), [(None, True, {"maxnreg": 255}), ("6.4", False, {})])
def test_a_chip_of_another_maker_has_no_descriptors(
    monkeypatch: pytest.MonkeyPatch, hip: str | None, descriptors: bool, options: dict[str, int]
) -> None:
    """AMD's MI300 says (9, 4), which is no capability of NVIDIA's, and its compiler knows no limit of registers."""
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(tuning, "_device_capability", lambda index: 94)
    gpu = torch.device("cuda", 0)
    assert tuning.has_descriptors(gpu) == descriptors
    assert tuning.register_limit(gpu, 255) == options
    assert hip is None or tuning.shared_limit(gpu) == 65_536


@pytest.mark.parametrize(
    ("filters", "depth", "taps", "maps", "tile"),
    [
        (64, 64, 9, 1, (128, 64, 4)),
        (256, 64, 1, 2, (128, 128, 4)),
        (192, 768, 1, 1, (128, 64, 4)),
        (2048, 512, 1, 2, (128, 128, 4)),
        (2048, 512, 1, 1, (128, 256, 8)),
        (256, 256, 9, 2, (128, 256, 8)),
        (256, 256, 9, 3, (128, 128, 8)),
    ],
)
def test_tiles_that_were_fastest_on_an_h200(
    hopper: torch.device, filters: int, depth: int, taps: int, maps: int, tile: tuple[int, int, int]
) -> None:
    """Pixels, filters and warps: 128 x 256 for long products of few maps, no filters for nothing."""
    config = tuning.matmul_config(hopper, torch.bfloat16, 1, 256, 256, filters, depth, True, maps, taps)
    assert (config.block_m, config.block_n, config.num_warps) == tile


@pytest.mark.parametrize(
    ("size", "filters", "depth", "tile"),
    [
        ((34, 34), 512, 512, (64, 128)),
        ((16, 16), 512, 512, (64, 64)),
        ((68, 68), 512, 512, (128, 256)),
        ((133, 133), 256, 256, (128, 128)),  # 139 tiles of 128 x 256 are a second wave of seven
    ],
)
def test_small_maps_fill_the_chip(
    hopper: torch.device, size: tuple[int, int], filters: int, depth: int, tile: tuple[int, int]
) -> None:
    """The last maps of a tile of 1024: 20 tiles of 128 x 256 would leave 112 of 132 multiprocessors idle."""
    config = tuning.matmul_config(hopper, torch.bfloat16, 1, *size, filters, depth, True, 1, 9)
    assert (config.block_m, config.block_n) == tile


@pytest.mark.parametrize(
    ("filters", "depth", "taps", "form", "tile"),
    [
        (64, 1, 49, "columns", (64, 64, 64)),
        (64, 3, 49, "columns", (64, 64, 32)),
        (96, 3, 16, "columns", (64, 128, 64)),
        (4, 4, 9, "columns", (64, 16, 64)),
        (64, 3, 1, "pointer", (64, 64, 16)),
        (20, 20, 9, "pointer", (64, 32, 32)),
    ],
)
def test_few_channels_are_flattened(
    hopper: torch.device, filters: int, depth: int, taps: int, form: str, tile: tuple[int, int, int]
) -> None:
    """A first layer, 49 columns in one step; where a tap fills 16 channels, or there is one tap, nothing is gained."""
    config = tuning.matmul_config(hopper, torch.bfloat16, 1, 1, 2048 * 2048, filters, depth, False, 1, taps)
    assert (config.form, (config.block_m, config.block_n, config.block_k)) == (form, tile)


@pytest.fixture
def blackwell(hopper: torch.device, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    monkeypatch.setattr(tuning, "_device_capability", lambda index: 100)
    return hopper


@pytest.mark.parametrize("filters", [64, 256, 512])
def test_statistics_take_registers_on_blackwell_alone(
    hopper: torch.device, monkeypatch: pytest.MonkeyPatch, filters: int
) -> None:
    """Of 128 x 128 by four warps 40 to 67 registers spilled, of 128 x 256 by eight 9 to 39."""

    def config(moments: bool) -> tuning.Config:
        given = hopper, torch.bfloat16, 1, 256, 256, filters, 512, True, 1, 9
        return tuning.matmul_config(*given, moments=moments)

    assert config(True) == config(False)
    monkeypatch.setattr(tuning, "_device_capability", lambda index: 100)
    assert config(True).block_n <= 128
    assert config(True).block_n < 128 or (config(True).num_warps, config(True).parts) == (8, 2)


@given(run=st.integers(1, 600), filters=st.integers(1, 2048), depth=st.integers(1, 2048), taps=st.integers(1, 7))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_stages_that_turn_operands_fit_on_blackwell(
    blackwell: torch.device, run: int, filters: int, depth: int, taps: int
) -> None:
    """Weight gradients in float32 wanted 245,936 bytes of 232,448: 6 stages of 40,960, where 4 were asked for."""
    config = tuning.wgrad_config(blackwell, torch.float32, run, filters, depth, taps, True)
    stage = (config.block_m + config.block_n * taps) * config.block_k * 4
    assert config.num_stages == 1 or (config.num_stages + 2) * stage <= tuning.shared_limit(blackwell)


@pytest.mark.parametrize(
    ("dtype", "filters", "depth", "taps", "maps", "costly", "tile"),
    [
        (torch.bfloat16, 128, 128, 9, 1, False, (128, 128, 64)),
        (torch.bfloat16, 88, 528, 1, 1, False, (64, 64, 32)),  # 8 channels at a time, which Triton does not know
        (torch.float16, 384, 1536, 1, 2, True, (64, 128, 64)),
        (torch.bfloat16, 16, 32, 9, 1, False, (64, 16, 32)),
        (torch.float32, 512, 512, 9, 1, False, (128, 64, 16)),
        (torch.float32, 512, 512, 1, 1, False, (128, 64, 32)),
    ],
)
def test_addresses_fit_in_registers(
    hopper: torch.device,
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    filters: int,
    depth: int,
    taps: int,
    maps: int,
    costly: bool,
    tile: tuple[int, int, int],
) -> None:
    """By pointers, on sm_80: of all but the first and the last registers spilled, up to 180."""
    monkeypatch.setattr(tuning, "_device_capability", lambda index: 80)
    config = tuning.matmul_config(hopper, dtype, 1, 1, 128 * 128, filters, depth, False, maps, taps, costly)
    assert (config.form, (config.block_m, config.block_n, config.block_k)) == ("pointer", tile)


@given(
    images=st.integers(1, 4),
    lines=st.integers(1, 600),
    run=st.integers(1, 600),
    filters=st.integers(1, 2048),
    block_m=st.sampled_from([64, 128]),
    block_n=st.sampled_from([16, 32, 64, 128, 256]),
)
def test_tiles_are_made_smaller_only_where_all_run_at_once(
    images: int, lines: int, run: int, filters: int, block_m: int, block_n: int
) -> None:
    made = tuning.OutputSize(images, lines, run, filters)
    small = tuning.fill_chip(made, block_m, block_n)
    assert small[0] >= 64 and small[1] >= min(64, block_n)
    assert small == (block_m, block_n) or made.tiles(*small) <= tuning.PROCESSORS
    assert small[0] <= block_m and small[1] <= block_n


@pytest.mark.parametrize(
    ("lines", "run", "filters", "block_n"),
    [
        (128, 128, 256, 256),  # 128 boxes of 8 x 16
        (135, 121, 256, 128),  # 136, of fewer pixels: four more than multiprocessors
        (58, 70, 512, 256),  # 40 boxes, 80 tiles; of half the filters 160, of which some multiprocessors have two
        (1, 16335, 256, 256),  # side by side there are 128
    ],
)
def test_boxes_that_do_not_fill_are_counted(
    hopper: torch.device, lines: int, run: int, filters: int, block_n: int
) -> None:
    """The last wave was counted by pixels, as if boxes went on in the next line: it had four tiles of 132."""
    config = tuning.matmul_config(hopper, torch.bfloat16, 1, lines, run, filters, filters, True, 1, 9)
    assert (config.block_m, config.block_n) == (128, block_n)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a driver")
def test_without_a_driver_a_plan_knows_no_chip(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inference of ResNet-50 could not be planned for a GPU on a machine without one."""
    monkeypatch.setattr(tuning, "interpreting", lambda: False)
    assert tuning.capability(torch.device("meta")) == 0 and not tuning.has_descriptors(torch.device("cpu"))
