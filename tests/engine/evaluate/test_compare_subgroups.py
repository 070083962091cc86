"""Two predictions of the same rows; the same measures in parts of the rows."""

from dataclasses import replace

import numpy as np
import pytest

from gigamorph import DataError
from gigamorph.engine.evaluate import roc
from gigamorph.engine.evaluate.cases import Cases
from gigamorph.engine.evaluate.compare import compare
from gigamorph.engine.evaluate.evaluate import Settings, bands, evaluate, subgroups
from gigamorph.engine.evaluate.report import headline, write_report


@pytest.fixture
def cases() -> Cases:
    random = np.random.default_rng(0)
    labels = random.integers(0, 2, 120)
    return Cases(
        outputs=("cancer",),
        truth=labels[:, None].astype(float),
        scores=(random.normal(size=120) + labels)[:, None],
        names=tuple(f"i{n}" for n in range(120)),
        patients=tuple(f"p{n // 2}" for n in range(120)),
        exams=("",) * 120,
        sides=("",) * 120,
        columns={
            "density": tuple("ABCD"[n % 4] for n in range(120)),
            "age": tuple(str(30 + n % 50) for n in range(120)),
        },
    )


def test_comparison_pairs_by_name_and_tests_as_delong(cases):
    other = replace(cases, scores=cases.scores + np.random.default_rng(1).normal(size=(120, 1)))
    order = np.random.default_rng(2).permutation(120)[:100]
    found = compare(cases, other.where(order), count=500)
    kept = np.sort(order)
    expected = roc.paired_delong(cases.truth[kept, 0], cases.scores[kept, 0], other.scores[kept, 0])
    assert (found["rows"], found["left_out"]) == (100, 20)
    assert found["cancer"]["p"] == pytest.approx(expected.p) and found["cancer"]["second"] == expected.second
    low, high = found["cancer"]["bootstrap"]
    assert low < expected.difference < high
    assert (low, high) == pytest.approx(expected.interval, abs=0.04)


def test_a_comparison_tells_of_rows_that_are_in_one_prediction_only(cases, tmp_path):
    """Its area is another than that of all rows."""
    found = evaluate(cases, Settings(levels=("image",), resamples=20), other=cases.where(np.arange(100)))
    told = "cancer, compared (the 100 images in both; 20 are in one only): AUC"
    assert any(told in line for line in headline(found))
    assert "cancer (the 100 images in both; 20 are in one only)" in write_report(tmp_path, cases, found).read_text()
    both = evaluate(cases, Settings(levels=("image",), resamples=20), other=cases)
    assert any("cancer, compared: AUC" in line for line in headline(both))


def test_comparison_of_equal_rankings_says_why_it_has_no_p(cases):
    found = compare(cases, replace(cases, scores=cases.scores * 2), count=50)["cancer"]
    assert found["p"] is None and found["difference"] == 0 and "rank the rows equally" in found["why"]


def test_comparison_refuses_what_cannot_be_paired(cases):
    with pytest.raises(DataError, match="i3: the two predictions have different labels"):
        truth = cases.truth.copy()
        truth[3] = 1 - truth[3]
        compare(cases, replace(cases, truth=truth))
    with pytest.raises(DataError, match="no image with a label in common"):
        compare(cases, replace(cases, names=tuple(f"j{n}" for n in range(120))))
    with pytest.raises(DataError, match="i0: occurs twice"):
        compare(cases, cases.where([0, 0, 1]))
    with pytest.raises(DataError, match="different outputs: cancer; mass"):
        compare(cases, replace(cases, outputs=("mass",)))


def test_subgroups_have_their_own_areas_at_one_threshold(cases):
    found = subgroups(cases, 0, "density", 0.5, count=50)
    assert [row["value"] for row in found] == list("ABCD") and sum(row["rows"] for row in found) == 120
    for number, row in enumerate(found):
        part = cases.where(np.arange(120) % 4 == number)
        assert row["auc"]["value"] == roc.auc(part.truth[:, 0], part.scores[:, 0])
        called = part.scores[:, 0] >= 0.5
        assert row["sensitivity"] == called[part.truth[:, 0] == 1].mean()
        assert row["specificity"] == (~called)[part.truth[:, 0] == 0].mean()
    with pytest.raises(DataError, match="unknown column 'maker' for subgroups; there are age, density"):
        subgroups(cases, 0, "maker", None)


def test_a_subgroup_of_one_class_says_so(cases):
    one = replace(cases, columns={"maker": tuple("x" if t else "" for t in cases.truth[:, 0])})
    found = subgroups(one, 0, "maker", None, count=20)
    assert [row["value"] for row in found] == ["x", "not known"] and all(
        "one class only" in r["undefined"] for r in found
    )


