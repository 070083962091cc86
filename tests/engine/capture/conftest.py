"""Fixtures for tests of recording."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest


@pytest.fixture
def few_objects() -> Iterator[None]:
    """A refusal looks through all objects for caches that hold a tensor of the recording: through the test's own here.

    With all that a test run has imported, a look takes most of a second.
    """
    gc.freeze()
    yield
    gc.unfreeze()
