"""A log counts as far as a checkpoint covers it: what is missing or changed is refused, what came later goes."""

from __future__ import annotations

import errno
import json
import os
import random
import resource
import signal
import time
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
from checkpoint_cases import in_child
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedmoe_core.simulation.directory.prefix_log import CHUNK, Prefix, PrefixLog


def records_of(count: int, *, round: int = 0, width: int = 3) -> list[dict[str, object]]:
    return [{"round": round, "number": number, "text": "☃\n" * width} for number in range(count)]


def made(path: Path, *, rounds: int = 2) -> tuple[PrefixLog, Prefix]:
    """A log of three lines a round, and what a checkpoint of its last round counts."""
    path.unlink(missing_ok=True)
    log = PrefixLog.create(path)
    for round_ in range(1, rounds + 1):
        log.append(*records_of(3, round=round_))
    return log, log.prefix()


def test_records_come_back_in_order_and_the_prefix_is_that_of_the_file(tmp_path: Path) -> None:
    log = PrefixLog.create(tmp_path / "metrics.jsonl")
    assert (log.read(), log.prefix()) == ([], Prefix(0, 0, sha256().hexdigest()))
    first, second, third = records_of(3)
    log.append(first)
    log.append(second, third)
    assert log.read() == [first, second, third]
    data = log.path.read_bytes()
    assert log.prefix() == Prefix(3, len(data), sha256(data).hexdigest())
    with pytest.raises(FileExistsError):
        PrefixLog.create(log.path)


def test_every_line_is_strict_json(tmp_path: Path) -> None:
    log = PrefixLog.create(tmp_path / "metrics.jsonl")
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
@given(more=st.integers(0, 4), width=st.sampled_from([0, 3, 3000]), data=st.data())
def test_inv10_a_cut_after_the_prefix_is_dropped_and_one_in_it_refused(
    tmp_path: Path, more: int, width: int, data: st.DataObject
) -> None:
    log, prefix = made(tmp_path / "ledger.jsonl")
    log.append(*records_of(more, round=3, width=width))
    content = log.path.read_bytes()
    cut = data.draw(st.integers(0, len(content)))
    log.path.write_bytes(content[:cut])
    if cut < prefix.bytes:
        with pytest.raises(ValueError, match=f"was cut: {cut} bytes of the {prefix.bytes}"):
            PrefixLog.reopen(log.path, prefix, round=2)
        assert log.path.read_bytes() == content[:cut], "a refusal changes nothing"
        return
    again = PrefixLog.reopen(log.path, prefix, round=2)
    assert again.path.read_bytes() == content[: prefix.bytes]
    again.append(*records_of(1, round=3))
    assert again.read() == [*(r for n in (1, 2) for r in records_of(3, round=n)), *records_of(1, round=3)]
    assert again.prefix().sha256 == sha256(again.path.read_bytes()).hexdigest()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.integers(0, 10**6), bit=st.integers(0, 7))
def test_a_flipped_bit_in_the_prefix_is_refused(tmp_path: Path, place: int, bit: int) -> None:
    log, prefix = made(tmp_path / "metrics.jsonl")
    content = bytearray(log.path.read_bytes())
    content[place % len(content)] ^= 1 << bit
    log.path.write_bytes(content)
    with pytest.raises(ValueError, match="its first 6 lines were changed; restore it"):
        PrefixLog.reopen(log.path, prefix, round=2)


@pytest.mark.parametrize(
    ("tail", "refused"),
    [
        (b'{"round": 3}\n{"round": 3}\n{"rou', False),
        (b"\0" * 9000 + b"\n\xff{\n" + b"[" * 100_000 + b"\n[1]\n", False),  # what a power cut may leave
        (b'{"round": 3}\n{"round": 1}\n', True),
        (b'{"type": "round"}\n', True),
        (b'{"round": 99}\n', True),
    ],
)
def test_lines_after_the_prefix_go_unless_another_round_wrote_them(tmp_path: Path, tail: bytes, refused: bool) -> None:
    log, prefix = made(tmp_path / "metrics.jsonl")
    kept = log.path.read_bytes()
    log.path.write_bytes(kept + tail)
    if refused:
        with pytest.raises(ValueError, match=r"goes on after the last round on record with a line of round .*where 3"):
            PrefixLog.reopen(log.path, prefix, round=2)
        return
    PrefixLog.reopen(log.path, prefix, round=2)
    assert log.path.read_bytes() == kept


