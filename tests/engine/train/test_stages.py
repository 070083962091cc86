"""Stages: which tensors move, what is frozen, and runs that are killed and resumed."""

import json
import math
import os
import shutil
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from forked import Forked
from squares import Net, Squares, run_killed
from torch.nn import functional as F

from gigamorph.engine.errors import GigamorphError
from gigamorph.engine.train import callbacks
from gigamorph.engine.train.checkpoint import load_checkpoint
from gigamorph.engine.train.loop import run_stages
from gigamorph.engine.train.optimizers import make_optimizer
from gigamorph.engine.train.run import Run
from gigamorph.engine.train.stages import Stage, freeze, train_mode, trainable_names
from gigamorph.engine.train.task import Score, Task

STAGES = (
    Stage("head", 2, 1e-2, trainable=("head",), batch_norm="trainable", batch_size=2, accumulate=2),
    Stage("all", 2, 1e-2, batch_size=3, weight_decay=1e-2, optimizer="adamw", schedule="cosine", dropout=0.1),
    Stage("sgd", 1, 1e-2, trainable=("body.0", "head.*"), batch_norm="eval", batch_size=2, optimizer="sgd"),
)


def assert_same(first, second):
    for name in ("last.ckpt", "best.ckpt"):
        a, b = (load_checkpoint(folder / name) for folder in (first, second))
        assert all(torch.equal(v, b["state_dict"][k]) for k, v in a["state_dict"].items())
        a, b = ({**c["gigamorph"], "state": dict(c["gigamorph"]["state"])} for c in (a, b))
        rows = [c["state"].pop("rows") for c in (a, b)]
        assert a["state"] == b["state"] and a["task"] == b["task"]
    drop = [[{k: v for k, v in row.items() if k not in ("seconds", "peak_bytes")} for row in own] for own in rows]
    assert drop[0] == drop[1]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    task = Squares()
    run_stages(task, STAGES, Run(out, seed=4))
    return out, task


# A run has 2 epochs of 4 batches, 2 of 3 and 1 of 4.
@pytest.mark.parametrize(("every", "kills"), [(0.0, range(1, 19)), (1e9, range(2, 19, 5))])
def test_killed_at_any_batch_and_resumed_is_bitwise_the_uninterrupted_run(whole, tmp_path, monkeypatch, every, kills):
    monkeypatch.setattr(callbacks, "SAVE_EVERY", every)
    out, task = whole
    for kill in kills:
        folder = tmp_path / str(kill)
        with pytest.raises(RuntimeError, match="killed"):
            run_stages(Squares(fail_at=kill), STAGES, Run(folder, seed=4))
        resumed = Squares()
        run_stages(resumed, STAGES, Run(folder, seed=4, resume=True))
        assert_same(out, folder)
        for name, value in task.module.state_dict().items():
            assert torch.equal(value, resumed.module.state_dict()[name]), (kill, name)


# Five epochs, and the best of them, of which there are two at least.
@pytest.mark.parametrize("nth", range(1, 8))
def test_killed_while_a_file_is_written(whole, tmp_path, monkeypatch, nth):
    count = []
    replace_ = os.replace

    def fail(source, target):
        if str(target).endswith(".ckpt"):
            count.append(target)
            if len(count) == nth:
                raise RuntimeError("power cut")
        replace_(source, target)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(GigamorphError, match="power cut"):
        run_stages(Squares(), STAGES, Run(tmp_path, seed=4))
    run_stages(Squares(), STAGES, Run(tmp_path, seed=4, resume=True))
    assert_same(whole[0], tmp_path)


