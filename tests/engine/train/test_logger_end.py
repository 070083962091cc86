"""A log that cannot be ended ends no run: what was trained is measured and kept."""

import logging
import sys

from lightning.pytorch.loggers import CSVLogger
from squares import Squares

from gigamorph.engine.train.loop import run_stages
from gigamorph.engine.train.run import Run
from gigamorph.engine.train.stages import Stage


class Gone(CSVLogger):
    def __init__(self, out):
        super().__init__(out, name="own", version="")

    def finalize(self, status):
        raise ConnectionError("no server\nat all")


def test_a_log_that_cannot_be_ended_is_a_warning(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "own_loggers", sys.modules[__name__])
    stages = (Stage("head", 1, 1e-2, batch_size=4), Stage("all", 1, 1e-2, batch_size=4))
    with caplog.at_level(logging.WARNING, logger="gigamorph"):
        found = run_stages(Squares(), stages, Run(tmp_path, log=("own_loggers:Gone",)))
    assert len(found.rows) == 2
    assert caplog.text.count("cannot close a log: ConnectionError: no server") == 2
