"""Reading: what is cleaned, what is refused, and by which sentence."""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path

import pytest

from fedmoe_core.data.corpus import PIECE_CHARS, Corpus, cut
from fedmoe_core.data.federated import load_corpus
from fedmoe_core.data.read_csv import clean
from fedmoe_core.data.read_stdlib import LEAST_PIECES, read_stdlib

ROWS = "".join(f'"{1 + row % 2}","title {row}","text {row}"\n' for row in range(12))


def csv_corpus(tmp_path: Path, content: str | bytes) -> Corpus:
    path = tmp_path / "rows.csv"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return load_corpus(f"csv:{path}")


def jsonl_corpus(tmp_path: Path, *lines: object) -> Corpus:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return load_corpus(f"jsonl:{path}")


@pytest.mark.parametrize(
    ("raw", "plain"),
    [
        ("doesn #39;t", "doesn't"),
        ("the  #36;10 million prize", "the $10 million prize"),
        ("makers #39; efforts", "makers' efforts"),
        ("said #39;Yes #39; twice", "said 'Yes' twice"),
        (r"A second\team of rocketeers", "A second team of rocketeers"),
        (r"about A\$348 million", "about A$348 million"),
        (r'\\"Sven"', '"Sven"'),
        ("Texas Inc. &lt;TXN.N&gt;, up", "Texas Inc. <TXN.N>, up"),
        ('see &lt;A HREF="http://x.y/z?a=b"&gt;SPLS.O&lt;/A&gt;, up', "see SPLS.O , up"),
        ("AT&amp;T and Q &amp;amp; A", "AT&T and Q & A"),
        ("no escapes: a < b; #1 at 5;", "no escapes: a < b; #1 at 5;"),
    ],
)
def test_escapes_of_old_corpora_become_plain_text(raw: str, plain: str) -> None:
    assert clean(raw) == plain


def test_csv_without_header(tmp_path: Path) -> None:
    corpus = csv_corpus(tmp_path, ROWS)
    assert corpus.texts[3] == "title 3 text 3"
    assert corpus.class_names == ("1", "2")
    assert corpus.labels_P.tolist() == [0, 1] * 6
    assert corpus.domain_names == ("all",)
    assert corpus.sha256 == sha256(ROWS.encode()).hexdigest()


def test_csv_with_header_and_byte_order_mark(tmp_path: Path) -> None:
    body = "".join(f"{row},hello {row},{'ab'[row % 2]},{'xyz'[row % 3]}\n" for row in range(12))
    corpus = csv_corpus(tmp_path, b"\xef\xbb\xbf" + f"id,text,Label,client\n{body}".encode())
    assert corpus.texts[0] == "hello 0"
    assert corpus.class_names == ("a", "b")
    assert corpus.domain_names == ("x", "y", "z")


def test_csv_class_names_come_from_the_file_beside(tmp_path: Path) -> None:
    (tmp_path / "rows_classes.txt").write_text("Zebra\nApe\n")
    assert csv_corpus(tmp_path, ROWS).class_names == ("Zebra", "Ape")
    (tmp_path / "rows_classes.txt").write_text("Only one\n")  # does not fit: ignored
    assert csv_corpus(tmp_path, ROWS).class_names == ("1", "2")


def test_numeric_classes_keep_numeric_order(tmp_path: Path) -> None:
    corpus = csv_corpus(tmp_path, "".join(f"{1 + row % 11},text {row}\n" for row in range(55)))
    assert corpus.class_names == tuple(str(number) for number in range(1, 12))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "holds no row"),
        ("label,text\n", "holds no row"),
        ("1\n2\n", "no text column"),
        ("label,client\n1,a\n", "no text column"),
        (ROWS + '"1","title"\n', "line 13 has 2 columns where line 1 has 3"),
        (ROWS + '"1","",""\n', "line 13 has an empty text"),
        (ROWS + '"1","\\","&nbsp;"\n', "line 13 has an empty text"),
        (ROWS + '"","a","b"\n', "line 13 has an empty label"),
        ("label,text,client\n1,a,\n", "line 2 has an empty client"),
        ('1,"two\nlines"\n1,\n', "line 3 has an empty text"),
        ("1,a\n" * 9, "one class, '1'"),
        (ROWS + '"3","a","b"\n', "class '3' has 1 rows"),
        ("sentiment,text,more\n" + ROWS, "if line 1 is a header"),
        (ROWS.encode() + b"\xff\xfe", "is not UTF-8 text"),
        (ROWS + '"1","a","b', "not valid CSV"),
    ],
)
def test_bad_csv_is_refused_in_one_sentence(tmp_path: Path, content: str | bytes, says: str) -> None:
    with pytest.raises(ValueError, match=r"rows\.csv") as error:
        csv_corpus(tmp_path, content)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_jsonl_text_is_cut_and_keeps_its_domain(tmp_path: Path) -> None:
    corpus = jsonl_corpus(
        tmp_path, {"text": "a" * (PIECE_CHARS + 1), "domain": "one"}, "", {"text": "half \ud800", "domain": "two"}
    )
    assert corpus.task == "causal_lm"
    assert [len(text) for text in corpus.texts] == [PIECE_CHARS, 1, 6]
    assert corpus.texts[2] == "half ?"
    assert corpus.domains_P.tolist() == [0, 0, 1]


