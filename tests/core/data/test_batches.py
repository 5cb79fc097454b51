"""Batches: a function of seed, round and client alone, of one fixed shape."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from fedmoe_core.data import batches
from fedmoe_core.data.batches import Batch, Encoded, client_batches, client_blocks, eval_batches, public_batches

END = 0


def stream(tokens: int) -> Encoded:
    """One piece with ids 1, 2, 3, ... and the end."""
    ids_N = torch.cat([torch.arange(1, tokens), torch.tensor([END])]).to(torch.int32)
    return Encoded(ids_N, torch.tensor([0, tokens]), END)


def rows(lengths: list[int]) -> Encoded:
    """Row r holds r + 1 repeated, then the end; its label is r."""
    offsets_P1 = torch.tensor([0, *np.cumsum(lengths)])
    ids_N = torch.arange(1, len(lengths) + 1).repeat_interleave(torch.tensor(lengths)).to(torch.int32)
    ids_N[offsets_P1[1:] - 1] = END
    return Encoded(ids_N, offsets_P1, END, torch.arange(len(lengths)))


def same(first: Iterator[Batch], second: Iterator[Batch]) -> bool:
    return all(
        torch.equal(a.tokens_SN, b.tokens_SN) and torch.equal(a.mask_SN, b.mask_SN)
        for a, b in zip(first, second, strict=True)
    )


@pytest.mark.parametrize("data", [stream(1000), rows([5] * 40)], ids=["text", "rows"])
def test_inv10_batches_depend_on_seed_round_and_client_only(data: Encoded) -> None:
    size = {"steps": 3, "batch_size": 4, "seq_len": 8}
    base = list(client_batches(data, seed=1, round=2, client=3, **size))
    other = client_batches(data, seed=1, round=2, client=4, **size)
    next(other)  # a draw by another client in between changes nothing
    assert same(iter(base), client_batches(data, seed=1, round=2, client=3, **size))
    for changed in ({"seed": 0}, {"round": 1}, {"client": 0}):
        where = {"seed": 1, "round": 2, "client": 3, **changed}
        assert not same(iter(base), client_batches(data, **where, **size))
    public = list(public_batches(data, seed=1, **size))
    assert not same(iter(base), iter(public))
    assert same(iter(public), public_batches(data, seed=1, **size))
    assert not same(iter(public), public_batches(data, seed=1, purpose="head", **size))


def test_fewer_steps_are_the_first_steps() -> None:
    data = stream(1000)
    where = {"seed": 0, "round": 0, "client": 0, "batch_size": 4, "seq_len": 8}
    whole = list(client_batches(data, steps=5, **where))
    assert same(iter(whole[:2]), client_batches(data, steps=2, **where))


def test_text_windows_are_contiguous_and_reach_both_ends() -> None:
    data = stream(20)
    starts = set()
    for batch in client_batches(data, seed=0, round=0, client=0, steps=20, batch_size=8, seq_len=12):
        assert batch.tokens_SN.dtype == torch.int64
        assert batch.tokens_SN.shape == batch.mask_SN.shape == (8, 12)
        assert batch.labels_S is None
        assert batch.mask_SN.all()
        for row in batch.tokens_SN:
            start = int(row[0]) - 1
            starts.add(start)
            assert torch.equal(row, data.tokens_N[start : start + 12].long())
    assert starts == set(range(9))  # 20 - 12 + 1 places, none missed in 160 draws


def test_a_stream_shorter_than_a_window_is_padded() -> None:
    (batch,) = client_batches(stream(5), seed=0, round=0, client=0, steps=1, batch_size=2, seq_len=8)
    assert batch.tokens_SN.tolist() == [[1, 2, 3, 4, END, END, END, END]] * 2
    assert batch.mask_SN.sum(1).tolist() == [5, 5]


def test_rows_come_once_before_any_comes_twice() -> None:
    data = rows([3] * 10)
    drawn = [
        label
        for batch in client_batches(data, seed=0, round=0, client=0, steps=5, batch_size=4, seq_len=3)
        for label in batch.labels_S.tolist()
    ]
    assert sorted(drawn[:10]) == sorted(drawn[10:20]) == list(range(10))
    (batch,) = client_batches(rows([3]), seed=0, round=0, client=0, steps=1, batch_size=4, seq_len=3)
    assert len(batch) == 4  # one row fills a batch of four


def test_rows_are_padded_or_cut_to_one_shape_and_keep_their_end() -> None:
    (batch,) = eval_batches(rows([2, 4, 7]), batch_size=3, seq_len=4)
    assert batch.tokens_SN.tolist() == [[1, END, END, END], [2, 2, 2, END], [3, 3, 3, END]]
    assert batch.mask_SN.tolist() == [[True, True, False, False], [True] * 4, [True] * 4]
    assert batch.labels_S.tolist() == [0, 1, 2]


def test_evaluation_covers_the_text_once() -> None:
    data = stream(50)
    seen = [row.tolist() for batch in eval_batches(data, batch_size=4, seq_len=8) for row in batch.tokens_SN]
    assert seen == [list(range(8 * i + 1, 8 * i + 9)) for i in range(6)]  # the last 2 tokens fill no window
    some = torch.cat([batch.tokens_SN for batch in eval_batches(data, batch_size=2, seq_len=8, sequences=3)])
    assert some[:, 0].tolist() == [1, 17, 33]  # spread evenly
    assert same(eval_batches(data, batch_size=4, seq_len=8), eval_batches(data, batch_size=4, seq_len=8))
    (short,) = eval_batches(stream(5), batch_size=4, seq_len=8)
    assert short.mask_SN.sum() == 5


def test_evaluation_covers_every_row_once() -> None:
    data = rows([3] * 10)
    sizes = [len(batch) for batch in eval_batches(data, batch_size=4, seq_len=3)]
    assert sizes == [4, 4, 2]
    some = [batch.labels_S.tolist() for batch in eval_batches(data, batch_size=4, seq_len=3, sequences=5)]
    assert some == [[0, 1, 2, 3], [4]]


def test_labeled_rows_can_be_read_as_text() -> None:
    data = rows([3] * 10)
    assert data.samples == 10
    assert data.as_text().samples == 30
    (batch,) = public_batches(data.as_text(), seed=0, steps=1, batch_size=2, seq_len=8)
    assert batch.labels_S is None
    assert batch.mask_SN.all()


@pytest.mark.parametrize("data", [stream(1000), rows([5] * 40), rows([3] * 7)], ids=["text", "rows", "few rows"])
def test_batches_do_not_depend_on_how_many_are_drawn_at_once(data: Encoded, monkeypatch: pytest.MonkeyPatch) -> None:
    where = {"seed": 0, "round": 0, "client": 0, "steps": 7, "batch_size": 4, "seq_len": 8}
    blocks = list(client_blocks(data, **where))
    assert [len(block) for block in blocks] == [28]
    at_once = list(client_batches(data, **where))
    for steps, sizes in ((1, [4] * 7), (3, [12, 12, 4])):
        monkeypatch.setattr(batches, "BLOCK_TOKENS", steps * 4 * 8)
        assert [len(block) for block in client_blocks(data, **where)] == sizes
        assert same(iter(at_once), client_batches(data, **where))
        if data.labels_P is not None:
            labels = [batch.labels_S.tolist() for batch in client_batches(data, **where)]
            assert labels == [batch.labels_S.tolist() for batch in at_once]