def test_numbers_are_put_into_decades_or_quarters():
    ages = [str(age) for age in range(38, 72)]
    assert bands(ages, "age")[:3] == ["30-39", "30-39", "40-49"] and bands(["61", "40"], "age") == ["61", "40"]
    values = [str(n) for n in range(100)]
    quarters = bands([*values, ""], "thickness")
    assert [quarters.count(name) for name in dict.fromkeys(quarters)] == [25, 25, 25, 25, 1]
    assert quarters[0] == "0 to 24.75" and quarters[99] == "74.25 to 99"
    assert bands(["CC", "MLO"], "view") == ["CC", "MLO"]


def test_bands_of_large_numbers_are_told_apart():
    days = [str(20230101 + n) for n in range(28)]
    assert len(set(bands(days, "study_date"))) == 4
    assert bands(days, "study_date")[0] == "20230101 to 20230108"


def test_ages_are_decades_however_the_column_spells_it():
    ages = [str(age) for age in range(38, 72)]
    assert bands(ages, "Patient Age")[:3] == ["30-39", "30-39", "40-49"] and " to " in bands(ages, "dosage")[0]


def test_bands_come_by_their_numbers(cases):
    def told(low, step):
        sizes = tuple(str(low + step * n) for n in range(120))
        found = subgroups(replace(cases, columns={"size": sizes}), 0, "size", None, count=20)
        return [float(row["value"].split(" to ")[0]) for row in found]

    assert told(5, 2) == sorted(told(5, 2)) and told(-40, 1) == sorted(told(-40, 1))


def test_breasts_whose_views_have_different_numbers_are_put_into_bands(cases):
    """A thickness for each view would else make each breast a subgroup."""
    views = tuple(f"{20 + n / 2}+{30 + n / 2}" for n in range(120))
    found = subgroups(replace(cases, columns={"thickness": views}), 0, "thickness", None, count=20)
    assert [row["value"] for row in found] == ["25 to 39.875", "39.875 to 54.75", "54.75 to 69.625", "69.625 to 84.5"]
    assert [row["rows"] for row in found] == [30] * 4
    assert bands(["4+2", "4", "", "2"], "birads") == ["4+2", "4", "", "2"]


def breasts(cases, **more) -> Cases:
    """Each of 60 patients with both sides."""
    sides = tuple("LR"[n % 2] for n in range(len(cases)))
    return replace(cases, sides=sides, **more)


def test_rows_of_other_names_are_paired_by_patient_and_side(cases):
    first = breasts(cases)
    second = breasts(cases, scores=cases.scores + np.random.default_rng(1).normal(size=(120, 1)))
    expected = compare(first, second, count=100)
    order = np.random.default_rng(2).permutation(120)
    renamed = replace(second, names=tuple(f"readings.csv, line {n}" for n in range(120))).where(order)
    assert compare(first, renamed, count=100) == expected
    # What only one of them knows tells nothing.
    exams = replace(first, exams=("e",) * 120)
    assert compare(exams, renamed, count=100)["rows"] == 120
    twice = replace(renamed, sides=("L",) * 120)
    with pytest.raises(DataError, match=r"in common .* by name or by patient, exam, side and view"):
        compare(first, twice)


def test_groups_of_equal_words_are_told_apart():
    """A patient and an exam of one name, and the same patient without an exam."""
    values = {"outputs": ("a",), "truth": np.eye(2)[:, :1], "scores": np.eye(2)[:, :1], "names": ("i", "j")}
    cases = Cases(**values, patients=("1", "1"), exams=("1", ""), sides=("L", "L"))
    assert len(set(cases.at("breast").names)) == 2


def test_a_level_at_which_rows_cannot_be_paired_says_so(cases):
    """Scores of breasts beside those of four images each."""
    images = Cases(
        **vars(cases)
        | {
            "patients": tuple(f"p{n // 4}" for n in range(120)),
            "sides": tuple("LLRR"[n % 4] for n in range(120)),
            "truth": np.repeat(cases.truth[::2], 2, 0),
            "columns": {},
        }
    )
    by_breast = images.at("breast")
    reader = replace(by_breast, names=tuple(f"line {n}" for n in range(60)), scores=by_breast.scores + 1)
    found = evaluate(images, Settings(resamples=20), other=reader)["levels"]
    assert found["breast"]["comparison"]["rows"] == 60 and found["breast"]["comparison"]["cancer"]["difference"] == 0
    assert "the other prediction is of breasts" in found["image"]["comparison"]["unpaired"]
    with pytest.raises(DataError, match="the other prediction is of breasts, and has no images"):
        evaluate(images, Settings(levels=("image",), resamples=20), other=reader)
