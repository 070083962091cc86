"""The model card tells what is known, and no patient and no path."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from markdown_it import MarkdownIt
from sklearn.metrics import roc_auc_score

from gigamorph.engine.datasets.tables import Record
from gigamorph.engine.evaluate.cases import Cases
from gigamorph.engine.train.card import Card, write_card


def records(split, count, **more):
    """Two images a patient, of one label."""
    paths = [Path(f"/secret/{split}{k}.dcm") for k in range(count)]
    return [Record(path, k // 2 % 2, f"Secret-{split}-{k // 2}", split, **more) for k, path in enumerate(paths)]


def predicted(of) -> Cases:
    random = np.random.default_rng(0)
    labels = np.array([record.label for record in of])
    return Cases(
        outputs=("malignant",),
        truth=labels[:, None].astype(float),
        scores=(random.normal(size=len(of)) + labels)[:, None],
        names=tuple(str(record.path) for record in of),
        patients=tuple(record.patient_id for record in of),
        exams=("",) * len(of),
        sides=("",) * len(of),
    )


def card(**more) -> Card:
    test = records("test", 40, view="CC", density="B")
    values = {
        "title": "resnet18 for benign and malignant",
        "model": {"architecture": "resnet18"},
        "training": {"lr": 0.001},
        "records": {"train": records("train", 6, view="MLO"), "val": [], "test": test},
        "classes": ("benign", "malignant"),
        "predictions": {"test": predicted(test)},
        "resamples": 200,
    }
    return Card(**(values | more))


def test_counts_figures_and_limits(tmp_path):
    text = write_card(tmp_path / "card.md", card()).read_text()
    assert "| train | 6 | 3 | 4 | 2 |" in text and "| test | 40 | 20 | 20 | 20 |" in text
    assert "- view: CC 40, MLO 6" in text and "- density: B 40, unknown 6" in text
    cases = card().predictions["test"]
    area = roc_auc_score(cases.truth[:, 0], cases.scores[:, 0])
    assert f"| test | image | malignant | 40 | 20 | {area:.3f} (" in text and "| test | exam |" in text
    assert "Tested on 20 patients" in text and "Performance by manufacturer is unknown" in text
    assert "- lr: 0.001" in text and "- torch: " in text
    assert "Secret" not in text and "/secret" not in text and ".dcm" not in text


def test_what_was_not_measured_is_said(tmp_path):
    one = records("test", 2)
    told = card(records={"train": one, "test": one}, predictions={"test": predicted(one)})
    text = write_card(tmp_path / "a.md", told)
    assert "test: one class only: all 2 images are negative" in text.read_text()
    text = write_card(tmp_path / "b.md", card(records={"train": one}, predictions={})).read_text()
    assert "No images were held out" in text and "Not tested" in text


@pytest.mark.parametrize("kind", ["classes", "labels"])
def test_several_outputs_have_a_row_each_and_a_mean(tmp_path, kind):
    test = records("test", 30)
    truth = np.eye(3)[np.arange(30) % 3]
    scores = np.random.default_rng(0).normal(size=(30, 3))
    base = predicted(test)
    cases = Cases(**{**vars(base), "truth": truth, "scores": scores, "outputs": ("a", "b", "c"), "kind": kind})
    text = write_card(tmp_path / "card.md", card(predictions={"test": cases})).read_text()
    if kind == "labels":
        many = [Record(Path("x"), -1, str(k), labels={"a": 1.0, "b": float(k % 2)}) for k in range(5)]
        told = card(records={"test": many}, classes=("a", "b", "c"), predictions={})
        assert "| test | 5 | 5 | 5 | 2 | 0 |" in write_card(tmp_path / "labels.md", told).read_text()
    assert text.count("| test | image |") == 4 and "| test | image | mean | 30 |" in text


def test_two_images_have_no_interval_but_a_reason(tmp_path):
    """Perfectly ranked, as one positive and one negative often are."""
    two = [Record(Path(f"/secret/{k}.dcm"), k, f"Secret-{k}", "test") for k in (0, 1)]
    cases = predicted(two)
    cases = Cases(**{**vars(cases), "scores": np.array([[-2.0], [2.0]])})
    text = write_card(tmp_path / "card.md", card(records={"test": two}, predictions={"test": cases})).read_text()
    assert "| 1.000 |" in text and "1.000 (1.000" not in text
    assert "- test, image, malignant: AUC with no interval: " in text
    nobody = Cases(**{**vars(cases), "patients": ("", "")})
    text = write_card(tmp_path / "other.md", card(records={"test": two}, predictions={"test": nobody})).read_text()
    assert "- test, image: 2 rows without a patient count as one each" in text


HOSTILE = "<img src=x onerror=alert(1)>\n# No heading\n[a](javascript:alert(1)) | `y` **z** &lt; __init__ \\[b](c)"


def test_names_are_text_in_markdown(tmp_path):
    """A renderer shows them as they are, and makes nothing of them."""
    test = records("test", 40, view=HOSTILE)
    made = card(
        title=HOSTILE,
        model={"architecture": HOSTILE, HOSTILE: 1},
        classes=("benign", HOSTILE),
        records={"test": test},
        predictions={"test": replace(predicted(test), outputs=(HOSTILE,))},
        pictures=[f"- {HOSTILE}"],
    )
    text = write_card(tmp_path / "card.md", made).read_text()
    tokens = MarkdownIt("commonmark").enable("table").parse(text)
    flat = [one for token in tokens for one in (token, *(token.children or ()))]
    assert {one.type for one in flat if one.level and not one.type.startswith(("t", "paragraph", "list"))} <= {"inline"}
    shown = ["".join(one.content for one in token.children) for token in tokens if token.type == "inline"]
    assert sum(" ".join(HOSTILE.splitlines()) in line for line in shown) >= 8
    assert sum(token.type == "heading_open" for token in tokens) == 8
