"""Processes for measurements: they do not affect each other's memory, and the parent survives their memory errors.

The parent writes requests and reads answers, one line of JSON each. A request names a method of the class `Server` in
some module; the server lives as long as the process, so that requests can use results of earlier ones.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .results import FAILED, NOT_RUN, OK, OUT_OF_MEMORY, REFUSED, BenchTask

Answer = dict[str, Any]
_RETURN_FREED_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
# Messages of C++ code when the system refuses memory; oneDNN does not report why it could not create a primitive.
_NO_MEMORY = ("can't allocate memory", "not enough memory", "bad_alloc", "out of memory", "could not create a memory")


class Process:
    """A process that answers requests. As a context manager, it ends with the block.

    Every answer has a `status`; after one that is not "ok" the process has ended.

    Args:
        server: the module with the `Server`.
        longest: maximal seconds of one request.
        lean: return freed memory to the system at once (glibc), so that resident memory is the memory in use. Otherwise
            the heap may cache as much again if blocks are small. It costs time.
        folder: the module's folder, if it is not on Python's path.
        env: environment variables in addition to those of this process.
        log: the file to which its error output is appended.
    """

    def __init__(
        self,
        server: str,
        longest: float = 600.0,
        lean: bool = False,
        folder: Path | None = None,
        env: Mapping[str, str] | None = None,
        log: Path | None = None,
    ):
        self.longest, self.log = longest, log
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, server, *([] if folder is None else [str(folder)])],
            env={**os.environ, **(_RETURN_FREED_MEMORY if lean else {}), **(env or {})},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._answers: queue.Queue[str] = queue.Queue()
        self._errors: list[str] = []
        threading.Thread(target=self._read, daemon=True).start()
        self._error_reader = threading.Thread(target=self._read_errors, daemon=True)
        self._error_reader.start()

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *error: object) -> None:
        self._process.kill()
        self._process.wait()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._answers.put(line)
        self._answers.put("")

    def _read_errors(self) -> None:
        assert self._process.stderr is not None
        with open(self.log or os.devnull, "a") as log:
            for line in self._process.stderr:
                log.write(line)
                log.flush()
                self._errors = [*self._errors[-20:], line.rstrip()]

    def ask(self, do: str, **what: Any) -> Answer:
        """Send one request; return its answer with "status" and, if that is not "ok", the "reason"."""
        assert self._process.stdin is not None
        try:
            print(json.dumps({"do": do, **what}), file=self._process.stdin, flush=True)
            line = self._answers.get(timeout=self.longest)
        except queue.Empty:
            self._process.kill()
            return {"status": NOT_RUN, "reason": f"stopped after {self.longest:.0f} s"}
        except BrokenPipeError:
            line = ""
        if line:
            return json.loads(line)
        code = self._process.wait()
        self._error_reader.join(timeout=5)
        if code == -signal.SIGKILL:
            return {"status": OUT_OF_MEMORY, "reason": "the system ended the process"}
        last = next((line for line in reversed(self._errors) if line.strip()), "no message")
        if "alloc" in last.lower() or "memory" in last.lower():
            return {"status": OUT_OF_MEMORY, "reason": last[:300]}
        return {"status": FAILED, "reason": f"the process ended with exit code {code}: {last[:300]}"}


class Child(Process):
    """A process that runs one peer's steps; see `Process`, and `Server` in `work.py`."""

    def __init__(self, longest: float = 600.0, lean: bool = False):
        super().__init__(f"{__package__}.work", longest, lean)

    def start(self, task: BenchTask, peer: str, settings: dict[str, Any], cap: int | None) -> Answer:
        """Prepare a peer's network."""
        return self.ask("start", task=dataclasses.asdict(task), peer=peer, settings=settings, cap=cap)

    def run(self, steps: int, warm: int = 0) -> Answer:
        """Run steps; see `PeerWork.run`."""
        return self.ask("run", steps=steps, warm=warm)


def measure_in_new_process(
    task: BenchTask,
    peer: str,
    settings: dict[str, Any],
    steps: int,
    *,
    cap: int | None = None,
    longest: float = 600.0,
    lean: bool = False,
) -> Answer:
    """Run steps of a peer in a new process; see `Child` and `PeerWork.run`."""
    with Child(longest, lean) as child:
        answer = child.start(task, peer, settings, cap)
        return child.run(steps) if answer["status"] == OK else answer


def serve(name: str) -> None:
    """Answer requests with the `Server` of a module until the input ends or one fails."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # keep output of libraries apart from answers
    server = importlib.import_module(name).Server()
    for line in sys.stdin:
        request = json.loads(line)
        answer: Answer = {"status": OK}
        try:
            answer |= getattr(server, request.pop("do"))(**request) or {}
        except Exception as error:
            answer["status"], answer["reason"] = status_of(error)
        print(json.dumps(answer, default=str), file=answers, flush=True)
        if answer["status"] != OK:
            os._exit(0)  # memory left over by an error would count


def status_of(error: BaseException) -> tuple[str, str]:
    """Return status and reason of a step that ended with an error."""
    import torch

    from ..errors import BudgetError, ForwardError, UnsupportedError

    text = " ".join(str(error).split())[:300] or type(error).__name__
    if isinstance(error, (BudgetError, torch.OutOfMemoryError, MemoryError)):
        return OUT_OF_MEMORY, text
    if isinstance(error, (UnsupportedError, ForwardError)):
        return REFUSED, text
    if isinstance(error, RuntimeError) and any(words in text.lower() for words in _NO_MEMORY):
        return OUT_OF_MEMORY, text
    return FAILED, f"{type(error).__name__}: {text}"


if __name__ == "__main__":
    sys.path[:0] = sys.argv[2:]
    serve(sys.argv[1])
