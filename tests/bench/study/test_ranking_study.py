"""The study of rankings: one seed of few steps, one loss difference by hand, and the published table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_runs import TINY, write_notes
from torch import Tensor
from torch.nn.functional import silu

from bench.study import ranking
from fedmoe_core.selection.names import AGREEMENT, BEST, RANKINGS
from fedmoe_core.simulation.observer import NullObserver
from fedmoe_core.simulation.prepare import Sources, read_sources, warm_model
from fedmoe_core.simulation.process_group import Ranks

DOCS = Path(__file__).resolve().parents[3] / "docs" / "benchmarks.md"


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Sources:
    place = tmp_path_factory.mktemp("ranking")
    words = [
        *TINY,
        f"data=jsonl:{write_notes(place / 'notes.jsonl')}",
        f"cache={place / 'cache'}",
        "warmup.steps=60",
        "warmup.lr=1e-2",
    ]
    return read_sources(ranking.config_of(0, words), Ranks(device=torch.device("cpu")), NullObserver())


@pytest.fixture(scope="module")
def part(sources: Sources) -> dict[str, Any]:
    return ranking.study(sources)


def without_expert(params: dict[str, Tensor], layer: int, expert: int, x: Tensor) -> Tensor:
    """The layer in plain loops, the expert's logit at -inf: softmax, two choices, renormalised."""
    router, w_in, w_out = (params[f"moe.{layer}.{name}"] for name in ("router", "w_in", "w_out"))
    x_TH = x.reshape(-1, x.shape[-1])
    logits_TE = x_TH @ router.T
    logits_TE[:, expert] = -torch.inf
    weights_TK, experts_TK = logits_TE.softmax(1).topk(2)
    weights_TK = weights_TK / weights_TK.sum(1, keepdim=True)
    y_TH = torch.zeros_like(x_TH)
    for choice in range(2):
        for e in range(len(router)):
            chosen_T = experts_TK[:, choice] == e
            gate, up = (x_TH[chosen_T] @ w_in[e].T).chunk(2, dim=1)
            y_TH[chosen_T] += weights_TK[chosen_T, choice, None] * ((silu(gate) * up) @ w_out[e].T)
    return y_TH.reshape(x.shape)


@pytest.mark.parametrize("layer", [0, 1])
def test_a_loss_difference_is_that_of_the_model_without_the_expert(
    layer: int, sources: Sources, part: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    expert = int(np.abs(part["rise"][layer]).argmax())
    adapter = sources.adapter
    params = warm_model(sources, NullObserver(), train=True, before_training=lambda untrained: None)
    batches = ranking.held_out_batches(sources.config, sources.data)
    adapter.configure(params)
    whole, counts = ranking.held_out_losses(adapter, batches)
    monkeypatch.setattr(
        adapter.moe[layer], "forward", lambda x, **_: without_expert(params, layer, expert, x), raising=False
    )
    left, _ = ranking.held_out_losses(adapter, batches)
    want = (left - whole).sum() / counts.sum()
    assert abs(want) > 3e-5
    # Two losses of 5.7 in float32 are subtracted; their mean over 512 places errs by about 1e-8.
    assert part["rise"][layer][expert] == pytest.approx(want, rel=5e-3)
    others = np.delete(part["rise"][layer], expert)
    assert np.abs(others - want).min() > 5e-3 * abs(want), "the wrong expert would not do"


def test_a_seed_has_a_correlation_for_every_score_and_text(part: dict[str, Any]) -> None:
    assert set(part["correlations"]) == set(ranking.TEXTS)
    for found in part["correlations"].values():
        assert list(found) == list(RANKINGS)
        assert all(-1 <= value <= 1 for kinds in found.values() for value in kinds.values())
    assert part["held_out_tokens"] > 0


def test_correlations_are_those_of_ranks() -> None:
    rise_LE = np.array([[0.1, 0.2, 0.3, 0.4], [9.0, 8.0, 7.0, 6.0]])
    same = ranking.correlations(rise_LE**3, rise_LE)
    assert all(value == pytest.approx(1) for value in same.values())
    crossed = ranking.correlations(np.array([[1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 3.0, 4.0]]), rise_LE)
    assert crossed["spearman within layers"] == pytest.approx(0)  # +1 in one layer, -1 in the other
    assert crossed["kendall within layers"] == pytest.approx(0)
    # One pair of neighbours is exchanged: 1 - 6 * 2 / (4 * 15), and 5 of 6 pairs less 1.
    swapped = ranking.correlations(np.array([[1.0, 3.0, 2.0, 4.0]]), rise_LE[:1])
    assert swapped["spearman all experts"] == pytest.approx(0.8)
    assert swapped["kendall all experts"] == pytest.approx(4 / 6)
    assert ranking.correlations(np.ones((1, 4)), rise_LE[:1])["spearman all experts"] == 0


def test_the_page_shows_the_table_of_the_record_and_the_best_is_the_default() -> None:
    record = ranking.read()
    assert [part["seed"] for part in record["seeds"]] == list(ranking.SEEDS)
    assert "\n".join(ranking.lines(record)) in DOCS.read_text("utf-8")
    medians = {name: ranking.medians(record, "public", name)["spearman within layers"][0] for name in RANKINGS}
    assert max(medians, key=lambda name: medians[name]) == BEST
    assert round(medians[BEST], 2) == AGREEMENT
