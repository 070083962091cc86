"""The cache: what others could have written there is neither executed nor believed."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from gigamorph.kernels import cpp
from gigamorph.kernels.cache import cache_folder, is_private, make_private

SOURCE = 'extern "C" int answer() { return 42; }'
pytestmark = pytest.mark.skipif(shutil.which("c++") is None, reason="there is no C++ compiler")


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GIGAMORPH_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "answer.cpp"
    path.write_text(SOURCE)
    return path


def test_a_library_is_built_once(source: Path) -> None:
    first = cpp.built(source)
    before = first.stat()
    assert is_private(first) and cpp.built(source) == first and first.stat().st_mtime_ns == before.st_mtime_ns
    assert first.parent.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("mode", [0o777, 0o666, 0o702])
def test_a_library_that_others_can_write_is_built_again(source: Path, mode: int) -> None:
    first = cpp.built(source)
    first.write_bytes(b"planted")
    first.chmod(mode)
    assert not is_private(first)
    again = cpp.built(source)
    assert again == first and is_private(again) and again.read_bytes() != b"planted"


@pytest.mark.skipif(os.getuid() != 0, reason="only root gives files away")
def test_a_library_of_another_account_is_built_again(source: Path) -> None:
    first = cpp.built(source)
    first.write_bytes(b"planted")
    os.chown(first, 12345, 12345)
    assert cpp.built(source).read_bytes() != b"planted"


@pytest.mark.parametrize("above", [0, 1, 2])
def test_a_folder_that_others_can_write_is_done_without(source: Path, above: int) -> None:
    first = cpp.built(source)
    open_to_all = first.parents[above]
    open_to_all.chmod(0o777)
    with pytest.raises(OSError, match="set GIGAMORPH_CACHE"):
        cpp.built(source)
    open_to_all.chmod(0o1777)  # as /tmp: nobody can move what is another's
    assert cpp.built(source) == first


def test_a_link_to_what_others_can_write(source: Path, tmp_path: Path) -> None:
    first = cpp.built(source)
    planted = tmp_path / "planted"
    planted.mkdir()
    planted.chmod(0o777)
    first.rename(planted / first.name)
    first.symlink_to(planted / first.name)
    assert not is_private(first)
    assert not cpp.built(source).is_symlink()


def test_another_compiler_builds_another_library(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = cpp.built(source)
    own = tmp_path / "own"
    own.write_text('#!/bin/sh\nexec c++ "$@"\n')
    own.chmod(0o755)
    monkeypatch.setenv("CXX", str(own))
    assert cpp.built(source) != first
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CXX", "")
    assert is_private(cpp.built(source))  # any of the builds serves if there is no compiler


def test_an_account_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GIGAMORPH_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)

    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    with pytest.raises(OSError, match="set GIGAMORPH_CACHE"):
        cache_folder()


def test_folders_of_the_cache_are_private(tmp_path: Path) -> None:
    make_private(tmp_path / "a" / "b")
    assert [(tmp_path / name).stat().st_mode & 0o777 for name in ("a", "a/b")] == [0o700, 0o700]
