"""Folders of text: what is read of them, in which order, and to whom it belongs."""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import pytest

from fedmoe_core.data.corpus import PIECE_CHARS
from fedmoe_core.data.federated import corpus_digest, load_corpus, load_data

PAGE = """<!doctype html><html><head><title>A &amp; B</title><style>p {}</style></head><body>
<p>One <b>bold</b>
word.<br>Two</p><script>var hidden = "<p>";</script><pre>  kept
    as is</pre></body></html>"""


def write(root: Path, files: dict[str, bytes]) -> Path:
    for name, raw in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(raw)
    return root


def test_each_sub_folder_is_a_domain_and_only_text_is_read(tmp_path: Path) -> None:
    files = {
        "zsh/manual.txt": b"\xef\xbb\xbfshell\r\ntext",
        "git/deep/notes.md": "caf\u00e9".encode(),
        "git/changes": b"not packed",
        "git/log.gz": gzip.compress(b"packed text"),
        "git/page.html.gz": gzip.compress(PAGE.encode()),
        "git/latin.txt": b"caf\xe9",
        "git/image.png": b"PNG\0\0",
        "git/.hidden": b"SECRET",
        ".git/config": b"SECRET",
        "README": b"loose text",
    }
    root = write(tmp_path / "docs", files)
    (root / "zsh" / "link").symlink_to(root / "git" / "deep" / "notes.md")
    os.mkfifo(root / "zsh" / "pipe")
    corpus = load_corpus(f"folder:{root}")
    page = "A & B\nOne bold word.\nTwo\n  kept\n    as is"
    assert corpus.texts == ("loose text", "not packed", "packed text", page, "caf\u00e9", "shell\ntext")
    assert [corpus.domain_names[domain] for domain in corpus.domains_P] == [".", *["git"] * 4, "zsh"]
    assert [corpus.domain_names[domain] for domain in corpus.ownable] == ["git", "zsh"]
    assert corpus.task == "causal_lm"
    assert corpus.labels_P is None


def test_the_digest_sees_names_and_bytes_of_text_alone(tmp_path: Path) -> None:
    def digest() -> str:
        return corpus_digest(f"folder:{root}")

    root = write(tmp_path / "docs", {"a/x.txt": b"text", "b/y.txt": b"more"})
    first = digest()
    assert first == load_corpus(f"folder:{root}").sha256
    write(root, {"a/image": b"\0", "a/.hidden": b"text"})
    assert digest() == first
    (root / "a" / "x.txt").rename(root / "a" / "z.txt")
    renamed = digest()
    write(root, {"b/y.txt": b"MORE"})
    assert len({first, renamed, digest()}) == 3


def test_loose_files_are_public_and_folders_are_owned(tmp_path: Path) -> None:
    def text(word: str) -> bytes:
        return (f"{word} " * PIECE_CHARS * 8)[: PIECE_CHARS * 8].encode()

    root = write(tmp_path / "docs", {"own/a.txt": text("mine"), "her/a.txt": text("hers"), "all.txt": text("loose")})
    data = load_data(f"folder:{root}", clients=2, vocab_size=300)
    assert {client.name for client in data.clients} == {"own", "her"}
    read = [data.tokenizer.model.decode(part.private.tokens_N.tolist()) for part in data.clients]
    assert not any("loose" in each for each in read)
    assert "loose" in data.tokenizer.model.decode(data.public.tokens_N.tolist())


def test_a_folder_that_cannot_be_used_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="gone is not a folder"):
        load_corpus(f"folder:{tmp_path / 'gone'}")
    write(tmp_path, {"loose.txt": b"text"})
    with pytest.raises(NotADirectoryError, match=r"loose\.txt is not a folder"):
        load_corpus(f"folder:{tmp_path / 'loose.txt'}")
    with pytest.raises(ValueError, match="no sub-folder with text; give each client"):
        load_corpus(f"folder:{tmp_path}")
    write(tmp_path, {"a/cut.gz": gzip.compress(b"text" * 99)[:-9]})
    with pytest.raises(ValueError, match=r"cut\.gz is not a whole gzip file .*; repair it"):
        load_corpus(f"folder:{tmp_path}")
    with pytest.raises(ValueError, match="names no file; write folder:DIR"):
        load_corpus("folder:")
