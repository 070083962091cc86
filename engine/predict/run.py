"""Prediction over an archive: what is left to do is done, each result kept as soon as it is known, tables at the end.

A run's folder holds ``run.json`` (what the run is), ``parts/N-of-M/`` (results), ``quarantine/N-of-M/`` (images that
failed), and the tables for people. Shards share a folder; each writes to its own parts and knows those of all.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import shutil
import sqlite3
import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..datasets.tables import Record
from ..errors import DataError, GigamorphError
from ..evaluate.recalibration import Calibration
from ..files import write_atomically
from ..images.parallel import available_cpus
from ..models.outputs import outputs_of
from ..parallel.launch import need_gpus
from ..train.progress import Meter
from .ahead import Opened
from .devices import Outcome, Reading, compute_here, compute_in_processes
from .index import Index
from .lock import held, hold
from .parts import Parts, read_parts
from .predictor import FAILURES, RESULTS, Classifier, Opener, Wanted
from .rows import Row, Work
from .tables import write_failures, write_tables

_FEW_TRIED = 100
"""Images of which so many have to be tried before their failures are judged as a share."""
_PROMPT = 200_000
"""Rows of which the tables are also written when a run ends early."""


@dataclass(frozen=True)
class Options:
    """How a run goes.

    Attributes:
        model: SHA-256 of the checkpoint; results are of image and model.
        checkpoint: its name, for messages.
        heatmaps: draw ``heatmaps/NAME.png``, as `gigamorph explain` does.
        identifiers: name patients that only the DICOM headers name; they are numbered otherwise.
        calibration: of two classes, for tables and heat maps.
        resume: go on in a folder that holds results of this model.
        retry_failed: try images of the quarantine again.
        max_failures: share of the images that may fail; None ends the run at the first, and keeps none of them.
        shard: (i, n): the i-th of n parts of the images, from 1.
        devices: processes that compute; 1 computes in this process.
        device: "cpu", or "cuda" for a GPU each.
        workers: processes that read ahead, for each device; None takes some.
    """

    model: str
    checkpoint: str = ""
    heatmaps: bool = False
    identifiers: bool = False
    calibration: Calibration | None = None
    resume: bool = False
    retry_failed: bool = False
    max_failures: float | None = None
    shard: tuple[int, int] = (1, 1)
    devices: int = 1
    device: str = "cpu"
    workers: int | None = None

    @property
    def shard_name(self) -> str:
        return f"{self.shard[0]}-of-{self.shard[1]}"


@dataclass
class Summary:
    """How a run ended.

    Attributes:
        images: of the shard.
        done: of them, with a result, also of earlier runs.
        failed: of them, in quarantine.
        complete: all images of all shards have a result or have failed, and the tables are written.
        computed, seconds, waited: of this run; how long the devices had nothing to compute, summed over them.
        scores: measures of each split's labelled images.
    """

    images: int = 0
    done: int = 0
    failed: int = 0
    complete: bool = False
    computed: int = 0
    seconds: float = 0.0
    waited: float = 0.0
    devices: int = 1
    scores: dict[str, dict[str, float | int | None]] = field(default_factory=dict)

    @property
    def idle(self) -> float:
        """Share of the time that devices waited for images."""
        return self.waited / max(self.seconds * self.devices, 1e-9)


@dataclass(frozen=True)
class Watch:
    """Who is told of a run as it goes.

    Attributes:
        meter: of progress; counts an image when its result is durable.
        warn: called with a line.
        failed: called with an image's name and the reason.
        looked: called with the rows and what opens them, before any work: some images, spread over the table.
    """

    meter: Meter = field(default_factory=lambda: Meter(None))
    warn: Callable[[str], object] = lambda text: None
    failed: Callable[[str, str], object] = lambda image, reason: None
    looked: Callable[[Classifier, Sequence[Record]], object] = lambda classifier, records: None


def predict(
    opener: Opener,
    sources: Sequence[str | Path | Record],
    out: str | Path,
    options: Options,
    watch: Watch | None = None,
) -> Summary:
    """Predict images into the folder ``out``; see `Options`.

    Results are durable as soon as they count as done, so that whatever ends the run leaves them, and a run with
    ``resume`` computes the rest. ``predictions.csv``, ``breasts.csv`` (mean of the views of each breast) and
    ``quarantine.csv`` are written when all is done, and when a run that is not large ends early.

    Args:
        opener: opens the network; to be pickled where there are several devices.
        sources: tables, folders, images, or records.

    Raises:
        DataError: a damaged image, named; a table that is wrong.
        GigamorphError: if ``out`` holds other results or is held by another process, cannot be written, or too many
            images failed.
    """
    out, watch = Path(out), watch or Watch()
    lock = out / "parts" / options.shard_name / "_lock"
    _refuse_others(out, options, ours=False)
    if options.device == "cuda":
        need_gpus(options.devices)
    # Where other processes compute, this one only needs to know the classes, and how images are opened.
    classifier = opener(device=options.device if options.devices == 1 else "cpu")
    with Index(options.model) as index:
        index.fill(sources, classifier.classes, check_files=options.max_failures is None, skip=out)
        if index.rows == classifier.trained_on:
            index.resolve(lambda records: classifier.open_images(records).records)
        watch.looked(classifier, [row.record for row in index.sample(4) if not row.url])
        with hold(lock, out):
            _refuse_others(out, options, ours=True)
            return _Run(opener, classifier, out, options, watch, index)()


class _Run:
    """A shard of a run, whose folder this process holds."""

    def __init__(
        self, opener: Opener, classifier: Classifier, out: Path, options: Options, watch: Watch, index: Index
    ) -> None:
        self._opener, self._classifier, self._out = opener, classifier, out
        self._options, self._watch, self._index = options, watch, index
        self._summary = Summary(devices=options.devices)
        self._classes = classifier.classes
        self._pending: list[Outcome] = []

    def __call__(self) -> Summary:
        options, index, out = self._options, self._index, self._out
        secret = self._join()
        index.add_done(row for rows in read_parts(out / "parts", ["key", "heatmap"]) for row in rows)
        index.add_failed(row for rows in read_parts(out / "quarantine") for row in rows)
        strange = index.strangers()
        if strange:
            self._watch.warn(f"{out}: {strange} results are of images that the table does not name (any more)")
        if options.shard[1] > 1:
            index.measure(lambda rows: map(self._pixels, rows))
            index.share_out(options.shard[1])
        if options.heatmaps:
            index.name_heatmaps()
        wanted = Wanted(options.model, out, options.heatmaps, options.calibration, secret)
        shard = options.shard[0]
        images, done, failed = index.counts(shard)
        self._summary.images, self._summary.done = images, done
        self._summary.failed = 0 if options.retry_failed else failed
        try:
            self._work(wanted)
        except BaseException:
            # The first error is the one to show: on a full disk this may fail as well.
            with contextlib.suppress(GigamorphError, OSError, sqlite3.Error):
                if index.rows <= _PROMPT and options.shard[1] == 1:
                    self._tables()
            raise
        self._finish()
        return self._summary

    def _work(self, wanted: Wanted) -> None:
        options, meter = self._options, self._watch.meter
        found = self._index.work(options.shard[0], failed=options.retry_failed)
        name = hashlib.sha256(f"{os.path.abspath(self._out)}\0{options.shard_name}".encode()).hexdigest()[:16]
        staging = Path(tempfile.gettempdir()) / f"gigamorph-{name}"
        shutil.rmtree(staging, ignore_errors=True)  # of a run that was killed
        staging.mkdir(mode=0o700)
        workers = default_workers(options.devices) if options.workers is None else options.workers
        reading = Reading(workers, staging, forgiving=options.max_failures is not None)
        results = Parts(self._out / "parts" / options.shard_name, RESULTS)
        failures = Parts(self._out / "quarantine" / options.shard_name, FAILURES)
        done = self._summary.done + self._summary.failed
        meter.start("predict", self._summary.images, done=done)
        began = time.monotonic()
        try:
            with contextlib.closing(self._outcomes(wanted, reading, found)) as outcomes:
                for outcome in outcomes:
                    self._summary.waited += outcome.waited
                    self._take(outcome, results, failures)
            self._synced(results, failures)
        finally:
            self._summary.seconds = time.monotonic() - began
            shutil.rmtree(staging, ignore_errors=True)
            with contextlib.suppress(GigamorphError):  # what was synced is kept; a further error hides the first
                results.close()
            with contextlib.suppress(GigamorphError):
                failures.close()
        for parts in (results, failures):
            parts.pack()

    def _outcomes(self, wanted: Wanted, reading: Reading, work: Iterator[Work]) -> Generator[Outcome, None, None]:
        options, meter = self._options, self._watch.meter
        if options.devices > 1:
            return compute_in_processes(self._opener, wanted, reading, work, options.devices, options.device)
        self._classifier.net.on_tile = meter.on_tile

        def before(opened: Opened) -> None:
            assert opened.item is not None
            meter.image(opened.item["image"].shape[-2] * opened.item["image"].shape[-1])

        return compute_here(self._classifier, wanted, reading, work, before)

    def _take(self, outcome: Outcome, results: Parts, failures: Parts) -> None:
        if outcome.error is not None:
            if self._options.max_failures is None:
                self._synced(results, failures)
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
            self._synced(results, failures)

    def _synced(self, results: Parts, failures: Parts) -> None:
        """Count what has become durable."""
        results.sync()
        failures.sync()
        summary, meter = self._summary, self._watch.meter
        pending, self._pending = self._pending, []
        for outcome in pending:
            if self._options.devices > 1 and outcome.result is not None:
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
                    f"{share:.2%} allows; see {self._out / 'quarantine.csv'}; the last: {last}"
                )

    def _finish(self) -> None:
        """Write the tables if no shard has anything left to do."""
        index, summary, out = self._index, self._summary, self._out
        with hold(out / "parts" / "_finish", out, wait=True):
            self._tables(only_if_complete=True)
        images, done, failed = index.counts(self._options.shard[0])
        summary.images, summary.done, summary.failed = images, done, failed

    def _tables(self, *, only_if_complete: bool = False) -> None:
        index, options, out = self._index, self._options, self._out
        index.add_done(row for rows in read_parts(out / "parts", ["key", "heatmap"]) for row in rows)
        index.add_failed(row for rows in read_parts(out / "quarantine") for row in rows)
        write_failures(index, out)
        images, done, failed = index.counts()
        self._summary.complete = done + failed == images
        if only_if_complete and not self._summary.complete:
            return
        results = (row for rows in read_parts(out / "parts") for row in rows)
        outputs = outputs_of(self._classifier.net)
        self._summary.scores = write_tables(
            index,
            results,
            out,
            self._classes,
            options.calibration,
            identifiers=options.identifiers,
            numbers=outputs is not None and outputs.numbers,
        )
        model: dict[str, str] = {"checkpoint": options.checkpoint, "sha256": options.model}
        if options.calibration is not None:
            split = options.calibration.split or "not known"
            model["calibrated_on"] = f"{options.calibration.images} images, split {split}"
        write_atomically(out / "predictions.json", lambda p: p.write_text(json.dumps(model) + "\n"), "note")

    def _join(self) -> bytes | None:
        """Say in the folder what the run is, or see that it is the same; the secret that renames patients."""
        out, options, index = self._out, self._options, self._index
        path = out / "run.json"
        own = _description(options) | {"rows": index.rows, "table": index.sha256}
        if not path.exists():
            with contextlib.suppress(FileExistsError):
                _write_once(path, json.dumps(own, indent=2).encode() + b"\n")
        found = _read_description(path)
        if found is not None and (found["rows"], found["table"]) != (own["rows"], own["table"]):
            others = [text for lock in _locks(out) if lock.parent.name != options.shard_name and (text := held(lock))]
            if others:
                raise GigamorphError(f"{out}: {others[0]} works on another table of images; wait for it")
            told = f"{found['rows']} rows then, {own['rows']} now"
            self._watch.warn(f"{out}: the table is not the one that the run began with ({told}); results are by image")
            write_atomically(path, lambda p: p.write_text(json.dumps(own, indent=2) + "\n"), "note")
        if options.identifiers:
            return None
        secret = out / "parts" / "_patients.key"
        with contextlib.suppress(FileExistsError):
            _write_once(secret, secrets.token_bytes(32), 0o600)
        return secret.read_bytes()

    def _pixels(self, row: Row) -> int:
        """Of an image whose size the table does not say; 0 where it cannot be told."""
        try:
            shape = self._classifier.open_images([row.record])[0]["image"].shape
        except DataError:
            return 0
        return shape[-2] * shape[-1]


def default_workers(devices: int) -> int:
    """Processes that read ahead for each of so many devices of this machine."""
    return max(1, min(8, available_cpus() // devices - 1))


def _refuse_others(out: Path, options: Options, *, ours: bool) -> None:
    """Refuse a folder that holds something else, or is in use."""
    shard = options.shard_name
    for lock in _locks(out):
        mine = lock.parent.name == shard
        clash = mine or lock.parent.name.partition("-of-")[2] != str(options.shard[1])
        if clash and not (mine and ours) and (holder := held(lock)):
            raise GigamorphError(f"{out}: {holder} writes to it; wait for it, or name another --out")
    found = _read_description(out / "run.json")
    if found is None:
        if (out / "predictions.csv").exists():
            raise GigamorphError(f"{out / 'predictions.csv'}: already exists; name another --out")
        return
    own = _description(options)
    if found["model"] != own["model"]:
        raise GigamorphError(
            f"{out}: holds results of another model ({found['checkpoint']}, SHA-256 {found['model'][:12]}...); name "
            "another --out"
        )
    begun = any(path.name != "_lock" for path in (out / "parts" / shard).glob("*"))
    if not options.resume and (begun or options.shard[1] == 1):
        raise GigamorphError(f"{out}: already holds predictions; go on with --resume, or name another --out")
    for name, text in (("heatmaps", "--heatmaps"), ("identifiers", "--identifiers")):
        if found[name] != own[name]:
            state = "with" if found[name] else "without"
            raise GigamorphError(f"{out}: was begun {state} {text}; go on {state} it, or name another --out")
    if found["drawn"] != own["drawn"]:
        raise GigamorphError(f"{out}: its heat maps have another calibration; go on with that, or name another --out")


def _description(options: Options) -> dict[str, Any]:
    drawn = repr(options.calibration) if options.heatmaps and options.calibration is not None else ""
    return {
        "format": 1,
        "model": options.model,
        "checkpoint": options.checkpoint,
        "heatmaps": options.heatmaps,
        "identifiers": options.identifiers,
        "drawn": hashlib.sha256(drawn.encode()).hexdigest() if drawn else "",
    }


def _read_description(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return found | {name: found[name] for name in ("model", "checkpoint", "heatmaps", "drawn", "rows", "table")}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise GigamorphError(f"{path}: cannot be read ({error}); name another --out") from error


def _write_once(path: Path, data: bytes, mode: int = 0o666) -> None:
    """Write a file that several processes may write first, whole. `FileExistsError` if one has."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        own = path.with_name(f".{path.name}.{os.getpid()}")
        handle = os.open(own, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
        try:
            os.write(handle, data)
            os.fsync(handle)
            os.link(own, path)
        finally:
            os.close(handle)
            own.unlink()
    except FileExistsError:
        raise
    except OSError as error:
        raise GigamorphError(f"{path}: cannot be written: {os.strerror(error.errno or 0)}; free some space") from error


def _locks(out: Path) -> list[Path]:
    return sorted((out / "parts").glob("*-of-*/_lock"))
