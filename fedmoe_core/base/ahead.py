"""Work that is prepared in another thread, one item ahead of the one that is used."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")
P = TypeVar("P")


@contextmanager
def ahead(items: Sequence[T], prepare: Callable[[T], P]) -> Iterator[Iterator[tuple[T, P]]]:
    """Go through ``items`` with what ``prepare`` makes of each; while one is used, the next is prepared.

    At most one prepared item waits, so memory holds two: this one and that. Leaving the block early waits for the
    preparation that runs and begins no other.

    Args:
        items: in the order of their use.
        prepare: runs in another thread, never twice at once. What it raises is raised where its item would come.

    Example:
        >>> with ahead([1, 2, 3], lambda number: number * number) as squares:
        ...     list(squares)
        [(1, 1), (2, 4), (3, 9)]
    """
    if not items:
        yield iter(())
        return
    pool = ThreadPoolExecutor(1, thread_name_prefix="ahead")
    try:
        yield _in_turn(items, pool.submit(prepare, items[0]), lambda item: pool.submit(prepare, item))
    finally:
        pool.shutdown(cancel_futures=True)


def _in_turn(items: Sequence[T], first: Future[P], begin: Callable[[T], Future[P]]) -> Iterator[tuple[T, P]]:
    waiting = first
    for place, item in enumerate(items, start=1):
        prepared = waiting.result()
        if place < len(items):
            waiting = begin(items[place])
        yield item, prepared
