"""Multi-reader multi-case (MRMC) studies: compares modalities by which several readers read the same cases.

Obuchowski and Rockette (1995): the AUCs of modalities i and readers j follow an analysis of variance, theta_ij = mu +
modality_i + Reader_j + (modality x Reader)_ij + error_ij, with correlated errors, because all readers read the same
cases. Four numbers are taken from the covariance matrix of the AUCs (DeLong's, or the jackknife's over patients): the
mean variance; Cov1, for one reader and two modalities; Cov2, for two readers and one modality; Cov3, for two readers
and two modalities. Tests and degrees of freedom are those of Hillis (2007); for new readers and new cases

    F = MS(T) / [MS(TR) + J max(Cov2 - Cov3, 0)],   ddf = [that denominator]^2 / {MS(TR)^2 / [(I - 1)(J - 1)]},

with I modalities and J readers. Hillis, Berbaum and Metz (2008) give the formulas for fixed readers or fixed cases.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import chi2, f, norm, t

from ..errors import DataError
from ..report.page import TextTable
from . import roc
from .cases import Cases
from .checks import Array, numbers, truth_of
from .compare import known_keys
from .report import format_p, write_results

Covariance = Literal["delong", "jackknife"]


@dataclass(frozen=True)
class Estimate:
    """A value with its standard error, degrees of freedom (None: normal) and 95 % interval, clipped to [0, 1]. A
    difference is clipped to [-1, 1] and has a two-sided p of equality. All are None if the variance is 0."""

    value: float
    error: float | None
    df: float | None
    interval: tuple[float, float] | None
    p: float | None = None


@dataclass(frozen=True)
class Test:
    """The test of equality of all modalities: F, with `denominator_df` None if infinite; for fixed readers
    chi-square."""

    statistic: float
    df: int
    denominator_df: float | None
    p: float


@dataclass(frozen=True)
class Analysis:
    """The results for one kind of generalisation.

    Attributes:
        test: of all modalities; None with one modality, or if the variance is 0.
        modalities: the mean AUC of each modality over the readers.
        differences: for each pair of modalities ("a - b"), the first minus the second.
        readers: for fixed readers, the differences of each reader by the same names.
    """

    test: Test | None
    modalities: dict[str, Estimate]
    differences: dict[str, Estimate]
    readers: dict[str, dict[str, Estimate]]


@dataclass(frozen=True)
class Components:
    """Mean squares of the AUCs, covariances of the errors, and the variance components of readers (may be negative)."""

    ms_modality: float
    ms_reader: float
    ms_both: float
    error: float
    cov1: float
    cov2: float
    cov3: float
    reader: float
    both: float


@dataclass(frozen=True)
class ReaderStudy:
    """The AUCs (modalities x readers) and the three analyses; those with random readers need at least two readers."""

    areas: dict[str, dict[str, float]]
    cases: int
    positives: int
    covariance: str
    components: Components
    random_readers_random_cases: Analysis | None
    fixed_readers_random_cases: Analysis
    random_readers_fixed_cases: Analysis | None


def reader_study(
    truth: ArrayLike,
    scores: ArrayLike,
    *,
    modalities: Sequence[str] | None = None,
    readers: Sequence[str] | None = None,
    covariance: Covariance = "delong",
    patients: Sequence[str] | None = None,
) -> ReaderStudy:
    """Compare modalities by the AUCs of several readers.

    Args:
        truth: (cases,) 1 or 0.
        scores: (modalities, readers, cases), larger for 1; every reader reads every case with every modality.
        modalities, readers: names; by default numbers from 1.
        covariance: method for the covariance of the AUCs; DeLong's assumes independent cases.
        patients: of the cases; the jackknife leaves out one patient at a time, by default one case.

    Raises:
        DataError: for values that are not numbers, wrong shapes, or fewer than two cases of a class.
    """
    values, positive = numbers(scores), truth_of(truth)
    if values.ndim != 3 or values.shape[2] != len(positive) or not values.size:
        raise DataError(f"scores must be (modalities, readers, {len(positive)} cases), not of shape {values.shape}")
    if not 2 <= positive.sum() <= len(positive) - 2:
        raise DataError(f"{positive.sum()} of {len(positive)} cases are positive; two of each class are needed")
    if patients is not None and (covariance != "jackknife" or len(patients) != len(positive)):
        raise DataError("patients must be one per case, and need the jackknife; DeLong assumes independent cases")
    names = [modalities or _numbered(values.shape[0]), readers or _numbered(values.shape[1])]
    for given, size in zip(names, values.shape, strict=False):
        if len(set(given)) != size:
            raise DataError(f"{', '.join(given)}: must be {size} different names")
    flat = list(values.reshape(-1, len(positive)))
    areas, matrix = roc.delong(positive, flat)
    if covariance == "jackknife":
        matrix = jackknife(positive, flat, patients)
    return _Anova(areas.reshape(values.shape[:2]), matrix, names[0], names[1]).study(positive, covariance)


def jackknife(truth: ArrayLike, scores: Sequence[ArrayLike], patients: Sequence[str] | None = None) -> Array:
    """The jackknife covariance matrix (k, k) of the AUCs of k scores (n,) of the same rows, over patients.

    It is (K - 1) / K times the sum of products of deviations, for K patients (by default rows).
    """
    positive, columns = truth_of(truth), [numbers(each) for each in scores]
    _, of_patient = np.unique(np.arange(len(positive)) if patients is None else patients, return_inverse=True)
    count = int(of_patient.max()) + 1
    inside = [of_patient[positive], of_patient[~positive]]
    left = [len(of) - np.bincount(of, minlength=count) for of in inside]
    if not (left[0] * left[1]).all():
        raise DataError("the jackknife is undefined because a class has no case without one of the patients")
    found = np.empty((len(columns), count))
    for row, (column, v10, v01) in enumerate(zip(columns, *roc.components(positive, columns), strict=True)):
        # The pairs of the AUC, minus those with a case of the patient; pairs within the patient are subtracted twice.
        pairs = v10.sum() * len(v01)
        pairs = pairs - np.bincount(inside[0], v10, count) * len(v01) - np.bincount(inside[1], v01, count) * len(v10)
        twice = _within(column[positive], column[~positive], inside[0], inside[1], count)
        found[row] = (pairs + twice) / (left[0] * left[1])
    deviation = found - found.mean(1, keepdims=True)
    return (count - 1) / count * deviation @ deviation.T


def _within(
    positives: Array, negatives: Array, of_positive: NDArray[np.intp], of_negative: NDArray[np.intp], count: int
) -> Array:
    """The numbers (count,) of correctly ordered pairs within each patient; ties count half."""
    found = np.zeros(count)
    for patient in np.intersect1d(of_positive, of_negative):
        above = np.subtract.outer(positives[of_positive == patient], negatives[of_negative == patient])
        found[patient] = np.heaviside(above, 0.5).sum()
    return found


def study_of(
    cases: Cases, *, reader: str = "reader", modality: str | None = None, covariance: Covariance = "delong"
) -> ReaderStudy:
    """The study of readings in rows, with columns for the reader and the modality.

    Args:
        cases: readings, of one output; a case is identified by its name, or by patient, exam, side and view.
        reader: column of readers.
        modality: column of modalities; None for one modality.
        covariance: "delong", or "jackknife" over patients.

    Raises:
        DataError: see `reader_study`; or for a missing column, or missing, repeated or contradictory readings.
    """
    for column in (reader, modality):
        if column is not None and column not in cases.columns:
            raise DataError(f"no column {column!r}; there are {', '.join(sorted(cases.columns)) or 'none'}")
    if len(cases.outputs) != 1:
        raise DataError(f"a reader study needs one output, not {', '.join(cases.outputs)}; choose it with --score")
    cases = cases.labelled()
    by = cases.columns[modality] if modality is not None else ("all",) * len(cases)
    keys = known_keys(cases)
    # Unique row names, such as line numbers, do not identify cases.
    keys = keys if len(set(cases.names)) == len(cases) and keys is not None else [(name,) for name in cases.names]
    who = cases.columns[reader]
    modalities, readers, of_cases = list(dict.fromkeys(by)), list(dict.fromkeys(who)), list(dict.fromkeys(keys))
    number_of_case = {key: number for number, key in enumerate(of_cases)}
    scores = np.full((len(modalities), len(readers), len(of_cases)), np.nan)
    truth = np.full(len(of_cases), np.nan)
    for row, key in enumerate(keys):
        at = (modalities.index(by[row]), readers.index(who[row]), number_of_case[key])
        reading = f"{_named(key)}, {by[row]}, reader {who[row]}"
        if not np.isnan(scores[at]):
            raise DataError(f"{reading}: this reading occurs twice; remove one")
        if truth[at[2]] == 1 - cases.truth[row, 0]:
            raise DataError(f"{reading}: its label differs from that of other readings of this case; correct one")
        scores[at], truth[at[2]] = cases.scores[row, 0], cases.truth[row, 0]
    missing = np.argwhere(np.isnan(scores))
    if len(missing):
        i, j, k = missing[0]
        of = f"{_named(of_cases[k])} by reader {readers[j]}, {modalities[i]}"
        raise DataError(f"{len(missing)} readings are missing, the first of {of}; all readers must read all cases")
    patient_of = dict(zip(keys, cases.clusters, strict=True))
    patients = [patient_of[key] for key in of_cases] if covariance == "jackknife" else None
    return reader_study(truth, scores, modalities=modalities, readers=readers, covariance=covariance, patients=patients)


def _named(key: tuple[str, ...]) -> str:
    return " ".join(part for part in key if part)


class _Anova:
    def __init__(self, areas: Array, matrix: Array, modalities: Sequence[str], readers: Sequence[str]) -> None:
        """The analysis of variance of AUCs (I, J) with their covariance matrix (I J, I J)."""
        self.areas, self.modalities, self.readers = areas, modalities, readers
        self.i, self.j = areas.shape
        self.matrix = matrix.reshape(self.i, self.j, self.i, self.j)
        self.means = areas.mean(1)
        error, cov1, cov2, cov3 = self._covariances()
        over_modalities, over_readers = max(self.i - 1, 1), max(self.j - 1, 1)
        of_reader, mean = areas.mean(0), areas.mean()
        rest = areas - self.means[:, None] - of_reader + mean
        ms_t = self.j * float(((self.means - mean) ** 2).sum()) / over_modalities
        ms_r = self.i * float(((of_reader - mean) ** 2).sum()) / over_readers
        ms_tr = float((rest**2).sum()) / (over_modalities * over_readers)
        reader = (ms_r - ms_tr) / self.i - cov1 + cov3
        both = ms_tr - error + cov1 + max(cov2 - cov3, 0)
        self.least = 1e-12 * error  # equal AUCs differ only by rounding
        self.found = Components(ms_t, ms_r, ms_tr, error, cov1, cov2, cov3, reader, both)

    def _covariances(self) -> tuple[float, float, float, float]:
        same_modality = np.eye(self.i, dtype=bool)[:, None, :, None]
        same_reader = np.eye(self.j, dtype=bool)[None, :, None, :]
        kinds = [
            same_modality & same_reader,
            ~same_modality & same_reader,
            same_modality & ~same_reader,
            ~same_modality & ~same_reader,
        ]
        error, cov1, cov2, cov3 = (float(self.matrix[kind].mean()) if kind.any() else 0.0 for kind in kinds)
        return error, cov1, cov2, cov3

    def study(self, positive: NDArray[np.bool_], covariance: str) -> ReaderStudy:
        several = self.j > 1
        areas = {
            modality: dict(zip(self.readers, row.tolist(), strict=True))
            for modality, row in zip(self.modalities, self.areas, strict=True)
        }
        counts = (len(positive), int(positive.sum()))
        return ReaderStudy(
            areas,
            *counts,
            covariance,
            self.found,
            self._random_readers(True) if several else None,
            self._fixed_readers(),
            self._random_readers(False) if several else None,
        )

    def _random_readers(self, random_cases: bool) -> Analysis:
        """The analysis for random readers, and random or fixed cases (without covariances)."""
        found, degrees = self.found, (self.i - 1) * (self.j - 1)
        shared = self.j * max(found.cov2 - found.cov3, 0) if random_cases else 0.0
        variance = found.ms_both + shared
        df = degrees * (variance / found.ms_both) ** 2 if found.ms_both > self.least else np.inf
        test = None
        if self.i > 1 and variance > self.least:
            statistic = found.ms_modality / variance
            if np.isfinite(df):
                test = Test(statistic, self.i - 1, df, float(f.sf(statistic, self.i - 1, df)))
            else:  # no interaction of readers and modalities: all variance is that of the cases
                test = Test(statistic, self.i - 1, None, float(chi2.sf(statistic * (self.i - 1), self.i - 1)))
        modalities = {}
        for row, name in enumerate(self.modalities):
            spread = float(self.areas[row].var(ddof=1))
            cov2 = self.j * max(self._cov2(row), 0) if random_cases else 0.0
            own = (self.j - 1) * ((spread + cov2) / spread) ** 2 if spread > self.least else np.inf
            modalities[name] = self._estimate(self.means[row], (spread + cov2) / self.j, own)
        return Analysis(test, modalities, self._differences(self.means, 2 * variance / self.j, df), {})

    def _fixed_readers(self) -> Analysis:
        """The analysis for random cases and fixed readers."""
        found = self.found
        variance = found.error - found.cov1 + (self.j - 1) * max(found.cov2 - found.cov3, 0)
        test = None
        if self.i > 1 and variance > self.least:
            statistic = (self.i - 1) * found.ms_modality / variance
            test = Test(statistic, self.i - 1, None, float(chi2.sf(statistic, self.i - 1)))
        modalities, readers = {}, {}
        for row, name in enumerate(self.modalities):
            own = float(np.einsum("jj->j", self.matrix[row, :, row]).mean())
            modalities[name] = self._estimate(
                self.means[row], (own + (self.j - 1) * max(self._cov2(row), 0)) / self.j, None
            )
        for column, name in enumerate(self.readers):
            own = self.matrix[:, column, :, column]
            others = float(own[~np.eye(self.i, dtype=bool)].mean()) if self.i > 1 else 0.0
            spread = 2 * (float(np.diag(own).mean()) - others)
            readers[name] = self._differences(self.areas[:, column], spread, None)
        return Analysis(test, modalities, self._differences(self.means, 2 * variance / self.j, None), readers)

    def _cov2(self, row: int) -> float:
        """Cov2 of one modality."""
        own = self.matrix[row, :, row]
        return float(own[~np.eye(self.j, dtype=bool)].mean()) if self.j > 1 else 0.0

    def _differences(self, values: Array, variance: float, df: float | None) -> dict[str, Estimate]:
        return {
            f"{self.modalities[a]} - {self.modalities[b]}": self._estimate(
                values[a] - values[b], variance, df, test=True
            )
            for a, b in itertools.combinations(range(self.i), 2)
        }

    def _estimate(self, value: float, variance: float, df: float | None, test: bool = False) -> Estimate:
        if variance <= self.least:
            return Estimate(float(value), None, None, None)
        error, of = float(np.sqrt(variance)), norm() if df is None else t(df)
        half = float(of.ppf(0.975)) * error
        p = float(2 * of.sf(abs(value) / error)) if test else None
        finite = None if df is None or not np.isfinite(df) else float(df)
        interval = max(float(value) - half, -1.0 if test else 0.0), min(float(value) + half, 1.0)
        return Estimate(float(value), error, finite, interval, p)


def _numbered(size: int) -> list[str]:
    return [str(number + 1) for number in range(size)]


_KINDS = {
    "random_readers_random_cases": "new readers and new cases",
    "fixed_readers_random_cases": "these readers and new cases",
    "random_readers_fixed_cases": "new readers and these cases",
}


def write_reader_report(out: str | Path, study: ReaderStudy, source: Mapping[str, Any]) -> Path:
    """Write ``metrics.json`` and ``report.html`` into `out`; returns the page's path.

    Args:
        out: the folder.
        study: the result of the study.
        source: sources of the readings, under the keys of `report.SOURCES`, and "rows".

    Raises:
        GigamorphError: if a file cannot be written.
    """
    readers = list(next(iter(study.areas.values())))
    rows = [[reader, *(f"{of[reader]:.3f}" for of in study.areas.values())] for reader in readers]
    return write_results(
        out,
        asdict(study) | dict(source),
        "readers.html",
        {},
        counts=f"{len(readers)} readers, {study.cases} cases, {study.positives} positive",
        covariance={"delong": "DeLong's", "jackknife": "the jackknife's"}[study.covariance],
        analyses=[(words, _table(analysis)) for words, analysis in _analyses(study)],
        areas=TextTable(["reader", *study.areas], rows),
        components=TextTable(
            ["", "value"], [[name, f"{value:.8f}"] for name, value in asdict(study.components).items()]
        ),
    )


def reader_headline(study: ReaderStudy) -> Iterator[str]:
    """A summary line for each modality and difference, and each kind of generalisation."""
    for words, analysis in _analyses(study):
        for name, one in (*analysis.modalities.items(), *analysis.differences.items()):
            p = "" if one.p is None else f", p {format_p(one.p)}"
            yield f"{words}: {name}: AUC {_with_interval(one)}{p}"


def _analyses(study: ReaderStudy) -> list[tuple[str, Analysis]]:
    found = [(words, getattr(study, kind)) for kind, words in _KINDS.items()]
    return [(words, analysis) for words, analysis in found if analysis is not None]


def _table(analysis: Analysis) -> TextTable:
    rows = [[name, *_row(one)] for name, one in (*analysis.modalities.items(), *analysis.differences.items())]
    for reader, differences in analysis.readers.items():
        rows += [[f"reader {reader}: {name}", *_row(one)] for name, one in differences.items()]
    if analysis.test is not None:
        test = analysis.test
        df = f"{test.df}" if test.denominator_df is None else f"{test.df} and {test.denominator_df:.2f}"
        rows.append(["all modalities alike", f"statistic {test.statistic:.3f}", "", df, format_p(test.p)])
    return TextTable(["", "AUC (95 % interval)", "standard error", "degrees of freedom", "p"], rows)


def _row(one: Estimate) -> list[str]:
    error = "" if one.error is None else f"{one.error:.4f}"
    return [_with_interval(one), error, "" if one.df is None else f"{one.df:.2f}", format_p(one.p)]


def _with_interval(one: Estimate) -> str:
    if one.interval is None:
        return f"{one.value:.3f} (no interval: the variance is 0)"
    return f"{one.value:.3f} ({one.interval[0]:.3f} to {one.interval[1]:.3f})"
