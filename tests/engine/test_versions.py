"""Releases that are newer than the tested ones: one warning in a process, with the command that compares results."""

from __future__ import annotations

import logging

import pytest
from torch import nn

from gigamorph import accelerate
from gigamorph.engine import versions
from gigamorph.engine.versions import TESTED, newer, release


@pytest.mark.parametrize(
    ("text", "numbers"),
    [("2.15.0+cu130", (2, 15, 0)), ("2.16.0.dev1+cu130", (2, 16, 0)), ("2.7.0rc1+local", (2, 7, 0)), ("", ())],
)
def test_the_numbers_of_a_release(text: str, numbers: tuple[int, ...]) -> None:
    assert release(text) == numbers


def test_newer_releases_are_found() -> None:
    tested = {name: f"{known.newest}.9" for name, known in TESTED.items()}
    assert newer(tested) == newer({}) == {}
    assert newer({**tested, "torch": "9.0"}) == {"torch": TESTED["torch"]}


def test_the_first_accelerate_warns_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(versions, "versions", lambda *_names: {"torch": "9.1.0+cpu", "triton": TESTED["triton"].newest})
    versions.warn_of_newer.cache_clear()
    with caplog.at_level(logging.WARNING, "gigamorph"):
        for _ in range(2):
            accelerate(nn.Conv2d(1, 1, 3))
    versions.warn_of_newer.cache_clear()
    (line,) = [record.getMessage() for record in caplog.records if "newer" in record.getMessage()]
    newest = TESTED["torch"].newest
    assert line.startswith(f"torch 9.1.0+cpu is newer than {newest}, ") and line.endswith("gigamorph doctor")
