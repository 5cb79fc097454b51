"""What one client holds, on its own device: its part of a run's corpus, or its owner's own text."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from fedmoe_core.base.rng import counter_rng
from fedmoe_core.config.run_config import Config
from fedmoe_core.data.batches import Encoded
from fedmoe_core.data.federated import ClientData, FederatedData, load_corpus
from fedmoe_core.data.tokenizing import encode_corpus, from_json
from fedmoe_core.messages.wire.greeting import Vocabulary
from fedmoe_core.simulation.prepare import cache_directory, read_data
from fedmoe_core.simulation.process_group import Ranks
from fedmoe_core.simulation.remote.words import Words

VALIDATION_SHARE = 10  # one row of so many is held back, as in a simulation


@dataclass(frozen=True, eq=False)
class OwnData:
    """One client's data.

    Attributes:
        client: encoded text; its held-out part is empty, for the server judges by its own.
        vocabulary: how it was encoded.
        counts_D: int64, private rows of each class, or tokens of each domain of the server's corpus; empty = unknown.
        vocab_size: token ids of the tokenizer.
    """

    client: ClientData
    vocabulary: Vocabulary
    counts_D: np.ndarray
    vocab_size: int

    @property
    def task(self) -> str:
        """What the model is trained for."""
        return "classification" if self.vocabulary.classes else "causal_lm"

    @property
    def class_shares_C(self) -> np.ndarray | None:
        """Class shares, one row of each class added; None without classes."""
        if not self.vocabulary.classes:
            return None
        counts_D = self.counts_D + 1.0
        return np.asarray(counts_D / counts_D.sum())


def vocabulary_of(data: FederatedData) -> Vocabulary:
    """Return how text becomes numbers in this run."""
    tokenizer = data.tokenizer
    return Vocabulary(tokenizer.kind, tokenizer.to_json(), tokenizer.end, tuple(data.class_names))


def own_data(words: Words, config: Config, vocabulary: Vocabulary, *, validation: bool) -> OwnData:
    """Read and encode what this device holds.

    Args:
        words, config: of the owner, and of the run on this device.
        vocabulary: the server's.
        validation: whether a tenth is held back.

    Raises:
        ValueError, OSError: the text cannot be read, or does not fit the run.
    """
    if words.text:
        return _from_text(words, config, vocabulary, validation=validation)
    data = read_data(config, Ranks(), validation=validation)
    if words.client >= len(data.clients):
        raise ValueError(f"client={words.client} is not in a run of {len(data.clients)} clients; they count from 0")
    found = vocabulary_of(data)
    if found.digest != vocabulary.digest:
        raise ValueError(f"data={config.data} is not the text of the server; give it the same, or set text=FILE")
    return OwnData(data.clients[words.client], found, data.counts_CD[words.client], data.tokenizer.vocab_size)


def _from_text(words: Words, config: Config, vocabulary: Vocabulary, *, validation: bool) -> OwnData:
    corpus = load_corpus(words.text)
    tokenizer = from_json(vocabulary.kind, vocabulary.tokenizer, vocabulary.end)
    _, encoded = encode_corpus(
        corpus.texts,
        np.zeros(0, np.int64),
        kind=vocabulary.kind,
        vocab_size=tokenizer.vocab_size,
        corpus_sha256=corpus.sha256,
        pretrained=tokenizer,
        cache=cache_directory(config),
        conversations=corpus.conversations,
    )
    if vocabulary.classes:
        encoded = replace(encoded, labels_P=_labels(words, corpus.labels_P, corpus.class_names, vocabulary))
    rows = np.arange(len(encoded))
    held_back = rows[:0]
    if validation:
        order = counter_rng(config.seed, "validation", words.client).permutation(len(rows))
        cut = max(1, len(rows) // VALIDATION_SHARE)
        held_back, rows = np.sort(order[:cut]), np.sort(order[cut:])
    private = encoded.take(rows)
    name = words.name or f"client {words.client}"
    client = ClientData(name, private, private.take(rows[:0]), encoded.take(held_back) if validation else None)
    return OwnData(client, vocabulary, _counts(private, len(vocabulary.classes)), tokenizer.vocab_size)


def _labels(words: Words, labels_P: np.ndarray | None, names: tuple[str, ...], vocabulary: Vocabulary) -> torch.Tensor:
    """The server's number of each row's class."""
    if labels_P is None:
        raise ValueError(f"text={words.text} has no labels, and this run classifies; give rows with labels")
    if strange := sorted(set(names) - set(vocabulary.classes)):
        known = ", ".join(vocabulary.classes)
        raise ValueError(f"text={words.text} has class {strange[0]!r}, and this run knows {known}; rename it")
    number = np.array([vocabulary.classes.index(name) for name in names], np.int64)
    return torch.from_numpy(number[labels_P])


def _counts(private: Encoded, classes: int) -> np.ndarray:
    if private.labels_P is None:
        return np.zeros(0, np.int64)
    return np.bincount(private.labels_P.numpy(), minlength=classes).astype(np.int64)
