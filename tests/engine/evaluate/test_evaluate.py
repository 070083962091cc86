"""What an evaluation holds as a whole, and the files that it is written to."""

import json
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from gigamorph import DataError
from gigamorph.engine.evaluate import odds
from gigamorph.engine.evaluate.cases import Cases
from gigamorph.engine.evaluate.evaluate import Settings, at_levels, evaluate
from gigamorph.engine.evaluate.froc import Marked
from gigamorph.engine.evaluate.report import headline, write_report


def exams(seed=0, patients=30, **more) -> Cases:
    """Two views of two breasts each."""
    random = np.random.default_rng(seed)
    n = 4 * patients
    labels = np.repeat(random.random(2 * patients) < 0.3, 2)
    return Cases(
        outputs=("cancer",),
        truth=labels[:, None].astype(float),
        scores=(2 * random.normal(size=n) + 2 * labels)[:, None],
        names=tuple(f"i{k}" for k in range(n)),
        patients=tuple(f"Secret-Patient-{k // 4}" for k in range(n)),
        exams=("",) * n,
        sides=tuple("LLRR"[k % 4] for k in range(n)),
        columns={"view": tuple(("CC", "MLO")[k % 2] for k in range(n))},
        **more,
    )


FEW = Settings(resamples=50)


def test_each_level_states_its_rule_and_is_the_area_of_its_rows():
    images = exams()
    found = evaluate(images, FEW)
    assert list(found["levels"]) == ["image", "breast", "exam"]
    for level, one in found["levels"].items():
        cases = images.at(level)
        assert one["rows"] == len(cases) == {"image": 120, "breast": 60, "exam": 30}[level] and one["patients"] == 30
        area = one["outputs"]["cancer"]["auc"]
        assert area["value"] == pytest.approx(roc_auc_score(cases.truth[:, 0], cases.scores[:, 0]), abs=1e-12)
        assert area["bootstrap"][0] <= area["value"] <= area["bootstrap"][1]
    assert "mean probability of a breast's views" in found["levels"]["breast"]["rule"]


def test_levels_that_change_nothing_are_left_out():
    images = exams()
    assert list(at_levels(images.where(np.arange(0, 120, 4)))) == ["image"]
    assert list(at_levels(images.where(np.arange(0, 120, 2)))) == ["image", "exam"]
    assert list(at_levels(images.at("breast"))) == ["breast"]


def test_a_threshold_given_is_told_what_comes_of_it():
    images = exams()
    found = evaluate(images, Settings(levels=("image",), threshold=0.8, resamples=50))["levels"]["image"]
    called, truth = images.scores[:, 0] >= np.log(4), images.truth[:, 0] > 0
    at = {name: measure["value"] for name, measure in found["outputs"]["cancer"]["at_threshold"].items()}
    assert at["sensitivity"] == pytest.approx(called[truth].mean())
    assert at["specificity"] == pytest.approx((~called)[~truth].mean())
    assert at["positive_predictive_value"] == pytest.approx(truth[called].mean())
    assert at["negative_predictive_value"] == pytest.approx((~truth)[~called].mean())
    assert at["called"] == pytest.approx(called.mean())
    for unknown in (Settings(threshold=np.nan), Settings(log_odds=np.nan)):
        with pytest.raises(DataError, match="not a number"):
            evaluate(images, unknown)
    with pytest.raises(DataError, match="between 0 and 1, not 3"):
        evaluate(images, Settings(threshold=3, resamples=5))


def test_all_of_a_class_may_be_asked_for():
    """Sensitivity without a false alarm; there is no area over so narrow a range."""
    images = exams()
    found = evaluate(images, Settings(levels=("image",), rates=(1.0,), resamples=20))["levels"]["image"]["outputs"]
    [point] = found["cancer"]["sensitivity_at_specificity"]
    highest = images.scores[images.truth == 0].max()
    assert point["value"] == pytest.approx((images.scores[images.truth == 1] > highest).mean())
    assert found["cancer"]["partial_auc"] == []


