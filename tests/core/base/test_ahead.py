"""One item ahead and no more: in order, errors where they belong, no thread left."""

from __future__ import annotations

from threading import Event, current_thread
from threading import enumerate as threads

import pytest

from fedmoe_core.base.ahead import ahead


def test_items_come_in_order_from_another_thread() -> None:
    with ahead(range(5), lambda item: (item, current_thread().name)) as prepared:
        found = list(prepared)
    assert [(item, made[0]) for item, made in found] == [(item, item) for item in range(5)]
    assert not any(made[1] == current_thread().name for _, made in found)
    assert not any(thread.name.startswith("ahead") for thread in threads())


def test_the_next_item_is_prepared_while_this_one_is_used_and_no_further_one() -> None:
    begun = [Event() for _ in range(4)]

    def prepare(item: int) -> int:
        begun[item].set()
        return item

    with ahead(range(4), prepare) as prepared:
        for item, _ in prepared:
            if item + 1 < 4:
                assert begun[item + 1].wait(30)  # though this one is still in use
            assert not any(event.is_set() for event in begun[item + 2 :])


def test_an_error_is_raised_where_its_item_would_come() -> None:
    def prepare(item: int) -> int:
        if item == 2:
            raise OSError("torn")
        return item

    with ahead(range(4), prepare) as prepared:
        assert [next(prepared)[0], next(prepared)[0]] == [0, 1]
        with pytest.raises(OSError, match="torn"):
            next(prepared)
    assert not any(thread.name.startswith("ahead") for thread in threads())


def test_who_leaves_early_waits_for_one_preparation_and_begins_no_other() -> None:
    done: list[int] = []
    with ahead(range(9), done.append) as prepared:
        next(prepared)
    assert done in ([0], [0, 1])
    assert not any(thread.name.startswith("ahead") for thread in threads())


def test_nothing_to_do() -> None:
    with ahead([], len) as prepared:
        assert list(prepared) == []
