"""State dicts in files: round trips, laziness, bounded memory, damaged files, atomic writing."""

from __future__ import annotations

import json
import struct
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from extra_memory import double
from forked import Forked
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from gigamorph.engine.errors import MorphError
from gigamorph.engine.models import resnet18
from gigamorph.engine.morph.store import _DTYPES, Computed, SafetensorsFile, TensorSpec, layout, read_state, write_state


def equal(one: Any, other: Any) -> bool:
    return set(one) == set(other) and all(
        one[n].dtype == other[n].dtype
        and one[n].shape == other[n].shape
        and torch.equal(*(t[n].contiguous().reshape(-1).view(torch.uint8) for t in (one, other)))
        for n in one
    )


def random_tensor(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    count = torch.Size(shape).numel() * dtype.itemsize
    raw = torch.randint(0, 2 if dtype == torch.bool else 256, (count,), dtype=torch.uint8)
    return raw.view(dtype).reshape(shape)


tensors = st.dictionaries(
    st.text('ab.π"\\0', min_size=1, max_size=6),
    st.tuples(st.lists(st.integers(0, 4), max_size=4).map(tuple), st.sampled_from(sorted(_DTYPES.values(), key=str))),
    max_size=6,
)


class TestRoundTrip:
    @settings(max_examples=100, deadline=None)
    @given(tensors)
    def test_safetensors_against_the_library(self, tmp_path_factory: Any, parts: dict[str, Any]) -> None:
        state = {name: random_tensor(*part) for name, part in parts.items()}
        path = tmp_path_factory.mktemp("store") / "a.safetensors"
        write_state(path, state, {"note": "π"})
        assert equal(load_file(path), state)
        ours = read_state(path)
        assert isinstance(ours, SafetensorsFile) and equal(ours, state)
        assert ours.metadata == {"format": "pt", "note": "π"}
        assert layout(ours) == layout(state)
        save_file(state, path)
        assert equal(read_state(path), state)

    def test_values_are_aligned(self, tmp_path: Path) -> None:
        write_state(tmp_path / "a.safetensors", {"a": torch.ones(3, dtype=torch.bool), "b": torch.ones(2).double()})
        data = (tmp_path / "a.safetensors").read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + length])
        assert length % 8 == 0 and header["b"]["data_offsets"] == [0, 16] and header["a"]["data_offsets"] == [16, 19]

    @pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth"])
    def test_network(self, tmp_path: Path, suffix: str) -> None:
        model = resnet18(3, 1, width=4)
        path = tmp_path / f"a{suffix}"
        write_state(path, model.state_dict())
        fresh = resnet18(3, 1, width=4)
        fresh.load_state_dict(read_state(path), strict=True)
        assert equal(fresh.state_dict(), model.state_dict())

    def test_views_and_strides(self, tmp_path: Path) -> None:
        base = torch.arange(24.0).reshape(4, 6)
        last = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
        state = {"transposed": base.t(), "part": base[1:3, ::2], "all": base, "channels last": last}
        write_state(tmp_path / "a.safetensors", state)
        assert equal(load_file(tmp_path / "a.safetensors"), state)

    @pytest.mark.parametrize("key", [None, "state_dict", "model", "model_state_dict"])
    @pytest.mark.parametrize("zipped", [True, False])
    def test_torch_files(self, tmp_path: Path, key: str | None, zipped: bool) -> None:
        state = {"a": torch.randn(3), "b": torch.tensor(2)}
        saved = state if key is None else {key: state, "epoch": 3}
        torch.save(saved, tmp_path / "a.ckpt", _use_new_zipfile_serialization=zipped)
        assert equal(read_state(tmp_path / "a.ckpt"), state)


class TestLazy:
    def test_a_computed_tensor_is_made_once_per_use_and_checked(self, tmp_path: Path) -> None:
        made: list[str] = []

        def make(name: str) -> Tensor:
            made.append(name)
            return torch.full((2,), float(len(name)))

        source = Computed({"a": TensorSpec((2,), torch.float32), "bb": TensorSpec((2,), torch.float32)}, make)
        assert len(source) == 2 and list(source) == ["a", "bb"] and not made
        write_state(tmp_path / "a.safetensors", source)
        assert sorted(made) == ["a", "bb"]
        assert load_file(tmp_path / "a.safetensors")["bb"].tolist() == [2, 2]
        wrong = Computed({"a": TensorSpec((3,), torch.float32)}, make)
        with pytest.raises(MorphError, match=r"tensor 'a' is torch\.float32"):
            write_state(tmp_path / "a.safetensors", wrong)
        assert load_file(tmp_path / "a.safetensors").keys() == {"a", "bb"}

    def test_changing_a_read_tensor_does_not_change_the_file(self, tmp_path: Path) -> None:
        path = tmp_path / "a.safetensors"
        write_state(path, {"a": torch.zeros(4)})
        source = read_state(path)
        source["a"].add_(1)
        assert source["a"].tolist() == [0] * 4

    def test_a_file_can_be_replaced_by_what_is_read_from_it(self, tmp_path: Path) -> None:
        path = tmp_path / "a.safetensors"
        write_state(path, {"a": torch.ones(4), "b": torch.ones(2)})
        source = read_state(path)
        write_state(path, Computed(layout(source), lambda name: source[name] * 2))
        assert equal(read_state(path), {"a": torch.full((4,), 2.0), "b": torch.full((2,), 2.0)})


