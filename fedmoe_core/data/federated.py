"""From ``data=...`` to encoded splits: the one call that a run makes."""

from __future__ import annotations

import sysconfig
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import cast

import numpy as np
import torch

from fedmoe_core.base.wording import unknown
from fedmoe_core.data.batches import Encoded, Task
from fedmoe_core.data.corpus import Corpus, read_bytes
from fedmoe_core.data.packed.read_dataset import dataset_digest, read_dataset
from fedmoe_core.data.packed.read_parquet import parquet_digest, read_parquet
from fedmoe_core.data.packed.read_spam import read_spam, spam_digest
from fedmoe_core.data.read_csv import read_csv
from fedmoe_core.data.read_folder import folder_digest, read_folder
from fedmoe_core.data.read_jsonl import read_jsonl
from fedmoe_core.data.read_stdlib import read_stdlib, stdlib_digest
from fedmoe_core.data.splits import Splits, count_holdings, split_corpus, with_validation
from fedmoe_core.data.tokenizing import DEFAULT_VOCAB, Kind, TextTokenizer, encode_corpus

SOURCES = ("stdlib", "csv:FILE", "jsonl:FILE", "folder:DIR", "parquet:FILE_OR_DIR", "hf:DIR", "spam:DIR")
_READERS = {
    "stdlib": read_stdlib,
    "csv": read_csv,
    "jsonl": read_jsonl,
    "folder": read_folder,
    "parquet": read_parquet,
    "hf": read_dataset,
    "spam": read_spam,
}
_DIGESTS = {  # of any other: that of the file
    "stdlib": stdlib_digest,
    "folder": folder_digest,
    "parquet": parquet_digest,
    "hf": dataset_digest,
    "spam": spam_digest,
}


@dataclass(frozen=True, eq=False)
class ClientData:
    """Private text of one client to train on, and held-out text to judge it by.

    ``validation`` is private text too, held back from training where the algorithm needs it; else None.
    """

    name: str  # its domains, or "client 3"
    private: Encoded
    test: Encoded
    validation: Encoded | None = None

    @property
    def samples(self) -> int:
        """|D_c|: private tokens (language modelling) or rows (classification)."""
        return self.private.samples


@dataclass(frozen=True, eq=False)
class FederatedData:
    """A corpus, split and encoded; C clients, D classes or domains.

    Attributes:
        source, partition, seed: what made it; ``partition`` is resolved (never ``auto``).
        public: text the server may use. Classification: labels are -1 except in ``public_labelled``'s rows.
        public_labelled: the public rows with a label, at most ``labels_per_class`` of each class; None for language
            modelling.
        clients: C clients.
        test: the global test split (classification); None for language modelling, where the clients' own count.
        class_names: empty for language modelling.
        names_D, counts_CD: what each has: int64 private rows by class, or private tokens by domain; the row sums are
            the clients' ``samples``.
        corpus_sha256: of the raw text.
        public_sha256: of the tokenizer, the public tokens and the labels given; two runs that agree here have the
            same warm-up.
        splits: the rows themselves, for yardsticks on raw text.
    """

    source: str
    task: Task
    partition: str
    seed: int
    tokenizer: TextTokenizer
    public: Encoded
    public_labeled: Encoded | None
    clients: tuple[ClientData, ...]
    test: Encoded | None
    class_names: tuple[str, ...]
    names_D: tuple[str, ...]
    counts_CD: np.ndarray
    corpus_sha256: str
    public_sha256: str
    splits: Splits

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def class_shares(self, client: int) -> np.ndarray | None:
        """Return the client's class shares, one row of each class added so that none is 0; None without classes."""
        if self.task != "classification":
            return None
        counts_D = self.counts_CD[client] + 1.0
        return counts_D / counts_D.sum()


def load_corpus(source: str) -> Corpus:
    """Read one of ``SOURCES``.

    Raises:
        ValueError: unknown scheme, or content that cannot be used; the message names the line.
        OSError: the file cannot be read.
    """
    scheme, path = _scheme_and_path(source)
    return _READERS[scheme](path)


def corpus_digest(source: str) -> str:
    """Digest the raw text as it is now, without parsing it: the ``sha256`` of the corpus that ``load_corpus`` gives.

    Raises:
        ValueError, OSError: as ``load_corpus``, where the file cannot be read at all.
    """
    scheme, path = _scheme_and_path(source)
    return _DIGESTS[scheme](path) if scheme in _DIGESTS else sha256(read_bytes(path)).hexdigest()


def _scheme_and_path(source: str) -> tuple[str, Path]:
    scheme, colon, name = source.partition(":")
    if scheme not in _READERS or (scheme == "stdlib" and colon):
        raise unknown(f"data {source!r}", source, SOURCES)
    if scheme == "stdlib":
        return scheme, Path(sysconfig.get_path("stdlib"))
    if not name:
        form = next(form for form in SOURCES if form.startswith(f"{scheme}:"))
        raise ValueError(f"data {source!r} names no file; write {form}")
    return scheme, Path(name)


