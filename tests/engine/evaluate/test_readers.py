"""Readers' studies against the published analysis of a published study, and against resampled readers and cases.

The study is Van Dyke et al. (1993): five readers graded 114 patients, 45 of them with an aortic dissection, by single
spin-echo and by cine MRI, from 1 (no) to 5. The expected figures are those that the authors' program OR-DBM MRMC 2.51
(Schartz, Hillis, Pesce and Berbaum) prints for it: trapezoidal area, jackknife.
"""

import numpy as np
import pytest

from gigamorph import DataError
from gigamorph.engine.evaluate import roc
from gigamorph.engine.evaluate.cases import Cases
from gigamorph.engine.evaluate.readers import jackknife, reader_study, study_of

# Of each reader the grades by both modalities, patient by patient: 69 without a dissection, then 45 with one.
GRADES = [
    """13 23 23 12 52 12 12 12 13 12 11 13 41 12 12 12 12 12 12 11 11 11 31 11 34 12 11 23 11 42 12 11 14 13 12 33 11 22
    13 21 12 12 22 33 33 11 31 11 13 33 33 11 11 13 14 11 12 24 22 11 12 14 11 34 34 22 11 11 11
    55 53 55 55 45 55 55 55 44 55 55 55 45 34 44 23 43 55 55 55 55 55 55 55 13 55 45 43 55 45 55 55 34 54 55 55 15 13
    55 55 55 45 45 55 11""",
    """23 32 22 22 22 22 22 22 23 32 22 22 52 22 22 21 32 22 22 22 21 22 22 22 43 22 22 22 22 32 22 21 22 22 21 22 22 22
    22 22 23 21 22 22 23 22 22 22 22 22 22 22 22 22 23 22 22 43 32 22 22 32 22 22 22 22 21 22 22
    55 33 55 55 55 55 55 45 22 55 55 55 43 44 24 22 24 55 54 55 55 55 54 55 22 45 32 33 55 45 55 53 22 44 22 55 25 22
    55 55 55 55 35 55 22""",
    """22 24 22 22 32 52 13 12 22 22 41 21 41 23 22 22 32 22 21 22 11 21 32 21 44 11 11 35 21 22 11 11 22 21 22 42 12 21
    12 42 12 21 11 13 22 21 21 21 22 23 33 21 11 13 22 12 11 22 23 12 13 54 11 42 24 12 21 12 21
    55 42 55 55 55 55 55 55 55 55 55 55 53 45 24 31 54 55 55 55 55 55 55 55 22 55 23 23 55 55 55 54 23 55 55 55 25 23
    54 55 55 55 55 55 21""",
    """12 12 11 11 11 11 33 11 12 11 11 11 11 12 12 11 11 11 12 11 21 11 11 11 23 12 11 12 11 22 11 11 11 11 12 12 11 11
    12 11 11 11 11 11 12 11 12 11 32 31 12 12 11 11 11 11 11 12 11 12 11 11 11 33 12 13 12 11 11
    55 54 55 55 55 55 55 55 54 55 55 55 54 55 55 15 55 55 55 55 55 55 55 55 54 55 45 54 44 45 55 55 35 55 55 55 15 23
    55 55 55 55 55 55 55""",
    """32 52 13 21 12 12 12 12 21 22 22 12 21 11 11 12 22 22 11 12 32 22 21 12 13 12 12 23 12 11 22 11 12 22 32 12 21 21
    12 11 12 31 31 33 22 11 12 12 23 13 12 11 12 12 12 12 11 32 42 12 22 33 11 22 13 23 11 11 31
    55 22 55 24 55 55 55 55 15 54 45 55 43 54 23 23 33 55 55 55 55 55 55 45 12 45 41 33 23 22 15 53 12 55 14 55 15 13
    53 55 55 35 55 55 23""",
]
TRUTH = np.repeat([0, 1], [69, 45])
SCORES = np.array([[[int(c) for c in pair] for pair in grades.split()] for grades in GRADES], float).transpose(2, 0, 1)


@pytest.fixture(scope="module")
def van_dyke():
    return reader_study(TRUTH, SCORES, modalities=("spin echo", "cine"), readers="ABCDE", covariance="jackknife")


def estimate(found):
    return (found.value, found.error, *found.interval)


def test_areas_and_components_are_the_published_ones(van_dyke):
    assert list(van_dyke.areas["spin echo"].values()) == pytest.approx(
        [0.91964573, 0.85877617, 0.90386473, 0.97310789, 0.82979066], abs=5e-9
    )
    assert list(van_dyke.areas["cine"].values()) == pytest.approx(
        [0.94782609, 0.90531401, 0.92173913, 0.99935588, 0.92995169], abs=5e-9
    )
    found = van_dyke.components
    squares = (found.ms_modality, found.ms_reader, found.ms_both)
    assert squares == pytest.approx((0.00479617, 0.00383620, 0.00055103), abs=5e-9)
    covariances = (found.error, found.cov1, found.cov2, found.cov3)
    assert covariances == pytest.approx((0.00080229, 0.00034661, 0.00034407, 0.00023903), abs=5e-9)
    assert (found.reader, found.both) == pytest.approx((0.00153500, 0.00020040), abs=5e-9)


