"""Runs the work on a Ray cluster: actors with the network take paths of images and return results.

Ray starts dead actors again, if necessary on other nodes, and repeats their images. The calling process stores each
image's result once (`parts`), as it does for local processes.
"""

from __future__ import annotations

import contextlib
import functools
import os
import tempfile
from collections import deque
from collections.abc import Generator, Iterator
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

from ..errors import GigamorphError
from .devices import DeviceSettings, Outcome, compute_here
from .job import Start
from .rows import Work

_BATCH = 8
"""Images per call of an actor."""
_FRUITLESS = 3
"""Consecutive deaths of actors without any result, after which an image is assumed to cause them."""


def compute_by_ray(
    start: Start, settings: DeviceSettings, work: Iterator[Work], actors: int, address: str | None
) -> Generator[Outcome, None, None]:
    """Compute on a cluster; yields outcomes in the order of completion.

    Args:
        start: makes the unit of an actor.
        settings: of each actor.
        work: the images.
        actors: maximum number of actors, each with a CPU, or with a CPU and a GPU.
        address: of a running cluster, as in `ray.init`; None takes that of RAY_ADDRESS, or starts a cluster on this
            machine, which ends with the work.

    Raises:
        GigamorphError: without Ray or a cluster, or if the work fails for another reason than its images.
    """
    ray = _ray()
    first = next(work, None)
    if first is None:
        return
    with _connected(ray, address, actors, settings.device):
        gpus = 1 if settings.device == "cuda" else 0
        kind = ray.remote(num_cpus=1, num_gpus=gpus, max_restarts=-1)(_Actor)
        yield from _dealt(ray, [kind.remote(start, settings) for _ in range(actors)], chain([first], work))


def _dealt(ray: Any, actors: list[Any], work: Iterator[Work]) -> Iterator[Outcome]:
    """The outcomes of all images.

    An actor gets images when it has answered a call without any, which Ray repeats until the actor has started, also
    after a death.
    """

    def call_without_images(actor: Any) -> Any:
        return actor.compute.options(max_task_retries=-1).remote([])

    calls: dict[Any, tuple[Any, list[Work]]] = {call_without_images(actor): (actor, []) for actor in actors}
    running = fruitless = 0
    more = True
    while more or running:
        [done], _ = ray.wait(list(calls))
        actor, some = calls.pop(done)
        running -= len(some)
        try:
            outcomes: list[Outcome] = ray.get(done)
        except ray.exceptions.RayError as error:
            first = (actor, []) not in calls.values()  # of its calls that this death has ended
            fruitless += first
            if isinstance(error, ray.exceptions.RayTaskError) or fruitless == _FRUITLESS:
                raise _error_of(error) from error
            if first:
                calls[call_without_images(actor)] = actor, []
            work, more = chain(some, work), True
            continue
        fruitless = 0 if outcomes else fruitless
        for _ in range(1 if some else 2):  # of an actor's two calls, one waits while the other runs
            given = list(islice(work, _BATCH))
            more = bool(given)
            if given:
                calls[actor.compute.remote(given)] = actor, given
                running += len(given)
        yield from outcomes


def _ray() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # no usage statistics
    try:
        import ray  # pyright: ignore[reportMissingImports]  (extra [ray])
        import ray.exceptions  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise GigamorphError(f"--engine ray needs Ray ({error}): pip install 'gigamorph[ray]'") from error
    return ray


@contextlib.contextmanager
def _connected(ray: Any, address: str | None, actors: int, device: str) -> Iterator[None]:
    if ray.is_initialized():
        yield
        return
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if address is None and "RAY_ADDRESS" not in os.environ:
        options |= {"num_cpus": actors, "include_dashboard": False}
    else:
        options["address"] = address or os.environ["RAY_ADDRESS"]
    try:
        ray.init(**options)
    except (ConnectionError, RuntimeError, ValueError) as error:
        text = " ".join(str(error).split())[:200]
        raise GigamorphError(f"no Ray cluster at {options.get('address', 'this machine')} ({text})") from error
    try:
        if device == "cuda" and not ray.cluster_resources().get("GPU"):
            raise GigamorphError("the Ray cluster has no GPUs; use --device cpu")
        yield
    finally:
        ray.shutdown()


class _Actor:
    """An actor with the network."""

    def __init__(self, start: Start, settings: DeviceSettings) -> None:
        self._start, self._settings = start, settings
        self._waiting: deque[Work] = deque()

    @functools.cached_property
    def _outcomes(self) -> Iterator[Outcome]:
        settings = replace(self._settings, staging=Path(tempfile.mkdtemp(prefix="gigamorph-")))
        unit, waiting = self._start(device=settings.device), iter(self._waiting.popleft, None)
        return compute_here(unit, settings, waiting, more=lambda: len(self._waiting) > 0)

    def compute(self, some: list[Work]) -> list[Outcome]:
        """The outcomes of images; the first call opens the network."""
        self._waiting.extend(some)
        outcomes = self._outcomes
        return [next(outcomes) for _ in some]


def _error_of(error: Any) -> GigamorphError:
    """The error that an actor has raised, or an error on dead actors."""
    cause = error
    while cause is not None:
        if isinstance(cause, GigamorphError):
            return cause
        cause = getattr(cause, "cause", None) or cause.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    own = next((line for line in reversed(lines) if "Error: " in line), lines[-1] if lines else type(error).__name__)
    return GigamorphError(f"Ray: {own[:300]}; results so far are stored, --resume continues")
