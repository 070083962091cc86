"""How good predictions are: areas, operating points, calibration, free-response ROC, all with intervals over patients;
studies of several readers.

Numpy, scipy and scikit-learn on float64; nothing here knows of networks. Larger scores mean 1, and scores are log-odds
wherever they come from a network, so that no ranking is lost to the rounding of probabilities near 0 and 1.
"""

from .cases import LEVELS, Cases
from .compare import compare
from .measures import pf1, quadratic_kappa
from .read import read_cases, read_marks, write_cases
from .readers import reader_study
from .roc import auc, delong, delong_interval, labelwise_auc, macro_auc, paired_delong, partial_auc

__all__ = [
    "LEVELS",
    "Cases",
    "auc",
    "compare",
    "delong",
    "delong_interval",
    "labelwise_auc",
    "macro_auc",
    "paired_delong",
    "partial_auc",
    "pf1",
    "quadratic_kappa",
    "read_cases",
    "read_marks",
    "reader_study",
    "write_cases",
]
