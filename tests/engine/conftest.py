"""Fixtures that tests of several rooms use."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import image_files
import numpy as np
import pytest
import stores
from torch import distributed as dist

from gigamorph import kernels
from gigamorph.kernels import choice


@pytest.fixture
def write_dicom(tmp_path: Path) -> Callable[..., Path]:
    """write(pixels, syntax, bits, name=..., **elements) -> path; as `image_files.write_dicom`."""

    def write(pixels: np.ndarray, *args: Any, name: str = "x.dcm", **elements: Any) -> Path:
        return image_files.write_dicom(tmp_path / name, pixels, *args, **elements)

    return write


@pytest.fixture
def fused_with_stock_ops(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The fused graph of a GPU, each op of it computed by PyTorch: fast, and what runs where cuDNN is the faster."""
    monkeypatch.setattr(kernels, "enabled", lambda device: True)
    with choice.override("stock"):
        yield


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Mammograms of two patients."""
    return stores.phantoms(tmp_path_factory.mktemp("p"))


@pytest.fixture
def store(files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> stores.FolderStore:
    """A DICOMweb store that has these files."""
    found = stores.FolderStore(tmp_path / "store", monkeypatch)
    found.put(files)
    return found


@pytest.fixture
def alone() -> Iterator[None]:
    """A process group of this process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()