def test_subgroups_without_a_threshold_have_areas_only():
    """The highest score is a negative's: no threshold reaches the specificity."""
    images = exams()
    scores = np.where(images.truth > 0, 0.0, 1.0)
    found = evaluate(
        Cases(**{**vars(images), "scores": scores}), Settings(levels=("image",), by=("view",), resamples=20)
    )
    part = found["levels"]["image"]["subgroups"]["view"]["cancer"]
    assert part["threshold"] is None and [row["auc"]["value"] for row in part["rows"]] == [0, 0]
    assert "sensitivity" not in part["rows"][0]


def test_nothing_to_measure_is_an_error():
    images = exams()
    with pytest.raises(DataError, match=r"one class only: all .* images are negative; nothing can be measured"):
        evaluate(images.where(images.truth[:, 0] == 0), FEW)
    # Every exam has a lesion: of exams nothing can be told, of images all.
    everyone = Cases(**{**vars(images), "truth": (np.arange(120) % 4 == 0)[:, None].astype(float)})
    found = evaluate(everyone, FEW)["levels"]
    assert "undefined" in found["exam"]["outputs"]["cancer"] and "auc" in found["image"]["outputs"]["cancer"]
    unknown = Cases(**{**vars(images), "truth": np.full((120, 1), np.nan)})
    with pytest.raises(DataError, match="no image has a label"):
        evaluate(unknown, FEW)


@pytest.mark.parametrize("kind", ["binary", "classes", "labels"])
def test_files(tmp_path, kind):
    images = exams()
    if kind != "binary":
        random = np.random.default_rng(1)
        truth = np.eye(3)[random.integers(0, 3, 120)]
        if kind == "labels":
            truth[:, 1] = 0  # one class only: said, and left out of the mean
            truth[:9, 0] = np.nan
        values = {"outputs": ("a", "b", "c"), "truth": truth, "scores": random.normal(size=(120, 3)), "kind": kind}
        images = Cases(**{**vars(images), **values})
    mark = Marked("p", np.array([[0.0, 9, 0, 9]]), np.array([[5.0, 5], [20, 20]]), np.array([1.0, 2]))
    settings = Settings(levels=("breast",), resamples=50, by=("view",) if kind == "binary" else ())
    found = evaluate(images, settings, other=Cases(**{**vars(images), "scores": -images.scores}), marked=[mark])
    page = write_report(tmp_path, images, found).read_text()
    assert json.loads((tmp_path / "metrics.json").read_text()) == json.loads(json.dumps(found))
    pictures = sorted(path.name for path in tmp_path.glob("*.png"))
    assert {"breast_curves.png", "froc.png"} <= set(pictures) and page.count("data:image/png;base64,") == len(pictures)
    # It holds all it shows, and no patient.
    text = re.sub(r"base64,[^\"]*", "", page)
    assert "http" not in text and "nan" not in text.lower() and text.count("src=") == text.count('src="data:image/png;')
    assert "Secret" not in page and "Secret" not in (tmp_path / "metrics.json").read_text()
    lines = headline(found)
    if kind == "binary":
        area = found["levels"]["breast"]["outputs"]["cancer"]["auc"]["value"]
        assert lines[0].startswith(f"breast level: AUC {area:.3f} (")
        assert page.index(f"{area:.3f}") < page.index("<img")  # first what matters
        told = " ".join(re.sub(r"<[^>]*>", " ", text).split())
        for what, fixed in (("sensitivity", "specificity"), ("specificity", "sensitivity")):
            for point in found["levels"]["breast"]["outputs"]["cancer"][f"{what}_at_{fixed}"]:
                assert f"{what} at {fixed} {point['at']:g} {point['value']:.3f}" in told
    if kind == "labels":
        assert any("b: one class only" in line for line in lines)
        assert found["levels"]["breast"]["mean_auc"]["left_out"] == ["b"] and "mean without b" in page
    if kind == "classes":
        assert "kappa" in found["levels"]["breast"] and "Quadratic weighted kappa" in page


