"""Tokenizers: lossless, trained on public text only, cached without trusting a damaged file."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedmoe_core.data.batches import Encoded
from fedmoe_core.data.tokenizing import END, UNKNOWN, TextTokenizer, encode_corpus, from_json, train_tokenizer

PUBLIC = ["def add(a, b):\n    return a + b\n", "import os\n\tprint('naïve café')\n", "while True:\n    pass\n"] * 5
BPE = train_tokenizer("bpe", PUBLIC, 300)


def encode(texts: list[str], public: list[int], cache: Path | None = None) -> tuple[TextTokenizer, Encoded]:
    return encode_corpus(texts, np.array(public), kind="bpe", vocab_size=300, corpus_sha256="c0ffee", cache=cache)


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=80))
def test_bpe_is_lossless_on_any_text(text: str) -> None:
    (ids,) = BPE.encode([text])
    assert BPE.model.decode(ids) == text
    assert BPE.end_id not in ids


def test_text_that_spells_the_end_token_stays_text() -> None:
    for tokenizer in (BPE, from_json("bpe", BPE.to_json())):
        (ids,) = tokenizer.encode([f"a {END} b"])
        assert tokenizer.end_id not in ids
        assert tokenizer.model.decode(ids) == f"a {END} b"


def test_word_vocabulary_is_lower_case_words_and_unknowns() -> None:
    tokenizer = train_tokenizer("word", ["The cat, the DOG.", "The cat doesn't"], 5)
    assert tokenizer.vocab_size == 5  # end, unknown and the three most frequent: the, cat, then one of two ties
    (ids,) = tokenizer.encode(["THE cat; zebra!"])
    assert [tokenizer.model.id_to_token(token) for token in ids] == ["the", "cat", UNKNOWN]
    assert tokenizer.model.decode(ids).startswith("the cat")
    assert tokenizer.encode([f"the {END} {UNKNOWN}"])[0].count(tokenizer.end_id) == 0


@pytest.mark.parametrize(("kind", "word"), [("bpe", "Ġquetzalcoatl"), ("word", "quetzalcoatl")])
def test_private_text_does_not_reach_the_tokenizer(kind: str, word: str) -> None:
    secret = " quetzalcoatl" * 200
    texts = [*PUBLIC, secret]
    public = np.arange(len(PUBLIC))
    settings = {"kind": kind, "vocab_size": 400, "corpus_sha256": "c0ffee"}
    private, _ = encode_corpus(texts, public, **settings)
    assert private.model.token_to_id(word) is None
    other, _ = encode_corpus([*PUBLIC, "something else altogether"], public, **settings)
    assert private.to_json() == other.to_json()  # not a trace of it
    shared, _ = encode_corpus(texts, np.arange(len(texts)), **settings)
    assert shared.model.token_to_id(word) is not None  # the control: public text does reach it


def test_every_piece_is_encoded_in_place_and_ended() -> None:
    texts = [*PUBLIC, "", "x"]
    tokenizer, encoded = encode(texts, list(range(len(PUBLIC))))
    assert len(encoded) == len(texts)
    assert encoded.tokens_N.dtype == torch.int32
    for row, text in enumerate(texts):
        ids = encoded.tokens_N[encoded.offsets_P1[row] : encoded.offsets_P1[row + 1]].tolist()
        assert ids[-1] == tokenizer.end_id == encoded.end
        assert tokenizer.model.decode(ids) == text


def test_take_gathers_pieces_in_the_order_asked() -> None:
    tokenizer, encoded = encode(PUBLIC, list(range(len(PUBLIC))))
    taken = encoded.take(np.array([2, 0, 2]))
    assert tokenizer.model.decode(taken.tokens_N.tolist()) == PUBLIC[2] + PUBLIC[0] + PUBLIC[2]
    assert taken.samples == len(taken.tokens_N)
    assert len(encoded.take(np.array([], dtype=np.int64))) == 0


def test_cache_gives_the_same_bits_and_forgets_damaged_files(tmp_path: Path) -> None:
    cache = tmp_path / "deep" / "cache"
    first, encoded = encode(PUBLIC, [0, 1, 2], cache)
    (path,) = cache.iterdir()  # nothing half-written beside it
    stamp = path.stat().st_mtime_ns
    second, again = encode(PUBLIC, [0, 1, 2], cache)
    assert path.stat().st_mtime_ns == stamp  # read, not written anew
    assert first.to_json() == second.to_json()
    assert torch.equal(encoded.tokens_N, again.tokens_N)
    assert torch.equal(encoded.offsets_P1, again.offsets_P1)
    assert END in second.model.decode(second.encode([END])[0])
    whole = path.read_bytes()
    for damaged in (whole[:-7], b"not a tensor file", b"", whole + b"x"):
        path.write_bytes(damaged)
        with pytest.warns(UserWarning, match=r"encoded-\w+.safetensors is damaged \(.*; the corpus is encoded again"):
            _, repaired = encode(PUBLIC, [0, 1, 2], cache)
        assert torch.equal(encoded.tokens_N, repaired.tokens_N)
    encode(PUBLIC, [0, 1], cache)
    assert len(list(cache.iterdir())) == 2  # another public part is another entry


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.integers(0, 10**6), change=st.sampled_from(["flip", "zeros", "cut", "more"]), size=st.integers(1, 64))
def test_no_damage_of_a_cached_corpus_is_read(tmp_path: Path, place: int, change: str, size: int) -> None:
    cache = tmp_path / "cache"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tokenizer, encoded = encode(PUBLIC, [0, 1, 2], cache)
        (path,) = cache.iterdir()
        content = bytearray(path.read_bytes())
        place %= len(content)
        match change:
            case "flip":
                content[place] ^= 1 << size % 8
            case "zeros":
                content[place : place + size] = bytes(len(content[place : place + size]))
            case "cut":
                del content[place:]
            case _:
                content[place:place] = bytes(range(size))
        path.write_bytes(content)
        other, again = encode(PUBLIC, [0, 1, 2], cache)
    assert other.to_json() == tokenizer.to_json()
    assert torch.equal(encoded.tokens_N, again.tokens_N)
    assert torch.equal(encoded.offsets_P1, again.offsets_P1)


def test_a_corpus_that_was_read_does_not_depend_on_the_file(tmp_path: Path) -> None:
    """As windows onto the file its tensors would change with it, and reading past its new end kills the process."""
    encode(PUBLIC, [0, 1, 2], tmp_path)
    (path,) = tmp_path.iterdir()
    _, encoded = encode(PUBLIC, [0, 1, 2], tmp_path)
    before = encoded.tokens_N.tolist()
    path.write_bytes(b"\0" * path.stat().st_size)
    assert encoded.tokens_N.tolist() == before


@pytest.mark.parametrize("form", ["a symbolic link", "a pipe", "a folder"])
def test_what_is_not_a_file_in_the_cache_is_refused(tmp_path: Path, form: str) -> None:
    encode(PUBLIC, [0, 1, 2], tmp_path)
    (path,) = tmp_path.iterdir()
    path.rename(tmp_path / "elsewhere")
    before = (tmp_path / "elsewhere").read_bytes()
    match form:
        case "a symbolic link":
            path.symlink_to(tmp_path / "elsewhere")
        case "a pipe":
            os.mkfifo(path)
        case _:
            path.mkdir()
    with pytest.raises(ValueError, match=f"is {form}, and fedmoe writes a file there; move it away"):
        encode(PUBLIC, [0, 1, 2], tmp_path)
    assert (tmp_path / "elsewhere").read_bytes() == before


def test_cache_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("in the way")
    with pytest.raises(OSError, match=r"cache folder .*file.* cannot be written"):
        encode(PUBLIC, [0, 1, 2], file)


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 257"):
        train_tokenizer("bpe", PUBLIC, 256)
    with pytest.raises(ValueError, match="did you mean 'word'"):
        encode_corpus(PUBLIC, np.arange(3), kind="words", vocab_size=300, corpus_sha256="c0ffee")
