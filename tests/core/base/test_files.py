"""The logs hold whole lines only, whenever the writer was killed."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedmoe_core.base.files import JsonlLog, read_json_lines, replacing, write_whole


def records_of(count: int, width: int = 3) -> list[dict[str, object]]:
    return [{"round": number, "text": "☃\n" * width} for number in range(count)]


def test_records_come_back_in_order(tmp_path: Path) -> None:
    log = JsonlLog(tmp_path / "metrics.jsonl")
    assert (log.read(), log.count()) == ([], 0)
    first, second, third = records_of(3)
    log.append(first)
    log.append(second, third)
    assert log.read() == [first, second, third]
    assert log.count() == 3


def test_every_line_is_strict_json(tmp_path: Path) -> None:
    log = JsonlLog(tmp_path / "metrics.jsonl")
    record = {
        "nan": float("nan"),
        "inf": [np.float32("inf"), -float("inf")],
        "array": np.arange(4).reshape(2, 2),
        "scalar": np.float64(0.5),
        "flag": np.bool_(True),
        3: (1, None, "x"),
    }
    log.append(record)

    def no_constants(name: str) -> None:
        raise AssertionError(name)

    assert json.loads(log.path.read_text(), parse_constant=no_constants) == {
        "nan": None,
        "inf": [None, None],
        "array": [[0, 1], [2, 3]],
        "scalar": 0.5,
        "flag": True,
        "3": [1, None, "x"],
    }


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(count=st.integers(0, 4), width=st.sampled_from([0, 1, 3000]), data=st.data())
def test_inv10_log_cut_anywhere_loses_only_its_last_line(
    tmp_path: Path, count: int, width: int, data: st.DataObject
) -> None:
    """Width 3000 makes lines longer than the 4 KiB steps in which the last newline is sought."""
    log = JsonlLog(tmp_path / "ledger.jsonl")
    log.path.unlink(missing_ok=True)
    records = records_of(count, width)
    log.append(*records)
    content = log.path.read_bytes()
    cut = data.draw(st.integers(0, len(content)))
    log.path.write_bytes(content[:cut])
    whole = content[:cut].count(b"\n")
    assert log.read() == records[:whole]
    assert log.count() == whole
    log.append({"round": "next"})
    assert log.read() == [*records[:whole], {"round": "next"}]
    keep = data.draw(st.integers(0, whole + 1))
    log.truncate(keep)
    assert log.read() == [*records[:whole], {"round": "next"}][:keep]


def test_inv10_truncate_drops_a_broken_line_and_refuses_missing_ones(tmp_path: Path) -> None:
    log = JsonlLog(tmp_path / "metrics.jsonl")
    log.truncate(0)
    assert not log.path.exists()
    with pytest.raises(ValueError, match="holds 0 lines, the checkpoint counted 1"):
        log.truncate(1)
    log.path.write_bytes(b'{"round": 0}\n{"round": 1}\n{"rou')
    with pytest.raises(ValueError, match="holds 2 lines, the checkpoint counted 3"):
        log.truncate(3)
    log.truncate(2)
    assert log.path.read_bytes() == b'{"round": 0}\n{"round": 1}\n'


@pytest.mark.parametrize("line", [b"{'a': 1}", b"\xff", b"[1]", b"3", b"", b"[" * 100_000])
def test_inv11_foreign_line_is_named(tmp_path: Path, line: bytes) -> None:
    log = JsonlLog(tmp_path / "metrics.jsonl")
    log.path.write_bytes(b'{"round": 0}\n' + line + b'\n{"round": 2}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl line 2 is not") as caught:
        log.read()
    assert "\n" not in str(caught.value)


def test_inv10_kill_at_random_moments_leaves_whole_lines(tmp_path: Path) -> None:
    log, rng = JsonlLog(tmp_path / "metrics.jsonl"), random.Random(0)
    for _ in range(10):
        done = log.count()
        child = os.fork()
        if child == 0:
            for number in range(done, 10**6):
                log.append({"number": number, "padding": "x" * 20_000})
            os._exit(1)
        time.sleep(rng.uniform(0.002, 0.03))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        records = log.read()
        assert [record["number"] for record in records] == list(range(len(records)))
        assert len(records) >= done
    assert log.count() > 0


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
