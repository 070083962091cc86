"""Logs beside ``log.csv``: their numbers, runs that go on, libraries that fail."""

import csv
import logging
import sys
import time

import pytest
import yaml
from lightning.pytorch.loggers import CSVLogger
from squares import Squares

from gigamorph.engine.errors import GigamorphError
from gigamorph.engine.train.loggers import logged, require_loggers
from gigamorph.engine.train.loop import run_stages
from gigamorph.engine.train.run import Run
from gigamorph.engine.train.stages import Stage


def stages(epochs=2):
    return (Stage("head", 1, 1e-2, batch_size=4), Stage("all", epochs, 1e-2, batch_size=4))


def losses(path):
    with path.open(newline="") as file:
        return {int(float(row["epoch"])): pytest.approx(float(row["train_loss"])) for row in csv.DictReader(file)}


def test_csv_has_the_epochs_of_before_when_a_run_goes_on(tmp_path):
    for epochs in (1, 2, 2):
        run_stages(Squares(), stages(epochs), Run(tmp_path, resume=True, log=("csv",)))
    assert losses(tmp_path / "csv" / "metrics.csv") == losses(tmp_path / "log.csv")
    assert "precision: fp32" in (tmp_path / "csv" / "hparams.yaml").read_text()


def test_settings_are_yaml_for_every_reader(tmp_path):
    logger = CSVLogger(tmp_path, name="csv", version="")
    with logged([logger], {"loss": {"of": (1, (2,))}, "freeze": ()}, [{"epoch": 1}]):
        pass
    text = (tmp_path / "csv" / "hparams.yaml").read_text()
    assert yaml.safe_load(text) == {"loss": {"of": [1, [2]]}, "freeze": []}


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for epochs in (1, 2):
        run_stages(Squares(), stages(epochs), Run(tmp_path, resume=True, log=("tensorboard",)))
    found = EventAccumulator(str(tmp_path / "tensorboard"))
    found.Reload()
    assert {one.step: one.value for one in found.Scalars("train_loss")} == losses(tmp_path / "log.csv")
    assert "hp_metric" not in found.Tags()["scalars"]


def test_mlflow(tmp_path, monkeypatch):
    """In the run's folder, and nothing where the command was called."""
    mlflow = pytest.importorskip("mlflow")
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for name, epochs in (("fold1", 1), ("run", 1), ("run", 2)):  # MLflow would put all into the first one's
        run_stages(Squares(), stages(epochs), Run(tmp_path / name, resume=True, log=("mlflow",)))
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/run/mlflow.db")
    experiment = client.get_experiment_by_name("gigamorph")
    last, first = client.search_runs([experiment.experiment_id], order_by=["attributes.start_time DESC"])
    history = client.get_metric_history(last.info.run_id, "train_loss")
    assert {one.step: one.value for one in history} == losses(tmp_path / "run" / "log.csv")
    assert len(client.get_metric_history(first.info.run_id, "train_loss")) == 2
    assert last.info.run_name == "run" and last.data.params["precision"] == "fp32" and last.info.status == "FINISHED"
    assert not list((tmp_path / "here").iterdir())


def test_wandb_without_an_account_is_refused_before_any_work(tmp_path, monkeypatch):
    code = "def setup(): return type('', (), {'settings': type('', (), {'mode': MODE})})"
    (tmp_path / "wandb.py").write_text(f"MODE = 'online'\n{code}\ndef login(prompt=True): return False\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with pytest.raises(GigamorphError, match="no account is configured; run wandb login, or set WANDB_MODE=offline"):
        require_loggers(["wandb"])
    sys.modules["wandb"].MODE = "offline"
    require_loggers(["wandb"])
    del sys.modules["wandb"]


def test_wandb_begins_a_run_for_each_of_ours(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    for name in ("fold1", "fold2"):
        run_stages(Squares(), stages(1), Run(tmp_path / name, log=("wandb",)))
        assert wandb.run is None
        [file] = (tmp_path / name / "wandb").glob("offline-run-*/run-*.wandb")
        until = time.monotonic() + 30
        while b"train_loss" not in file.read_bytes():  # a process of its own writes it
            assert time.monotonic() < until
            time.sleep(0.1)


class Refusing(CSVLogger):
    def __init__(self, out):
        super().__init__(out, name="own", version="")

    def log_hyperparams(self, params=None):
        raise ConnectionError("no server\nat all")


class Failing(Refusing):
    def log_hyperparams(self, params=None):
        pass

    def log_metrics(self, metrics, step=None):
        if step == 2:
            raise ConnectionError("gone")
        super().log_metrics(metrics, step)


def test_a_log_that_cannot_begin_is_one_line_and_one_that_fails_ends_no_run(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "own_loggers", sys.modules[__name__])
    begun = []
    with pytest.raises(GigamorphError, match=r"^Refusing cannot log this run: ConnectionError: no server$"):
        run_stages(
            Squares(),
            stages(),
            Run(tmp_path / "no", log=("own_loggers:Refusing",), begun=lambda: begun.append(1)),
        )
    assert not begun
    with caplog.at_level(logging.WARNING, logger="gigamorph"):
        run_stages(Squares(), stages(), Run(tmp_path / "yes", log=("own_loggers:Failing",)))
    assert "epoch 2 not logged by Failing: ConnectionError: gone" in caplog.text
    assert list(losses(tmp_path / "yes" / "own" / "metrics.csv")) == [1, 3]
    assert len(losses(tmp_path / "yes" / "log.csv")) == 3
