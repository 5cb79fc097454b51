"""Losses of conversations: answers alone count, in training, in evaluation and of clients at once."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from stock_models import batch_of, relative, stock_model
from tiny_corpus import make_config
from torch.nn.functional import cross_entropy

from fedmoe_bindings.transformers import TransformersAdapter
from fedmoe_core.simulation import run as simulate
from fedmoe_core.simulation.observer import NullObserver


def test_only_answers_are_predicted_and_they_read_everything() -> None:
    adapter = TransformersAdapter(stock_model("olmoe"))
    batch = batch_of(lengths=(11, 7, 4))
    answers_SN = torch.zeros_like(batch.mask_SN)
    answers_SN[0, 3:6] = answers_SN[1, 6] = answers_SN[0, 0] = True  # the first token has no predecessor
    batch = replace(batch, labels_S=None, answers_SN=answers_SN)
    logits_SNV = adapter.model(input_ids=batch.tokens_SN, attention_mask=batch.mask_SN.long()).logits.double()
    places = [(0, 3), (0, 4), (0, 5), (1, 6)]
    losses = [cross_entropy(logits_SNV[row, place - 1], batch.tokens_SN[row, place]) for row, place in places]
    want = torch.stack(losses).mean()
    loss = adapter.loss(batch)
    assert relative(loss, want) < 1e-5
    found = adapter.evaluate(batch)
    assert found.count == 4
    assert found.loss_sum == pytest.approx(4 * want.item(), rel=1e-5)
    parts = adapter.evaluate_parts(batch, [1, 2])
    assert [part.count for part in parts] == [3, 1]
    assert sum(part.loss_sum for part in parts) == pytest.approx(found.loss_sum, rel=1e-5)
    shown = adapter.place_losses(batch)
    assert shown.total.count == 4
    assert sorted(map(tuple, shown.counted_SN.nonzero().tolist())) == [(row, place - 1) for row, place in places]
    assert relative(adapter.text_loss(batch), want) < 1e-5


def test_a_batch_without_answers_has_loss_0_and_no_gradient() -> None:
    adapter = TransformersAdapter(stock_model("olmoe"))
    batch = batch_of()
    loss = adapter.loss(replace(batch, answers_SN=torch.zeros_like(batch.mask_SN)))
    loss.backward()
    assert float(loss) == 0.0
    assert all(p.grad is None or not p.grad.any() for p in adapter.model.parameters())


def test_clients_at_once_learn_from_answers_as_one_by_one(tmp_path: Path) -> None:
    talks = tmp_path / "talks.jsonl"
    lines = []
    for owner in ("ann", "bob"):
        for n in range(60):
            ask = {"role": "user", "content": f"{owner} adds {n} and {n % 7}, which is noise {n * 977 % 101}"}
            lines.append(
                {"messages": [ask, {"role": "assistant", "content": f"{owner}: {n + n % 7}"}], "client": owner}
            )
    talks.write_text("\n".join(map(json.dumps, lines)))
    make = make_config(tmp_path, tmp_path / "tiny")
    losses = []
    for clients in (1, 2):
        config = make(
            *(f"data=jsonl:{talks}", "clients=2", "rounds=2", "train.trunk=frozen", f"cohort.clients={clients}"),
            *("budgets=['experts=50%', 'unlimited']", f"out={tmp_path / str(clients)}"),
        )
        summary = simulate.run(config, observer=NullObserver())
        assert summary["loss_after"] < summary["loss_before"]
        losses.append(summary["loss_after"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
