"""siamese: the mixture of the distances, soft labels, and their loss."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gigamorph.engine.errors import GigamorphError
from gigamorph.engine.mammography.recipes.siamese.mixture import Mixture, fit_mixture, soft_labels
from gigamorph.engine.mammography.recipes.siamese.network import distance, soft_contrastive


def two_gaussians(seed=0, n=4000, share=0.1):
    rng = np.random.default_rng(seed)
    different = rng.random(n) < share
    return np.where(different, rng.normal(0.9, 0.1, n), rng.normal(0.3, 0.06, n)), different


def test_mixture_recovers_two_known_gaussians():
    d, different = two_gaussians()
    found = fit_mixture(d)
    assert found.means == pytest.approx((0.3, 0.9), abs=0.02)
    assert found.deviations == pytest.approx((0.06, 0.1), abs=0.01)
    assert found.share == pytest.approx(0.1, abs=0.01) and found.separated
    assert np.mean((found.posterior(d) > 0.5) == different) > 0.999


@given(
    st.floats(0, 1),
    st.floats(0.01, 1),
    st.floats(0.01, 0.5),
    st.floats(0.01, 0.5),
    st.floats(0.01, 0.5),
)
def test_posterior_never_falls(low, gap, first, second, share):
    mixture = Mixture((low, low + gap), (first, second), share)
    d = np.linspace(-2, 4, 500)
    assert (np.diff(mixture.posterior(d)) >= 0).all()
    # Between the means it is Bayes' rule as it stands.
    between = np.linspace(low, low + gap, 7)
    dense = [
        w * np.exp(-0.5 * ((between - m) / s) ** 2) / s
        for w, m, s in zip((1 - share, share), mixture.means, mixture.deviations, strict=True)
    ]
    ordinary = dense[1] / np.maximum(dense[0] + dense[1], 1e-300)
    known = dense[0] + dense[1] > 1e-200
    np.testing.assert_allclose(mixture.posterior(between)[known], ordinary[known], atol=1e-9)


def test_guards_of_the_mixture():
    same = fit_mixture(np.random.default_rng(0).normal(0.5, 0.1, 2000))
    assert not same.separated or same.means[1] - same.means[0] > 0.1
    assert (
        fit_mixture(two_gaussians(share=0.5)[0]).share == 0.2
        and fit_mixture(two_gaussians(share=0.001)[0]).share >= 0.01
    )
    assert np.isfinite(fit_mixture(np.full(50, 0.3)).posterior([0.1, 0.3, 0.5])).all()  # a floor below the variances
    with pytest.raises(GigamorphError, match="distances are too few or not all finite"):
        fit_mixture([0.1, np.nan, 0.2, 0.3, 0.4])


@pytest.mark.parametrize("rule", ["gmm", "exp", "rank", "hard"])
def test_rules_are_monotone_and_within_limits(rule):
    d, different = two_gaussians()
    labels = soft_labels(d, rule, fit_mixture(d))
    assert labels.min() >= 0 and labels.max() <= 1 and (np.diff(labels[np.argsort(d)]) >= 0).all()
    assert labels[different].mean() > labels[~different].mean() + 0.3
    assert set(np.unique(labels)) == {0, 1} or rule != "hard"


def test_hard_labels_give_the_classic_contrastive_loss():
    d = torch.tensor([0.0, 0.3, 0.8, 1.4])
    assert soft_contrastive(d, torch.zeros(4), 1.0) == pytest.approx(float((d**2).mean()))
    assert soft_contrastive(d, torch.ones(4), 1.0) == pytest.approx(float((1 + 0.7**2 + 0.2**2) / 4))


def test_gradients_are_right_finite_at_zero_and_not_into_the_labels():
    torch.manual_seed(0)
    a, b = (torch.randn(5, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    y = torch.rand(5, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda a, b: soft_contrastive(distance(a, b), y, 3.0), (a, b))
    same = torch.ones(2, 3, requires_grad=True)
    soft_contrastive(distance(same, same.detach().clone()), torch.ones(2)).backward()
    assert torch.isfinite(same.grad).all()
    labels = torch.rand(5, dtype=torch.float64, requires_grad=True)
    soft_contrastive(distance(a, b), labels).backward()
    assert labels.grad is None
