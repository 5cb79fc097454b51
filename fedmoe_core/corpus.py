"""Raw text with its facts, read from the standard library of this Python or from a JSON Lines file."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np

from fedmoe_core.batch import Task

PIECE_CHARS = 4000
SKIPPED_FOLDERS = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib-dynload", "__pycache__"}
)
# Packages with a special vocabulary, measured to make non-identical clients; some systems lack tkinter, idlelib.
FIRST_OWNED = (
    *("asyncio", "email", "unittest", "tkinter", "idlelib"),
    *("encodings", "xml", "ctypes", "pydoc_data", "multiprocessing"),
)
LEAST_PIECES = 8  # a package with less text (32,000 characters) stays public


@dataclass(frozen=True, eq=False)
class Corpus:
    """P pieces of text (language modelling) or P labelled rows (classification), in a canonical order.

    Attributes:
        source: what was asked for, such as ``stdlib`` or ``csv:news.csv``.
        texts: the pieces or rows.
        domains_P: (P,) int64, index into ``domain_names``: package, or the file's ``client`` / ``domain`` field.
        ownable: domains that clients may own, most wanted first; text of any other domain is public.
        labels_P: (P,) int64, index into ``class_names``; None for language modelling.
        sha256: of the raw bytes: the file's own digest, or (standard library) that over every path, length and content
            in sorted order.
    """

    source: str
    task: Task
    texts: tuple[str, ...]
    domains_P: np.ndarray
    domain_names: tuple[str, ...]
    ownable: tuple[int, ...]
    labels_P: np.ndarray | None
    class_names: tuple[str, ...]
    sha256: str


def read_stdlib(root: Path) -> Corpus:
    """Read all ``.py`` files under ``root`` (but SKIPPED_FOLDERS) in pieces; the domain is the package or module.

    Raises:
        ValueError: there is no source text, as in a Python that ships bytecode only.
    """
    digest = sha256()
    texts: list[str] = []
    domains: list[str] = []
    packages: set[str] = set()
    for inside, raw in _python_sources(root):
        digest.update(_entry(inside, raw))
        pieces = cut(raw.decode("utf-8", errors="replace"))
        texts += pieces
        domains += [inside.parts[0].removesuffix(".py")] * len(pieces)
        if len(inside.parts) > 1:
            packages.add(inside.parts[0])
    if not texts:
        raise ValueError(f"no Python source text under {root}; use data=jsonl:FILE with text of your own")
    names, domains_P, sizes = np.unique(domains, return_inverse=True, return_counts=True)
    order = sorted(
        (index for index, size in enumerate(sizes) if size >= LEAST_PIECES),
        key=lambda index: (names[index] not in FIRST_OWNED, names[index] not in packages, -sizes[index], names[index]),
    )
    return Corpus(
        source="stdlib",
        task="causal_lm",
        texts=tuple(texts),
        domains_P=domains_P.astype(np.int64),
        domain_names=tuple(map(str, names)),
        ownable=tuple(order),
        labels_P=None,
        class_names=(),
        sha256=digest.hexdigest(),
    )


def read_jsonl(path: Path) -> Corpus:
    """Read one JSON object per line: ``text``, and, on every line or on none, ``label`` and ``client`` or ``domain``.

    With labels each line is one row; without, it is a document that is cut into pieces.

    Raises:
        ValueError: a broken line, an empty text or a field that some lines lack; the message names the line.
        OSError: the file cannot be read.
    """
    raw = read_bytes(path)
    records = list(_jsonl_records(decode(raw, path), path))
    if not records:
        raise ValueError(f"{path} holds no line; give one JSON object per line, each with a text")
    fields = {field for field in ("label", "client", "domain") if field in records[0][1]}
    group_field = next((field for field in ("client", "domain") if field in fields), None)
    texts: list[str] = []
    labels: list[str] = []
    domains: list[str] = []
    for line, record in records:
        for field in ("label", "client", "domain"):
            if (field in record) != (field in fields):
                raise ValueError(
                    f"{path} line {line}: {field!r} is on some lines only; give it to all lines or to none"
                )
        text = record.get("text")
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"{path} line {line}: 'text' is missing, empty or not a string; fill it or drop the line")
        # A JSON escape can name half a surrogate pair, which no UTF-8 encoder takes.
        text = text.encode("utf-8", errors="replace").decode("utf-8")
        pieces = [text] if "label" in fields else cut(text)
        texts += pieces
        domains += [_name(record, group_field, path, line) if group_field else "all"] * len(pieces)
        if "label" in fields:
            labels.append(_name(record, "label", path, line))
    digest = sha256(raw).hexdigest()
    return make_corpus(f"jsonl:{path}", texts, domains=domains, labels=labels or None, digest=digest)


def make_corpus(
    source: str,
    texts: list[str],
    *,
    domains: list[str],
    labels: list[str] | None,
    digest: str,
    class_names: tuple[str, ...] = (),
) -> Corpus:
    """Index the names of domains and labels; classes in the order given, else the natural one of their labels.

    Raises:
        ValueError: fewer than two classes, or a class too small to be split three ways.
    """
    names, domains_P, sizes = np.unique(domains, return_inverse=True, return_counts=True)
    labels_P = None
    if labels is not None:
        present = set(labels)
        class_names = tuple(name for name in class_names if name in present) or tuple(sorted(present, key=_natural))
        if len(class_names) < 2:
            raise ValueError(f"{source} has one class, {class_names[0]!r}; classification needs at least two")
        index_of = {name: index for index, name in enumerate(class_names)}
        labels_P = np.array([index_of[label] for label in labels], dtype=np.int64)
        rows_of_class = np.bincount(labels_P)
        if rows_of_class.min() < 5:
            small = int(rows_of_class.argmin())
            raise ValueError(
                f"{source}: class {class_names[small]!r} has {rows_of_class[small]} rows and each class needs 5 for "
                "the public, test and client splits; add rows, or, if line 1 is a header, name its label column 'label'"
            )
    return Corpus(
        source=source,
        task="causal_lm" if labels is None else "classification",
        texts=tuple(texts),
        domains_P=domains_P.astype(np.int64),
        domain_names=tuple(map(str, names)),
        ownable=tuple(int(index) for index in np.argsort(-sizes, kind="stable")),
        labels_P=labels_P,
        class_names=class_names,
        sha256=digest,
    )


def cut(text: str) -> list[str]:
    """Cut into pieces of PIECE_CHARS characters; blank pieces are dropped."""
    pieces = [text[start : start + PIECE_CHARS] for start in range(0, len(text), PIECE_CHARS)]
    return [piece for piece in pieces if piece.strip()]


def stdlib_digest(root: Path) -> str:
    """Return the sha256 (hex) of what ``read_stdlib`` reads: over every path, length and content in sorted order."""
    digest = sha256()
    for inside, raw in _python_sources(root):
        digest.update(_entry(inside, raw))
    return digest.hexdigest()


def read_bytes(path: Path) -> bytes:
    """Read a file once: what is parsed and what is digested are then the same bytes, whatever happens to the file.

    Raises:
        ValueError: it is a pipe or a device, which a resumed run could not read again.
        OSError: it cannot be read.
    """
    try:
        if path.exists() and not path.is_file() and not path.is_dir():
            raise ValueError(f"{path} is a pipe or a device, which can be read only once; save its text as a file")
        return path.read_bytes()
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} does not exist; check the file name after data=") from None
    except IsADirectoryError:
        raise IsADirectoryError(f"{path} is a folder; name the file inside it") from None
    except PermissionError:
        raise PermissionError(f"{path} may not be read; check its permissions") from None


def decode(raw: bytes, path: Path) -> str:
    """Decode UTF-8 and drop a byte-order mark; every way to end a line becomes a newline.

    Raises:
        ValueError: it is not UTF-8; the message names the first wrong byte.
    """
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _entry(inside: Path, raw: bytes) -> bytes:
    """What a file adds to the digest of the standard library."""
    return f"{inside.as_posix()}\0{len(raw)}\0".encode() + raw


def _python_sources(root: Path) -> Iterator[tuple[Path, bytes]]:
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = sorted(name for name in subfolders if name not in SKIPPED_FOLDERS)
        for name in sorted(files):
            if name.endswith(".py"):
                path = Path(folder, name)
                yield path.relative_to(root), path.read_bytes()


def _jsonl_records(raw: str, path: Path) -> Iterator[tuple[int, dict[str, object]]]:
    # Not splitlines(): JSON strings may hold U+2028 and its kin unescaped, which do not end a line here.
    for line, content in enumerate(raw.split("\n"), start=1):
        if not content.strip():
            continue
        try:
            record = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} line {line} is not valid JSON ({error}); repair or drop the line") from None
        if not isinstance(record, dict):
            raise ValueError(f'{path} line {line} is not a JSON object; write {{"text": ...}}')
        yield line, record


def _name(record: dict[str, object], field: str, path: Path, line: int) -> str:
    """A label, client or domain as a string."""
    value = record[field]
    if isinstance(value, bool) or not isinstance(value, str | int) or not str(value).strip():
        raise ValueError(f"{path} line {line}: {field!r} must be a non-empty string or a whole number, not {value!r}")
    return str(value).strip()


def _natural(name: str) -> tuple[bool, int, str]:
    """Sort key: whole numbers by value, before words."""
    return (not name.isdecimal(), int(name) if name.isdecimal() else 0, name)
