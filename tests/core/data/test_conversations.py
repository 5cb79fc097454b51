"""Conversations: which tokens are answers, to the token, from the file to the batch."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from fedmoe_core.data.batches import Batch, Encoded, client_batches, eval_batches, eval_sequences
from fedmoe_core.data.conversations import Turn, text_of
from fedmoe_core.data.federated import corpus_digest, load_corpus, load_data
from fedmoe_core.data.tokenizing import END, TextTokenizer, encode_corpus

USER, ANSWER = {"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "It is 4."}
TALKS = (
    (Turn("system", "Be brief."), Turn("user", "2 + 2?"), Turn("assistant", "4")),
    (Turn("user", f"a {END} b"), Turn("assistant", f"c {END} d"), Turn("user", "more"), Turn("assistant", "caf\u00e9")),
    (Turn("assistant", "Hello!"), Turn("user", "Bye.")),
)


def encode(talks: tuple[tuple[Turn, ...], ...] = TALKS, cache: Path | None = None) -> tuple[TextTokenizer, Encoded]:
    texts = [text_of(talk) for talk in talks]
    settings = {"kind": "bpe", "vocab_size": 270, "corpus_sha256": "c0ffee", "cache": cache}
    return encode_corpus(texts, np.arange(len(texts)), conversations=talks, **settings)


def shown(tokenizer: TextTokenizer, tokens: list[int]) -> str:
    """Text of tokens, the end token as a sign that no conversation holds: content may spell it."""
    texts, stretch = "", list[int]()
    for token in tokens:
        if token == tokenizer.end_id:
            texts, stretch = f"{texts}{tokenizer.model.decode(stretch)}\0", []
        else:
            stretch.append(token)
    return texts + tokenizer.model.decode(stretch)


def write(path: Path, *lines: object) -> str:
    path.write_text("\n".join(map(json.dumps, lines)))
    return f"jsonl:{path}"


def test_the_answers_are_marked_to_the_token_with_the_end_after_each() -> None:
    tokenizer, encoded = encode()
    found = []
    for piece in range(len(encoded)):
        place = slice(encoded.offsets_P1[piece], encoded.offsets_P1[piece + 1])
        tokens, answers = encoded.tokens_N[place].tolist(), encoded.answers_N[place].tolist()
        assert tokens[-1] == encoded.end
        stretches: list[tuple[bool, list[int]]] = []
        for token, answer in zip(tokens, answers, strict=True):
            if not stretches or stretches[-1][0] != answer:
                stretches.append((answer, []))
            stretches[-1][1].append(token)
        found.append([(answer, shown(tokenizer, stretch)) for answer, stretch in stretches])
    assert found[0] == [(False, "<|system|>\nBe brief.\n<|user|>\n2 + 2?\n<|assistant|>\n"), (True, "4\0")]
    assert found[1] == [
        (False, f"<|user|>\na {END} b\n<|assistant|>\n"),
        (True, f"c {END} d\0"),
        (False, "<|user|>\nmore\n<|assistant|>\n"),
        (True, "caf\u00e9\0"),
    ]
    assert found[2] == [(False, "<|assistant|>\n"), (True, "Hello!\0"), (False, "<|user|>\nBye.\n\0")]


def test_the_cache_keeps_the_answers_and_knows_them_from_plain_text(tmp_path: Path) -> None:
    _, first = encode(cache=tmp_path)
    (path,) = tmp_path.iterdir()
    stamp = path.stat().st_mtime_ns
    _, again = encode(cache=tmp_path)
    assert path.stat().st_mtime_ns == stamp  # read, not written again
    assert torch.equal(first.answers_N, again.answers_N)
    texts = [text_of(talk) for talk in TALKS]
    settings = {"kind": "bpe", "vocab_size": 270, "corpus_sha256": "c0ffee", "cache": tmp_path}
    assert encode_corpus(texts, np.arange(3), **settings)[1].answers_N is None
    assert len(list(tmp_path.iterdir())) == 2
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)
    with pytest.warns(UserWarning, match="is damaged"):
        assert torch.equal(encode(cache=tmp_path)[1].answers_N, first.answers_N)


def test_taken_pieces_and_batches_carry_their_answers() -> None:
    _, encoded = encode()
    taken = encoded.take(np.array([2, 0]))
    first, last = encoded.offsets_P1[1], encoded.offsets_P1[2]
    assert torch.equal(taken.answers_N, torch.cat([encoded.answers_N[last:], encoded.answers_N[:first]]))
    batch = next(client_batches(encoded, seed=0, round=1, client=0, steps=1, batch_size=4, seq_len=8))
    assert batch.answers_SN.shape == batch.tokens_SN.shape
    plain = Batch(batch.tokens_SN, batch.mask_SN)
    joined = Batch.end_to_end([batch, plain])
    assert torch.equal(joined.answers_SN, torch.cat([batch.answers_SN, plain.mask_SN]))
    assert Batch.end_to_end([plain, plain]).answers_SN is None
    assert [part.answers_SN.shape for part in batch.split(3)] == [(3, 8), (1, 8)]
    assert torch.equal(batch.first(2).answers_SN, batch.answers_SN[:2])
    assert batch.to("meta").answers_SN.device.type == "meta"


def test_every_window_of_conversations_has_a_token_to_predict() -> None:
    answers_N = torch.zeros(400, dtype=torch.bool)
    answers_N[[50, 51, 333]] = True
    data = Encoded(torch.arange(400, dtype=torch.int32), torch.tensor([0, 400]), 0, None, answers_N)
    drawn = list(client_batches(data, seed=0, round=1, client=0, steps=30, batch_size=8, seq_len=10))
    assert all(batch.answers_SN[:, 1:].any(1).all() for batch in drawn)
    starts = {int(row[0]) for batch in drawn for row in batch.tokens_SN}
    assert starts == {*range(41, 51), *range(324, 333)}  # every window that holds one behind its first place
    judged = Batch.end_to_end(list(eval_batches(data, batch_size=2, seq_len=10)))
    assert judged.tokens_SN[:, 0].tolist() == [50, 330]
    assert len(judged) == eval_sequences(data, 10) == 2
    none = Encoded(data.tokens_N, data.offsets_P1, 0, None, torch.zeros(400, dtype=torch.bool))
    assert len(next(eval_batches(none, batch_size=40, seq_len=10))) == 40


def test_a_file_of_conversations_is_read_one_piece_each(tmp_path: Path) -> None:
    lines = [{"messages": [USER, ANSWER], "client": client} for client in ("ann", "bob") for _ in range(12)]
    source = write(tmp_path / "talks.jsonl", *lines)
    corpus = load_corpus(source)
    assert corpus.sha256 == corpus_digest(source)
    assert len(corpus.texts) == len(corpus.conversations) == 24
    assert corpus.texts[0] == "<|user|>\n2 + 2?\n<|assistant|>\nIt is 4.\n"
    data = load_data(source, clients=2, vocab_size=270)
    for part in (data.public, *(client.private for client in data.clients), data.clients[0].test):
        assert shown(data.tokenizer, part.tokens_N[part.answers_N].tolist()) == "It is 4.\0" * len(part)
        assert len(part.answers_N) == len(part.tokens_N)


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ([{"messages": [USER]}], r"line 1 has no answer to learn from; give it a message of role 'assistant'"),
        ([{"messages": [USER, ANSWER]}, {"messages": [USER]}], "line 2 has no answer"),
        ([{"messages": []}], "line 1: 'messages' must be a list"),
        ([{"messages": "hello"}], "line 1: 'messages' must be a list"),
        ([{"messages": [USER, {"role": "assistant"}]}], "line 1: message 2 needs a role and a content"),
        ([{"messages": [{"content": "x"}, ANSWER]}], "line 1: message 1 needs a role and a content"),
        ([{"messages": [USER, {"role": "assistant", "content": " "}]}], "line 1: message 2 needs a role and a content"),
        ([{"messages": ["hello"]}], "line 1: message 1 needs a role and a content"),
        ([{"messages": [USER, ANSWER | {"role": "bot"}]}], "message 2 has role 'bot'; use one of system, user"),
        ([{"messages": [USER, ANSWER]}, {"text": "a"}], "line 2: 'messages' is on some lines only"),
        ([{"text": "a"}, {"messages": [USER, ANSWER]}], "line 2: 'messages' is on some lines only"),
        ([{"messages": [USER, ANSWER], "text": "a"}], "line 1 has both 'messages' and 'text'; give one"),
        ([{"messages": [USER, ANSWER], "label": 1}], "line 1 has both 'messages' and 'label'; give one"),
    ],
)
def test_conversations_that_cannot_be_learnt_from_are_refused(lines: list[object], says: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=says):
        load_corpus(write(tmp_path / "talks.jsonl", *lines))