def load_data(
    source: str = "stdlib",
    *,
    clients: int = 10,
    partition: str = "auto",
    seed: int = 0,
    tokenizer: str = "auto",
    vocab_size: int | None = None,
    labels_per_class: int = 25,
    validation: bool = False,
    pretrained: TextTokenizer | None = None,
    cache: Path | None = None,
) -> FederatedData:
    """Read, split, tokenize and encode; equal arguments on equal text give equal bits.

    Args:
        source: one of ``SOURCES``.
        clients: C.
        partition: ``domain``, ``iid``, ``dirichlet:ALPHA``, or ``auto``: ``domain`` where the corpus has domains, else
            ``dirichlet:0.5`` over classes, or ``iid`` for unlabelled text.
        tokenizer: ``bpe``, ``bpe-lower``, ``word``, or ``auto``: ``bpe`` for language modelling, else ``bpe-lower``.
        vocab_size: most ids; None = 2048 (``bpe``), 4096 (``bpe-lower``) or 8000 (``word``).
        labels_per_class: public rows of each class that come with their label (classification).
        validation: whether a tenth of each client's private data is held back for validation.
        pretrained: a model's own tokenizer, instead of ``tokenizer`` and ``vocab_size``.
        cache: folder for encoded corpora; None = encode at every call.

    Raises:
        ValueError, OSError: one sentence that names the offender and the remedy.
    """
    corpus = load_corpus(source)
    kind = _kind(tokenizer, corpus.task)
    splits = split_corpus(corpus, clients=clients, scheme=partition, seed=seed, labels_per_class=labels_per_class)
    if validation:
        splits = with_validation(splits, seed=seed)
    trained, encoded = encode_corpus(
        corpus.texts,
        splits.public_P,
        kind=kind,
        vocab_size=DEFAULT_VOCAB[kind] if vocab_size is None else vocab_size,
        corpus_sha256=corpus.sha256,
        pretrained=pretrained,
        cache=cache,
        conversations=corpus.conversations,
    )
    sizes_P = encoded.offsets_P1.diff().numpy()
    public = encoded.take(splits.public_P)
    if corpus.labels_P is not None:
        encoded = replace(encoded, labels_P=torch.from_numpy(corpus.labels_P))
        given = np.isin(splits.public_P, splits.labeled_P)
        shown = np.where(given, corpus.labels_P[splits.public_P], -1)
        public = replace(public, labels_P=torch.from_numpy(shown))
        sizes_P = np.ones_like(sizes_P)
    counts_CD, names_D = count_holdings(corpus, splits, sizes_P)
    return FederatedData(
        source=source,
        task=corpus.task,
        partition=splits.partition,
        seed=seed,
        tokenizer=trained,
        public=public,
        public_labeled=None if corpus.labels_P is None else encoded.take(splits.labeled_P),
        clients=tuple(
            ClientData(
                _client_name(splits.partition, client, names),
                encoded.take(private),
                encoded.take(test),
                encoded.take(splits.validation[client]) if validation else None,
            )
            for client, (private, test, names) in enumerate(
                zip(splits.private, splits.tests, _domains_of(corpus, splits), strict=True)
            )
        ),
        test=None if corpus.labels_P is None else encoded.take(splits.test_P),
        class_names=corpus.class_names,
        names_D=names_D,
        counts_CD=counts_CD,
        corpus_sha256=corpus.sha256,
        public_sha256=_digest(trained, public),
        splits=splits,
    )


def _kind(tokenizer: str, task: Task) -> Kind:
    if tokenizer == "auto":
        return "bpe" if task == "causal_lm" else "bpe-lower"
    if tokenizer not in DEFAULT_VOCAB:
        raise unknown(f"tokenizer {tokenizer!r}", tokenizer, ("auto", *DEFAULT_VOCAB))
    return cast(Kind, tokenizer)


def _domains_of(corpus: Corpus, splits: Splits) -> list[list[str]]:
    return [[corpus.domain_names[index] for index in np.unique(corpus.domains_P[rows])] for rows in splits.private]


def _client_name(scheme: str, client: int, domains: list[str]) -> str:
    if scheme != "domain":
        return f"client {client}"
    return "+".join(domains) if len(domains) <= 3 else f"{domains[0]}+{len(domains) - 1} more"


def _digest(tokenizer: TextTokenizer, public: Encoded) -> str:
    digest = sha256(tokenizer.to_json().encode())
    for tensor in (public.tokens_N, public.offsets_P1, public.labels_P, public.answers_N):
        if tensor is not None:
            digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()
