"""Validation data: a tenth of each client's own, out of training only where an algorithm needs it, always the same."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from tiny_corpus import make_config, write_text, write_topics

from fedmoe_core.data.federated import FederatedData, load_data
from fedmoe_core.data.splits import Splits, with_validation
from fedmoe_core.simulation.world import validation_batches


def splits(*sizes: int) -> Splits:
    edges = np.cumsum([0, *sizes])
    private = tuple(np.arange(a, b) for a, b in itertools.pairwise(edges))
    none = np.zeros(0, dtype=np.int64)
    return Splits(none, none, none, private, private, "iid")


def test_a_tenth_and_at_least_one_row_is_held_back() -> None:
    whole = splits(100, 14, 15, 2)
    held = with_validation(whole, seed=0)
    assert [len(rows) for rows in held.validation] == [10, 1, 2, 1]
    for rows, private, validation in zip(whole.private, held.private, held.validation, strict=True):
        assert sorted([*private, *validation]) == list(rows)
        assert list(private) == sorted(private)  # the order of training rows is what it was
    assert held.tests == whole.tests


def test_the_rows_depend_on_the_seed_and_the_client_alone() -> None:
    one, two = with_validation(splits(50, 60), seed=3), with_validation(splits(50, 61, 9), seed=3)
    np.testing.assert_array_equal(one.validation[0], two.validation[0])
    assert not np.array_equal(one.validation[0], with_validation(splits(50, 60), seed=4).validation[0])


def test_a_client_with_one_row_is_named() -> None:
    with pytest.raises(ValueError, match="client 1 owns 1 private row and needs 2"):
        with_validation(splits(5, 1), seed=0)


def load(path: Path, *, validation: bool) -> FederatedData:
    kind = path.suffix.removeprefix(".")
    return load_data(f"{kind}:{path}", clients=3, seed=0, vocab_size=300, validation=validation)


@pytest.mark.parametrize("labeled", [True, False])
def test_data_is_untouched_unless_validation_is_asked_for(tmp_path: Path, labeled: bool) -> None:
    path = write_topics(tmp_path / "t.csv") if labeled else write_text(tmp_path / "n.jsonl")
    plain, held = load(path, validation=False), load(path, validation=True)
    assert plain.public_sha256 == held.public_sha256  # one warm-up serves both
    for before, after in zip(plain.clients, held.clients, strict=True):
        assert before.validation is None
        assert after.validation is not None
        assert len(after.validation) == max(1, round(len(before.private) / 10))
        assert len(after.private) + len(after.validation) == len(before.private)
        assert len(after.test) == len(before.test)
    assert held.counts_CD.sum(axis=1).tolist() == [client.samples for client in held.clients]


def test_validation_batches_have_the_shape_of_training(tmp_path: Path) -> None:
    config = make_config(tmp_path, tmp_path / "shared")("eval.validation=3", labeled=True)
    data = load(write_topics(tmp_path / "t.csv"), validation=True)
    batches = list(validation_batches(data.clients[0], config))
    assert [batch.tokens_SN.shape for batch in batches] == [(2, 32), (1, 32)]
    assert list(validation_batches(load(tmp_path / "t.csv", validation=False).clients[0], config)) == []
