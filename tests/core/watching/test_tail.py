"""A log is read on from where it was: each whole line once, and all of them again once the file is another."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmoe_core.watching import tail as module
from fedmoe_core.watching.tail import Tail


def new(tail: Tail) -> tuple[bool, list[bytes]]:
    return tail.rewound(), list(tail.lines())


def test_whole_lines_come_once_and_half_a_line_waits(tmp_path: Path) -> None:
    path = tmp_path / "log"
    tail = Tail(path)
    assert new(tail) == (False, [])
    path.write_bytes(b"one\ntwo\nthr")
    assert new(tail) == (False, [b"one", b"two"])
    assert new(tail) == (False, [])
    with path.open("ab") as file:
        file.write(b"ee\nfour\n")
    assert new(tail) == (False, [b"three", b"four"])


def test_only_what_is_new_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, read = tmp_path / "log", []
    path.write_bytes(b"x" * 100_000 + b"\n")
    tail = Tail(path)
    new(tail)
    opened = Path.open

    def counted(self: Path, *how: Any) -> Any:
        file = opened(self, *how)
        seek = file.seek

        def sought(place: int) -> int:
            read.append(place)
            return seek(place)

        return type(
            "Counted",
            (),
            {
                "__enter__": lambda it: it,
                "__exit__": lambda it, *_: file.close(),
                "seek": lambda it, at: sought(at),
                "read": lambda it, size: file.read(size),
                "fileno": lambda it: file.fileno(),
            },
        )()

    monkeypatch.setattr(Path, "open", counted)
    assert new(tail) == (False, [])
    assert min(read) >= 100_001 - module.REMEMBERED


@pytest.mark.parametrize("grown", [b"", b"2 again\n", b"2 again and longer\n3\n4\n5\n"])
def test_a_log_that_was_cut_back_is_read_from_its_start(tmp_path: Path, grown: bytes) -> None:
    path = tmp_path / "log"
    tail = Tail(path)
    path.write_bytes(b"1\n2 once\n3\n")
    new(tail)
    with path.open("r+b") as file:  # as a resumed run does, between two looks
        file.truncate(2)
        file.seek(2)
        file.write(grown)
    assert new(tail) == (True, [b"1", *grown.split(b"\n")[:-1]])


def test_a_log_that_was_replaced_or_removed_is_another(tmp_path: Path) -> None:
    path, other = tmp_path / "log", tmp_path / "other"
    tail = Tail(path)
    path.write_bytes(b"1\n2\n")
    new(tail)
    other.write_bytes(b"1\n2\n3\n")
    os.replace(other, path)
    assert new(tail) == (True, [b"1", b"2", b"3"])
    path.unlink()
    assert new(tail) == (True, [])
    assert new(tail) == (False, [])
    path.write_bytes(b"new\n")
    assert new(tail) == (False, [b"new"])


@given(st.lists(st.binary(max_size=40).map(lambda line: line.replace(b"\n", b"")), max_size=30), st.data())
def test_however_a_log_grows_its_lines_are_its_lines(
    tmp_path_factory: pytest.TempPathFactory, lines: list[bytes], data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("logs") / "log"
    whole, tail, found, place = b"".join(line + b"\n" for line in lines), Tail(path), [], 0
    while place < len(whole):
        step = data.draw(st.integers(1, len(whole)))
        with path.open("ab") as file:
            file.write(whole[place : place + step])
        place += step
        rewound, came = new(tail)
        assert not rewound
        found += came
    assert found == lines
