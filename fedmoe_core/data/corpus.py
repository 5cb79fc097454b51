"""Raw text with its facts: the record, and how every reader makes it from pieces."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedmoe_core.data.batches import Task
from fedmoe_core.data.conversations import Conversation

PIECE_CHARS = 4000


@dataclass(frozen=True, eq=False)
class Corpus:
    """P pieces of text (language modelling) or P labelled rows (classification), in a canonical order.

    Attributes:
        source: what was asked for, such as ``stdlib`` or ``csv:news.csv``.
        texts: the pieces or rows.
        domains_P: (P,) int64, index into ``domain_names``: package, or the file's ``client`` / ``domain`` field.
        ownable: domains that clients may own, most wanted first; text of any other domain is public.
        labels_P: (P,) int64, index into ``class_names``; None for language modelling.
        sha256: of the raw bytes: the file's own digest, or (standard library, folder) that over every path, length and
            content in sorted order.
        conversations: P conversations, whose ``texts`` are then what ``text_of`` writes; None = plain text.
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
    conversations: tuple[Conversation, ...] | None = None


def make_corpus(
    source: str,
    texts: list[str],
    *,
    domains: list[str],
    labels: list[str] | None,
    digest: str,
    class_names: tuple[str, ...] = (),
    conversations: tuple[Conversation, ...] | None = None,
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
        conversations=conversations,
    )


def cut(text: str) -> list[str]:
    """Cut into pieces of PIECE_CHARS characters; blank pieces are dropped."""
    pieces = [text[start : start + PIECE_CHARS] for start in range(0, len(text), PIECE_CHARS)]
    return [piece for piece in pieces if piece.strip()]


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


def entry_of(inside: Path, raw: bytes) -> bytes:
    """What a file adds to the digest of a folder; a name need not be UTF-8."""
    return f"{inside.as_posix()}\0{len(raw)}\0".encode("utf-8", "surrogateescape") + raw


def _natural(name: str) -> tuple[bool, int, str]:
    """Sort key: whole numbers by value, before words."""
    return (not name.isdecimal(), int(name) if name.isdecimal() else 0, name)
