"""DVME: the published head, balanced subsets; the recipe on files, killed and resumed."""

import json
import shutil
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.metrics import cohen_kappa_score, roc_auc_score
from torch import nn

from gigamorph.engine.config import parse_config
from gigamorph.engine.datasets.tables import Record, read_table, write_table
from gigamorph.engine.errors import DataError, GigamorphError
from gigamorph.engine.evaluate.read import read_cases
from gigamorph.engine.evaluate.roc import auc
from gigamorph.engine.mammography.recipes import default_text
from gigamorph.engine.mammography.recipes.classify import ClassifierTask
from gigamorph.engine.mammography.recipes.dvme import DvmeConfig, ExtractorConfig, train
from gigamorph.engine.mammography.recipes.dvme.compare import Linear, draw_subset, folder, measure
from gigamorph.engine.mammography.recipes.dvme.network import DVMEHead, Extractor, SelfAttention, make_extractor
from gigamorph.engine.mammography.recipes.tensors import TensorTask
from gigamorph.engine.models.compat import make_torchvision_importable
from gigamorph.engine.published.classifier import open_classifier
from gigamorph.engine.train.loop import run_stages
from gigamorph.engine.train.run import Run
from gigamorph.engine.train.stages import Stage

make_torchvision_importable()
timm = pytest.importorskip("timm")

DIMS = (2048, 2048, 1536)
SMALL = DvmeConfig(
    extractors=(ExtractorConfig("a", "tiny_nets:normed"), ExtractorConfig("b", "lesionnet?stages=1")),
    channels=1,
    mean=(0.5,),
    std=(0.25,),
    resize=(32, 24),
    crop=0,
    subsets=(4, 0),
    folds=2,
    p=4,
    hidden=8,
    epochs=2,
    batch_size=4,
)


def count(module):
    return sum(p.numel() for p in module.parameters())


# --------------------------------------------------------------------------------------------------------- the head


def test_published_numbers_of_parameters():
    with torch.device("meta"):
        assert count(DVMEHead(DIMS, 5)) == 3_677_706
        assert count(DVMEHead(DIMS, 5, tokens="block")) == 4_726_789
        assert count(Linear([2048], 5)) == 10_245 and count(Linear([1536], 5)) == 7_685
        dino, resnet = (
            Extractor(timm.create_model(e.model[5:], num_classes=2), e.blocks)
            for e in (DvmeConfig().extractors[2], DvmeConfig().extractors[0])
        )
        assert round(count(dino) / 1e6, 1) == 21.7 and round(count(resnet) / 1e6, 1) == 23.5
        assert dino(torch.empty(2, 3, 224, 224)).shape == (2, 1536)
        assert resnet(torch.empty(2, 3, 96, 96)).shape == (2, 2048)


def test_config_file_holds_the_defaults():
    assert parse_config(default_text("dvme"), DvmeConfig, "dvme.toml") == DvmeConfig()


def test_attention_is_that_of_timm():
    from timm.layers import Attention

    for dim, heads in ((12, 3), (1, 1)):
        theirs, ours = Attention(dim, num_heads=heads).double(), SelfAttention(dim, heads).double()
        ours.load_state_dict(theirs.state_dict())
        x = torch.randn(2, 5, dim, dtype=torch.float64)
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("tokens", ["scalar", "block", "none"])
def test_head_is_the_listing(tokens):
    torch.manual_seed(0)
    head = DVMEHead((3, 5, 2), 4, p=4, hidden=6, tokens=tokens).double().eval()
    parts = [torch.randn(7, dim, dtype=torch.float64) for dim in (3, 5, 2)]
    x = torch.cat([layer(part) for layer, part in zip(head.project, parts, strict=True)], 1)
    if tokens != "none":
        shaped = x.view(7, -1, 1) if tokens == "scalar" else x.view(7, 3, 4)
        q, k, v = head.attention.qkv(shaped).chunk(3, -1)
        weights = torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, -1)
        torch.testing.assert_close(head.attention.weights(shaped)[:, 0], weights)
        x = head.attention.proj(weights @ v).reshape(7, -1)
        found = head.attention_map(parts)
        assert found.shape == (3, 3)
        torch.testing.assert_close(found.sum(1), torch.ones(3, dtype=torch.float64))
        if tokens == "block":
            torch.testing.assert_close(found, weights.mean(0))
    else:
        with pytest.raises(GigamorphError, match="no attention"):
            head.attention_map(parts)
    hidden = head.classifier[1](head.classifier[0](nn.functional.layer_norm(x, (12,))))
    torch.testing.assert_close(head(parts), head.classifier[3](hidden), rtol=1e-12, atol=1e-12)


