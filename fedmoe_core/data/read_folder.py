"""Text and its facts, read from a folder that has one sub-folder for each domain."""

from __future__ import annotations

import gzip
import os
import zlib
from collections.abc import Iterator
from dataclasses import replace
from hashlib import sha256
from html.parser import HTMLParser
from pathlib import Path

from fedmoe_core.data.corpus import Corpus, cut, entry_of, make_corpus, read_bytes

LOOSE = "."  # the domain of files that lie in the folder itself
_HTML = (".html", ".htm", ".xhtml")
_UNSEEN = frozenset({"script", "style", "template"})
_INLINE = frozenset({"a", "abbr", "b", "cite", "code", "em", "font", "i", "kbd", "samp", "small", "span", "strong"})
_INLINE |= {"sub", "sup", "tt", "u", "var", "wbr"}


def read_folder(root: Path) -> Corpus:
    """Read every text file below ``root`` in pieces; the domain is the sub-folder of ``root`` that it lies in.

    Text is what decodes as UTF-8 and holds no NUL, whatever the file is called; anything else is passed over. A ``.gz``
    file is unpacked first, and of ``.html``, ``.htm`` and ``.xhtml`` only the text between the tags is read. Hidden
    files and folders and symbolic links are passed over: a link would give two clients the same text. Files in ``root``
    itself are public, because clients own sub-folders. Files come in the sorted order of their folders and names.

    Raises:
        ValueError: no sub-folder with text, or a ``.gz`` file that is damaged.
        OSError: ``root`` is not a folder, or a file cannot be read.
    """
    digest = sha256()
    texts: list[str] = []
    domains: list[str] = []
    for inside, raw, text in _text_files(root):
        digest.update(entry_of(inside, raw))
        pieces = cut(_shown(text) if _plain_name(inside).endswith(_HTML) else text)
        texts += pieces
        domains += [_printable(inside.parts[0]) if len(inside.parts) > 1 else LOOSE] * len(pieces)
    if set(domains) <= {LOOSE}:
        raise ValueError(f"{root} has no sub-folder with text; give each client or domain a folder of its own in it")
    corpus = make_corpus(f"folder:{root}", texts, domains=domains, labels=None, digest=digest.hexdigest())
    return replace(corpus, ownable=tuple(d for d in corpus.ownable if corpus.domain_names[d] != LOOSE))


def folder_digest(root: Path) -> str:
    """Return the sha256 (hex) of what ``read_folder`` reads: over every path, length and content in sorted order."""
    digest = sha256()
    for inside, raw, _ in _text_files(root):
        digest.update(entry_of(inside, raw))
    return digest.hexdigest()


def files_below(root: Path) -> Iterator[Path]:
    """Walk the plain files below ``root``, neither hidden nor linked, in the sorted order of folders and names.

    Raises:
        OSError: ``root`` is not a folder, or a folder in it cannot be listed.
    """
    if not root.is_dir():
        kind = NotADirectoryError if root.exists() else FileNotFoundError
        raise kind(f"{root} is not a folder; check the name after data=")
    for folder, subfolders, files in os.walk(root, onerror=_refuse):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for name in sorted(files):
            path = Path(folder, name)
            if not name.startswith(".") and path.is_file() and not path.is_symlink():
                yield path


def _text_files(root: Path) -> Iterator[tuple[Path, bytes, str]]:
    """Each text file's path in ``root``, its bytes and its text."""
    for path in files_below(root):
        raw = read_bytes(path)
        content = raw
        if path.name.endswith(".gz"):
            try:
                content = gzip.decompress(raw)
            except (OSError, EOFError, zlib.error) as error:
                raise ValueError(f"{path} is not a whole gzip file ({error}); repair it or take it away") from None
        try:
            text = content.decode("utf-8-sig")
        except UnicodeDecodeError:
            continue
        if "\0" not in text:
            yield path.relative_to(root), raw, text.replace("\r\n", "\n").replace("\r", "\n")


def _refuse(error: OSError) -> None:
    raise OSError(f"{error.filename} cannot be listed ({error.strerror}); check its permissions") from error


def _plain_name(inside: Path) -> str:
    return inside.name.lower().removesuffix(".gz")


def _printable(name: str) -> str:
    """A folder's name; bytes that are not UTF-8 become marks."""
    return os.fsencode(name).decode("utf-8", errors="replace")


class _Shown(HTMLParser):
    """Collects what a browser would show: text outside scripts and styles, blocks on lines of their own."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self.verbatim = self.unseen = 0  # how many <pre>, and how many unseen elements, are open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.unseen += tag in _UNSEEN
        self.verbatim += tag == "pre"
        if tag not in _INLINE:
            self.parts.append("\n")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in _INLINE:
            self.parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        # At least 0: a page may close what it never opened.
        self.unseen = max(0, self.unseen - (tag in _UNSEEN))
        self.verbatim = max(0, self.verbatim - (tag == "pre"))
        if tag not in _INLINE:
            self.parts.append("\n")

    def handle_data(self, data: str) -> None:
        if self.unseen:
            return
        if self.verbatim:
            self.parts.append(data)
        else:
            words = " ".join(data.split())
            self.parts.append(" " * data[:1].isspace() + words + " " * (data[-1:].isspace() and bool(words)))


def _shown(page: str) -> str:
    """The text of an HTML page; runs of blank lines become one line break."""
    parser = _Shown()
    parser.feed(page)
    parser.close()
    lines = "".join(parser.parts).split("\n")
    return "\n".join(line.rstrip() for line in lines if line.strip())
