"""Shared by the tests of readers and tables."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import image_files
import numpy as np
import pytest


@pytest.fixture
def write_dicom(tmp_path: Path) -> Callable[..., Path]:
    """write(pixels, syntax, bits, name=..., **elements) -> path; as `image_files.write_dicom`."""

    def write(pixels: np.ndarray, *args: Any, name: str = "x.dcm", **elements: Any) -> Path:
        return image_files.write_dicom(tmp_path / name, pixels, *args, **elements)

    return write
