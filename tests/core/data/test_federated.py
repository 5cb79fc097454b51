"""Splits and the whole way from a file to encoded clients: disjoint, fixed by the seed, counted right."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bench.study.naive_bayes import naive_bayes_accuracy
from fedmoe_core.data.batches import Encoded
from fedmoe_core.data.corpus import Corpus, make_corpus
from fedmoe_core.data.federated import FederatedData, load_data
from fedmoe_core.data.read_stdlib import FIRST_OWNED
from fedmoe_core.data.splits import Splits, split_corpus

TOPICS = (("goal", "match", "team"), ("stock", "market", "bank"), ("chip", "code", "robot"))


def text_corpus(pieces_of_domain: list[int]) -> Corpus:
    domains = [f"d{domain}" for domain, pieces in enumerate(pieces_of_domain) for _ in range(pieces)]
    texts = [f"piece {row} of {domain}" for row, domain in enumerate(domains)]
    return make_corpus("jsonl:memory", texts, domains=domains, labels=None, digest="0")


def row_corpus(rows_of_class: list[int]) -> Corpus:
    labels = [str(label) for label, rows in enumerate(rows_of_class) for _ in range(rows)]
    texts = [f"row {row}" for row in range(len(labels))]
    return make_corpus("csv:memory", texts, domains=["all"] * len(labels), labels=labels, digest="0")


def written(tmp_path: Path, kind: str, rows: int = 240) -> str:
    """A small news file: each topic has words of its own, each of 4 sources its own name."""
    rng = np.random.default_rng(0)
    lines = []
    for row in range(rows):
        words = rng.choice([*TOPICS[row % 3], "the", "a", "said"], size=8)
        lines.append({"text": " ".join(words) + f" n{row}", "label": f"topic{row % 3}", "domain": f"source{row % 4}"})
    path = tmp_path / f"news.{kind}"
    if kind == "csv":
        path.write_text("".join(f'"{line["label"]}","{line["text"]}"\n' for line in lines))
    elif kind == "jsonl":
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    else:
        path = tmp_path / "text.jsonl"
        path.write_text("".join(json.dumps({"text": d["text"], "domain": d["domain"]}) + "\n" for d in lines))
        return f"jsonl:{path}"
    return f"{kind}:{path}"


def equal(first: Splits, second: Splits) -> bool:
    return all(
        np.array_equal(a, b)
        for one, two in (
            ((first.public_P, first.labeled_P, first.test_P), (second.public_P, second.labeled_P, second.test_P)),
            (first.private, second.private),
            (first.tests, second.tests),
        )
        for a, b in zip(one, two, strict=True)
    )


def assert_once(total: int, *parts: np.ndarray) -> None:
    """The parts hold every row 0..total-1 exactly once."""
    assert sorted(np.concatenate(parts).tolist()) == list(range(total))


@given(
    seed=st.integers(0, 2**31),
    clients=st.integers(1, 6),
    pieces=st.lists(st.integers(6, 40), min_size=6, max_size=8),
    scheme=st.sampled_from(["domain", "iid", "dirichlet:0.1", "dirichlet:5"]),
)
def test_text_splits_are_disjoint_and_whole(seed: int, clients: int, pieces: list[int], scheme: str) -> None:
    corpus = text_corpus(pieces)
    splits = split_corpus(corpus, clients=clients, scheme=scheme, seed=seed)
    assert_once(len(corpus.texts), splits.public_P, *splits.private, *splits.tests)
    assert len(splits.private) == len(splits.tests) == clients
    assert all(len(part) for part in (*splits.private, *splits.tests))
    assert equal(splits, split_corpus(corpus, clients=clients, scheme=scheme, seed=seed))
    other = split_corpus(corpus, clients=clients, scheme="iid", seed=seed)
    assert np.array_equal(splits.public_P, other.public_P)  # the public part does not depend on the partitioner


def test_text_splits_have_the_promised_shares() -> None:
    splits = split_corpus(text_corpus([100, 200, 300]), clients=3, scheme="domain", seed=0)
    assert len(splits.public_P) == 60
    assert sorted(map(len, splits.tests)) == [20, 40, 60]
    assert sorted(map(len, splits.private)) == [70, 140, 210]


@given(
    seed=st.integers(0, 2**31),
    clients=st.integers(1, 6),
    rows=st.lists(st.integers(5, 80), min_size=2, max_size=5),
    scheme=st.sampled_from(["auto", "iid", "dirichlet:0.1", "dirichlet:5"]),
    labels_per_class=st.integers(1, 30),
)
def test_row_splits_are_disjoint_and_whole(
    seed: int, clients: int, rows: list[int], scheme: str, labels_per_class: int
) -> None:
    corpus = row_corpus(rows)
    splits = split_corpus(corpus, clients=clients, scheme=scheme, seed=seed, labels_per_class=labels_per_class)
    assert_once(len(corpus.texts), splits.public_P, splits.test_P, *splits.private)
    assert set(splits.labeled_P) <= set(splits.public_P)
    classes = range(len(rows))
    given_C = np.bincount(corpus.labels_P[splits.labeled_P], minlength=len(rows))
    public_C = np.bincount(corpus.labels_P[splits.public_P], minlength=len(rows))
    assert all(given_C[label] == min(labels_per_class, public_C[label]) for label in classes)
    assert set(corpus.labels_P[splits.test_P]) == set(classes)
    for private, test in zip(splits.private, splits.tests, strict=True):
        assert len(private)
        assert len(test)
        assert set(test) <= set(splits.test_P)
        assert len(set(test)) == len(test)
        assert set(corpus.labels_P[test]) <= set(corpus.labels_P[private])
    again = split_corpus(corpus, clients=clients, scheme=scheme, seed=seed, labels_per_class=labels_per_class)
    assert equal(splits, again)


def test_row_splits_have_the_promised_shares_and_mixes() -> None:
    corpus = row_corpus([1000, 1000, 1000, 1000])
    splits = split_corpus(corpus, clients=5, scheme="dirichlet:0.5", seed=1)
    assert (len(splits.public_P), len(splits.labeled_P), len(splits.test_P)) == (800, 100, 600)
    assert np.bincount(corpus.labels_P[splits.test_P]).tolist() == [150] * 4
    for private, test in zip(splits.private, splits.tests, strict=True):
        mix, kept = (np.bincount(corpus.labels_P[rows], minlength=4) / len(rows) for rows in (private, test))
        assert np.abs(mix - kept).max() < 0.01
        assert np.bincount(corpus.labels_P[test], minlength=4).max() >= 149  # the largest such slice
        for first in (16, 64):  # evaluation reads so many
            part = np.bincount(corpus.labels_P[test[:first]], minlength=4) / first
            assert np.abs(mix - part).max() <= 2 / first


def test_test_rows_are_not_sorted_by_class() -> None:
    """Evaluation on the first rows must see every class."""
    corpus = row_corpus([200, 200])
    test_P = split_corpus(corpus, clients=2, scheme="iid", seed=0).test_P
    assert 5 < corpus.labels_P[test_P[:30]].sum() < 25


@pytest.mark.parametrize("corpus", [text_corpus([40] * 4), row_corpus([60] * 4)], ids=["text", "rows"])
def test_other_seeds_split_otherwise(corpus: Corpus) -> None:
    first, second = (split_corpus(corpus, clients=4, scheme="auto", seed=seed) for seed in (0, 1))
    assert not np.array_equal(first.public_P, second.public_P)
    assert not np.array_equal(first.private[0], second.private[0])


@pytest.mark.parametrize(
    ("corpus", "settings", "says"),
    [
        (text_corpus([30, 1]), {"clients": 2}, r"client 1 would own 1 piece of text and needs 2"),
        (text_corpus([30]), {"clients": 1, "scheme": "domain"}, r"needs a client or domain field.*partition=iid"),
        (row_corpus([30, 30]), {"clients": 2, "scheme": "domain"}, r"domain field.*partition=dirichlet:0\.5"),
        (text_corpus([30, 30]), {"clients": 3}, r"clients=3 is more than the 2 domains"),
        (text_corpus([30]), {"clients": 14}, r"clients=14 needs 28 .* but 27 are left"),
        (text_corpus([4, 4]), {"clients": 2}, r"too short"),
        (row_corpus([5, 5]), {"clients": 9}, r"clients=9 needs 9 .* but 6 are left"),
        (row_corpus([30, 30]), {"clients": 2, "labels_per_class": 0}, r"labels_per_class=0"),
        (row_corpus([30, 30]), {"clients": 2, "scheme": "dirichlet:0"}, r"above 0"),
        (row_corpus([30, 30]), {"clients": 2, "seed": -1}, r"seed -1"),
    ],
)
def test_splits_that_cannot_be_are_refused(corpus: Corpus, settings: dict[str, int], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        split_corpus(corpus, **{"scheme": "auto", "seed": 0, **settings})


def pieces_of(data: FederatedData, part: Encoded) -> set[str]:
    cuts = part.offsets_P1.tolist()
    return {data.tokenizer.model.decode(part.tokens_N[a:b].tolist()) for a, b in pairwise(cuts)}


@pytest.mark.parametrize("kind", ["csv", "jsonl", "text"])
def test_loaded_data_are_counted_right(tmp_path: Path, kind: str) -> None:
    data = load_data(written(tmp_path, kind), clients=4, vocab_size=400, tokenizer="bpe")
    assert [client.samples for client in data.clients] == data.counts_CD.sum(1).tolist()
    assert data.counts_CD.shape == (4, len(data.names_D))
    if kind == "text":
        assert (data.task, data.num_classes, data.test, data.public_labeled) == ("causal_lm", 0, None, None)
        assert data.names_D == ("source0", "source1", "source2", "source3")
        assert {client.name for client in data.clients} == set(data.names_D)
        parts = [data.public, *(part for client in data.clients for part in (client.private, client.test))]
    else:
        assert data.class_names == data.names_D == ("topic0", "topic1", "topic2")
        assert data.partition == ("dirichlet:0.5" if kind == "csv" else "domain")
        assert (data.public.labels_P >= 0).sum() == len(data.public_labeled) == 48
        labels = torch.cat([client.private.labels_P for client in data.clients])
        assert torch.bincount(labels).tolist() == data.counts_CD.sum(0).tolist()
        parts = [data.public, data.test, *(client.private for client in data.clients)]
    held = [pieces_of(data, part) for part in parts]
    assert sum(map(len, held)) == len(set().union(*held)) == 240  # every text is in exactly one part


SAME_WARM_UP = ({}, {"cache": None}, {"clients": 3})


@pytest.mark.parametrize("change", [*SAME_WARM_UP, {"seed": 1}, {"vocab_size": 270}, {"labels_per_class": 2}])
def test_inv10_same_arguments_same_bits(tmp_path: Path, change: dict[str, int | None]) -> None:
    source = written(tmp_path, "csv")
    base = load_data(source, clients=4, cache=tmp_path / "cache")
    other = load_data(source, **{"clients": 4, "cache": tmp_path / "cache", **change})
    assert other.corpus_sha256 == base.corpus_sha256
    # The warm-up sees public text and labels only, so the number of clients must not make it a new one.
    assert (other.public_sha256 == base.public_sha256) == (change in SAME_WARM_UP)
    if change in ({}, {"cache": None}):
        for one, two in zip(base.clients, other.clients, strict=True):
            assert torch.equal(one.private.tokens_N, two.private.tokens_N)
            assert torch.equal(one.test.tokens_N, two.test.tokens_N)


def test_withheld_labels_cannot_be_used(tmp_path: Path) -> None:
    data = load_data(written(tmp_path, "csv"), clients=4, labels_per_class=5)
    shown = data.public.labels_P[data.public.labels_P >= 0]
    assert torch.bincount(shown).tolist() == torch.bincount(data.public_labeled.labels_P).tolist() == [5, 5, 5]
    with pytest.raises(IndexError):
        torch.nn.functional.cross_entropy(torch.zeros(len(data.public), 3), data.public.labels_P)


def test_naive_bayes_learns_the_topics(tmp_path: Path) -> None:
    source = written(tmp_path, "csv")
    data = load_data(source, clients=4)
    assert naive_bayes_accuracy(data) > 0.95
    Path(source.removeprefix("csv:")).write_text("1,a\n2,b\n" * 20)
    with pytest.raises(ValueError, match="changed"):
        naive_bayes_accuracy(data)
    with pytest.raises(ValueError, match="no labels"):
        naive_bayes_accuracy(load_data(written(tmp_path, "text"), clients=4, vocab_size=300))


def test_unknown_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="did you mean 'bpe'"):
        load_data(written(tmp_path, "csv"), tokenizer="bpee")


@pytest.fixture(scope="session")
def stdlib(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., FederatedData]:
    """``load_data("stdlib", ...)`` with one cache for the session."""
    folder = tmp_path_factory.mktemp("encoded")

    @cache
    def load(clients: int = 10, partition: str = "auto") -> FederatedData:
        return load_data("stdlib", clients=clients, partition=partition, cache=folder)

    return load


def test_standard_library_by_package(stdlib: Callable[..., FederatedData]) -> None:
    data = stdlib()
    assert data.partition == "domain"
    assert data.tokenizer.vocab_size == 2048
    assert len({client.name for client in data.clients}) == 10
    always = set(FIRST_OWNED) - {"tkinter", "idlelib"}  # some systems leave these two out
    assert always <= {client.name for client in data.clients}
    assert ((data.counts_CD > 0).sum(1) == 1).all()
    for client in data.clients:
        whole = len(client.private) + len(client.test)
        assert len(client.test) == pytest.approx(2 / 9 * whole, abs=1)
        assert client.test.samples >= 2000  # enough for 8 windows of 128 tokens
    assert data.public.samples > 1_000_000
    assert data.tokenizer.end_id not in data.tokenizer.encode(["<|end|>"])[0]


@pytest.mark.parametrize(("clients", "partition"), [(3, "domain"), (14, "domain"), (20, "iid"), (10, "dirichlet:0.1")])
def test_standard_library_for_other_fleets(stdlib: Callable[..., FederatedData], clients: int, partition: str) -> None:
    data = stdlib(clients, partition)
    assert len(data.clients) == clients
    assert min(client.samples for client in data.clients) > 1000
    if clients <= 10 or partition != "domain":  # the public text, and so the warm-up, is that of the default
        assert data.public_sha256 == stdlib().public_sha256
    assert len(data.names_D) == max(10, clients if partition == "domain" else 0)


def test_standard_library_has_only_so_many_packages(stdlib: Callable[..., FederatedData]) -> None:
    with pytest.raises(ValueError, match=r"clients=500 is more than the \d+ packages .* partition=iid"):
        stdlib(500, "domain")


def ag_news() -> Path:
    """``../shared/data/ag_news.csv``, seen from the repository or from a worktree of it."""
    found = (parent.parent / "shared" / "data" / "ag_news.csv" for parent in Path(__file__).resolve().parents[3:])
    path = next((path for path in found if path.is_file()), None)
    if path is None:
        pytest.skip("../shared/data/ag_news.csv is absent")
    return path


def test_ag_news() -> None:
    data = load_data(f"csv:{ag_news()}")
    assert data.class_names == ("World", "Sports", "Business", "Sci/Tech")
    assert (len(data.public), len(data.public_labeled), len(data.test)) == (1520, 100, 1140)
    assert sum(client.samples for client in data.clients) == 7600 - 1520 - 1140
    assert data.tokenizer.kind == "bpe-lower"
    assert data.tokenizer.vocab_size == 4096
    assert 0.86 < naive_bayes_accuracy(data) < 0.91
