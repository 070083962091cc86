"""Classes are known by their names, wherever their columns are."""

import csv
import itertools
import json

import numpy as np
import pytest
from commands import run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.special import logit

from gigamorph import DataError
from gigamorph.engine.evaluate.class_names import positive_of
from gigamorph.engine.evaluate.compare import compare
from gigamorph.engine.evaluate.evaluate import Settings, evaluate
from gigamorph.engine.evaluate.read import read_cases, write_cases


def write(path, header, rows):
    with path.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([header, *rows])
    return path


@pytest.mark.parametrize(
    "pair",
    [
        "benign malignant",
        "normal Cancer",
        "0 1",
        "not_mass mass",
        "other cancer",
        "no yes",
        "Nein Ja",
        "gutartig Bösartig",
    ],
)
def test_the_positive_class_is_told_by_its_name(pair):
    names = pair.split()
    assert positive_of(names) == positive_of(names[::-1]) == names[1]


@pytest.mark.parametrize("pair", ["a b", "1 2", "normal benign", "cancer malignant", "left right"])
def test_names_that_do_not_tell(pair):
    names = pair.split()
    assert positive_of(names) is positive_of(names[::-1]) is None


@pytest.mark.parametrize("labels", [("0", "1"), ("benign", "malignant")])
def test_exchanged_columns_are_the_same_predictions(tmp_path, labels):
    """Of labels that were numbers the AUC of exchanged columns was 1 - AUC."""
    values = [("a", labels[0], 0.8, 0.2), ("b", labels[1], 0.3, 0.7), ("c", labels[0], 0.4, 0.6)]
    first = write(tmp_path / "x.csv", ["image_path", "label", "p_benign", "p_malignant"], values)
    second = write(
        tmp_path / "y.csv", ["p_malignant", "p_benign", "label", "image_path"], [row[::-1] for row in values]
    )
    cases = [read_cases(path) for path in (first, second)]
    for one in cases:
        assert one.outputs == ("malignant",) and one.truth[:, 0].tolist() == [0, 1, 0]
        np.testing.assert_allclose(one.scores[:, 0], logit([0.2, 0.7, 0.6]))


def test_where_names_do_not_tell_the_score_is_asked_for(tmp_path, capsys):
    rows = [(f"{n}.png", "ab"[n % 2], 0.1 * n, 1 - 0.1 * n) for n in range(8)]
    path = write(tmp_path / "p.csv", ["image_path", "label", "p_a", "p_b"], rows)
    assert run("eval", path, "--out", tmp_path / "out", "--resamples", 5) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "a and b" in error and "--score p_b" in error and "--score p_a" in error
    assert run("eval", path, "--score", "p_a", "--out", tmp_path / "out", "--resamples", 5) == 0
    found = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert found["outputs"] == ["a"] and found["levels"]["image"]["outputs"]["a"]["positives"] == 4
    cases = read_cases(path, score="p_a")
    assert cases.truth[:, 0].tolist() == [1, 0] * 4
    np.testing.assert_allclose(cases.scores[:, 0], logit([row[2] for row in rows]))


def test_a_column_of_truth_beside_a_column_of_score_is_known_by_the_classes(tmp_path):
    """The name of the truth's column was taken for that of the scored class, and all labels for the other one."""
    rows = [(n, n % 2, ["cancer", "normal"][n % 2], (n + 1) % 2, 0.1 * n, 1 - 0.1 * n, 0.1 * n) for n in range(4)]
    header = "image_path truth named label_0 p_0 p_1 p_cancer".split()
    path = write(tmp_path / "p.csv", header, rows)
    for label, score, wanted in [
        ("truth", "p_1", [0, 1, 0, 1]),
        ("truth", "p_0", [1, 0, 1, 0]),
        ("label_0", "p_0", [1, 0, 1, 0]),
        (None, "p_0", [1, 0, 1, 0]),
    ]:
        assert read_cases(path, label=label, score=score).truth[:, 0].tolist() == wanted, (label, score)
    path = write(tmp_path / "q.csv", [*header, "p_normal"], [(*row, 1 - row[-1]) for row in rows])
    assert read_cases(path, label="named", score="p_cancer").truth[:, 0].tolist() == [1, 0, 1, 0]


