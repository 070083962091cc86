"""What a run makes of each image: predictions, explanations, converted files. The runner knows no more than this."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Protocol

import pyarrow as pa

from ..datasets.dataset import grey_of, with_white
from ..datasets.tables import Record
from ..files import write_atomically
from ..images.levels import White
from .decoders import Opened
from .delivery import Document
from .index import Index
from .options import RunOptions, Scores, Watch
from .rows import Row, Work

Result = dict[str, Any]


def texts(*names: str) -> list[tuple[str, pa.DataType]]:
    """Columns of a schema."""
    return [(name, pa.string()) for name in names]


FAILURES = pa.schema(texts("key", "model", "image_path", "reason"))
"""Of the quarantine."""


class Unit(Protocol):
    """The work of one process: it opens images, also in the processes that read ahead, and makes a result of each."""

    @property
    def net(self) -> Any:
        """The network, whose tiles are counted; None without one."""
        ...

    def open(self, record: Record, work: Work) -> dict[str, Any]:
        """An item with "image" (None if all is done here) and "record".

        Args:
            record: of the work, but for its path where the file was fetched.
        """
        ...

    def __call__(self, opened: Opened) -> Result:
        """The result, a row of the job's schema.

        Raises:
            DataError, BudgetError: of this image, which they name.
        """
        ...


class Start(Protocol):
    """Makes the unit of another process; to be pickled."""

    def __call__(self, *, device: str) -> Unit: ...


class Job:
    """What is made of each image of a run, and the tables at its end.

    Attributes:
        kind: the command.
        made: what a folder of it holds, for messages.
        product: a table at the end that nothing else may have written; empty if any may be replaced.
        schema: of the results; has key, model, image_path and pixels.
        files: in the run's folder besides the parts, as patterns; of an image, with ``{name}`` for what `named` says.
        named: the column with the name of an image's files; empty where none are written.
        classes: as in `stream_table`; known once the job is open.
    """

    kind: ClassVar[str]
    made: ClassVar[str]
    product: str = ""
    schema: ClassVar[pa.Schema]
    files: tuple[str, ...] = ()
    named: str = ""
    classes: Sequence[str] | None = None

    def described(self) -> dict[str, Any]:
        """What decides the results besides the model; a folder keeps it, and refuses a run that differs."""
        return {}

    def differs(self, name: str, before: Any) -> str:
        """What to say of a folder whose run was begun with another value of what `described` calls `name`."""
        option = f"--{name.replace('_', '-')}"
        if isinstance(before, bool):
            state = "with" if before else "without"
            return f"was begun {state} {option}; go on {state} it, or name another --out"
        if isinstance(before, list):
            before = f" {option} ".join(before)
            if not before:
                return f"was begun without {option}; go on without it, or name another --out"
        return f"was begun with {option} {before}; go on with that, or name another --out"

    def open(self, options: RunOptions) -> None:
        """Get ready in this process, before the images are listed."""

    def key(self, row: Row, model: str) -> str:
        """The identity of a row's result."""
        return row.key(model)

    def name(self, row: Row) -> str:
        """Of an image's files; further images of the same name get -2, -3, ..."""
        return row.stem

    def look(self, index: Index, watch: Watch) -> None:
        """Look at the images before any work."""

    def begin(self, out: Path, secret: Callable[[], bytes]) -> None:
        """The folder is this process's, and the work begins.

        Args:
            secret: by which patients are renamed, the same in all shards.
        """

    def pixels(self, row: Row) -> int:
        """Of an image whose size the table does not say.

        Raises:
            DataError: if it cannot be told.
        """
        shape = self.unit().open(row.record, Work("", row))["image"].shape
        return shape[-2] * shape[-1]

    def unit(self) -> Unit:
        """Of this process."""
        raise NotImplementedError

    def start(self) -> Start:
        """Makes those of others."""
        raise NotImplementedError

    def tables(self, index: Index, results: Iterable[Result], out: Path) -> Scores:
        """Write the tables of all that has a result; returns measures."""
        raise NotImplementedError

    def documents(self, index: Index, results: Iterable[Result], out: Path) -> Iterator[Document]:
        """What goes to a DICOMweb store when all is done and the tables are written."""
        raise NotImplementedError


def opened_with_white(opener: Callable[..., Any], white: White | None, *, device: str) -> Any:
    """What an opener opens, which takes this white level of images of which the table does not say; None: its own."""
    found = opener(device=device)
    return replace(found, open_images=lambda records: found.open_images(with_white(records, white)))


class PredictJob(Job):
    """What runs of `gigamorph predict` share, whatever their network says of an image.

    Args:
        opener: opens the network, which has `open_images` and `trained_on` as
            `gigamorph.engine.predict.predictor.Classifier`.
    """

    kind, made, product = "predict", "predictions", "predictions.csv"
    files = ("predictions.csv", "predictions.json", "breasts.csv", "exams.csv", "heatmaps", "masks")

    _network: Any

    def __init__(self, opener: Callable[..., Any], options: RunOptions) -> None:
        self._opener, self._options = opener, options

    def open(self, options: RunOptions) -> None:
        # Where other processes compute, this one only needs to know the classes, and how images are opened.
        self._network = self._opener(device=options.device if options.here else "cpu")

    def look(self, index: Index, watch: Watch) -> None:
        network = self._network
        # The training may have left images out, and its table still tells which split each was in; an archive is not
        # held in memory to find that out.
        if network.trained_on <= index.rows <= 2 * network.trained_on:
            index.resolve(lambda records: network.open_images(records).records)
        watch.looked(network, [row.record for row in index.sample(4) if not row.url])

    def write_note(self, out: Path, **more: Any) -> None:
        """Beside the table: which network its predictions are of."""
        options = self._options
        note: dict[str, Any] = {"checkpoint": options.checkpoint, "sha256": options.model}
        note |= {"flip": list(options.flips)} if options.flips else {}
        note["grey"] = grey_of(self._network.open_images([]))
        note["grey"] |= {} if options.white is None else {"white": options.white}
        note |= {"precision": options.precision} if options.precision != "fp32" else {}
        note |= more
        write_atomically(out / "predictions.json", lambda path: path.write_text(json.dumps(note) + "\n"), "note")
