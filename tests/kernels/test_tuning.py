"""What launches are chosen by."""

from __future__ import annotations

import pytest
import torch

from gigamorph.kernels import tuning


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
    ("pixels", "rows", "tile"),
    [
        (512, 512, 256),
        (256, 256, 256),
        (258, 258, 128),
        (130, 130, 256),
        (386, 300, 256),
        (131_072, 1, 256),
        (16_500, 1, 128),
    ],
)
def test_pixels_of_a_tile_follow_tails_and_waves(
    monkeypatch: pytest.MonkeyPatch, pixels: int, rows: int, tile: int
) -> None:
    """Of 64 filters: a row of 258 would leave nearly half of two tiles of 256 idle; 67 tiles half of the processors."""
    monkeypatch.setattr(tuning, "interpreting", lambda: False)
    monkeypatch.setattr(tuning, "_device_capability", lambda index: 90)
    gpu = torch.device("cuda", 0)
    config = tuning.matmul_config(gpu, torch.bfloat16, pixels, 64, 64, True, taps=9, rows=rows)
    assert (config.block_m, config.block_n) == (tile, 64)