def test_jsonl_with_labels_is_classification(tmp_path: Path) -> None:
    corpus = jsonl_corpus(
        tmp_path, *({"text": f"row {row}\u2028x", "label": row % 2, "client": 7} for row in range(10))
    )
    assert corpus.task == "classification"
    assert corpus.class_names == ("0", "1")
    assert corpus.domain_names == ("7",)


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ([""], "holds no line"),
        ([{"text": "a"}, '{"text": "b"'], "line 2 is not valid JSON"),
        ([{"text": "a"}, "", "[1]"], "line 3 is not a JSON object"),
        ([{"text": " "}], "line 1: 'text' is missing"),
        ([{"words": "a"}], "line 1: 'text' is missing"),
        ([{"text": 5}], "line 1: 'text' is missing"),
        ([{"text": "a", "label": 1}, {"text": "b"}], "line 2: 'label' is on some lines only"),
        ([{"text": "a"}, {"text": "b", "domain": "x"}], "line 2: 'domain' is on some lines only"),
        ([{"text": "a", "label": 1.5}], "line 1: 'label' must be"),
        ([{"text": "a", "label": True}], "line 1: 'label' must be"),
        ([{"text": "a", "domain": ""}], "line 1: 'domain' must be"),
        ([{"text": "a", "label": "x"}] * 9, "one class, 'x'"),
        (["[" * 100_000], "line 1 is not valid JSON"),
        (["1" * 5000], "line 1 is not valid JSON"),
    ],
)
def test_bad_jsonl_is_refused_in_one_sentence(tmp_path: Path, lines: list[object], says: str) -> None:
    with pytest.raises(ValueError, match=r"rows\.jsonl") as error:
        jsonl_corpus(tmp_path, *lines)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("stdlb", "did you mean 'stdlib'"),
        ("cvs:file", "did you mean 'csv:file'"),
        ("json:file", "did you mean 'jsonl:file'"),
        ("stdlib:x", "did you mean 'stdlib'"),
        ("csv", "names no file"),
        ("jsonl:", "names no file"),
        ("", "valid: stdlib"),
    ],
)
def test_unknown_sources_are_refused_with_the_nearest(source: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        load_corpus(source)


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"gone\.csv does not exist"):
        load_corpus(f"csv:{tmp_path / 'gone.csv'}")
    with pytest.raises(IsADirectoryError, match="is a folder"):
        load_corpus(f"jsonl:{tmp_path}")


def make_library(root: Path) -> None:
    big = "x = 1\n" * (PIECE_CHARS * LEAST_PIECES // 6 + 1)
    files = {
        "zoo.py": big,
        "asyncio/__init__.py": big,
        "own/deep/code.py": big * 2,
        "tiny/__init__.py": "pass\n",
        "own/tests/hidden.py": "SECRET",
        "site-packages/foreign.py": "SECRET",
        "latin.py": "caf\xe9",
    }
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode("latin-1"))


def test_standard_library_skips_tests_and_ranks_packages(tmp_path: Path) -> None:
    make_library(tmp_path)
    corpus = read_stdlib(tmp_path)
    assert corpus.domain_names == ("asyncio", "latin", "own", "tiny", "zoo")
    # asyncio is on the list of choice, own is a package, zoo a module; tiny and latin are too small to be owned.
    assert [corpus.domain_names[index] for index in corpus.ownable] == ["asyncio", "own", "zoo"]
    assert not any("SECRET" in text for text in corpus.texts)
    assert "caf\ufffd" in corpus.texts
    assert max(map(len, corpus.texts)) == PIECE_CHARS


def test_standard_library_digest_sees_names_and_bytes(tmp_path: Path) -> None:
    digests = set()
    for folder in ("a", "b"):
        make_library(tmp_path / folder)
        digests.add(read_stdlib(tmp_path / folder).sha256)
    assert len(digests) == 1  # where it lies does not matter
    (tmp_path / "b" / "zoo.py").rename(tmp_path / "b" / "zoe.py")
    digests.add(read_stdlib(tmp_path / "b").sha256)
    (tmp_path / "b" / "latin.py").write_text("cafe")
    digests.add(read_stdlib(tmp_path / "b").sha256)
    assert len(digests) == 3


def test_python_without_sources_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no Python source text"):
        read_stdlib(tmp_path)


def test_cut_loses_nothing_but_blank_pieces() -> None:
    text = "ab " * 5000
    assert "".join(cut(text)) == text
    assert cut(" " * PIECE_CHARS + "x") == ["x"]
    assert cut("") == []