def test_without_attention_the_order_of_extractors_is_one_of_weights_only():
    torch.manual_seed(0)
    head = DVMEHead((3, 5), 4, p=4, hidden=6, tokens="none").double().eval()
    turned = DVMEHead((5, 3), 4, p=4, hidden=6, tokens="none").double().eval()
    turned.project[0], turned.project[1] = head.project[1], head.project[0]
    turned.classifier = head.classifier
    weight = torch.cat(head.classifier[0].weight.split(4, 1)[::-1], 1)
    parts = [torch.randn(7, dim, dtype=torch.float64) for dim in (3, 5)]
    want = head(parts)
    head.classifier[0].weight = nn.Parameter(weight)
    torch.testing.assert_close(turned(parts[::-1]), want, rtol=1e-12, atol=1e-12)


def test_heads_that_tokens_do_not_allow_are_refused():
    with pytest.raises(GigamorphError, match="tokens of 1 value cannot be split among 8 heads"):
        DVMEHead((3, 3), 2, heads=8)
    with pytest.raises(GigamorphError, match="unknown tokens 'rows'"):
        DVMEHead((3, 3), 2, tokens="rows")


# -------------------------------------------------------------------------------------------------------- extractors


def test_last_linear_layer_is_cut_off():
    extractor = make_extractor("resnet18", 1)
    extractor.eval()
    x = torch.randn(2, 1, 40, 32)
    maps = nn.Sequential(*list(extractor.network.children())[:-2])(x)
    torch.testing.assert_close(extractor(x), maps.mean((2, 3)))
    with pytest.raises(GigamorphError, match="no blocks"):
        make_extractor("resnet18", 1, blocks=4)


def test_class_tokens_of_the_last_blocks():
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=2, img_size=32, depth=3).eval()
    tokens = []
    for block in vit.blocks:
        block.register_forward_hook(lambda m, i, out: tokens.append(vit.norm(out)[:, 0]))
    found = Extractor(vit, 2)(torch.randn(2, 3, 32, 32))
    torch.testing.assert_close(found, torch.cat(tokens[1:], 1))


# ---------------------------------------------------------------------------------------------------------- subsets


def test_subsets_are_balanced_nested_and_repeatable():
    labels = [0] * 30 + [1] * 12 + [2] * 3
    for fold in range(3):
        small, large = (draw_subset(labels, 3, size, fold, 7) for size in (7, 20))
        assert [sum(labels[i] == c for i in small) for c in range(3)] == [3, 2, 2]
        assert [sum(labels[i] == c for i in large) for c in range(3)] == [7, 7, 6]
        assert set(small) <= set(large) and len({i for i in large if labels[i] < 2}) == 14
        assert {i for i in large if labels[i] == 2} == {42, 43, 44}  # all of the rare class, twice
        assert draw_subset(labels, 3, 20, fold, 7) == large
    assert draw_subset(labels, 3, 20, 0, 7) != draw_subset(labels, 3, 20, 1, 7)
    assert draw_subset(labels, 3, 0, 1, 7) == list(range(45))
    with pytest.raises(DataError, match="class 3 has no training images"):
        draw_subset(labels, 4, 8, 0, 0)
    with pytest.raises(DataError, match="is too small for 3 classes"):
        draw_subset(labels, 3, 2, 0, 0)


def test_measures_are_those_of_scikit_learn():
    labels = torch.tensor([0, 1, 2, 2])
    logits = torch.tensor([[0.9, 0.3, 0], [0, 0.8, 0.2], [0.1, 0, 0.7], [0, 0.6, 0.5]])
    kappa = cohen_kappa_score(labels, logits.argmax(1), weights="quadratic")
    assert measure("kappa", 3)(labels, logits) == pytest.approx(kappa, abs=1e-12)
    auc = roc_auc_score(labels, torch.softmax(logits.double(), 1), multi_class="ovr")
    assert measure("auc", 3)(labels, logits) == pytest.approx(auc, abs=1e-12)
    assert measure("auc", 2)(torch.tensor([0, 1]), torch.tensor([[0.0, 300.0], [0.0, 301.0]])) == 1  # not saturated