def test_killed_by_a_signal_that_cannot_be_caught(whole, tmp_path):
    process = Forked(run_killed, STAGES, tmp_path, 4, torch.get_num_threads())
    assert process.wait() == -signal.SIGKILL, process.error
    run_stages(Squares(), STAGES, Run(tmp_path, seed=4, resume=True))
    assert_same(whole[0], tmp_path)


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_finishes_the_step_and_saves_it(end, tmp_path):
    class Interrupted(Squares):
        def loss(self, batch):
            if self.calls == 2:  # in the second half of the first optimizer step's two batches, plus one
                os.kill(os.getpid(), end)
            return super().loss(batch)

    former = [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)]
    task = Interrupted()
    big = replace(STAGES[0], accumulate=1)
    with pytest.raises(KeyboardInterrupt):
        run_stages(task, (big, *STAGES[1:]), Run(tmp_path, seed=4))
    assert [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)] == former
    state = load_checkpoint(tmp_path / "last.ckpt")["gigamorph"]["state"]
    assert [state[name] for name in ("stage", "within", "epoch", "batch")] == [0, 0, 0, 3] and task.calls == 3
    resumed = Squares()
    run_stages(resumed, (big, *STAGES[1:]), Run(tmp_path, seed=4, resume=True))
    assert resumed.calls == 15 and resumed.began == [1, 2, 3, 4]  # the epoch under way was not begun again


