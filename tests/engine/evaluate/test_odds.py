"""Log-odds tell large logits apart where probabilities are all 1."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import softmax
from sklearn.metrics import roc_auc_score

from gigamorph.engine.evaluate import odds, roc


@given(st.integers(0, 1000), st.integers(2, 6))
def test_log_odds_are_those_of_the_softmax(seed, classes):
    logits = np.random.default_rng(seed).normal(size=(5, classes)) * 3
    p = softmax(logits, -1)
    np.testing.assert_allclose(odds.of_logits(logits), np.log(p / (1 - p)), rtol=0, atol=1e-9)
    np.testing.assert_allclose(odds.probabilities(odds.of_logits(logits)), p, rtol=0, atol=1e-12)
    np.testing.assert_allclose(odds.of_probabilities(p), odds.of_logits(logits), rtol=0, atol=1e-9)


def test_rankings_of_large_logits_are_not_saturated():
    logits = np.array([[0.0, 60], [0, 50], [0, 70], [0, 55]])
    labels = [1, 0, 1, 0]
    assert roc_auc_score(labels, softmax(logits, -1)[:, 1]) == 0.5  # what probabilities make of it
    assert roc.auc(labels, odds.of_logits(logits)[:, 1]) == 1.0
    # One output of a sigmoid, and logits of three classes.
    assert roc.auc(labels, odds.of_logits(logits[:, 1:])[:, 0]) == 1.0
    three = odds.of_logits(np.concatenate([logits, -logits[:, 1:]], 1))
    assert roc.auc(labels, three[:, 1]) == 1.0


def test_mean_of_probabilities_is_not_saturated_either():
    z = np.array([[1.0, -2, 300], [3, 0.5, 500]])
    p = odds.probabilities(z).mean(0)[:2]
    assert odds.mean(z)[:2] == pytest.approx(np.log(p / (1 - p)), abs=1e-12)
    # 1 - mean = (exp(-300) + exp(-500)) / 2
    assert odds.mean(z)[2] == pytest.approx(300 + np.log(2), abs=1e-9)
    assert odds.mean(np.array([[np.inf], [np.inf]])) == [np.inf]
    assert odds.mean(np.array([[-np.inf], [0.0]]))[0] == pytest.approx(np.log(0.25 / 0.75))
