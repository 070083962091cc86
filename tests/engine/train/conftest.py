"""Shared by the tests of training."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _undrawn(request: pytest.FixtureRequest):
    """What pictures show is looked at in one file."""
    if "test_curves" not in request.node.nodeid:
        request.getfixturevalue("undrawn")
