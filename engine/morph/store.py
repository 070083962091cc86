"""State dicts in files: lazy reads and atomic writes, one tensor at a time for safetensors files.

A source is any mapping from names to tensors: a plain state dict, a `SafetensorsFile` that reads a tensor on request,
or a `Computed` mapping that computes one. `write_state` accepts all three, so a file can grow into another one with a
single tensor in memory. A temporary file next to the target replaces it at the end, so a failure changes nothing.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import safe_open
from torch import Tensor

from ..errors import MorphError
from ..files import whole_or_absent
from ..models.weights import first_line

# Names of dtypes in the safetensors format.
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_CHUNK = 1 << 24  # bytes


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype of a tensor, which may not exist yet."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Size of the values in bytes."""
        return self.dtype.itemsize * math.prod(self.shape)


def layout(tensors: Mapping[str, Tensor]) -> dict[str, TensorSpec]:
    """Return the layout of every tensor of a source, without reading a lazy source."""
    if isinstance(tensors, Computed):
        return tensors.layout
    return {name: TensorSpec(tuple(t.shape), t.dtype) for name, t in tensors.items()}


class Computed(Mapping[str, Tensor]):
    """Mapping that computes tensors on request and does not store them.

    Args:
        layout: layout of each tensor by name.
        make: computes the tensor of a name.
    """

    def __init__(self, layout: dict[str, TensorSpec], make: Callable[[str], Tensor]) -> None:
        self.layout, self._make = layout, make

    def __getitem__(self, name: str) -> Tensor:
        expected = self.layout[name]
        tensor = self._make(name)
        if tuple(tensor.shape) != expected.shape or tensor.dtype != expected.dtype:
            raise MorphError(
                f"tensor '{name}' is {tensor.dtype} {tuple(tensor.shape)}, but {expected.dtype} {expected.shape} was "
                "expected"
            )
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.layout)

    def __len__(self) -> int:
        return len(self.layout)


class SafetensorsFile(Computed):
    """A safetensors file as a mapping; only requested tensors are in memory, as long as they are referenced.

    Raises:
        MorphError: the file is missing or damaged.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        with self._open() as file:
            self.metadata: dict[str, str] = file.metadata() or {}
            found = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            known = {
                name: TensorSpec(tuple(s.get_shape()), self._dtype(name, s.get_dtype())) for name, s in found.items()
            }
        super().__init__(known, self._read)

    @contextmanager
    def _open(self) -> Iterator[Any]:
        with _readable(self.path, "safetensors"), safe_open(self.path, framework="pt") as file:
            yield file

    def _dtype(self, name: str, dtype: str) -> torch.dtype:
        if dtype not in _DTYPES:
            raise MorphError(f"{self.path}: tensor '{name}' has dtype {dtype}, which PyTorch does not support")
        return _DTYPES[dtype]

    def _read(self, name: str) -> Tensor:
        # Opened for each tensor, because the library maps the file into memory and holds its pages while it is open.
        with self._open() as file:
            return file.get_tensor(name)


def read_state(path: str | Path) -> Mapping[str, Tensor]:
    """Read the tensors of a .safetensors file lazily, or of a torch.save file (memory-mapped if possible).

    A torch file may contain the state dict directly, or under "state_dict", "model" or "model_state_dict".

    Raises:
        MorphError: the file is missing, damaged, or contains no state dict.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        return SafetensorsFile(path)
    loaded = read_torch(path)
    for key in ("state_dict", "model", "model_state_dict"):
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
            break
    if not isinstance(loaded, dict) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise MorphError(f"{path}: contains no state dict; save one with torch.save(model.state_dict(), path)")
    return loaded


def read_torch(path: str | Path) -> Any:
    """Read a torch.save file without running code from it, memory-mapped if possible.

    Raises:
        MorphError: the file is missing or damaged.
    """
    path = Path(path)
    with _readable(path, "weights"):
        with path.open("rb") as file:
            zipped = file.read(2) == b"PK"  # files of PyTorch before 1.6 cannot be mapped
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)


@contextmanager
def _readable(path: Path, kind: str) -> Iterator[None]:
    """Convert errors of a missing or damaged file to one line."""
    try:
        yield
    except FileNotFoundError as error:
        raise MorphError(f"{path}: no such file") from error
    except MorphError:
        raise
    except Exception as error:  # zip, pickle, PyTorch and safetensors raise different errors for a damaged file
        raise MorphError(f"{path}: not a readable {kind} file: {first_line(error)}") from error


def write_state(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a source to a .safetensors file, one tensor at a time, or to a .pt or .pth file, all at once.

    Args:
        path: the target; only a complete file replaces it.
        tensors: the source; it may read the current file at the target.
        metadata: strings for the header of a safetensors file.

    Raises:
        MorphError: the file cannot be written; the target is not changed.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        with atomic(path) as file:
            _write_safetensors(file, tensors, {"format": "pt", **(metadata or {})})
    elif path.suffix in (".pt", ".pth"):
        with atomic(path) as file:
            torch.save({name: tensors[name] for name in tensors}, file)
    else:
        raise MorphError(f"{path}: the name must end in .safetensors, .pt or .pth")


@contextmanager
def atomic(path: str | Path) -> Iterator[IO[bytes]]:
    """Open a temporary file that replaces `path` when it is complete, and is removed otherwise.

    Raises:
        MorphError: the file cannot be written.
    """
    path = Path(path)
    try:
        with whole_or_absent(path) as temporary, temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:  # PyTorch's zip writer raises RuntimeError for a full disk
        raise MorphError(f"{path}: cannot be written: {first_line(error)}") from error


def tensor_bytes(tensor: Tensor) -> memoryview:
    """Return the values of a tensor as bytes in file order (little endian)."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy())  # pyright: ignore[reportArgumentType]


def _write_safetensors(file: IO[bytes], tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Write 8 bytes of header length, the header as JSON, and the values without gaps; wide dtypes first to align."""
    parts = layout(tensors)
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    names = sorted(parts, key=lambda name: (-parts[name].dtype.itemsize, name))
    for name in names:
        part = parts[name]
        if part.dtype not in _NAMES:
            raise MorphError(f"tensor '{name}' is {part.dtype}, which the safetensors format does not support")
        start, end = end, end + part.nbytes
        header[name] = {"dtype": _NAMES[part.dtype], "shape": list(part.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(struct.pack("<Q", len(text)))
    file.write(text)
    for name in names:
        values = tensor_bytes(tensors[name])
        for start in range(0, len(values), _CHUNK):
            file.write(values[start : start + _CHUNK])
        del values  # frees the memory before the next tensor is made
