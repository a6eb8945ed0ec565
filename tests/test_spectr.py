"""The method cells of decoding/spectr against a linear program, exact enumeration and closed forms."""

import numpy as np
import pytest

from workbook.acceptance import linear_program_acceptance
from workbook.chance import ToyModel, enumerate_outcomes
from workbook.notebook import load_method
from workbook.verifiers import exact_law

spectr = load_method("decoding/spectr")
T, D = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.3, 0.5])


def pairs(count=12, vocabulary=5):
    rng = np.random.default_rng(1)
    return [tuple(rng.dirichlet(np.full(vocabulary, 0.7), 2)) for _ in range(count)]


def test_threshold_solves_its_equation():
    for t, d in pairs():
        for k in (2, 3, 5):
            rho = spectr.kseq_threshold(t, d, k)
            beta = np.minimum(d, t / rho).sum()
            assert 1 - (1 - beta) ** k == pytest.approx(rho * beta, abs=1e-9)
            assert 1 <= rho <= k


def test_one_draft_has_no_discount():
    assert spectr.kseq_threshold(T, D, 1) == 1
    assert spectr.kseq_acceptance(T, D, 1) == pytest.approx(np.minimum(T, D).sum())


def test_residual_is_never_negative_and_sums_to_the_rejection():
    for t, d in pairs():
        for k in (1, 2, 4):
            rho = spectr.kseq_threshold(t, d, k)
            residual = spectr.kseq_residual(t, d, k, rho)
            assert residual.min() >= 0
            assert residual.sum() == pytest.approx(1 - spectr.kseq_acceptance(t, d, k), abs=1e-9)


def test_too_small_a_discount_is_refused():
    with pytest.raises(ValueError, match="too small for 4 drafts"):
        spectr.kseq_residual(T, D, 4, 1.0)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_selected_token_has_the_targets_law(k):
    for t, d in pairs(4, 4):
        law = np.zeros(4)
        for p, token in enumerate_outcomes(
            lambda c, t=t, d=d: spectr.kseq_select(t, d, [c.draw(d) for _ in range(k)], c)
        ):
            law[token] += p
        np.testing.assert_allclose(law, t, atol=1e-12)


@pytest.mark.parametrize(("drafts", "length"), [(1, 2), (2, 1), (2, 2), (3, 1)])
def test_block_step_has_the_targets_law(drafts, length):
    target, draft = ToyModel(5), ToyModel(6)
    law = exact_law(spectr.spectr_verification, target, draft, drafts=drafts, length=length, tokens=3)
    np.testing.assert_allclose(law, target.law(3), atol=1e-12)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_minimal_cut_equals_the_linear_program(k):
    for t, d in pairs(6, 4):
        assert spectr.optimal_acceptance(t, d, k) == pytest.approx(linear_program_acceptance(t, d, k), abs=1e-9)


def test_guarantee_holds_and_published_example():
    for t, d in pairs(40, 30):
        for k in (2, 4, 8):
            assert spectr.kseq_acceptance(t, d, k) >= spectr.guarantee(k) * spectr.optimal_acceptance(t, d, k) - 1e-9
    assert spectr.kseq_threshold(T, D, 2) == pytest.approx(1.4568, abs=1e-4)
    assert spectr.kseq_acceptance(T, D, 2) == pytest.approx(0.7914, abs=1e-4)
    assert spectr.optimal_acceptance(T, D, 2) == pytest.approx(0.86, abs=1e-12)


def test_bad_distributions_are_refused():
    with pytest.raises(ValueError, match="target is no distribution"):
        spectr.kseq_threshold(np.array([0.5, 0.6]), np.array([0.5, 0.5]), 2)
    with pytest.raises(ValueError, match="at least 1"):
        spectr.kseq_threshold(T, D, 0)
