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
