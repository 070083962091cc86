"""Measured processes: what one does cannot touch another's memory, and none is lost if one runs out of it.

The parent writes requests and reads answers, a line of JSON each. A process keeps its peer's network between requests,
so that several peers can take turns.
"""

from __future__ import annotations

import dataclasses
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from .results import FAILED, NOT_RUN, OK, OUT_OF_MEMORY, Task

Answer = dict[str, Any]
_LEAN = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


class Child:
    """A process that runs one peer's steps. Use it as a context manager: it ends with the block.

    Every request gives an answer with a `status`; after one that is not "ok" the process has ended.

    Args:
        longest: seconds that one request may take.
        lean: freed memory goes back to the system at once (glibc), so that resident memory is what is in use; otherwise
            the heap keeps as much again where blocks are small. It costs time.
    """

    def __init__(self, longest: float = 600.0, lean: bool = False):
        self.longest = longest
        environment = {**os.environ, **(_LEAN if lean else {})}
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__],
            env=environment,
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

    def __enter__(self) -> Child:
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
        for line in self._process.stderr:
            self._errors = [*self._errors[-20:], line.rstrip()]

    def ask(self, do: str, **what: Any) -> Answer:
        """One request; its answer with "status" and, if that is not "ok", the "reason"."""
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
        return {"status": FAILED, "reason": f"the process ended with code {code}: {last[:300]}"}

    def start(self, task: Task, peer: str, settings: dict[str, Any], cap: int | None) -> Answer:
        """Make a peer's network ready."""
        return self.ask("start", task=dataclasses.asdict(task), peer=peer, settings=settings, cap=cap)

    def run(self, steps: int, warm: int = 0) -> Answer:
        """Run steps; see `Work.run`."""
        return self.ask("run", steps=steps, warm=warm)

    def save(self, path: Path) -> Answer:
        """Store what the last step computed; see `Work.results`."""
        return self.ask("save", path=str(path))

    def ceilings(self, device: str) -> Answer:
        """Rates of this machine; see `roofline.measure_ceilings`."""
        return self.ask("ceilings", device=device)

    def profile(self, folder: Path) -> Answer:
        """Trace one step; see `profile.profile`."""
        return self.ask("profile", folder=str(folder))


def measure_alone(
    task: Task,
    peer: str,
    settings: dict[str, Any],
    steps: int,
    *,
    cap: int | None = None,
    longest: float = 600.0,
    lean: bool = False,
) -> Answer:
    """Steps of a peer in a process that ends with them; see `Child` and `Work.run`."""
    with Child(longest, lean) as child:
        answer = child.start(task, peer, settings, cap)
        return child.run(steps) if answer["status"] == OK else answer


def serve() -> None:
    """Answer requests until the input ends or one fails."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever libraries print does not mix with answers
    import torch

    from .work import Work, status_of

    work: Work | None = None
    for line in sys.stdin:
        request = json.loads(line)
        answer: Answer = {"status": OK}
        try:
            match request["do"]:
                case "start":
                    task = Task(**{**request["task"], "image": tuple(request["task"]["image"])})
                    work = Work(task, request["peer"], request["settings"], request["cap"])
                    answer["prepare_seconds"] = work.prepare_seconds
                case "run":
                    assert work is not None
                    answer |= work.run(request["steps"], request["warm"])
                case "save":
                    assert work is not None
                    torch.save(work.results(), request["path"])
                case "ceilings":
                    from .roofline import measure_ceilings

                    answer |= measure_ceilings(request["device"])
                case "profile":
                    from .profile import profile_step

                    assert work is not None
                    answer |= profile_step(work, Path(request["folder"]))
        except Exception as error:
            answer["status"], answer["reason"] = status_of(error)
        print(json.dumps(answer), file=answers, flush=True)
        if answer["status"] != OK:
            os._exit(0)  # what an error has left in memory would count


if __name__ == "__main__":
    serve()
