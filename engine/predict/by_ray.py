"""Runs the work on a Ray cluster: actors with the network take paths of images and return results.

Ray Data distributes images, restarts dead actors, if necessary on other nodes, and repeats their images. The calling
process stores each image's result once (`parts`), as it does for local processes.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import shutil
import tempfile
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ..errors import GigamorphError
from ..files import temporary_name
from .devices import Outcome, Reading, compute_here
from .job import Start
from .rows import Work

_BATCH = 8
"""Images per batch of an actor."""
_LISTED = 10_000  # images per file of the list
_AT_ONCE = 200_000  # images per list, to bound the memory; the actors restart for the next list
_RETRIES = 2
"""Retries by Ray of images whose actor has died."""
_FRUITLESS = 3
"""Consecutive rounds that end by a death without any result, after which an image is assumed to cause it.
Ray aborts its work if an actor or a node dies at an unexpected moment."""


def compute_by_ray(
    start: Start, reading: Reading, work: Iterator[Work], actors: int, device: str, address: str | None, shared: Path
) -> Generator[Outcome, None, None]:
    """Compute on a cluster; yields outcomes in the order of completion.

    Args:
        start: makes the unit of an actor.
        reading: how images are read.
        work: the images.
        actors: maximum number of actors, each with a CPU, or with a CPU and a GPU.
        device: "cpu" or "cuda".
        address: of a running cluster, as in `ray.init`; None takes that of RAY_ADDRESS, or starts a cluster on this
            machine, which ends with the work.
        shared: a folder that all nodes can read, for the temporary list of images.

    Raises:
        GigamorphError: without Ray or a cluster, or if the work fails for another reason than its images.
    """
    ray = _ray()
    first = next(work, None)
    if first is None:
        return
    work = chain([first], work)
    listed = temporary_name(shared / "work")
    listed.mkdir(mode=0o700)
    try:
        while given := {one.key: one for one in islice(work, _AT_ONCE)}:
            yield from _repeated(
                ray, given, listed, lambda: _batches(ray, listed, start, reading, actors, device, address)
            )
    finally:
        shutil.rmtree(listed, ignore_errors=True)


def _repeated(ray: Any, given: dict[str, Work], listed: Path, deal: Callable[[], Iterator[Any]]) -> Iterator[Outcome]:
    """The outcomes of all images; if a death aborts Ray's work, the rest is repeated while rounds yield results."""
    fruitless = 0
    while given:
        _write_list(given.values(), listed)
        left = len(given)
        try:
            for found in (pickle.loads(one) for batch in deal() for one in batch["outcome"].to_pylist()):
                one = given.pop(found[0], None)
                if one is not None:  # else an actor that died has also done it
                    yield Outcome(one, *found[1:])
        except ray.exceptions.RayError as error:
            fruitless = 0 if len(given) < left else fruitless + 1
            if isinstance(error, ray.exceptions.RayTaskError) or fruitless == _FRUITLESS:
                raise _error_of(error) from error
        else:
            if given:
                raise GigamorphError(f"Ray has lost {len(given)} images; use --resume to repeat them")


def _ray() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # no usage statistics
    try:
        import ray  # pyright: ignore[reportMissingImports]  (extra [ray])
        import ray.data  # pyright: ignore[reportMissingImports]
        import ray.exceptions  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise GigamorphError(f"--engine ray needs Ray ({error}): pip install 'gigamorph[ray]'") from error
    return ray


def _write_list(images: Iterable[Work], folder: Path) -> None:
    """Replace the files with the list of images, which Ray reads."""
    for path in folder.iterdir():
        path.unlink()
    waiting, number = iter(images), 0
    while some := list(islice(waiting, _LISTED)):
        table = pa.table({"work": pa.array([pickle.dumps(one, 5) for one in some], pa.binary())})
        pq.write_table(table, folder / f"{number:08d}.parquet", row_group_size=64 * _BATCH)
        number += 1


@contextlib.contextmanager
def _connected(ray: Any, address: str | None, actors: int, device: str) -> Iterator[None]:
    if ray.is_initialized():
        yield
        return
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if address is None and "RAY_ADDRESS" not in os.environ:
        # One more CPU for the tasks of Ray itself.
        options |= {"num_cpus": actors + 1, "include_dashboard": False}
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


def _batches(
    ray: Any, listed: Path, start: Start, reading: Reading, actors: int, device: str, address: str | None
) -> Iterator[Any]:
    """Batches of outcomes, as they are completed.

    Each call has a new connection: after failed work, Ray's actors hold their CPUs until the connection ends, and new
    work would wait for these CPUs forever.
    """
    with _connected(ray, address, actors, device):
        yield from _data(ray, listed, start, reading, actors, device)


def _data(ray: Any, listed: Path, start: Start, reading: Reading, actors: int, device: str) -> Iterator[Any]:
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    images = ray.data.read_parquet(str(listed)).repartition(target_num_rows_per_block=_BATCH)
    done = images.map_batches(
        _Actor,
        fn_constructor_args=(start, replace(reading, staging=Path()), device),
        batch_size=_BATCH,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=actors, max_tasks_in_flight_per_actor=2),
        num_cpus=1,
        num_gpus=1 if device == "cuda" else 0,
        max_restarts=-1,
        max_task_retries=_RETRIES,
    )
    return done.iter_batches(batch_size=None, batch_format="pyarrow")


class _Actor:
    """An actor with the network."""

    def __init__(self, start: Start, reading: Reading, device: str) -> None:
        self._staging = tempfile.mkdtemp(prefix="gigamorph-")
        self._waiting: deque[Work] = deque()
        reading = replace(reading, staging=Path(self._staging))
        waiting = iter(self._waiting.popleft, None)
        more = self._waiting.__len__
        self._outcomes = compute_here(start(device=device), reading, waiting, more=lambda: more() > 0)

    def __call__(self, batch: pa.Table) -> pa.Table:
        works = [pickle.loads(data) for data in batch["work"].to_pylist()]
        self._waiting.extend(works)
        found = []
        for _ in works:
            outcome = next(self._outcomes)
            found.append(pickle.dumps((outcome.work.key, outcome.result, outcome.error, outcome.waited), 5))
        return pa.table({"outcome": pa.array(found, pa.binary())})


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