def test_the_note_of_a_prediction_tells_the_order_of_the_training(tmp_path):
    rows = [("x.png", "b", 0.1, 0.9), ("y.png", "a", 0.7, 0.3)]
    path = write(tmp_path / "predictions.csv", ["image_path", "label", "p_b", "p_a"], rows)
    path.with_suffix(".json").write_text('{"classes": ["a", "b"]}')
    cases = read_cases(path)
    assert cases.outputs == ("b",) and cases.truth[:, 0].tolist() == [1, 0]
    named = write(
        tmp_path / "predictions.csv", ["image_path", "label", "p_cancer", "p_normal"], [("x", "normal", 0.1, 0.9)]
    )
    named.with_suffix(".json").write_text('{"classes": ["cancer", "normal"]}')  # as sorted names are numbered
    assert read_cases(named).outputs == ("cancer",) and read_cases(named).truth[0, 0] == 0


def test_numbers_are_not_the_names_of_several_classes(tmp_path):
    path = write(tmp_path / "p.csv", ["image_path", "label", "p_low", "p_mid", "p_high"], [("x", 1, 0.2, 0.5, 0.3)])
    with pytest.raises(DataError, match=r"line 2: label '1' must be one of high, low, mid"):
        read_cases(path)


def test_classes_without_an_order_have_no_weighted_kappa(tmp_path):
    rows = [(n, ("low", "mid", "high")[n % 3], 0.2, 0.5, 0.3) for n in range(9)]
    path = write(tmp_path / "p.csv", ["image_path", "label", "p_low", "p_mid", "p_high"], rows)
    image = Settings(levels=("image",), resamples=5)
    kappa = evaluate(read_cases(path), image)["levels"]["image"]["kappa"]
    assert kappa["value"] is None and "order" in kappa["why"]
    path.with_suffix(".json").write_text('{"classes": ["low", "mid", "high"]}')
    cases = read_cases(path)
    assert cases.outputs == ("low", "mid", "high") and evaluate(cases, image)["levels"]["image"]["kappa"]["value"] == 0


SEVERAL = {
    "binary": ["p_benign", "p_malignant"],
    "classes": ["p_0", "p_1", "p_2"],
    "named": ["p_x", "p_y", "p_z"],
    "labels": ["p_mass", "p_calc"],
}


@st.composite
def tables(draw):
    kind = draw(st.sampled_from(list(SEVERAL)))
    columns = SEVERAL[kind]
    names = [column[2:] for column in columns]
    truth = ["label_mass", "label_calc"] if kind == "labels" else ["label"]
    header = ["image_path", "patient_id", "laterality", *truth, *columns]
    rows = []
    for n in range(draw(st.integers(6, 12))):
        weights = [draw(st.integers(1, 9)) for _ in columns]
        known = [draw(st.sampled_from("01")) for _ in truth] if kind == "labels" else [draw(st.sampled_from(names))]
        rows.append([f"{n}.png", f"p{n // 3}", "LR"[n % 2], *known, *(w / sum(weights) for w in weights)])
    columns_as, rows_as = draw(st.permutations(range(len(header)))), draw(st.permutations(range(len(rows))))
    return header, rows, columns_as, rows_as


def measures(found):
    """All numbers of a report, by where they are."""
    if isinstance(found, dict):
        return {(key, *rest): value for key, one in found.items() for rest, value in measures(one).items()}
    if isinstance(found, list):
        return {(n, *rest): value for n, one in enumerate(found) for rest, value in measures(one).items()}
    return {(): found}


