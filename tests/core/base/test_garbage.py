"""What exists is passed over within the block and not after it; cycles that are made inside are collected."""

from __future__ import annotations

import gc
import weakref

import pytest

from fedmoe_core.base.garbage import older_objects_skipped


class Cycle:
    """An object that only the collector frees."""

    def __init__(self) -> None:
        self.itself = self


def test_older_objects_are_passed_over_until_the_block_ends() -> None:
    older = weakref.ref(Cycle())
    with older_objects_skipped():
        younger = weakref.ref(Cycle())
        gc.collect()
        assert older() is not None
        assert younger() is None
    gc.collect()
    assert older() is None
    assert gc.get_freeze_count() == 0


def test_an_error_ends_it_too() -> None:
    with pytest.raises(KeyboardInterrupt), older_objects_skipped():
        raise KeyboardInterrupt
    assert gc.get_freeze_count() == 0


def test_what_the_caller_froze_stays_frozen() -> None:
    gc.freeze()
    try:
        with older_objects_skipped():
            pass
        assert gc.get_freeze_count() > 0
    finally:
        gc.unfreeze()
