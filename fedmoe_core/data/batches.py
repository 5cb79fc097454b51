"""Batches: the record a model eats, and the seeded draw that makes it from encoded text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fedmoe_core.base.rng import counter_rng

Task = Literal["causal_lm", "classification", "plain"]  # plain: a torch module with a loss of its own
# Drawn at once, because most of a small draw is Python's time; 1.2 MB.
BLOCK_TOKENS = 2**17


@dataclass(frozen=True)
class Batch:
    """Token ids (S sequences of N places), which places are real, and what there is to learn at which of them."""

    tokens_SN: Tensor  # int64
    mask_SN: Tensor  # bool, True = a real token
    labels_S: Tensor | None = None  # int64, classification only
    answers_SN: Tensor | None = None  # bool, True = a token to predict; None = every real one (language modelling)

    def __len__(self) -> int:
        return self.tokens_SN.shape[0]

    @classmethod
    def end_to_end(cls, batches: Sequence[Batch]) -> Batch:
        """Join batches of one sequence length."""
        labels = [batch.labels_S for batch in batches if batch.labels_S is not None]
        tokens_SN, mask_SN = (torch.cat([getattr(b, name) for b in batches]) for name in ("tokens_SN", "mask_SN"))
        answers_SN = None
        if any(batch.answers_SN is not None for batch in batches):  # plain text beside conversations counts as a whole
            answers_SN = torch.cat([b.mask_SN if b.answers_SN is None else b.answers_SN for b in batches])
        return cls(tokens_SN, mask_SN, torch.cat(labels) if labels else None, answers_SN)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Batch:
        """Return the same batch on ``device``; without waiting for it, where ``non_blocking`` and it is pinned."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def staged(self, device: torch.device) -> Batch:
        """Return the same batch on the host; for a GPU in pinned memory, which it reads by itself."""
        return self._each(Tensor.pin_memory) if device.type == "cuda" else self

    def split(self, size: int) -> Iterator[Batch]:
        """Return views of so many sequences each; the last may be smaller."""
        for first in range(0, len(self), size):
            yield self._each(lambda tensor, first=first: tensor[first : first + size])  # type: ignore[misc]

    def first(self, size: int) -> Batch:
        """Return a view of the first ``size`` sequences."""
        return self._each(lambda tensor: tensor[:size])

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        labels_S = None if self.labels_S is None else change(self.labels_S)
        answers_SN = None if self.answers_SN is None else change(self.answers_SN)
        return Batch(change(self.tokens_SN), change(self.mask_SN), labels_S, answers_SN)


@dataclass(frozen=True, eq=False)
class Encoded:
    """P encoded pieces or rows, end to end; each ends with the end token.

    Attributes:
        tokens_N: (N,) int32 ids; piece p is ``tokens_N[offsets_P1[p]:offsets_P1[p + 1]]``.
        offsets_P1: (P + 1,) int64.
        end: the id that ends a piece and fills padding.
        labels_P: (P,) int64 for classification, -1 where the label is withheld; None for language modelling.
        answers_N: (N,) bool, the tokens of answers and the end token after each; None = every token is learnt.
    """

    tokens_N: Tensor
    offsets_P1: Tensor
    end: int
    labels_P: Tensor | None = None
    answers_N: Tensor | None = None

    def __len__(self) -> int:
        return len(self.offsets_P1) - 1

    @property
    def samples(self) -> int:
        """Size of the data |D_c| as aggregation weighs it: rows if labelled, else tokens, of answers or not."""
        return len(self.tokens_N) if self.labels_P is None else len(self)

    def as_text(self) -> Encoded:
        """Return the same tokens without labels, for language modelling on the text of a classification corpus."""
        return replace(self, labels_P=None)

    def take(self, rows: np.ndarray) -> Encoded:
        """Return the given pieces, in the given order."""
        rows_P = torch.from_numpy(np.asarray(rows, dtype=np.int64))
        begins_P = self.offsets_P1[rows_P]  # of these rows alone: a client must not cost what all others hold
        lengths_P = self.offsets_P1[rows_P + 1] - begins_P
        offsets_P1 = torch.cat([torch.zeros(1, dtype=torch.int64), lengths_P.cumsum(0)])
        shift_P = begins_P - offsets_P1[:-1]
        place_N = torch.arange(int(offsets_P1[-1])) + shift_P.repeat_interleave(lengths_P)
        labels_P = None if self.labels_P is None else self.labels_P[rows_P]
        answers_N = None if self.answers_N is None else self.answers_N[place_N]
        return Encoded(self.tokens_N[place_N], offsets_P1, self.end, labels_P, answers_N)


def client_batches(
    data: Encoded, *, seed: int, round: int, client: int, steps: int, batch_size: int, seq_len: int
) -> Iterator[Batch]:
    """Draw the batches of one client in one round; they depend on these arguments only, whatever other clients do.

    Language modelling: windows of ``seq_len`` tokens at uniform places of the client's one long stream; of
    conversations, at uniform places among those whose window holds a token to predict. Classification: rows in random
    order, each once before any comes twice. Every batch has the shape (batch_size, seq_len); padding appears in rows
    shorter than that and in a stream shorter than one window.
    """
    blocks = client_blocks(
        data, seed=seed, round=round, client=client, steps=steps, batch_size=batch_size, seq_len=seq_len
    )
    for block in blocks:
        yield from block.split(batch_size)


