"""The runner over archives: computes missing results, stores each one immediately, and writes tables at the end.

A `Job` defines the computation for each image.
"""

from __future__ import annotations

import contextlib
import shutil
import sqlite3
import tempfile
import time
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path

from ..datasets.tables import Record
from ..errors import DataError, GigamorphError
from ..files import temporary_name
from ..images.dicomweb import service_of
from ..images.parallel import available_cpus
from ..parallel.launch import need_gpus
from .by_ray import compute_by_ray
from .decoders import Opened
from .delivery import deliver
from .devices import DeviceSettings, Outcome, compute_here, compute_in_processes
from .folder import RunFolder
from .index import RunDatabase
from .job import FAILURES, Job, Result
from .options import RunOptions, Summary, Watch
from .parts import Parts, read_parts, read_results
from .rows import Row, Work
from .tables import write_failures

_FEW_TRIED = 100
"""Minimum number of images for the fraction of failures."""
_PROMPT = 200_000
"""Maximum number of rows for which an interrupted run also writes its tables."""


def run(
    job: Job, sources: Sequence[str | Path | Record], out: str | Path, options: RunOptions, watch: Watch | None = None
) -> Summary:
    """Run a job for images, with results in the folder ``out``.

    A result counts as done when it is durable, so an interrupted run keeps its results, and a run with ``resume``
    computes the rest. Tables are written at the end, and also when a run of few images is interrupted.

    Args:
        job: the computation.
        sources: tables, folders, images, or records.
        out: folder of the results.
        options: of the run.
        watch: callbacks.

    Raises:
        DataError: naming a damaged image, or for an invalid table.
        GigamorphError: if ``out`` has other results or is in use by another process, cannot be written, or too many
            images failed.
    """
    watch = watch or Watch()
    folder = RunFolder(Path(out), job, options)
    folder.refuse(ours=False)
    if options.device == "cuda" and options.engine == "embedded":
        need_gpus(options.devices)
    if options.store:
        service_of(options.store)  # to raise errors before any work
    job.open(options)
    with RunDatabase(lambda row: job.key(row, options.model)) as index:
        for text in index.fill(sources, job.classes, check_files=options.max_failures is None, skip=folder.path):
            watch.warn(text)
        job.look(index, watch)
        if options.overwrite:
            folder.clear()
        with folder.locked():
            return _Runner(job, folder, options, watch, index)()