def test_what_a_callback_knows_goes_from_stage_to_stage_when_a_run_goes_on(tmp_path, monkeypatch):
    (tmp_path / "counting.py").write_text(
        "import os, signal\n"
        "from lightning.pytorch.callbacks import Callback\n"
        "class Count(Callback):\n"
        "    count = 0\n"
        "    def on_train_batch_end(self, trainer, *_):\n"
        "        self.count += 1\n"
        "    def on_train_epoch_end(self, trainer, module):\n"
        f"        if (trainer.max_epochs, trainer.current_epoch) == ({STAGES[0].epochs}, {STAGES[0].epochs - 1}):\n"
        "            os.kill(os.getpid(), signal.SIGINT)\n"
        "    def state_dict(self):\n"
        "        return {'count': self.count}\n"
        "    def load_state_dict(self, state):\n"
        "        self.count = state['count']\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    stages = (STAGES[0], replace(STAGES[1], epochs=STAGES[0].epochs + 1))
    run = Run(tmp_path, seed=4, callbacks=("counting:Count",))
    with pytest.raises(KeyboardInterrupt):
        run_stages(Squares(), stages, run)
    stored = load_checkpoint(tmp_path / "last.ckpt")
    before = stored["callbacks"]["Count"]["count"]
    assert stored["gigamorph"]["state"]["within"] == STAGES[0].epochs and before > 0
    again = Squares()
    run_stages(again, stages, replace(run, resume=True))
    assert load_checkpoint(tmp_path / "last.ckpt")["callbacks"]["Count"]["count"] == before + again.calls


def test_complete_run_is_not_trained_again(whole, tmp_path):
    again = Squares(fail_at=1)
    trained = run_stages(again, STAGES, Run(whole[0], seed=4, resume=True))
    assert len(trained.rows) == 5 and [row["stage"] for row in trained.rows] == ["head"] * 2 + ["all"] * 2 + ["sgd"]
    scores = [row["score"] for row in trained.rows]
    assert trained.best_score == max(scores) and trained.best_epoch == 1 + scores.index(max(scores))
    assert again.score() == pytest.approx(trained.best_score, abs=1e-12)  # the best weights are in the module


def test_a_run_of_a_version_that_lacked_an_option_goes_on(whole, tmp_path):
    stored = load_checkpoint(whole[0] / "last.ckpt")
    for stage in stored["gigamorph"]["settings"]["stages"]:
        del stage["layer_decay"]
    shutil.copytree(whole[0], tmp_path / "older")
    torch.save(stored, tmp_path / "older" / "last.ckpt")
    run = Run(tmp_path / "older", seed=4, resume=True)
    with pytest.raises(GigamorphError, match="different stages"):
        run_stages(Squares(), [replace(stage, layer_decay=0.5) for stage in STAGES], run)
    assert len(run_stages(Squares(fail_at=1), STAGES, run).rows) == 5


def test_a_folder_is_not_overwritten_nor_resumed_with_other_settings(whole):
    with pytest.raises(GigamorphError, match="already holds a run"):
        run_stages(Squares(), STAGES, Run(whole[0], seed=4))
    with pytest.raises(GigamorphError, match="different seed"):
        run_stages(Squares(), STAGES, Run(whole[0], seed=5, resume=True))
    with pytest.raises(GigamorphError, match="different stages"):
        run_stages(Squares(), STAGES[:2], Run(whole[0], seed=4, resume=True))


def test_module_is_left_as_it_was_but_for_its_weights(whole):
    module = whole[1].module
    assert all(p.requires_grad for p in module.parameters()) and module.head[0].p == 0.3 and not module.training


# ----------------------------------------------------------------------------------------------------- stage tables


def step(stage):
    """Names of parameters and buffers that one step of a stage changes."""
    torch.manual_seed(0)
    net = Net()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    freeze(net, stage)
    train_mode(net, stage)
    optimizer = make_optimizer(net, stage)
    F.cross_entropy(net(torch.randn(4, 1, 6, 6)), torch.tensor([0, 1, 2, 0])).backward()
    optimizer.step()
    return {k for k, v in net.state_dict().items() if not torch.equal(v, before[k])}


def weights(*modules):
    return {f"{m}.{k}" for m in modules for k in ("weight", "bias")}


def statistics(*modules):
    return {f"{m}.{k}" for m in modules for k in ("running_mean", "running_var", "num_batches_tracked")}


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd"])
def test_frozen_parameters_and_statistics_are_bit_identical_after_a_step(optimizer):
    # The bias in front of a norm has no gradient but rounding; Adam moves it all the same.
    head = Stage("s", 1, 0.1, trainable=("head",), weight_decay=0.1, optimizer=optimizer)
    got = step(replace(head, batch_norm="trainable")) - {"head.1.bias"}
    assert got == weights("head.1", "head.2") - {"head.1.bias"} | statistics("head.2")
    got = step(replace(head, batch_norm="eval"))
    assert got == weights("head.1", "head.2")
    got = step(replace(head, batch_norm="train")) - {"head.1.bias"}
    assert got == weights("head.1", "head.2") - {"head.1.bias"} | statistics("head.2", "body.1")


def test_patterns_name_parameters_and_modules():
    stage = Stage("s", 1, 0.1)
    net = Net()
    names = [name for name, _ in net.named_parameters()]
    assert trainable_names(net, stage) == names
    assert trainable_names(net, replace(stage, trainable=("head.1", "body.*.weight"))) == [
        "body.0.weight",
        "body.1.weight",
        "head.1.weight",
        "head.1.bias",
    ]
    with pytest.raises(GigamorphError, match=r"stage 's': 'layer4' matches no parameter .* parts are body, head"):
        trainable_names(net, replace(stage, trainable=("head", "layer4")))


def test_decay_is_on_weights_only_and_dropout_is_set():
    net = Net()
    stage = Stage("s", 1, 0.1, weight_decay=0.5, dropout=0.7)
    freeze(net, stage)
    decayed, others = make_optimizer(net, stage).param_groups
    assert [p.ndim for p in decayed["params"]] == [4, 2] and decayed["weight_decay"] == 0.5
    assert all(p.ndim == 1 for p in others["params"]) and others["weight_decay"] == 0
    assert net.head[0].p == 0.7
    decayed, others = make_optimizer(net, replace(stage, undecayed=("head",))).param_groups
    assert [p.ndim for p in decayed["params"]] == [4] and len(others["params"]) == 7
    with pytest.raises(GigamorphError, match="'tail' matches no parameter"):
        make_optimizer(net, replace(stage, undecayed=("tail",)))


# ------------------------------------------------------------------------------------------------------ a plain loop


class Line(Task):
    """Seven points, in their order, through which a line is to go: four batches."""

    def __init__(self):
        torch.manual_seed(1)
        self.module, self.points = torch.nn.Linear(3, 1).double(), torch.randn(7, 4, dtype=torch.float64)

    def examples(self, epoch):
        return self.points

    def order(self, count, generator):
        return np.arange(count)

    def loss(self, batch):
        points = torch.stack(list(batch))
        return F.mse_loss(self.module(points[:, :3])[:, 0], points[:, 3])


FACTORS = {
    "constant": lambda step, steps: 1.0,
    "linear": lambda step, steps: 1 - step / steps,
    "cosine": lambda step, steps: (1 + math.cos(math.pi * step / steps)) / 2,
}


@pytest.mark.parametrize(
    ("accumulate", "schedule", "decay"),
    [(1, "cosine", None), (3, "constant", None), (3, "linear", None), (2, "constant", 0.5)],
)
def test_a_stage_is_a_plain_loop(accumulate, schedule, decay, tmp_path):
    """Rates by the step; the last step of an epoch is of the batches that are left; averages take in each step."""
    expected = Line()
    batches = expected.points.split(2)
    chunks = [batches[first : first + accumulate] for first in range(0, len(batches), accumulate)] * 2  # epochs
    optimizer = torch.optim.SGD(expected.module.parameters(), lr=0.1, momentum=0.9, nesterov=True)
    average = [p.detach().clone() for p in expected.module.parameters()]
    for step, chunk in enumerate(chunks):
        optimizer.zero_grad()
        torch.stack([expected.loss(batch) for batch in chunk]).mean().backward()
        optimizer.param_groups[0]["lr"] = 0.1 * FACTORS[schedule](step, len(chunks))
        optimizer.step()
        share = 0 if decay is None else min(decay, (2 + step) / (11 + step))
        average = [
            share * a + (1 - share) * p.detach() for a, p in zip(average, expected.module.parameters(), strict=True)
        ]
    task, own = Line(), {"schedule": schedule, "warmup": 0.0, "average": decay, "optimizer": "sgd"}
    run_stages(task, [Stage("s", 2, 0.1, batch_size=2, accumulate=accumulate, **own)], Run(tmp_path))
    for have, want in zip(task.module.parameters(), average, strict=True):
        torch.testing.assert_close(have.detach(), want, rtol=1e-12, atol=1e-12)


# --------------------------------------------------------------------------------------------------------- scripted


class Scripted(Squares):
    """Scores as written down."""

    def score(self):
        return self.scores[len(self.began) - 1]


def test_patience_plateau_and_best(tmp_path):
    stage = Stage("a", 9, 1.0, plateau=2, patience=5, batch_size=8, optimizer="sgd", clip=1e-3)
    task = Scripted(scores=[0.1, 0.5, 0.2, 0.4, 0.5, 0.1, 0.3, 0.9, 0.9])
    trained = run_stages(task, [stage, replace(stage, name="b", epochs=1)], Run(tmp_path))
    assert [row["stage"] for row in trained.rows] == ["a"] * 7 + ["b"]  # five epochs without more than 0.5
    assert [row["lr"] for row in trained.rows] == pytest.approx([1, 1, 1, 1, 0.1, 0.1, 0.01, 1])
    assert (trained.best_epoch, trained.best_score) == (8, 0.9)


def test_patience_by_something_else_than_the_score(tmp_path):
    """The score chooses the epoch, what it is stopped by ends the stage."""
    scores = [Score(value, stop=stop) for value, stop in [(0.1, 3), (0.2, 4), (0.5, 3), (0.3, 2), (0.9, 9)]]
    stage = Stage("a", 5, 1e-9, patience=2, batch_size=8, optimizer="sgd")
    trained = run_stages(Scripted(scores=scores), [stage], Run(tmp_path))
    assert len(trained.rows) == 4 and (trained.best_epoch, trained.best_score) == (3, 0.5)


class Losses(Squares):
    """No scores, and losses as written down."""

    def loss(self, batch):
        return super().loss(batch) * 0 + self.scores[len(self.began) - 1]

    def score(self):
        return None


@pytest.mark.parametrize("by_loss", [False, True])
def test_best_training_loss_is_kept_where_it_is_asked_for(tmp_path, by_loss):
    task = Losses(scores=[3.0, 1.0, 2.0])
    task.best_by_loss = by_loss
    trained = run_stages(task, [Stage("a", 3, 1e-3, batch_size=8)], Run(tmp_path))
    assert (trained.best_epoch, trained.best_score) == ((2, -1.0) if by_loss else (3, None))


def test_clipping_bounds_the_step(tmp_path):
    task = Squares()
    before = [p.detach().clone() for p in task.module.parameters()]
    run_stages(task, [Stage("a", 1, 1.0, optimizer="sgd", momentum=0.0, batch_size=8, clip=1e-3)], Run(tmp_path))
    pairs = zip(task.module.parameters(), before, strict=True)
    moved = math.sqrt(sum(((p.detach() - b) ** 2).sum().item() for p, b in pairs))
    assert moved == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.parametrize("what", ["loss", "gradient", "score"])
def test_not_a_number_is_one_line_and_keeps_the_last_state(whole, tmp_path, what):
    class Bad(Squares):
        def loss(self, batch):
            loss = super().loss(batch)
            if self.calls < 6 or what == "score":
                return loss
            return loss * math.nan if what == "loss" else loss + 0 * torch.sqrt(0 * loss)

        def score(self):
            return math.nan if what == "score" and self.calls > 4 else super().score()

    with pytest.raises(GigamorphError) as caught:
        run_stages(Bad(), STAGES, Run(tmp_path, seed=4))
    text = str(caught.value)
    assert "\n" not in text and f"the {what} is nan" in text and "stage 'head', epoch 2" in text and "last.ckpt" in text
    assert ("step 1:" in text) == (what != "score")
    run_stages(Squares(), STAGES, Run(tmp_path, seed=4, resume=True))
    assert_same(whole[0], tmp_path)


def test_no_examples(tmp_path):
    class Empty(Squares):
        def examples(self, epoch):
            return []

    with pytest.raises(GigamorphError, match="no training examples"):
        run_stages(Empty(), STAGES, Run(tmp_path))


def test_progress_is_reported(tmp_path):
    seen = []
    run_stages(Squares(), STAGES[:1], Run(tmp_path, report=seen.append))
    assert [(p.epoch, p.image, p.images) for p in seen if p.stage == "head" and not p.note][:3] == [
        (0, 0, 8),
        (0, 1, 8),
        (0, 2, 8),
    ]
    assert next(p.note for p in seen if p.note).startswith("head 1/2  loss ")
    assert json.dumps((tmp_path / "log.csv").read_text().splitlines()[0]).count(",") == 6


def test_frozen_parts_and_rates_of_their_own():
    stage = Stage("s", 1, 0.1, frozen=("body.0",), rates=(("head", 0.2), ("head.1.bias", 0.4)), weight_decay=0.01)
    net = Net()
    assert trainable_names(net, stage) == [n for n, _ in net.named_parameters() if not n.startswith("body.0.")]
    freeze(net, stage)
    names = {id(p): name for name, p in net.named_parameters()}
    found = {names[id(p)]: group for group in make_optimizer(net, stage).param_groups for p in group["params"]}
    assert found.keys() == set(trainable_names(net, stage))
    for name, rate in (("body.1.weight", 0.1), ("head.1.weight", 0.2), ("head.1.bias", 0.4), ("head.2.bias", 0.2)):
        assert found[name]["lr"] == rate and found[name]["base"] == rate
        assert found[name]["weight_decay"] == (0.01 if name == "head.1.weight" else 0)
    with pytest.raises(GigamorphError, match="all parameters are frozen"):
        trainable_names(net, replace(stage, frozen=("body", "head")))
    with pytest.raises(GigamorphError, match=r"'tail' matches no parameter of the network; its parts are body, head"):
        make_optimizer(net, replace(stage, rates=(("tail", 1.0),)))