def client_blocks(
    data: Encoded, *, seed: int, round: int, client: int, steps: int, batch_size: int, seq_len: int
) -> Iterator[Batch]:
    """Draw ``client_batches``, the sequences of several steps end to end: as many as make up ``BLOCK_TOKENS``."""
    yield from _draw(data, counter_rng(seed, "client batches", round, client), steps, (batch_size, seq_len))


def public_batches(
    data: Encoded, *, seed: int, steps: int, batch_size: int, seq_len: int, purpose: str = "warm-up"
) -> Iterator[Batch]:
    """Draw the batches of central training on public data, as in ``client_batches``; one stream per ``purpose``."""
    for block in _draw(data, counter_rng(seed, f"public {purpose}"), steps, (batch_size, seq_len)):
        yield from block.split(batch_size)


def eval_batches(data: Encoded, *, batch_size: int, seq_len: int, sequences: int = 0) -> Iterator[Batch]:
    """Return fixed batches for evaluation: the same at every call.

    Language modelling: disjoint windows, spread evenly over the stream; of conversations, those that hold a token to
    predict. Classification: the first rows (splits are stored in random order). The last batch may be smaller.

    Args:
        sequences: most windows or rows; 0 = all.
    """
    count = eval_sequences(data, seq_len, sequences=sequences)
    if data.labels_P is None:
        starts_W = _disjoint(data, seq_len)
        starts = starts_W[np.arange(count) * len(starts_W) // count]
        for first in range(0, count, batch_size):
            yield _windows(data, starts[first : first + batch_size], seq_len)
        return
    for first in range(0, count, batch_size):
        yield _rows(data, np.arange(first, min(first + batch_size, count)), seq_len)


def eval_sequences(data: Encoded, seq_len: int, *, sequences: int = 0) -> int:
    """Count the windows or rows of ``eval_batches``."""
    whole = len(_disjoint(data, seq_len)) if data.labels_P is None else len(data)
    return min(sequences or whole, whole)


def _draw(data: Encoded, rng: np.random.Generator, steps: int, shape: tuple[int, int]) -> Iterator[Batch]:
    batch_size, seq_len = shape
    at_once = max(1, BLOCK_TOKENS // (batch_size * seq_len))  # steps of a block
    if data.labels_P is None:
        places = max(0, len(data.tokens_N) - seq_len) + 1
        starts_W = None if data.answers_N is None else _with_answer(data, np.arange(places), seq_len)
        for done in range(0, steps, at_once):
            # Drawn step by step, so that a batch depends neither on the steps after it nor on the size of a block.
            most = places if starts_W is None else len(starts_W)
            drawn_S = np.concatenate(
                [rng.integers(0, most, size=batch_size) for _ in range(min(at_once, steps - done))]
            )
            yield _windows(data, drawn_S if starts_W is None else starts_W[drawn_S], seq_len)
        return
    passes = -(-steps * batch_size // len(data))
    order = np.concatenate([rng.permutation(len(data)) for _ in range(passes)]) if passes else np.zeros(0, np.int64)
    for done in range(0, steps, at_once):
        yield _rows(data, order[done * batch_size : min(done + at_once, steps) * batch_size], seq_len)


def _disjoint(data: Encoded, seq_len: int) -> np.ndarray:
    """Starts of the windows that evaluation may use."""
    return _with_answer(data, np.arange(max(1, len(data.tokens_N) // seq_len)) * seq_len, seq_len)


def _with_answer(data: Encoded, starts_W: np.ndarray, seq_len: int) -> np.ndarray:
    """The starts of windows in which a token is predicted; all of them where that is so in none, whose loss is 0."""
    if data.answers_N is None:
        return starts_W
    before_N1 = np.concatenate([[0], np.cumsum(data.answers_N.numpy(), dtype=np.int64)])
    places = len(data.answers_N)
    # Not the window's first token, which nothing predicts.
    held_W = before_N1[np.minimum(starts_W + seq_len, places)] - before_N1[np.minimum(starts_W + 1, places)]
    return starts_W[held_W > 0] if held_W.any() else starts_W


def _windows(data: Encoded, starts_S: np.ndarray, seq_len: int) -> Batch:
    place_SN = torch.from_numpy(np.asarray(starts_S, dtype=np.int64))[:, None] + torch.arange(seq_len)
    mask_SN = place_SN < len(data.tokens_N)
    inside_SN = place_SN.clamp(max=len(data.tokens_N) - 1)
    tokens_SN = data.tokens_N[inside_SN].to(torch.int64).masked_fill(~mask_SN, data.end)
    answers_SN = None if data.answers_N is None else data.answers_N[inside_SN] & mask_SN
    return Batch(tokens_SN, mask_SN, answers_SN=answers_SN)


def _rows(data: Encoded, rows_S: np.ndarray, seq_len: int) -> Batch:
    """Rows cut to ``seq_len``, the end token kept as the last place, and padded to it."""
    assert data.labels_P is not None
    index_S = torch.from_numpy(np.asarray(rows_S, dtype=np.int64))
    length_S = data.offsets_P1.diff()[index_S]
    inside_SN = torch.arange(seq_len)[None]
    mask_SN = inside_SN < length_S[:, None]
    place_SN = (data.offsets_P1[:-1][index_S][:, None] + inside_SN).clamp(max=len(data.tokens_N) - 1)
    tokens_SN = data.tokens_N[place_SN].to(torch.int64).masked_fill(~mask_SN, data.end)
    tokens_SN[length_S > seq_len, -1] = data.end
    return Batch(tokens_SN, mask_SN, data.labels_P[index_S])
