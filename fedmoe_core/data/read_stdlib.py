"""Text and its facts, read from the standard library of this Python."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import numpy as np

from fedmoe_core.data.corpus import Corpus, cut, entry_of, make_corpus

SKIPPED_FOLDERS = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib-dynload", "__pycache__"}
)


# Packages with a special vocabulary, measured to make non-identical clients; some systems lack tkinter, idlelib.
FIRST_OWNED = (
    *("asyncio", "email", "unittest", "tkinter", "idlelib"),
    *("encodings", "xml", "ctypes", "pydoc_data", "multiprocessing"),
)


LEAST_PIECES = 8  # a package with less text (32,000 characters) stays public


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
        digest.update(entry_of(inside, raw))
        pieces = cut(raw.decode("utf-8", errors="replace"))
        texts += pieces
        domains += [inside.parts[0].removesuffix(".py")] * len(pieces)
        if len(inside.parts) > 1:
            packages.add(inside.parts[0])
    if not texts:
        raise ValueError(f"no Python source text under {root}; use data=jsonl:FILE with text of your own")
    corpus = make_corpus("stdlib", texts, domains=domains, labels=None, digest=digest.hexdigest())
    names, sizes = corpus.domain_names, np.bincount(corpus.domains_P)
    order = sorted(
        (index for index, size in enumerate(sizes) if size >= LEAST_PIECES),
        key=lambda index: (names[index] not in FIRST_OWNED, names[index] not in packages, -sizes[index], names[index]),
    )
    return replace(corpus, ownable=tuple(order))


def stdlib_digest(root: Path) -> str:
    """Return the sha256 (hex) of what ``read_stdlib`` reads: over every path, length and content in sorted order."""
    digest = sha256()
    for inside, raw in _python_sources(root):
        digest.update(entry_of(inside, raw))
    return digest.hexdigest()


def _python_sources(root: Path) -> Iterator[tuple[Path, bytes]]:
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = sorted(name for name in subfolders if name not in SKIPPED_FOLDERS)
        for name in sorted(files):
            if name.endswith(".py"):
                path = Path(folder, name)
                yield path.relative_to(root), path.read_bytes()