class _Runner:
    """Runs a shard; this process has locked its folder."""

    def __init__(self, job: Job, folder: RunFolder, options: RunOptions, watch: Watch, index: RunDatabase) -> None:
        self._job, self._folder, self._options, self._watch, self._index = job, folder, options, watch, index
        self._summary = Summary(devices=options.devices)
        self._pending: list[Outcome] = []

    def __call__(self) -> Summary:
        options, index, folder = self._options, self._index, self._folder
        folder.join(index.rows, index.sha256, self._watch.warn)
        self._job.begin(folder.path, folder.secret)
        self._load_states()
        unlisted = index.unlisted_results()
        if unlisted:
            self._watch.warn(f"{folder.path}: has {unlisted} results of images that are not in the table")
        if options.shard[1] > 1:
            index.measure(lambda rows: map(self._pixels, rows))
            index.share_out(options.shard[1])
        if self._job.named:
            index.name_files(self._job.name)
        shard = options.shard[0]
        images, done, failed = index.counts(shard)
        self._summary.images, self._summary.done = images, done
        self._summary.failed = 0 if options.retry_failed else failed
        try:
            self._work()
        except BaseException:
            # The first error is reported: on a full disk this may fail as well.
            with contextlib.suppress(GigamorphError, OSError, sqlite3.Error):
                if index.rows <= _PROMPT and options.shard[1] == 1 and folder.has_results():
                    self._tables()
            raise
        self._finish()
        return self._summary

    def _load_states(self) -> None:
        """Load the results and failures of all shards into the index."""
        named = self._job.named
        for rows in read_results(self._folder.parts, ["key", named] if named else ["key"]):
            self._index.add_done((row["key"], row.get(named)) for row in rows)
        self._index.add_failed(row for rows in read_parts(self._folder.quarantine) for row in rows)

    def _work(self) -> None:
        options, meter, folder = self._options, self._watch.meter, self._folder
        found = self._index.work(options.shard[0], failed=options.retry_failed)
        staging = temporary_name(Path(tempfile.gettempdir()) / "gigamorph")  # an unpredictable name
        staging.mkdir(mode=0o700)
        workers = default_workers(options) if options.workers is None else options.workers
        settings = DeviceSettings(workers, staging, options.max_failures is not None, options.device, options.precision)
        results = Parts(folder.parts / folder.shard, self._job.schema)
        failures = Parts(folder.quarantine / folder.shard, FAILURES)
        done = self._summary.done + self._summary.failed
        meter.start(self._job.kind, self._summary.images, done=done)
        began = time.monotonic()
        try:
            with _errors_thrown_into(self._outcomes(settings, found)) as outcomes:
                for outcome in outcomes:
                    self._summary.waited += outcome.waited
                    self._record(outcome, results, failures)
            self._sync(results, failures)
        finally:
            self._summary.seconds = time.monotonic() - began
            shutil.rmtree(staging, ignore_errors=True)
            with contextlib.suppress(GigamorphError):  # synced results are durable; another error would hide the first
                results.close()
            with contextlib.suppress(GigamorphError):
                failures.close()
        for parts in (results, failures):
            parts.pack()

    def _outcomes(self, settings: DeviceSettings, work: Iterator[Work]) -> Generator[Outcome, None, None]:
        options, meter = self._options, self._watch.meter
        if not options.here:
            given = self._job.start(), settings, work, options.devices
            return compute_by_ray(*given, options.address) if options.engine == "ray" else compute_in_processes(*given)
        unit = self._job.unit()
        if unit.net is not None:
            unit.net.on_tile = meter.on_tile

        def before(opened: Opened) -> None:
            assert opened.item is not None
            image = opened.item["image"]
            if image is not None:
                meter.image(image.shape[-2] * image.shape[-1])

        return compute_here(unit, settings, work, before)

    def _record(self, outcome: Outcome, results: Parts, failures: Parts) -> None:
        if outcome.error is not None:
            if self._options.max_failures is None:
                self._sync(results, failures)
                raise outcome.error
            reason = " ".join(str(outcome.error).split())
            work = outcome.work
            failures.append(
                {"key": work.key, "model": self._options.model, "image_path": work.row.name, "reason": reason}
            )
            self._watch.failed(work.row.name, reason)
        else:
            assert outcome.result is not None
            results.append(outcome.result)
        self._pending.append(outcome)
        if outcome.error is not None or results.sync(now=False):
            self._sync(results, failures)

    def _sync(self, results: Parts, failures: Parts) -> None:
        """Make results durable, count them, and check the fraction of failures."""
        results.sync()
        failures.sync()
        summary, meter = self._summary, self._watch.meter
        pending, self._pending = self._pending, []
        for outcome in pending:
            if not self._options.here and outcome.result is not None:
                meter.image(outcome.result["pixels"])
            summary.computed += outcome.result is not None
            summary.done += outcome.result is not None
            summary.failed += outcome.error is not None
            meter.image_done()
        share = self._options.max_failures
        last = next((outcome.error for outcome in reversed(pending) if outcome.error), None)
        if share is not None and last is not None:
            tried = max(summary.done + summary.failed, min(summary.images, _FEW_TRIED))
            if summary.failed > share * tried:
                raise GigamorphError(
                    f"{summary.failed} of {summary.done + summary.failed} images failed, more than --max-failures "
                    f"{share:.2%} allows; see {self._folder.path / 'quarantine.csv'}; last error: {last}"
                )

    def _pixels(self, row: Row) -> int:
        """The number of pixels of an image whose size is not in the table; 0 if unknown."""
        try:
            return self._job.pixels(row)
        except DataError:
            return 0

    def _finish(self) -> None:
        """Write the tables if all shards are complete."""
        index, summary = self._index, self._summary
        options = self._options
        with self._folder.finishing():
            self._tables(only_if_complete=True)
            if options.store and summary.complete:
                documents = self._job.documents(index, self._results(), self._folder.path)
                summary.stored = deliver(documents, index, options.store, self._folder.path / "stored")
        images, done, failed = index.counts(options.shard[0])
        summary.images, summary.done, summary.failed = images, done, failed

    def _results(self) -> Iterator[Result]:
        return (row for rows in read_results(self._folder.parts) for row in rows)

    def _tables(self, *, only_if_complete: bool = False) -> None:
        index, out = self._index, self._folder.path
        self._load_states()
        write_failures(index, out)
        images, done, failed = index.counts()
        self._summary.complete = done + failed == images
        if only_if_complete and not self._summary.complete:
            return
        self._summary.scores = self._job.tables(index, self._results(), out)


@contextlib.contextmanager
def _errors_thrown_into(outcomes: Generator[Outcome, None, None]) -> Iterator[Iterator[Outcome]]:
    """Context that throws the error of its body into the generator, which waits for its processes except after Ctrl-C.

    Otherwise, processes would not end if this one is a child of `multiprocessing`, which closes their queue first.
    """
    try:
        yield outcomes
    except BaseException as error:
        outcomes.throw(error)
        raise


def default_workers(options: RunOptions) -> int:
    """The default number of reading processes per device, by the CPUs of this machine."""
    if options.engine == "ray":
        return 2 if options.device == "cuda" else 0  # an actor on the CPU has only one core, for computing
    return max(1, min(8, available_cpus() // options.devices - 1))
