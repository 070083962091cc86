"""Shared by the tests of recipes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from gigamorph.engine.evaluate.evaluate import evaluate


@pytest.fixture(autouse=True, scope="session")
def fewer_resamples():
    """Model cards with intervals from 100 resamples: the 2000 that they have took most of a small recipe's time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "gigamorph.engine.train.card.evaluate",
            lambda cases, settings: evaluate(cases, replace(settings, resamples=100)),
        )
        yield
