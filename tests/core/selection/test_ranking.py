"""Every score that ranks experts, against a computation in plain float64 torch, token by token."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import mse_loss, silu

from fedmoe_core.config.sections import SelectionConfig
from fedmoe_core.layer.moe import MoE
from fedmoe_core.selection.names import BEST, RANKINGS
from fedmoe_core.selection.ranking import all_scores, ranked
from fedmoe_core.simulation.scoring import Scoring, score_experts

E, K, H, INNER, T = 5, 2, 6, 7, 12
SELECTION = SelectionConfig(lam=0.3, beta=0.7)


@dataclass(frozen=True)
class Rows:
    """A batch of one layer: inputs, targets and real tokens."""

    x_TH: Tensor
    target_TH: Tensor
    real_T: Tensor

    def to(self, _: object) -> Rows:
        return self


class OneLayer:
    """An adapter whose model is one float64 layer and whose loss is a mean squared error over real tokens."""

    def __init__(self) -> None:
        torch.manual_seed(3)
        self.model = MoE(H, INNER, E, K, with_stats=True, with_scores=True, dtype=torch.float64)
        with torch.no_grad():
            for tensor in self.model.parameters():
                tensor.normal_()
            self.model.router[E - 1] = 0  # seldom chosen, so that rows differ widely
        self.moe, self.spec = (self.model,), SimpleNamespace(num_experts=E)

    def configure(self, state: Any, submodel: Any) -> None:
        assert not submodel.train_dense

    def loss(self, batch: Rows) -> Tensor:
        y_TH = self.model(batch.x_TH, batch.real_T)
        return mse_loss(y_TH[batch.real_T], batch.target_TH[batch.real_T])


def batches() -> list[Rows]:
    torch.manual_seed(4)
    real_T = torch.arange(T) % 5 != 3
    return [Rows(*torch.randn(2, T, H, dtype=torch.float64), real_T) for _ in range(2)]


def by_hand(layer: MoE) -> dict[str, Tensor]:
    """All scores by their definitions: tokens one by one, the gradient of the router's weights by autograd."""
    sums = {name: torch.zeros(E, dtype=torch.float64) for name in ("abs", "signed", "norms", "rows")}
    seen: list[Tensor] = []
    for batch in batches():
        x_TH, target_TH = batch.x_TH[batch.real_T], batch.target_TH[batch.real_T]
        g_TE = (x_TH @ layer.router.detach().T).softmax(1)
        seen.append(g_TE)
        weights_TK, experts_TK = g_TE.topk(K)
        weights_TK = (weights_TK / weights_TK.sum(1, keepdim=True)).requires_grad_()
        outputs_TKH = torch.stack(
            [
                torch.stack([expert(layer, int(e), x_H) for e in experts_K])
                for x_H, experts_K in zip(x_TH, experts_TK, strict=True)
            ]
        )
        mse_loss((weights_TK[..., None] * outputs_TKH).sum(1), target_TH).backward()
        assert weights_TK.grad is not None
        taylor_TK = weights_TK.detach() * weights_TK.grad
        for token, experts_K in enumerate(experts_TK):
            for choice, e in enumerate(experts_K):
                sums["rows"][e] += 1
                sums["abs"][e] += taylor_TK[token, choice].abs()
                sums["signed"][e] -= taylor_TK[token, choice]
                sums["norms"][e] += weights_TK[token, choice].detach() * outputs_TKH[token, choice].norm()
    g_TE = torch.cat(seen)
    p_E = g_TE.mean(0)
    s_E = SELECTION.lam * p_E + (1 - SELECTION.lam) * g_TE.max(0).values
    return {
        "taylor": sums["abs"] / 2,
        "taylor_signed": sums["signed"] / 2,
        "s": s_E,
        "ib": s_E - SELECTION.beta * (g_TE * (g_TE / p_E).log()).mean(0),
        "reap": sums["norms"] / sums["rows"].clamp(min=1),
        "reap_sum": sums["norms"] / len(g_TE),
        "frequency": sums["rows"] / len(g_TE),
    }


def expert(layer: MoE, e: int, x_H: Tensor) -> Tensor:
    gate_I, up_I = (layer.w_in[e].detach() @ x_H).chunk(2)
    return layer.w_out[e].detach() @ (silu(gate_I) * up_I)


@pytest.fixture(scope="module")
def scored() -> tuple[OneLayer, Scoring]:
    adapter: Any = OneLayer()
    return adapter, score_experts(adapter, {}, batches(), SELECTION)


@pytest.mark.parametrize("name", RANKINGS)
def test_a_score_is_what_its_definition_says(name: str, scored: tuple[OneLayer, Scoring]) -> None:
    adapter, found = scored
    want_E = by_hand(adapter.model)[name].numpy()
    assert np.ptp(want_E) > 1e-3
    # The importance sums of a layer are kept in float32; all else is float64.
    loose = 1e-5 if name.startswith(("taylor", "reap")) else 1e-12
    np.testing.assert_allclose(found.scores[name][0], want_E, rtol=loose, atol=loose * abs(want_E).max())


def test_tokens_are_counted_and_padding_is_not(scored: tuple[OneLayer, Scoring]) -> None:
    _, found = scored
    real = int(batches()[0].real_T.sum())
    assert found.tokens_L.tolist() == [2 * real]
    assert found.tokens_LE.sum() == 2 * real * K
    facts = found.facts("reap")
    order = facts["ranking"][0]
    assert [facts["scores"]["reap"][0][e] for e in order] == sorted(facts["scores"]["reap"][0], reverse=True)
    assert facts["tokens_by_expert"] == found.tokens_LE.tolist()


def test_reap_is_that_of_the_experts_that_are_held_and_of_frozen_ones() -> None:
    whole, layer, held = OneLayer().model, OneLayer().model, [0, 1, 3]
    layer.set_experts([e in held for e in range(E)], [e == 1 for e in range(E)])
    x_TH, want_E, got_E = batches()[0].x_TH, *torch.zeros(2, E, dtype=torch.float64)
    layer(x_TH).sum().backward()
    weights_TK, choices_TK = (x_TH @ whole.router.detach()[held].T).softmax(1).topk(K)
    for x_H, weights_K, choices_K in zip(x_TH, weights_TK, choices_TK, strict=True):
        for weight, choice in zip(weights_K / weights_K.sum(), choices_K, strict=True):
            want_E[held[int(choice)]] += weight * expert(whole, held[int(choice)], x_H).norm()
    assert layer.scores is not None
    got_E[list(layer.experts)] = layer.scores.reap_B.double()
    torch.testing.assert_close(got_E, want_E, rtol=1e-5, atol=0)


def test_equal_scores_rank_by_id_and_no_batch_is_refused() -> None:
    assert ranked(np.array([[1.0, 2.0, 2.0], [0.0, 0.0, 0.0]])).tolist() == [[1, 2, 0], [0, 1, 2]]
    profile: Any = None
    with pytest.raises(ValueError, match="batches=0"):
        all_scores(profile, batches=0, lam=0.5, beta=0.1)
    assert BEST in RANKINGS