def test_random_readers_and_cases(van_dyke):
    found = van_dyke.random_readers_random_cases
    assert (found.test.statistic, found.test.denominator_df) == pytest.approx((4.456, 15.26), abs=5e-3)
    assert found.test.df == 1 and found.test.p == pytest.approx(0.05167, abs=5e-6)
    difference = found.differences["spin echo - cine"]
    assert estimate(difference) == pytest.approx((-0.04380, 0.02075, -0.08796, 0.00036), abs=5e-6)
    assert difference.p == pytest.approx(found.test.p) and difference.df == found.test.denominator_df
    one, two = found.modalities.values()
    assert estimate(one) == pytest.approx((0.89703704, 0.03317360, 0.82522360, 0.96885048), abs=5e-9)
    assert estimate(two) == pytest.approx((0.94083736, 0.02156637, 0.89413783, 0.98753689), abs=5e-9)
    assert (one.df, two.df) == pytest.approx((12.74, 12.71), abs=5e-3)


def test_fixed_readers(van_dyke):
    found = van_dyke.fixed_readers_random_cases
    assert found.test.statistic == pytest.approx(5.47595, abs=5e-6) and found.test.p == pytest.approx(0.0193, abs=5e-5)
    difference = estimate(found.differences["spin echo - cine"])
    assert difference == pytest.approx((-0.04380, 0.01872, -0.08049, -0.00711), abs=6e-6)
    one, two = found.modalities.values()
    assert estimate(one) == pytest.approx((0.89703704, 0.02428971, 0.84943008, 0.94464399), abs=5e-9)
    assert estimate(two) == pytest.approx((0.94083736, 0.01677632, 0.90795637, 0.97371835), abs=5e-9)
    each = [of["spin echo - cine"] for of in found.readers.values()]
    assert [one.error for one in each] == pytest.approx([0.02551, 0.02630, 0.03121, 0.01729, 0.04406], abs=5e-6)
    assert [one.p for one in each] == pytest.approx([0.2693, 0.0768, 0.5668, 0.1290, 0.0230], abs=5e-5)


def test_fixed_cases(van_dyke):
    found = van_dyke.random_readers_fixed_cases
    assert found.test.statistic == pytest.approx(8.70, abs=5e-3) and found.test.p == pytest.approx(0.0420, abs=5e-5)
    difference = found.differences["spin echo - cine"]
    assert estimate(difference) == pytest.approx((-0.04380, 0.01485, -0.08502, -0.00258), abs=6e-6)
    assert difference.df == 4
    one, two = found.modalities.values()
    assert estimate(one) == pytest.approx((0.89703704, 0.02482994, 0.82809808, 0.96597599), abs=5e-9)
    assert estimate(two) == pytest.approx((0.94083736, 0.01615303, 0.89598936, 0.98568536), abs=5e-9)


def test_intervals_do_not_leave_the_range_of_areas():
    """Three readers are nearly perfect by one modality, and nearly reversed by the other."""
    truth = np.repeat([0, 1], 4)
    near = np.array([[1, 1, 2, 3, 3, 4, 4, 4], [1, 1, 1, 3, 2, 4, 4, 4], [1, 1, 1, 1, 4, 4, 4, 4.0]])
    study = reader_study(truth, np.array([near, -near]))
    for found in (study.random_readers_random_cases, study.fixed_readers_random_cases):
        high, low = found.modalities.values()
        (difference,) = found.differences.values()
        assert high.interval[0] < high.value < high.interval[1] == 1
        assert 0 == low.interval[0] < low.value < low.interval[1]
        assert 0 < difference.interval[0] < difference.value < difference.interval[1] == 1


def test_the_jackknife_is_each_patient_left_out():
    random = np.random.default_rng(0)
    truth, scores = random.integers(0, 2, 30), random.normal(size=(2, 30)).round(1)
    patients = random.integers(0, 12, 30).astype(str)  # of one or of both classes
    left_out = [[roc.auc(truth[kept], one[kept]) for kept in (patients != p for p in set(patients))] for one in scores]
    count = len(set(patients))
    expected = np.cov(left_out) * (count - 1) ** 2 / count
    np.testing.assert_allclose(jackknife(truth, scores, patients), expected, rtol=1e-9)
    # Of single cases it is almost DeLong's.
    _, delong = roc.delong(TRUTH, list(SCORES.reshape(10, -1)))
    np.testing.assert_allclose(jackknife(TRUTH, list(SCORES.reshape(10, -1))), delong, rtol=0.03, atol=2e-6)


