"""Shared by the tests of recipes."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _undrawn(undrawn):
    """Here no picture is looked at."""