@given(tables())
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_order_of_columns_and_rows_changes_no_measure(tmp_path, table):
    header, rows, columns_as, rows_as = table
    before = read_cases(write(tmp_path / "x.csv", header, rows))
    other = [[rows[r][c] for c in columns_as] for r in rows_as]
    after = read_cases(write(tmp_path / "y.csv", [header[c] for c in columns_as], other))
    few = Settings(resamples=20)
    try:
        first = measures(evaluate(before, few))
    except DataError as error:
        with pytest.raises(DataError) as same:
            evaluate(after, few)
        assert str(same.value) == str(error)
        return
    second = measures(evaluate(after, few))
    order = [key for key in first if key[0] == "outputs"]
    assert {key: value for key, value in second.items() if key[0] != "outputs"} == {
        key: value if not isinstance(value, float) else pytest.approx(value, abs=1e-12)
        for key, value in first.items()
        if key not in order
    }
    compared = compare(before, after, count=5)
    assert all(compared[name].get("difference", 0) == 0 for name in before.outputs)


def test_predictions_that_are_written_and_read_keep_their_classes(tmp_path):
    rows = [(f"{n}.png", "xyz"[n % 3], 0.2, 0.5, 0.3) for n in range(4)]
    for header in itertools.permutations(["p_x", "p_y", "p_z"]):
        cases = read_cases(write(tmp_path / "p.csv", ["image_path", "label", *header], rows))
        back = read_cases(write_cases(tmp_path / "q.csv", cases))
        assert back.outputs == cases.outputs == ("x", "y", "z")
        np.testing.assert_array_equal(back.truth, cases.truth)
        assert [line.split(",")[4] for line in (tmp_path / "q.csv").read_text().splitlines()[1:]] == list("xyzx")


GRADES = ["normal", "benign", "cancer"]


def graded(folder, note=None):
    """Predictions of which one is two grades off, and another one grade."""
    rows = [(n, GRADES[n % 3], *np.eye(3)[n % 3]) for n in range(9)]
    rows += [(9, "normal", 0, 0, 1), (10, "cancer", 0, 1, 0)]
    path = write(folder / "predictions.csv", ["image_path", "label", *(f"p_{name}" for name in GRADES)], rows)
    if note is not None:
        path.with_suffix(".json").write_text(json.dumps(note))
    return path


@pytest.mark.parametrize(
    ("note", "order"),
    [
        (None, None),
        ({"classes": sorted(GRADES)}, None),
        ({"classes": GRADES}, GRADES),
        ({"classes": sorted(GRADES), "ordered": True}, sorted(GRADES)),
    ],
)
def test_sorted_names_of_a_training_are_no_order(note, order, tmp_path, capsys):
    """An alphabet's order was taken for one of grades."""
    path, image = graded(tmp_path, note), Settings(levels=("image",), resamples=5)
    assert run("eval", path, "--out", tmp_path / "out", "--resamples", 5) == 0
    said, found = capsys.readouterr().out, json.loads((tmp_path / "out" / "metrics.json").read_text())
    if order is None:
        assert (
            "do not determine an order: no kappa, and breasts and exams take the last of benign, cancer, normal; state"
            in said
        )
        assert found["levels"]["image"]["kappa"]["value"] is None and found["ordered"] is False
    else:
        assert f"classes in the order {' < '.join(order)}\n" in said and found["ordered"] is True
    given = ["--classes", ",".join(GRADES)]
    assert run("eval", path, "--out", tmp_path / "stated", "--resamples", 5, *given) == 0
    assert "classes in the order normal < benign < cancer\n" in capsys.readouterr().out
    stated = json.loads((tmp_path / "stated" / "metrics.json").read_text())["levels"]["image"]["kappa"]["value"]
    grades = graded(tmp_path, {"classes": GRADES})
    assert stated == evaluate(read_cases(grades), image)["levels"]["image"]["kappa"]["value"]
    if order == sorted(GRADES):
        assert stated != found["levels"]["image"]["kappa"]["value"]


def test_an_order_of_other_classes_is_one_line(tmp_path):
    path = graded(tmp_path)
    with pytest.raises(DataError, match=r"has the classes benign, cancer, normal; list each once in --classes"):
        read_cases(path, classes=["normal", "benign", "benign"])
    two = write(tmp_path / "two.csv", ["image_path", "label", "p_0", "p_1"], [("x", 0, 0.6, 0.4)])
    with pytest.raises(DataError, match="does not have three or more classes; omit --classes"):
        read_cases(two, classes=["0", "1"])