def test_a_doubled_log_is_refused_and_one_of_a_terabyte_is_not_read(tmp_path: Path) -> None:
    log, prefix = made(tmp_path / "metrics.jsonl")
    log.path.write_bytes(log.path.read_bytes() * 2)
    with pytest.raises(ValueError, match="with a line of round 1"):
        PrefixLog.reopen(log.path, prefix, round=2)
    os.truncate(log.path, 1 << 40)  # a hole: it takes no space
    with pytest.raises(ValueError, match="bytes after the last round on record"):
        PrefixLog.reopen(log.path, prefix, round=2)
    log.path.unlink()
    with pytest.raises(ValueError, match="is missing; restore it"):
        PrefixLog.reopen(log.path, prefix, round=2)


def test_a_prefix_longer_than_what_is_read_at_once(tmp_path: Path) -> None:
    log = PrefixLog.create(tmp_path / "metrics.jsonl")
    log.append(*({"round": 1, "padding": "x" * 100_000} for _ in range(2 * CHUNK // 100_000 + 1)))
    prefix = log.prefix()
    log.append({"round": 2})
    assert PrefixLog.reopen(log.path, prefix, round=1).prefix() == prefix
    assert log.path.stat().st_size == prefix.bytes > 2 * CHUNK


def test_a_log_that_is_gone_or_that_another_program_wrote_ends_the_run_in_one_sentence(tmp_path: Path) -> None:
    log, prefix = made(tmp_path / "metrics.jsonl")
    with log.path.open("ab") as file:
        file.write(b"{}\n")
    with pytest.raises(OSError, match="another program wrote it"):
        log.append({"round": 3})
    log.path.unlink()
    for form in ("gone", "a symbolic link"):
        with pytest.raises(OSError, match=form):
            log.append({"round": 3})
        log.path.unlink(missing_ok=True)
        log.path.symlink_to(tmp_path / "victim")
    assert not (tmp_path / "victim").exists(), "nothing is made in its stead"
    assert log.prefix() == prefix


def test_a_full_disk_leaves_no_part_of_a_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A limit on file size stands for the full disk, which takes a part first; then a disk that takes nothing."""
    log, prefix = made(tmp_path / "metrics.jsonl")

    def fill() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (prefix.bytes + 10, prefix.bytes + 10))
        with pytest.raises(OSError, match=r"metrics.jsonl cannot be written \(File too large\); mend that and resume"):
            log.append(*records_of(3, round=3))

    assert in_child(fill) == 0
    assert log.path.stat().st_size == prefix.bytes

    def full(*given: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(OSError, match="No space left on device"):
            log.append(*records_of(3, round=3))
    log.append(*records_of(3, round=3))
    assert PrefixLog.reopen(log.path, log.prefix(), round=3).prefix().lines == 9


def test_inv10_kill_at_random_moments_leaves_what_was_on_record(tmp_path: Path) -> None:
    log, rng = PrefixLog.create(tmp_path / "metrics.jsonl"), random.Random(0)
    padding, done = "x" * 20_000, 0
    for _ in range(10):
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            for number in range(done, 10**6):
                log.append({"round": number, "padding": padding})
                os.write(writing, b".")
            os._exit(1)
        os.close(writing)
        time.sleep(rng.uniform(0.002, 0.03))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        told = 0
        while data := os.read(reading, 1 << 16):
            told += len(data)
        os.close(reading)
        lines = log.path.read_bytes().split(b"\n")[:-1]
        assert [json.loads(line)["round"] for line in lines] == list(range(len(lines)))
        assert done + told <= len(lines) <= done + told + 1
        done = len(lines)
        whole = b"".join(line + b"\n" for line in lines)
        log = PrefixLog.reopen(log.path, Prefix(done, len(whole), sha256(whole).hexdigest()), round=done - 1)
    assert done > 0