def test_rate_falls_and_training_ends_without_a_better_score(tmp_path):
    scores = iter([0.5, 0.6, 0.6, 0.55, 0.5, 0.4, 0.7, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1])
    task = TensorTask(nn.Linear(2, 2), torch.randn(4, 2), torch.tensor([0, 1, 0, 1]))
    task.score = lambda: next(scores)
    stage = Stage("linear", 50, 1e-3, plateau=DvmeConfig().plateau, patience=DvmeConfig().patience, batch_size=4)
    trained = run_stages(task, [stage], Run(tmp_path))
    assert [row["lr"] for row in trained.rows] == pytest.approx([1e-3] * 12 + [1e-4] * 5)
    assert len(trained.rows) == 17 and trained.best_epoch == 7


# -------------------------------------------------------------------------------------------------------- the recipe


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    records = []
    for index in range(16):
        path = folder / f"{index}.npy"
        values = rng.random((40, 30)) * 0.5
        values[10:20, 10:20] += 0.4 * (index % 2)
        np.save(path, values.astype(np.float32))
        records.append(Record(path, index % 2, f"P{index}", ("train", "train", "val", "test")[index // 4]))
    return write_table(folder / "table.csv", records, ["0", "1"])


def test_killed_and_resumed_is_bitwise_the_uninterrupted_run(table, tmp_path, monkeypatch):
    protocols = ("linear", "dvme", "no_attention", "finetune", "finetune_dvme")
    small = tuple(
        ExtractorConfig(name, "lesionnet?stages=1") for name in "ab"
    )  # checkpoints of all trainings are written twice
    config = replace(
        SMALL,
        extractors=small,
        protocols=protocols,
        subsets=(0,),
        folds=1,
        transformers=("b",),
        transformer_batch=2,
    )
    whole = train(table, config, Run(tmp_path / "whole", seed=3))
    trainings = {(r["subset"], r["protocol"], r["extractor"]) for r in whole["rows"]}
    assert len(trainings) == len(whole["rows"]) == 2 + 1 + 1 + 2 + 1
    loss, calls = (ClassifierTask.loss, TensorTask.loss), []

    def killed(number):
        def call(self, batch):
            calls.append(number)
            if calls.count(number) == (9, 11)[number] and len(calls) < 40:
                raise RuntimeError("killed")
            return loss[number](self, batch)

        return call

    monkeypatch.setattr(ClassifierTask, "loss", killed(0))
    monkeypatch.setattr(TensorTask, "loss", killed(1))
    for resume in (False, True):
        with pytest.raises(RuntimeError, match="killed"):
            train(table, config, Run(tmp_path / "cut", seed=3, resume=resume))
    resumed = train(table, config, Run(tmp_path / "cut", seed=3, resume=True))
    assert resumed == whole == json.loads((tmp_path / "cut" / "metrics.json").read_text())
    files = sorted(p.relative_to(tmp_path / "whole") for p in (tmp_path / "whole").rglob("best.ckpt"))
    assert len(files) == len(trainings)
    for file in files:
        first, second = (torch.load(tmp_path / run / file, weights_only=True)["state_dict"] for run in ("whole", "cut"))
        assert all(torch.equal(value, second[name]) for name, value in first.items())
    place = tmp_path / "whole" / folder("finetune_dvme", "all", 0, 0) / "best.ckpt"
    opened = open_classifier(place, memory_budget=None, device="cpu")
    source = opened.open_images(read_table(table).records)[0]["image"]
    assert opened.classes == ["0", "1"] and source.shape == (1, 32, 24)
    assert opened.net.eval()(source).isfinite().all()
    with pytest.raises(DataError, match="does not classify whole images"):
        open_classifier(place.parents[3] / "linear" / "a" / "all_0" / "best.ckpt", memory_budget=None, device="cpu")


def test_linear_evaluation_leaves_extractors_as_they_are(table, tmp_path, monkeypatch):
    made = []

    def remember(*args, **kwargs):
        made.append(make_extractor(*args, **kwargs))
        made.append({k: v.clone() for k, v in made[-1].state_dict().items()})
        return made[-2]

    monkeypatch.setattr(sys.modules["gigamorph.engine.mammography.recipes.dvme.train"], "make_extractor", remember)
    found = train(table, replace(SMALL, folds=2), Run(tmp_path))
    for extractor, before in zip(made[::2], made[1::2], strict=True):
        assert all(torch.equal(value, before[name]) for name, value in extractor.state_dict().items())
    assert {r["folds"] for r in found["summary"]} == {2}
    assert np.allclose(np.sum(found["attention"]["rows_attend_to_columns"], 1), 1)
    [card] = tmp_path.rglob("model_card.md")
    assert "| test | image |" in card.read_text() and str(tmp_path) not in card.read_text()
    cases = read_cases(card.parent / "test.csv")
    [row] = [
        row
        for row in found["rows"]
        if row["protocol"] == "dvme" and card.parent == tmp_path / folder("dvme", "all", row["subset"], row["fold"])
    ]
    assert auc(cases.truth[:, 0], cases.scores[:, 0]) == pytest.approx(row["test"], abs=1e-12)


def test_native_resolution_within_a_budget(table, tmp_path):
    own = SMALL.extractors[1:]
    config = replace(SMALL, extractors=own, resize=(), protocols=("finetune",), subsets=(4,), folds=1, epochs=1)
    assert len(train(table, config, Run(tmp_path, memory_budget=2**29))["rows"]) == 1


def test_two_steps_on_real_images(real_data, tmp_path):
    paths = [*sorted((real_data / "dicom").glob("mg_*.dcm"))[:2], real_data / "nih_chest_xray.png"]
    records = []
    for number, split in enumerate(("train", "val", "test")):
        for label, path in enumerate(paths[:2]):
            copy = tmp_path / f"{split}{label}{path.suffix}"
            shutil.copyfile(path, copy)
            records.append(Record(copy, label, f"P{number}{label}", split))
    table = write_table(tmp_path / "real.csv", records, ["0", "1"])
    own = (ExtractorConfig("r", "timm:test_resnet"), ExtractorConfig("v", "timm:vit_tiny_patch16_224", blocks=4))
    config = replace(DvmeConfig(), extractors=own, subsets=(2,), folds=1, epochs=2, protocols=("linear", "dvme"))
    metrics = train(table, config, Run(tmp_path / "run"))
    assert [row["extractor"] for row in metrics["rows"]] == ["r", "v", "all"]
    assert len((tmp_path / "run" / "dvme" / "all" / "2_0" / "log.csv").read_text().splitlines()) == 3


def test_bad_input_is_told_in_one_line(table, tmp_path):
    text = table.read_text()

    def refused(message, text=text, error=DataError, config=SMALL, **settings):
        bad = table.parent / "bad.csv"
        bad.write_text(text)
        with pytest.raises(error, match=message) as caught:
            train(bad, config, Run(tmp_path / "bad", **settings))
        assert "\n" not in str(caught.value)

    refused("patient P0 is in train and test", text.replace("P12,test", "P0,test"))
    lines = text.splitlines()
    refused("class 1 has no training images", "\n".join(x.replace(",1,", ",0,") if ",train" in x else x for x in lines))
    one = "\n".join(x.replace(",1,", ",0,") if ",val" in x else x for x in lines)
    refused("split val has images of only one class", one)
    named = text.replace(",0,", ",high,").replace(",1,", ",low,").replace(",low,", ",mid,", 1)
    refused("needs an order, which the names high, low, mid do not show", named, config=replace(SMALL, metric="kappa"))
    assert not (tmp_path / "bad").exists()
    wild = replace(SMALL, lr=1e30)
    refused("stage '(linear|dvme)', epoch .*: the (loss|gradient|score) is", error=GigamorphError, config=wild)
    assert list((tmp_path / "bad" / "embeddings").rglob("*.npy"))
    refused("was begun with lr = .* in its configuration, not 0.001", error=GigamorphError, resume=True)
    missing = replace(SMALL, extractors=(ExtractorConfig("a", "resnet18", "none.pth"),))
    with pytest.raises(GigamorphError, match=r"weights 'none.pth': no such file; use another"):
        train(table, missing, Run(tmp_path / "other"))