def test_of_one_reader_it_is_delongs_paired_test():
    found = reader_study(TRUTH, SCORES[:, :1])
    paired = roc.paired_delong(TRUTH, SCORES[1, 0], SCORES[0, 0])
    difference = found.fixed_readers_random_cases.differences["1 - 2"]
    assert found.random_readers_random_cases is None
    assert (difference.value, difference.p) == pytest.approx((paired.difference, paired.p))
    assert difference.interval == pytest.approx(paired.interval)
    alone = reader_study(TRUTH, SCORES[:1]).random_readers_random_cases
    assert alone.test is None and not alone.differences and alone.modalities["1"].error > 0


def test_the_level_is_held_where_modalities_are_equally_good():
    """New readers and new cases each time (Roe and Metz, 1997), both modalities alike: 5 of 100 p are below 0.05."""
    random = np.random.default_rng(1)
    truth, p = np.repeat([0, 1], [40, 30]), []
    for _ in range(200):
        skill, taste = 0.3 * random.normal(size=(1, 5, 1)), 0.3 * random.normal(size=(2, 5, 1))
        noise = random.normal(size=(1, 1, 70)) + 0.5 * random.normal(size=(2, 1, 70)) + random.normal(size=(2, 5, 70))
        found = reader_study(truth, (1.5 + skill + taste) * truth + noise)
        p.append(found.random_readers_random_cases.test.p)
    assert 0.025 < np.mean(np.array(p) < 0.05) < 0.085
    assert 0.35 < np.mean(np.array(p) < 0.5) < 0.65


def readings(scores=SCORES, **more) -> Cases:
    """A row for each reading."""
    rows = [(m, r, c) for m in range(2) for r in range(5) for c in range(114)]
    values = {
        "outputs": ("dissection",),
        "truth": np.array([[TRUTH[c]] for *_, c in rows], float),
        "scores": np.array([[scores[place]] for place in rows], float),
        "names": tuple(f"patient {c}" for *_, c in rows),
        "patients": tuple(str(c) for *_, c in rows),
        "exams": ("",) * len(rows),
        "sides": ("",) * len(rows),
        "probable": False,
        "columns": {
            "reader": tuple("ABCDE"[r] for _, r, _ in rows),
            "modality": tuple(("spin echo", "cine")[m] for m, *_ in rows),
        },
    }
    return Cases(**(values | more))


def test_readings_are_rows_in_any_order(van_dyke):
    found = study_of(readings(), modality="modality", covariance="jackknife")
    # Cases that no column names are known by their patient, exam and side.
    unnamed = readings(names=tuple(f"line {n}" for n in range(1140)))
    for study in (found, study_of(unnamed, modality="modality", covariance="jackknife")):
        assert study.areas == van_dyke.areas and study.positives == 45
        assert vars(study.components) == pytest.approx(vars(van_dyke.components))
        expected = vars(van_dyke.random_readers_random_cases.test)
        assert vars(study.random_readers_random_cases.test) == pytest.approx(expected)
    mixed = study_of(readings().where(np.random.default_rng(0).permutation(1140)), modality="modality")
    assert mixed.random_readers_random_cases.test.p == pytest.approx(0.05, abs=0.01)


def test_incomplete_studies_are_refused():
    with pytest.raises(DataError, match=r"1 readings are missing, the first of patient 113 by reader E, cine"):
        study_of(readings().where(np.arange(1139)), modality="modality")
    with pytest.raises(DataError, match="patient 0, spin echo, reader A: this reading occurs twice"):
        study_of(readings().where([*range(1140), 0]), modality="modality")
    truth = readings().truth
    truth[1] = 1
    with pytest.raises(DataError, match="patient 1, spin echo, reader B: its label differs from that"):
        study_of(readings(truth=truth), modality="modality")
    with pytest.raises(DataError, match="no column 'doctor'; there are modality, reader"):
        study_of(readings(), reader="doctor")
    with pytest.raises(DataError, match="this reading occurs twice"):
        study_of(readings())  # both modalities as one
    with pytest.raises(DataError, match="0 of 69 cases are positive"):
        reader_study(TRUTH[:69], SCORES[..., :69])
    with pytest.raises(DataError, match="patients must be one per case, and need the jackknife"):
        reader_study(TRUTH, SCORES, patients=["p"] * 114)


def test_readers_who_agree_leave_nothing_to_test():
    same = np.repeat(SCORES[:1, :1], 2, 0).repeat(3, 1)
    found = reader_study(TRUTH, same)
    for one in (found.random_readers_random_cases, found.fixed_readers_random_cases):
        assert one.test is None and one.differences["1 - 2"].interval is None
        assert one.differences["1 - 2"].value == 0
