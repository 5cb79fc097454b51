"""Rows dealt to clients, and the batches drawn from them."""

from __future__ import annotations

import pytest
import torch
from small_plain import blobs

from fedmoe_core.data.rows import deal_rows, draw_places, rows_digest, rows_of_steps

TEST = blobs(10, seed=9)


def test_every_row_has_one_owner_and_labels_are_counted() -> None:
    train = blobs(200)
    data = deal_rows(train, TEST, clients=7, scheme="auto", seed=3)
    assert data.partition == "dirichlet:0.5"
    owned = torch.cat(data.rows_C)
    assert sorted(owned.tolist()) == list(range(200))
    assert data.names_D == ("class 0", "class 1", "class 2")
    for client, rows in enumerate(data.rows_C):
        counted = torch.bincount(train[1][rows], minlength=3)
        assert counted.tolist() == data.counts_CD[client].tolist()
    again, other = (deal_rows(train, TEST, clients=7, scheme="auto", seed=seed) for seed in (3, 4))
    assert again.counts_CD.tolist() == data.counts_CD.tolist() != other.counts_CD.tolist()


def test_the_digest_is_of_the_rows_and_of_whose_they_are() -> None:
    train = blobs(20)
    digest = rows_digest(train, TEST)
    assert rows_digest(tuple(tensor.clone() for tensor in train), TEST) == digest
    changed = train[0].clone()
    changed[3, 2] += 1e-6
    parts = [[tuple(tensor[:cut] for tensor in train), tuple(tensor[cut:] for tensor in train)] for cut in (8, 9)]
    others = [rows_digest((changed, train[1]), TEST), rows_digest(train, train), *(rows_digest(p, TEST) for p in parts)]
    assert len({digest, *others}) == 5


def test_rows_without_labels_are_dealt_evenly() -> None:
    data = deal_rows((torch.randn(20, 3), torch.randn(20)), TEST, clients=4, scheme="auto", seed=0)
    assert data.partition == "iid"
    assert data.counts_CD.tolist() == [[5]] * 4


def test_clients_may_come_with_their_own_rows() -> None:
    own = [blobs(4, seed=1), blobs(9, seed=2)]
    data = deal_rows(own, TEST, clients=2, scheme="iid", seed=0)
    assert data.partition == "given"
    for rows, (inputs, labels) in zip(data.rows_C, own, strict=True):
        found = data.batch(rows)
        assert torch.equal(found[0], inputs)
        assert torch.equal(found[1], labels)


@pytest.mark.parametrize(
    ("train", "words", "match"),
    [
        ((torch.ones(3, 2), torch.ones(4)), {}, r"the tensors of train have \[3, 4\] rows"),
        ((), {}, "train holds nothing"),
        ((torch.tensor(1.0),), {}, "train must be tensors with a row for each sample"),
        ([blobs(4), blobs(4)], {"clients": 3}, "train has the rows of 2 clients and clients=3"),
        ((torch.ones(30, 2), torch.ones(30)), {"scheme": "dirichlet:1"}, "deals by label, and the last tensor holds"),
        (blobs(2), {"clients": 3}, "clients=3 needs 3 rows"),
    ],
)
def test_rows_that_cannot_be_dealt_are_refused(train: object, words: dict[str, object], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        deal_rows(train, TEST, **{"clients": 2, "scheme": "auto", "seed": 0, **words})  # type: ignore[arg-type]


def test_a_pass_reads_every_row_once() -> None:
    own = torch.arange(100, 123)
    batches = list(draw_places(own, (0, 1, 2), steps=6, batch_size=8, by_epoch=True))
    assert [len(batch) for batch in batches] == [8, 8, 7] * 2
    for part in (batches[:3], batches[3:]):
        assert sorted(torch.cat(part).tolist()) == own.tolist()
    assert not torch.equal(torch.cat(batches[:3]), torch.cat(batches[3:]))
    assert rows_of_steps(23, 6, batch_size=8, by_epoch=True) == 46
    assert rows_of_steps(23, 4, batch_size=8, by_epoch=True) == 31


def test_steps_read_full_batches_and_no_row_twice_before_all_once() -> None:
    own = torch.arange(5)
    batches = list(draw_places(own, (0, 1, 2), steps=4, batch_size=3, by_epoch=False))
    assert [len(batch) for batch in batches] == [3] * 4
    assert sorted(torch.cat(batches)[:5].tolist()) == own.tolist()
    assert rows_of_steps(5, 4, batch_size=3, by_epoch=False) == 12


def test_batches_depend_on_seed_round_and_client_alone() -> None:
    def drawn(*key: int) -> list[int]:
        return torch.cat(list(draw_places(torch.arange(40), key, steps=2, batch_size=8, by_epoch=False))).tolist()  # type: ignore[arg-type]

    assert drawn(0, 1, 2) == drawn(0, 1, 2)
    assert len({tuple(drawn(*key)) for key in [(0, 1, 2), (1, 1, 2), (0, 2, 2), (0, 1, 3)]}) == 4
