"""Python's garbage collector, kept from objects that are there before a run's rounds begin."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def older_objects_skipped() -> Iterator[None]:
    """Let the garbage collector skip, until the block ends, whatever exists when it begins.

    The imports of torch and transformers leave a million objects, and a full collection walks them all in 0.17 s: as
    long as 100 clients of a small model train. Where the caller has frozen objects itself, nothing is done.
    """
    if gc.get_freeze_count():
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