def extra_memory(tmp_path: Path, tensors: int, mib: int) -> int:
    """Bytes beyond those in use at the start, at the peak, while a file of `tensors` times `mib` MiB is doubled."""
    names = [str(tmp_path / name) for name in ("a.safetensors", "b.safetensors")]
    process = Forked(double, *names, tensors, mib)
    assert process.wait() == 0, process.error
    grown = SafetensorsFile(names[1])
    last = grown[f"t{tensors - 1}"]
    assert last.shape == (2, mib << 18) and last[:, -1].tolist() == [tensors - 1, (tensors - 1) / 2]
    return int(process.output)


@pytest.mark.skipif(sys.platform != "linux", reason="the peak can be reset on Linux only")
class TestMemory:
    def test_one_tensor_at_a_time(self, tmp_path: Path) -> None:
        # a tensor of 4 MiB, its double, and what the allocator keeps; the file has 128 MiB and becomes 256
        assert extra_memory(tmp_path, tensors=32, mib=4) < 48 << 20


class TestRefusals:
    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        path = tmp_path / "a.safetensors"
        write_state(path, {"a": torch.arange(6.0), "b": torch.ones(2, dtype=torch.int64)})
        return path

    def refused(self, path: Path) -> str:
        before = path.read_bytes() if path.exists() else None
        with pytest.raises(MorphError) as caught:
            read_state(path)
        assert "\n" not in str(caught.value) and str(path) in str(caught.value)
        assert (path.read_bytes() if path.exists() else None) == before
        return str(caught.value)

    @settings(max_examples=60, deadline=None)
    @given(st.integers(0, 10_000), st.sampled_from(["cut", "append", "header"]), st.integers(0, 255))
    def test_damaged_safetensors(self, tmp_path_factory: Any, place: int, how: str, byte: int) -> None:
        path = tmp_path_factory.mktemp("store") / "a.safetensors"
        state = {"a": torch.arange(6.0), "b": torch.ones(2, dtype=torch.int64)}
        write_state(path, state)
        data = path.read_bytes()
        if how == "cut":
            path.write_bytes(data[: place % len(data)])
        elif how == "append":
            path.write_bytes(data + bytes([byte] * (1 + place % 100)))
        else:
            (length,) = struct.unpack("<Q", data[:8])
            place %= length + 8
            path.write_bytes(data[:place] + bytes([byte]) + data[place + 1 :])
        try:
            found = dict(read_state(path))
        except MorphError as error:
            assert "\n" not in str(error) and str(path) in str(error)
        else:  # a byte of the header that still makes sense: a name, a dtype of that size, a shape of that count
            assert how == "header"
            assert sum(t.nbytes for t in found.values()) == 40

    def test_missing_and_foreign(self, tmp_path: Path) -> None:
        for name in ("none.safetensors", "none.pt"):
            assert "no such file" in self.refused(tmp_path / name)
        for name in ("text.safetensors", "text.pt", "empty.pt", "empty.safetensors"):
            (tmp_path / name).write_text("hello" * name.startswith("text"))
            assert "not a readable" in self.refused(tmp_path / name)

    def test_damaged_torch_files(self, tmp_path: Path) -> None:
        path = tmp_path / "a.pt"
        write_state(path, {"a": torch.randn(100)})
        data = path.read_bytes()
        for cut in (2, 100, len(data) // 2, len(data) - 10):
            path.write_bytes(data[:cut])
            self.refused(path)
        torch.save({"a": torch.randn(2), "b": [1, 2]}, path)
        assert "contains no state dict" in self.refused(path)
        torch.save(torch.nn.Linear(2, 2), path)
        assert "not a readable" in self.refused(path)  # a pickled object is never executed

    def test_a_failed_write_leaves_everything(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        before = path.read_bytes()

        def fails(name: str) -> Tensor:
            if name == "b":
                raise MorphError("no b")
            return torch.zeros(2)

        with pytest.raises(MorphError, match="no b"):
            write_state(path, Computed({n: TensorSpec((2,), torch.float32) for n in "ab"}, fails))
        with pytest.raises(MorphError, match=r"complex128.*does not support"):
            write_state(path, {"a": torch.zeros(2, dtype=torch.complex128)})
        with pytest.raises(MorphError, match=r"\.safetensors, \.pt or \.pth"):
            write_state(path.with_suffix(".bin"), {})
        with pytest.raises(MorphError, match="cannot be written"):
            write_state(path.parent / "missing" / "a.safetensors", {})

        def full(*_: Any) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("os.fsync", full)
        for target in (path, path.with_suffix(".pt")):
            with pytest.raises(MorphError, match="No space left"):
                write_state(target, {"a": torch.zeros(2)})
        assert path.read_bytes() == before
        assert list(path.parent.iterdir()) == [path]