@settings(max_examples=25)
@given(st.integers(0, 2**32 - 1), st.sampled_from(["binary", "classes", "labels"]), st.integers(1, 12), st.booleans())
def test_whatever_the_rows_are_there_are_plain_values_or_one_line(seed, kind, n, probable):
    random = np.random.default_rng(seed)
    outputs = ("a",) if kind == "binary" else ("a", "b", "c")
    truth = random.integers(0, 2, (n, len(outputs))).astype(float)
    if kind == "classes":
        truth = np.eye(3)[random.integers(0, 3, n)]
    truth[random.random(n) < 0.3] = np.nan
    ends = [-np.inf, np.inf] if probable else [-9e9, 9e9]
    scores = random.choice([*ends, -800.0, -1.0, 0.0, 0.5, 40.0, 50.0], (n, len(outputs)))
    cases = Cases(
        outputs=outputs,
        truth=truth,
        scores=scores,
        names=tuple(map(str, range(n))),
        patients=tuple(random.choice(["", "p", "q", "r"], n).tolist()),
        exams=tuple(random.choice(["", "e"], n).tolist()),
        sides=tuple(random.choice(["", "L", "R"], n).tolist()),
        kind=kind,
        probable=probable,
        columns={"age": tuple(random.choice(["", "40", "55.5"], n).tolist())},
    )
    given_ = Settings(levels=("image", "breast", "exam"), threshold=0.5, by=("age",), resamples=5)
    try:
        found = evaluate(cases, given_, other=Cases(**{**vars(cases), "scores": scores[::-1]}))
    except DataError as error:
        told = ("nothing can be measured", "no image with a label in common")
        assert any(text in str(error) for text in told) and "\n" not in str(error)
    else:
        json.dumps(found, allow_nan=False)
        assert len(headline(found)) >= 3


def test_rows_without_a_patient_are_told(tmp_path):
    images = exams()
    for known, text in (
        (0, "patients unknown, so intervals treat each row as one"),
        (100, "25 patients and 20 rows without one, each treated as one"),
    ):
        patients = images.patients[:known] + ("",) * (120 - known)
        some = Cases(**{**vars(images), "patients": patients})
        found = evaluate(some, Settings(levels=("image",), resamples=20))
        one = found["levels"]["image"]
        assert (one["patients"], one["rows_without_patient"]) == (known // 4, 120 - known)
        assert text in headline(found)[0]
        assert text[1:] in write_report(tmp_path / str(known), some, found).read_text()


def test_one_patient_has_no_interval_but_a_reason(tmp_path):
    images = Cases(**{**vars(exams()), "patients": ("p",) * 120})
    found = evaluate(images, Settings(levels=("image",), resamples=20))
    measure = found["levels"]["image"]["outputs"]["cancer"]["auc"]
    assert measure["bootstrap"] is None and measure["standard_error"] is None
    assert "all rows are of one patient" in headline(found)[0]
    page = write_report(tmp_path, images, found).read_text()
    assert "Output cancer: no interval: all rows are of one patient." in page


def test_grouping_many_images_takes_no_loop_over_breasts():
    """The mean of groups is that of each."""
    random = np.random.default_rng(0)
    values = random.normal(size=(30, 2)) * 50
    values[3:5] = np.inf
    values[7] = -np.inf
    starts = np.array([0, 3, 5, 8, 29])
    parts = np.split(values, starts[1:])
    np.testing.assert_allclose(odds.means(values, starts), [odds.mean(part) for part in parts], rtol=1e-12)


@pytest.mark.parametrize("change", [{"truth": np.full((120, 1), 2.0)}, {"patients": ("p",)}, {"scores": np.ones(120)}])
def test_cases_that_do_not_fit_are_refused(change):
    with pytest.raises(DataError):
        Cases(**{**vars(exams()), **change})
