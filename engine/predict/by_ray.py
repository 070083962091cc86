"""The work of a run on a Ray cluster: actors that hold the network take images by their paths, and give results back.

Ray Data deals images out, starts actors anew that have died, on other nodes if need be, and repeats their images. The
process that runs keeps what has come back (`parts`), each image once, as with processes of its own.
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

TOGETHER = 8
"""Images that go to an actor at a time, and come back together."""
_LISTED = 10_000  # images of a file of the list
_AT_ONCE = 200_000  # images that are listed together: the actors start anew for the next, and memory stays bounded
_RETRIES = 2
"""How often Ray tries images again whose actor has died."""
_FRUITLESS = 3
"""Rounds in a row that end in a death and bring nothing: then one of the images is held to be what kills.
Ray itself gives its work up when an actor or a node dies at a moment that it does not expect."""


def compute_by_ray(
    start: Start, reading: Reading, work: Iterator[Work], actors: int, device: str, address: str | None, shared: Path
) -> Generator[Outcome, None, None]:
    """Work on a cluster, in the order in which images are done.

    Args:
        actors: as many at most, each with a CPU, or with a GPU as well.
        address: of a running cluster, as in `ray.init`; None takes the one that RAY_ADDRESS names, or starts one on
            this machine, which ends with the work.
        shared: a folder that all nodes see; the list of images lies there meanwhile.

    Raises:
        GigamorphError: without Ray or a cluster, or if the work fails there for another reason than its images.
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
            yield from _all_of(
                ray, given, listed, lambda: _batches(ray, listed, start, reading, actors, device, address)
            )
    finally:
        shutil.rmtree(listed, ignore_errors=True)


def _all_of(ray: Any, given: dict[str, Work], listed: Path, deal: Callable[[], Iterator[Any]]) -> Iterator[Outcome]:
    """What comes back, until all has; dealt anew where a death ends Ray's work, as long as rounds bring something."""
    fruitless = 0
    while given:
        _list(given.values(), listed)
        left = len(given)
        try:
            for found in (pickle.loads(one) for batch in deal() for one in batch["outcome"].to_pylist()):
                one = given.pop(found[0], None)
                if one is not None:  # else an actor that died had done it, too
                    yield Outcome(one, *found[1:])
        except ray.exceptions.RayError as error:
            fruitless = 0 if len(given) < left else fruitless + 1
            if isinstance(error, ray.exceptions.RayTaskError) or fruitless == _FRUITLESS:
                raise _told(error) from error
        else:
            if given:
                raise GigamorphError(f"Ray has lost {len(given)} images; --resume does them")


def _ray() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # or it would tell its makers of this cluster
    try:
        import ray  # pyright: ignore[reportMissingImports]  (extra [ray])
        import ray.data  # pyright: ignore[reportMissingImports]
        import ray.exceptions  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise GigamorphError(f"--engine ray needs Ray ({error}): pip install 'gigamorph[ray]'") from error
    return ray


def _list(images: Iterable[Work], folder: Path) -> None:
    """Files of images to do, in place of others, that Ray reads as it goes."""
    for path in folder.iterdir():
        path.unlink()
    waiting, number = iter(images), 0
    while some := list(islice(waiting, _LISTED)):
        table = pa.table({"work": pa.array([pickle.dumps(one, 5) for one in some], pa.binary())})
        pq.write_table(table, folder / f"{number:08d}.parquet", row_group_size=64 * TOGETHER)
        number += 1


@contextlib.contextmanager
def _connected(ray: Any, address: str | None, actors: int, device: str) -> Iterator[None]:
    if ray.is_initialized():
        yield
        return
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if address is None and "RAY_ADDRESS" not in os.environ:
        # The process that runs needs a share as well: Ray gives its own tasks a CPU each.
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
            raise GigamorphError("the Ray cluster has no GPUs; give --device cpu")
        yield
    finally:
        ray.shutdown()


def _batches(
    ray: Any, listed: Path, start: Start, reading: Reading, actors: int, device: str, address: str | None
) -> Iterator[Any]:
    """Batches of outcomes, as they come.

    Each time by a connection of its own: of work that has failed, Ray leaves actors alive that hold their CPUs until
    the connection ends, and what comes next would wait for these for ever.
    """
    with _connected(ray, address, actors, device):
        yield from _data(ray, listed, start, reading, actors, device)


def _data(ray: Any, listed: Path, start: Start, reading: Reading, actors: int, device: str) -> Iterator[Any]:
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    images = ray.data.read_parquet(str(listed)).repartition(target_num_rows_per_block=TOGETHER)
    done = images.map_batches(
        _Actor,
        fn_constructor_args=(start, replace(reading, staging=Path()), device),
        batch_size=TOGETHER,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=actors, max_tasks_in_flight_per_actor=2),
        num_cpus=1,
        num_gpus=1 if device == "cuda" else 0,
        max_restarts=-1,
        max_task_retries=_RETRIES,
    )
    return done.iter_batches(batch_size=None, batch_format="pyarrow")


class _Actor:
    """A process of the cluster that holds the network."""

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


def _told(error: Any) -> GigamorphError:
    """What an actor has raised, or that actors die."""
    cause = error
    while cause is not None:
        if isinstance(cause, GigamorphError):
            return cause
        cause = getattr(cause, "cause", None) or cause.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    own = next((line for line in reversed(lines) if "Error: " in line), lines[-1] if lines else type(error).__name__)
    return GigamorphError(f"Ray: {own[:300]}; what has come back is kept, --resume goes on")
