"""Which row is public, held out or a client's own: disjoint, and fixed by the seed."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from fedmoe_core.base.rng import counter_rng
from fedmoe_core.data.corpus import Corpus
from fedmoe_core.data.partition import counts, parse_scheme, partition
from fedmoe_core.data.read_stdlib import FIRST_OWNED

# Language modelling: shares of the text that clients may own; classification: shares of all rows.
PUBLIC_TEXT, TEST_TEXT = 0.10, 0.20
PUBLIC_ROWS, TEST_ROWS = 0.20, 0.15
VALIDATION = 0.10  # of a client's private rows, where its algorithm needs them
DEFAULT_ALPHA = 0.5  # label skew where ``auto`` finds no domains


@dataclass(frozen=True, eq=False)
class Splits:
    """Indices into ``Corpus.texts``.

    Attributes:
        public_P: public rows, ascending.
        labelled_P: the public rows with a label to use (classification), a subset of ``public_P``; else empty.
        test_P: one global test split in random order (classification); else empty.
        private: one array per client; disjoint from one another, from ``public_P`` and from all tests.
        tests: one held-out array per client. Language modelling: the client's own text, disjoint between clients.
            Classification: rows of ``test_P`` in the client's own label mix; two clients may share rows.
        partition: the resolved partitioner.
        validation: one array per client, taken out of ``private``; empty unless the algorithm needs validation data.
    """

    public_P: np.ndarray
    labeled_P: np.ndarray
    test_P: np.ndarray
    private: tuple[np.ndarray, ...]
    tests: tuple[np.ndarray, ...]
    partition: str
    validation: tuple[np.ndarray, ...] = ()


def split_corpus(corpus: Corpus, *, clients: int, scheme: str, seed: int, labels_per_class: int = 25) -> Splits:
    """Split ``corpus`` for ``clients`` clients.

    Language modelling: of every domain that clients may own 10 % of the pieces are public, with all text of other
    domains; the rest is partitioned, and of each client's share 2/9 (20 % of the whole) is held out. The public part
    therefore does not depend on the partitioner. Classification: of every class 20 % is public, 15 % test, and the
    rest is partitioned; ``labels_per_class`` public rows of each class keep their label.

    Raises:
        ValueError: unknown partitioner, no domains to part by, or too little text for so many clients.
    """
    name, _ = parse_scheme(scheme)
    has_domains = len(corpus.domain_names) > 1
    if name == "auto":
        skewed = f"dirichlet:{DEFAULT_ALPHA}" if corpus.task == "classification" else "iid"
        name = scheme = "domain" if has_domains else skewed
    if name == "domain" and not has_domains:
        raise ValueError(
            f"partition=domain needs a client or domain field, which {corpus.source} lacks; "
            f"add it or use partition={'dirichlet:0.5' if corpus.task == 'classification' else 'iid'}"
        )
    if corpus.task == "classification":
        return _split_rows(corpus, clients, scheme, (seed, labels_per_class))
    return _split_text(corpus, clients, scheme, seed)


def with_validation(splits: Splits, *, seed: int) -> Splits:
    """Hold back a tenth of each client's private rows, at least one, for validation; all else as in these splits.

    The rest keeps its order. Which rows go depends on the seed and the client alone.

    Raises:
        ValueError: a client owns a single row.
    """
    private, validation = [], []
    for client, rows in enumerate(splits.private):
        if len(rows) < 2:
            raise ValueError(
                f"client {client} owns {len(rows)} private row and needs 2, one to train on and one to validate on; "
                "lower clients, use partition=iid, or give it more data"
            )
        count = max(1, _share(len(rows), VALIDATION))
        held = counter_rng(seed, "validation", client).permutation(len(rows)) < count
        private.append(rows[~held])
        validation.append(rows[held])
    return replace(splits, private=tuple(private), validation=tuple(validation))


def owned_domains(corpus: Corpus, *, clients: int, scheme: str) -> tuple[int, ...]:
    """List the domains whose text goes to clients.

    A file's domains all do. Of the standard library the first 10 in the order of preference do, or, under ``domain``,
    as many as there are clients.

    Raises:
        ValueError: ``domain`` with more clients than ownable packages.
    """
    if corpus.source != "stdlib":
        return corpus.ownable
    if scheme == "domain" and clients > len(corpus.ownable):
        raise ValueError(
            f"clients={clients} is more than the {len(corpus.ownable)} packages of this Python's standard library "
            f"that hold enough text; use clients <= {len(corpus.ownable)} or partition=iid"
        )
    wanted = max(len(FIRST_OWNED), clients) if scheme == "domain" else len(FIRST_OWNED)
    return corpus.ownable[:wanted]


def count_holdings(corpus: Corpus, splits: Splits, sizes_P: np.ndarray) -> tuple[np.ndarray, tuple[str, ...]]:
    """Sum ``sizes_P`` over private rows, int64 (clients, classes) or (clients, owned domains), and name those."""
    rows = np.concatenate(splits.private)
    owner = np.repeat(np.arange(len(splits.private)), [len(part) for part in splits.private])
    if corpus.labels_P is not None:
        groups, names = corpus.labels_P[rows], corpus.class_names
    else:
        present, groups = np.unique(corpus.domains_P[rows], return_inverse=True)
        names = tuple(corpus.domain_names[index] for index in present)
    return counts(owner, groups, (len(splits.private), len(names)), sizes_P[rows]), names


def _split_text(corpus: Corpus, clients: int, scheme: str, seed: int) -> Splits:
    owned = owned_domains(corpus, clients=clients, scheme=scheme)
    public = [np.flatnonzero(~np.isin(corpus.domains_P, owned))]
    pool = []
    for domain in owned:
        rows = np.flatnonzero(corpus.domains_P == domain)
        rows = counter_rng(seed, "public text", domain).permutation(rows)
        cut = _share(len(rows), PUBLIC_TEXT)
        public.append(rows[:cut])
        pool.append(rows[cut:])
    public_P, pool_P = np.sort(np.concatenate(public)), np.sort(np.concatenate(pool))
    if not len(public_P):
        raise ValueError(
            f"{corpus.source} is too short: a tenth of each domain's pieces is public, which rounds to none; "
            "give at least 5 pieces (20,000 characters) in one domain"
        )
    owner = partition(corpus.domains_P[pool_P], clients=clients, scheme=scheme, seed=seed, least=2)
    private, tests = [], []
    for client in range(clients):
        rows = counter_rng(seed, "held-out text", client).permutation(pool_P[owner == client])
        if len(rows) < 2:
            raise ValueError(
                f"client {client} would own {len(rows)} piece of text and needs 2, one to train on and one held out; "
                f"lower clients, use partition=iid, or give it more text"
            )
        cut = max(1, _share(len(rows), TEST_TEXT / (1 - PUBLIC_TEXT)))
        tests.append(rows[:cut])
        private.append(rows[cut:])
    none = np.zeros(0, dtype=np.int64)
    return Splits(public_P, none, none, tuple(private), tuple(tests), scheme)


def _split_rows(corpus: Corpus, clients: int, scheme: str, seeds: tuple[int, int]) -> Splits:
    assert corpus.labels_P is not None
    seed, labels_per_class = seeds
    if labels_per_class < 1:
        raise ValueError(f"labels_per_class={labels_per_class} must be at least 1, or the head learns nothing")
    public, labeled, test, pool = [], [], [], []
    for label in range(len(corpus.class_names)):
        rows = counter_rng(seed, "classes", label).permutation(np.flatnonzero(corpus.labels_P == label))
        first = max(1, _share(len(rows), PUBLIC_ROWS))
        second = first + max(1, _share(len(rows), TEST_ROWS))
        public.append(rows[:first])
        labeled.append(rows[: min(first, labels_per_class)])
        test.append(rows[first:second])
        pool.append(rows[second:])
    pool_P = np.sort(np.concatenate(pool))
    groups = corpus.domains_P if scheme == "domain" else corpus.labels_P
    owner = partition(groups[pool_P], clients=clients, scheme=scheme, seed=seed)
    test_P = counter_rng(seed, "test order").permutation(np.concatenate(test))
    private = tuple(pool_P[owner == client] for client in range(clients))
    tests = tuple(_same_mix(corpus.labels_P, test_P, rows) for rows in private)
    return Splits(np.sort(np.concatenate(public)), np.sort(np.concatenate(labeled)), test_P, private, tests, scheme)


def _same_mix(labels_P: np.ndarray, test_P: np.ndarray, private: np.ndarray) -> np.ndarray:
    """The largest part of ``test_P`` whose label mix is that of ``private``, ordered so that its first rows have it.

    In ``test_P``'s own order they would not: of a rare label only the first rows are kept, and so they come early.
    """
    classes = int(labels_P.max()) + 1
    mix_C = np.bincount(labels_P[private], minlength=classes) / len(private)
    have_C = np.bincount(labels_P[test_P], minlength=classes)
    size = (have_C[mix_C > 0] / mix_C[mix_C > 0]).min()
    take_C = np.minimum(have_C, np.round(size * mix_C).astype(np.int64))
    kept, place = [], []
    for label in range(classes):
        rows = test_P[labels_P[test_P] == label][: take_C[label]]
        kept.append(rows)
        place.append((np.arange(len(rows)) + 0.5) / max(1, len(rows)))
    return np.concatenate(kept)[np.argsort(np.concatenate(place), kind="stable")]


def _share(count: int, share: float) -> int:
    """``count * share``, halves rounded up."""
    return int(count * share + 0.5)
