"""Files are whole or not there, are nothing but files, and a line of another kind is named."""

from __future__ import annotations

import os
import socket
import threading
from pathlib import Path

import pytest

from fedmoe_core.base.files import form_of, opened, read_json_lines, replacing, require_file, write_whole


@pytest.mark.parametrize("line", [b"{'a': 1}", b"\xff", b"[1]", b"3", b"", b"[" * 100_000])
def test_inv11_foreign_line_is_named(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"round": 0}\n' + line + b'\n{"round": 2}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl line 2 is not") as caught:
        read_json_lines(path)
    assert "\n" not in str(caught.value)


def test_a_lenient_reader_takes_what_an_editor_leaves_and_no_half_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"a": 1}\n\n{"a": 2}')
    assert [record for _, record in read_json_lines(path, lenient=True)] == [{"a": 1}, {"a": 2}]
    path.write_bytes(b'{"a": 1}\n{"a": 2')
    assert read_json_lines(path, lenient=True) == read_json_lines(path) == [(f"{path} line 1", {"a": 1})]
    path.write_bytes(b'{"a": 1\n{"a": 2}')
    with pytest.raises(ValueError, match=r"metrics\.jsonl line 1 is not JSON"):
        read_json_lines(path, lenient=True)


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path, kept = tmp_path / "state", tmp_path / "kept"
    kept.write_text("kept")
    path.symlink_to(kept)
    write_whole(path, "first")
    assert (path.read_text(), path.is_symlink(), kept.read_text()) == ("first", False, "kept")

    def fail() -> None:
        with replacing(path) as partial:
            partial.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert path.read_text() == "first"
    assert {entry.name for entry in tmp_path.iterdir()} == {"state", "kept"}


def test_what_is_not_a_file_is_named_and_never_waited_for(tmp_path: Path) -> None:
    def look(path: Path) -> str:
        with pytest.raises(ValueError) as caught, opened(path):
            pytest.fail("opened what is not a file")
        return str(caught.value)

    (tmp_path / "victim").write_text("precious")
    (tmp_path / "link").symlink_to(tmp_path / "victim")
    (tmp_path / "broken").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "socket"))
        told: dict[str, str] = {}
        names = {"link": "a symbolic link", "broken": "a symbolic link", "pipe": "a pipe", "folder": "a folder"}
        names |= {"socket": "a socket", "/dev/null": "a device"}
        looker = threading.Thread(target=lambda: told.update({name: look(tmp_path / name) for name in names}))
        looker.daemon = True
        looker.start()
        looker.join(timeout=20)
        assert not looker.is_alive(), "opening a pipe waits for its other end"
    assert {name: form in told[name] for name, form in names.items()} == dict.fromkeys(names, True)
    assert (form_of(tmp_path / "victim"), form_of(tmp_path / "missing")) == ("", "")
    with opened(tmp_path / "victim") as file:
        assert file.read() == b"precious"
    require_file(tmp_path / "victim", most=8)
    with pytest.raises(ValueError, match="has 8 bytes, and such a file has at most 7"):
        require_file(tmp_path / "victim", most=7)


def test_a_file_that_cannot_be_written_is_one_sentence_with_its_name(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"gone/summary.json could not be written \(No such file"):
        write_whole(tmp_path / "gone" / "summary.json", "text")
