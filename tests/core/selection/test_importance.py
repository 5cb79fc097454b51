"""Importance scores against their definitions, computed token by token."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fedmoe_core.selection import importance

LOGITS = arrays(
    np.float64, st.tuples(st.integers(1, 3), st.integers(1, 12), st.integers(1, 6)), elements=st.floats(-30, 30)
)


def softmax(logits_LBE: np.ndarray) -> np.ndarray:
    raised = np.exp(logits_LBE - logits_LBE.max(axis=-1, keepdims=True))
    return raised / raised.sum(axis=-1, keepdims=True)


def sums_of(g_LBE: np.ndarray, taylor_abs_LE: np.ndarray | None = None) -> SimpleNamespace:
    layers, tokens, experts = g_LBE.shape
    plogp = g_LBE * np.log(np.where(g_LBE > 0, g_LBE, 1))
    return SimpleNamespace(
        tokens_L=np.full(layers, tokens),
        prob_sum_LE=g_LBE.sum(axis=1),
        prob_max_LE=g_LBE.max(axis=1),
        plogp_sum_LE=plogp.sum(axis=1),
        taylor_abs_LE=np.zeros((layers, experts)) if taylor_abs_LE is None else taylor_abs_LE,
    )


def router(seed: int = 0, *, layers: int = 2, tokens: int = 40, experts: int = 5) -> np.ndarray:
    return softmax(2 * np.random.default_rng(seed).standard_normal((layers, tokens, experts)))


@given(LOGITS)
def test_inv7_sum_of_kl_terms_is_the_information_of_router_and_input(logits_LBE: np.ndarray) -> None:
    g_LBE = softmax(logits_LBE)
    layers, tokens, _ = g_LBE.shape
    sums = sums_of(g_LBE)
    kl_LE = importance.kl_terms(sums.prob_sum_LE, sums.plogp_sum_LE, sums.tokens_L)
    for layer in range(layers):
        # I(R; X) of the joint distribution p(x_i, e) = G_e(x_i) / B, from its definition.
        joint = g_LBE[layer] / tokens
        product = joint.sum(axis=1, keepdims=True) * joint.sum(axis=0, keepdims=True)
        at = joint > 0
        information = float((joint[at] * np.log(joint[at] / product[at])).sum())
        assert kl_LE[layer].sum() == pytest.approx(information, abs=1e-12)
    assert (kl_LE >= 0).all()


def test_scores_equal_their_definitions() -> None:
    g_LBE = router()
    tokens = g_LBE.shape[1]
    taylor_LE = np.random.default_rng(1).random((2, 5))
    sums = sums_of(g_LBE, taylor_LE)
    p_LE = g_LBE.mean(axis=1)
    eq5 = 0.3 * p_LE + 0.7 * g_LBE.max(axis=1)
    eq11 = np.mean(g_LBE * np.log(g_LBE / p_LE[:, None]), axis=1)
    np.testing.assert_allclose(importance.expert_scores(sums, "s", lam=0.3, beta=9), eq5, rtol=1e-12)
    np.testing.assert_allclose(importance.expert_scores(sums, "ib", lam=0.3, beta=0.4), eq5 - 0.4 * eq11, rtol=1e-12)
    expected = taylor_LE / taylor_LE.sum(axis=1, keepdims=True) - 0.4 * eq11 / np.log(tokens)
    np.testing.assert_allclose(importance.expert_scores(sums, "taylor", lam=0.3, beta=0.4), expected, rtol=1e-12)
    np.testing.assert_allclose(importance.usage(sums.prob_sum_LE, sums.tokens_L), p_LE, rtol=1e-12)


@given(LOGITS)
def test_taylor_penalty_lies_between_zero_and_usage(logits_LBE: np.ndarray) -> None:
    g_LBE = softmax(logits_LBE)
    sums = sums_of(g_LBE)
    penalty_LE = -importance.expert_scores(sums, "taylor", lam=0.5, beta=1.0)
    assert (penalty_LE >= 0).all()
    assert (penalty_LE <= importance.usage(sums.prob_sum_LE, sums.tokens_L) + 1e-12).all()


def test_scores_do_not_depend_on_how_tokens_were_batched() -> None:
    g_LBE = router(3)
    parts = [sums_of(g_LBE[:, :7]), sums_of(g_LBE[:, 7:])]
    merged = SimpleNamespace(
        tokens_L=parts[0].tokens_L + parts[1].tokens_L,
        prob_sum_LE=parts[0].prob_sum_LE + parts[1].prob_sum_LE,
        prob_max_LE=np.maximum(parts[0].prob_max_LE, parts[1].prob_max_LE),
        plogp_sum_LE=parts[0].plogp_sum_LE + parts[1].plogp_sum_LE,
        taylor_abs_LE=parts[0].taylor_abs_LE,
    )
    whole = importance.expert_scores(sums_of(g_LBE), "ib", lam=0.5, beta=1.0)
    np.testing.assert_allclose(importance.expert_scores(merged, "ib", lam=0.5, beta=1.0), whole, rtol=1e-12)


def test_a_router_that_ignores_its_input_has_no_penalty() -> None:
    g_LBE = np.broadcast_to(softmax(np.arange(5.0)), (2, 9, 5))
    sums = sums_of(g_LBE)
    kl_LE = importance.kl_terms(sums.prob_sum_LE, sums.plogp_sum_LE, sums.tokens_L)
    np.testing.assert_allclose(kl_LE, 0, atol=1e-15)
    assert (kl_LE >= 0).all()


def test_no_token_gives_finite_scores() -> None:
    sums = sums_of(np.zeros((2, 1, 4)))
    sums.tokens_L[:] = 0
    for score in ("s", "ib", "taylor"):
        assert (importance.expert_scores(sums, score, lam=0.5, beta=1.0) == 0).all()


def test_bad_score_and_lambda_are_named() -> None:
    with pytest.raises(ValueError, match=r"'frequency'.*taylor, reap"):
        importance.expert_scores(sums_of(router()), "frequency", lam=0.5, beta=0.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"lam=1\.5"):
        importance.expert_scores(sums_of(router()), "s", lam=1.5, beta=0.0)


NO_PRIOR = {"prior_taylor_LE": np.zeros((1, 1)), "prior_prob_sum_LE": np.zeros((1, 1))}


def test_absent_estimate_is_own_demand_times_the_fleets_worth_of_it() -> None:
    rng = np.random.default_rng(5)
    demand_CLE = rng.random((3, 2, 4)) + 0.1
    worth_LE = rng.random((2, 4)) + 0.1
    held_CLE = np.zeros((3, 2, 4), dtype=bool)
    held_CLE[0, :, :3] = held_CLE[1, :, 1:] = True
    taylor_CLE = np.where(held_CLE, demand_CLE * worth_LE, 0.0)
    # Where worth per unit of demand really is the same for everybody, the estimate is the truth for all C x L x E.
    filled = importance.estimate_absent(taylor_CLE, demand_CLE, held_CLE, **NO_PRIOR)
    np.testing.assert_allclose(filled, demand_CLE * worth_LE)


def test_absent_estimate_keeps_what_was_measured_and_ignores_what_was_not() -> None:
    rng = np.random.default_rng(6)
    demand_CLE, taylor_CLE = rng.random((2, 3, 2, 4))
    held_CLE = rng.random((3, 2, 4)) < 0.5
    filled = importance.estimate_absent(taylor_CLE, demand_CLE, held_CLE, **NO_PRIOR)
    assert (filled[held_CLE] == taylor_CLE[held_CLE]).all()
    garbage = np.where(held_CLE, taylor_CLE, 1e9)
    np.testing.assert_array_equal(importance.estimate_absent(garbage, demand_CLE, held_CLE, **NO_PRIOR), filled)


def test_absent_estimate_falls_back_to_layer_then_demand_and_uses_the_prior() -> None:
    demand_CLE = np.array([[[2.0, 4.0, 6.0]], [[1.0, 1.0, 3.0]]])
    nobody = np.zeros((2, 1, 3), dtype=bool)
    zeros = np.zeros((2, 1, 3))
    np.testing.assert_array_equal(importance.estimate_absent(zeros, demand_CLE, nobody, **NO_PRIOR), demand_CLE)
    one = nobody.copy()
    one[0, 0, 0] = True
    taylor_CLE = zeros.copy()
    taylor_CLE[0, 0, 0] = 6.0  # worth 3 a unit of demand: all that is known of the layer
    expected = 3 * demand_CLE
    np.testing.assert_allclose(importance.estimate_absent(taylor_CLE, demand_CLE, one, **NO_PRIOR), expected)
    prior = {"prior_taylor_LE": np.array([[0.0, 10.0, 2.0]]), "prior_prob_sum_LE": np.array([[0.0, 2.0, 4.0]])}
    seeded = importance.estimate_absent(taylor_CLE, demand_CLE, one, **prior)
    np.testing.assert_allclose(seeded, demand_CLE * np.array([3.0, 5.0, 0.5]))
