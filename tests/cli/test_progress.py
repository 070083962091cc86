import io
import json
import logging

import pytest
import torch
from rich.console import Console

from gigamorph.cli.progress import ProgressView, StageView
from gigamorph.cli.runner import watching
from gigamorph.engine.models import create_model
from gigamorph.engine.morph.widen import widen
from gigamorph.engine.train.progress import Meter


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr("time.monotonic", clock)
    return clock


def test_plain_lines_when_not_a_terminal(clock):
    text = io.StringIO()
    with ProgressView(Console(file=text, width=60), interval=10) as view:
        meter = Meter(view)
        meter.start("train", 4, epoch=1, epochs=3)
        for _ in range(4):
            meter.image(30_000_000)
            clock.now += 6
            meter.image_done()
        meter.note("epoch 2/3  loss 0.5")
    lines = text.getvalue().splitlines()
    assert len(lines) == 3 and "\x1b" not in text.getvalue()
    assert lines[0].startswith("train 2/3: image 2/4, 5.0 Mpx/s, ") and lines[0].endswith("0:12 left in this stage")
    assert "(peak " in lines[0]
    assert lines[2] == "epoch 2/3  loss 0.5"


def test_a_bar_on_a_terminal_shows_tiles_inside_an_image(clock):
    class Event:
        phase, done, total, pixels = "backward", 1, 2, 50

    text = io.StringIO()
    console = Console(file=text, force_terminal=True, width=160)
    with ProgressView(console) as view:
        meter = Meter(view)
        meter.start("train", 2, training=True)
        meter.image(8_000_000)
        clock.now += 1
        meter.on_tile(Event)
        view._bar.refresh()
    # a quarter for the forward pass and half of the rest: 5/8 of one of two images in a second
    assert "5.0 Mpx/s" in text.getvalue() and "0:02 left" in text.getvalue()


def test_a_resumed_epoch_estimates_from_its_own_images_only(clock):
    text = io.StringIO()
    with ProgressView(Console(file=text, width=60), interval=1) as view:
        meter = Meter(view)
        meter.start("train", 100, done=90)
        meter.image(10)
        clock.now += 5
        meter.image_done()
    assert "image 91/100" in text.getvalue() and "0:45 left" in text.getvalue()


def test_json_lines_of_a_resumed_run_estimate_from_its_own_images_only(clock, capsys):
    with watching(as_json=True, device="cpu") as watch:
        watch.meter.start("predict", 100, done=90)
        clock.now += 5
        watch.meter.image_done()
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (last["done"], last["images_per_second"], last["seconds_left"]) == (91, 0.2, 45.0)


@pytest.mark.parametrize("terminal", [True, False])
def test_stages_of_a_morph_are_shown_while_it_runs(terminal):
    parent, out = create_model("lesionnet"), io.StringIO()
    with StageView("gigamorph.morph", Console(file=out, force_terminal=terminal, width=100), interval=0):
        widen(parent, torch.zeros(1, 1, 64, 64), factor=2)
    shown = out.getvalue()
    assert "MiB" in shown or "GiB" in shown
    if terminal:  # whose picture is drawn a few times a second: which stages these are is a matter of time
        return
    stages = [line.partition(" (")[0] for line in shown.splitlines()]
    assert stages[:3] == [
        "looking for branches by image size, batch and precision",
        "following the channels through one forward",
        "checking the widened network op by op",
    ]
    runs = ["float32, eval mode", "float32, train mode", "float64, eval mode", "float64, train mode"]
    for who in ("the parent", "the child"):
        assert [s for s in stages if s.startswith(f"running {who}")][:4] == [f"running {who} in {run}" for run in runs]
    assert not logging.getLogger("gigamorph.morph").handlers


def test_a_short_morph_prints_no_stages():
    out = io.StringIO()
    with StageView("gigamorph.morph", Console(file=out)):
        widen(create_model("lesionnet"), torch.zeros(1, 1, 64, 64), factor=2)
    assert not out.getvalue()
