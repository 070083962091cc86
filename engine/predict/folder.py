"""The folder of a run: its description, its locks, and checks of its content.

``run.json`` describes the run, ``parts/N-of-M/`` holds results and ``quarantine/N-of-M/`` failed images. Shards share a
folder; each writes to its own parts.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..errors import GigamorphError
from ..files import temporary_name, write_atomically
from ..parallel.lock import cannot_write, held, hold
from ..parsing import parse_json
from .job import Job
from .options import RunOptions
from .parts import read_results

_OF_TRAINING = ("last.ckpt", "log.csv", "folds.json")
"""Files that identify a folder of `gigamorph train`, which has a quarantine.csv of its own images."""


class RunFolder:
    """The folder of a job's results; this process computes one shard."""

    def __init__(self, path: Path, job: Job, options: RunOptions) -> None:
        self.path, self._job, self._options = path, job, options

    @property
    def parts(self) -> Path:
        return self.path / "parts"

    @property
    def quarantine(self) -> Path:
        return self.path / "quarantine"

    @property
    def shard(self) -> str:
        return self._options.shard_name

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Context in which only this process writes to the shard. After an error without results, files are removed.

        Raises:
            GigamorphError: naming another process that writes to it, or other content of the folder.
        """
        made, existed = not self.path.exists(), (self.path / "run.json").exists()
        with hold(self.parts / self.shard / "_lock", self.path):
            self.refuse(ours=True)
            try:
                yield
            except BaseException:
                # Another shard may be starting.
                if not existed and self._options.shard[1] == 1 and not self.has_results():
                    with contextlib.suppress(OSError):
                        self._empty(made)
                raise

    def _empty(self, made: bool) -> None:
        """Remove the files that this process has written, and the folder if it has made it."""
        for path in (self.path / "run.json", self.parts / "_patients.key", self.parts / "_finish"):
            path.unlink(missing_ok=True)
        for parent in (self.parts, self.quarantine):
            shutil.rmtree(parent / self.shard, ignore_errors=True)
            with contextlib.suppress(OSError):  # it existed before, with other content
                parent.rmdir()
        if made:
            self.path.rmdir()

    def finishing(self) -> contextlib.AbstractContextManager[None]:
        """Context in which only this process writes the tables of all shards; waits for other processes."""
        return hold(self.parts / "_finish", self.path, wait=True)

    def refuse(self, *, ours: bool) -> None:
        """Refuse a folder that has other content, or is in use.

        Args:
            ours: whether this process holds the shard.
        """
        job, options, out = self._job, self._options, self.path
        self._refuse_other_processes(ours)
        found = self._refuse_other_runs()
        if found is None or options.overwrite:
            return
        if found["model"] != options.model:
            raise GigamorphError(
                f"{out}: has results of another model ({found['checkpoint']}, SHA-256 {found['model'][:12]}...); "
                f"name another --out{self._or_overwrite}"
            )
        if not options.resume and (options.shard[1] == 1 or self.has_results(self.shard)):
            raise GigamorphError(
                f"{out}: already holds {job.made}; continue with --resume, or name another --out{self._or_overwrite}"
            )
        for name, value in job.described().items():
            if found.get(name) != value:
                raise GigamorphError(f"{out}: {job.differs(name, found.get(name))}")

    @property
    def _or_overwrite(self) -> str:
        return ", or give --overwrite" if self._job.files else ""

    def _refuse_other_processes(self, ours: bool) -> None:
        """Refuse a folder that another process writes to."""
        options, out = self._options, self.path
        for lock in self._locks():
            mine = lock.parent.name == self.shard
            clash = mine or lock.parent.name.partition("-of-")[2] != str(options.shard[1])
            if clash and not (mine and ours) and (holder := held(lock)):
                raise GigamorphError(f"{out}: {holder} writes to it; wait for it, or name another --out")

    def _refuse_other_runs(self) -> dict[str, Any] | None:
        """The content of `run.json`, or None; refuses the folder of another command."""
        job, out = self._job, self.path
        found = _read_description(out / "run.json")
        if found is None or not self.has_results():
            if found is None and job.product and (out / job.product).exists():
                raise GigamorphError(
                    f"{out / job.product}: already exists, without the run.json of its run; name another --out"
                )
            trained = next((name for name in _OF_TRAINING if (out / name).exists()), None)
            if trained is not None:
                raise GigamorphError(f"{out}: holds a run of gigamorph train ({trained}); name another --out")
            return None
        if found["kind"] != job.kind:
            raise GigamorphError(f"{out}: belongs to gigamorph {found['kind']}; name another --out")
        return found

    def clear(self) -> None:
        """Remove the files of a run of this kind, and no others.

        Raises:
            GigamorphError: see `refuse`; or if a file cannot be removed.
        """
        self.refuse(ours=False)
        job, out = self._job, self.path
        try:
            of_images = [pattern for pattern in job.files if "{name}" in pattern]
            for rows in read_results(self.parts, [job.named]) if of_images else ():
                for name in (pattern.format(name=row[job.named]) for row in rows for pattern in of_images):
                    (out / name).unlink(missing_ok=True)
            own = [name for name in job.files if name not in of_images]
            for name in (*own, "quarantine.csv", "stored", "quarantine", "parts", "run.json"):
                path = out / name
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        except OSError as error:
            raise cannot_write(out, error, "name another --out") from error

    def join(self, rows: int, table: str, warn: Callable[[str], object]) -> None:
        """Write the description of the run, or check that it matches.

        Args:
            rows: number of images.
            table: digest of the images.
            warn: called with a warning if the table has changed.
        """
        out, options = self.path, self._options
        path = out / "run.json"
        own = {
            "format": 1,
            "kind": self._job.kind,
            "model": options.model,
            "checkpoint": options.checkpoint,
            **self._job.described(),
            "rows": rows,
            "table": table,
        }
        text = json.dumps(own, indent=2) + "\n"
        others = [holder for lock in self._locks() if lock.parent.name != self.shard and (holder := held(lock))]
        if not path.exists():
            with contextlib.suppress(FileExistsError):
                _write_once(path, text.encode())
        elif not others and not self.has_results():  # of a run without results
            write_atomically(path, lambda p: p.write_text(text), "note")
        found = _read_description(path)
        if found is not None and (found["rows"], found["table"]) != (rows, table):
            if others:
                raise GigamorphError(f"{out}: {others[0]} works on another table of images; wait until it ends")
            counts = f"{found['rows']} rows then, {rows} now"
            warn(f"{out}: the table has changed since the run started ({counts}); results are matched by image")
            write_atomically(path, lambda p: p.write_text(text), "note")

    def secret(self) -> bytes:
        """The key that pseudonymizes patients, the same for all shards."""
        path = self.parts / "_patients.key"
        with contextlib.suppress(FileExistsError):
            _write_once(path, secrets.token_bytes(32), 0o600)
        return path.read_bytes()

    def has_results(self, shards: str = "*-of-*") -> bool:
        """Whether any result or failure of these shards, by default of any, exists."""
        found = (path for parent in (self.parts, self.quarantine) for path in parent.glob(f"{shards}/*"))
        return any(path.name != "_lock" for path in found)

    def _locks(self) -> list[Path]:
        return sorted(self.parts.glob("*-of-*/_lock"))


def _read_description(path: Path) -> dict[str, Any] | None:
    try:
        found = {"kind": "predict", "flip": [], "white": None, **parse_json(path.read_text(encoding="utf-8"))}
        return found | {name: found[name] for name in ("model", "checkpoint", "rows", "table")}
    except FileNotFoundError:
        return None
    except NotADirectoryError as error:
        raise GigamorphError(f"{path.parent}: cannot be written because it is a file; name a folder") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise GigamorphError(f"{path}: cannot be read ({error}); name another --out") from error


def _write_once(path: Path, data: bytes, mode: int = 0o666) -> None:
    """Write a file atomically if it does not exist; otherwise raises `FileExistsError`."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        own = temporary_name(path)
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
        raise cannot_write(path, error, "name another --out") from error
