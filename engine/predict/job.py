"""The interface between the runner and the jobs that it runs: predictions, explanations, converted files."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Protocol

import pyarrow as pa

from ..datasets.dataset import grey_of, with_white
from ..datasets.tables import Record
from ..errors import GigamorphError
from ..files import write_atomically
from ..images.levels import White
from .decoders import Opened
from .delivery import Document
from .index import RunDatabase
from .options import RunOptions, Scores, Watch
from .rows import Row, Work

Result = dict[str, Any]


def texts(*names: str) -> list[tuple[str, pa.DataType]]:
    """Columns of a schema."""
    return [(name, pa.string()) for name in names]


FAILURES = pa.schema(texts("key", "model", "image_path", "reason"))
"""Schema of the quarantine."""


class Unit(Protocol):
    """The work of a process: opens images, also in the reading processes, and computes a result for each."""

    @property
    def net(self) -> Any:
        """The network, whose tiles are reported; None without a network."""
        ...

    def open(self, record: Record, work: Work) -> dict[str, Any]:
        """An item with "image" (None if no computation follows) and "record".

        Args:
            record: the record of the work, with the local path of a downloaded file.
            work: the image.
        """
        ...

    def __call__(self, opened: Opened) -> Result:
        """The result of an image, a row of the job's schema.

        Raises:
            DataError, BudgetError: for an error of this image, which they name.
        """
        ...


class Start(Protocol):
    """Makes the unit of another process; must be picklable."""

    def __call__(self, *, device: str) -> Unit: ...


class Job:
    """The computation for each image of a run, and the tables at its end.

    Attributes:
        kind: the command.
        made: what the folder contains, for messages.
        product: a final table that must not exist before the run; empty if any table may be replaced.
        schema: of the results; has key, model, image_path and pixels.
        files: patterns of files in the run's folder, in addition to the parts; ``{name}`` is the value of column
            `named`.
        named: the column with the name of an image's files; empty without files.
        classes: see `stream_table`; known after `open`.
    """

    kind: ClassVar[str]
    made: ClassVar[str]
    product: str = ""
    schema: ClassVar[pa.Schema]
    files: tuple[str, ...] = ()
    named: str = ""
    classes: Sequence[str] | None = None

    def described(self) -> dict[str, Any]:
        """The settings that, with the model, determine the results; a folder stores them and refuses other settings."""
        return {}

    def differs(self, name: str, before: Any) -> str:
        """The error text for a folder whose run has another value of the setting `name` of `described`."""
        option = f"--{name.replace('_', '-')}"
        if isinstance(before, bool):
            state = "with" if before else "without"
            return f"was started {state} {option}; continue {state} it, or name another --out"
        if isinstance(before, list):
            before = f" {option} ".join(before)
            if not before:
                return f"was started without {option}; continue without it, or name another --out"
        return f"was started with {option} {before}; continue with it, or name another --out"

    def open(self, options: RunOptions) -> None:
        """Prepare this process, before the images are listed."""

    def key(self, row: Row, model: str) -> str:
        """The key of a row's result."""
        return row.key(model)

    def name(self, row: Row) -> str:
        """The name of an image's files; other images of the same name get -2, -3, ..."""
        return row.stem

    def look(self, index: RunDatabase, watch: Watch) -> None:
        """Inspect the images before any work."""

    def begin(self, out: Path, secret: Callable[[], bytes]) -> None:
        """Prepare the folder, which this process has locked, before the work.

        Args:
            out: the folder.
            secret: returns the key that pseudonymizes patients, the same in all shards.
        """

    def pixels(self, row: Row) -> int:
        """The number of pixels of an image whose size is not in the table.

        Raises:
            DataError: if it is unknown.
        """
        shape = self.unit().open(row.record, Work("", row))["image"].shape
        return shape[-2] * shape[-1]

    def unit(self) -> Unit:
        """The unit of this process."""
        raise NotImplementedError

    def start(self) -> Start:
        """The factory of units in other processes; a job without a network has none."""
        raise GigamorphError("images are converted by the processes of this machine; omit devices and engine")

    def tables(self, index: RunDatabase, results: Iterable[Result], out: Path) -> Scores:
        """Write the tables of all results; returns measures."""
        raise NotImplementedError

    def documents(self, index: RunDatabase, results: Iterable[Result], out: Path) -> Iterator[Document]:
        """The documents for a DICOMweb store, after the tables are written."""
        raise NotImplementedError


def opened_with_white(opener: Callable[..., Any], white: White | None, *, device: str) -> Any:
    """The opened network, with a default white level for images whose table has none; None uses the network's own."""
    found = opener(device=device)
    return replace(found, open_images=lambda records: found.open_images(with_white(records, white)))


def started(compute: Callable[[Any], Unit], opener: Callable[..., Any], *, device: str) -> Unit:
    """A `Start` of a job with a network."""
    return compute(opener(device=device))


class PredictJob(Job):
    """Base class of jobs with a network, and the properties of those of `gigamorph predict`.

    Args:
        opener: opens the network, which has `open_images` and `trained_on` like
            `gigamorph.engine.predict.predictor.Classifier`.
        options: of the run.
    """

    kind, made, product = "predict", "predictions", "predictions.csv"
    files = ("predictions.csv", "predictions.json", "breasts.csv", "exams.csv", "heatmaps", "masks")

    _network: Any

    def __init__(self, opener: Callable[..., Any], options: RunOptions) -> None:
        self._opener, self._options = opener, options

    def open(self, options: RunOptions) -> None:
        # If other processes compute, this one only needs the classes, and opens images.
        self._network = self._opener(device=options.device if options.here else "cpu")

    def look(self, index: RunDatabase, watch: Watch) -> None:
        network = self._network
        # The table may be that of the training, with images that it left out, and then determines the splits. Larger
        # archives are not loaded into memory for this.
        if network.trained_on <= index.rows <= 2 * network.trained_on:
            index.resolve(lambda records: network.open_images(records).records)
        watch.looked(network, [row.record for row in index.sample(4) if not row.url])

    def compute(self) -> Callable[[Any], Unit]:
        """The factory of units from an opened network; must be picklable."""
        raise NotImplementedError

    def unit(self) -> Unit:
        return self.compute()(self._network)

    def start(self) -> Start:
        return functools.partial(started, self.compute(), self._opener)

    def write_note(self, out: Path, **more: Any) -> None:
        """Write predictions.json, which describes the network and the settings of the predictions."""
        options = self._options
        note: dict[str, Any] = {"checkpoint": options.checkpoint, "sha256": options.model}
        note |= {"flip": list(options.flips)} if options.flips else {}
        note["grey"] = grey_of(self._network.open_images([]))
        note["grey"] |= {} if options.white is None else {"white": options.white}
        note |= {"precision": options.precision} if options.precision != "fp32" else {}
        note |= more
        write_atomically(out / "predictions.json", lambda path: path.write_text(json.dumps(note) + "\n"), "note")
