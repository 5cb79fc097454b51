"""How a run stands, from its directory alone, at every moment of its life; nothing in it is written or held."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from synthetic_run import make_run

from fedmoe_core.simulation.directory.claim import LOCK, MARKER, exclusive
from fedmoe_core.watching import lock as locking
from fedmoe_core.watching.lock import in_use
from fedmoe_core.watching.watcher import Watcher


def lines_of(path: Path, name: str = "metrics.jsonl") -> list[bytes]:
    return (path / name).read_bytes().splitlines(keepends=True)


def unfinished(path: Path, *, rounds: int, **how: Any) -> list[bytes]:
    """A run whose log ends after ``rounds`` rounds; the lines that come after."""
    make_run(path, **how)
    (path / "summary.json").unlink()
    lines = lines_of(path)
    end = 1 + next(n for n, line in enumerate(lines) if json.loads(line)["round"] == rounds and b'"round", ' in line)
    (path / "metrics.jsonl").write_bytes(b"".join(lines[:end]))
    return lines[end:]


def test_a_finished_run(tmp_path: Path) -> None:
    make_run(tmp_path / "run", clients=10, rounds=8)
    seen = Watcher(tmp_path / "run").look()
    rounds = [line for line in map(json.loads, lines_of(tmp_path / "run")) if line["type"] == "round"]
    assert (seen.state, seen.round, seen.rounds, seen.title) == ("finished", 8, 8, "HFedMoE: tiny on stdlib")
    assert seen.loss_R == tuple(line["loss"] for line in rounds)
    assert seen.worst_loss == max(rounds[-1]["loss_clients"])
    assert seen.bytes_down == rounds[-1]["bytes_down_total"]
    assert seen.round_seconds == pytest.approx(sum(line["seconds"] for line in rounds[1:]) / 8)
    assert seen.seconds_left is None
    ledger = list(map(json.loads, lines_of(tmp_path / "run", "ledger.jsonl")))
    assert seen.memory_bytes == max(line["real"]["memory_bytes"] for line in ledger)
    assert seen.answers == {"ok": 79, "failed": 1}
    (reason,) = seen.reasons["failed"]
    assert (reason.reason, reason.times, reason.clients, reason.first) == ("loss is NaN at step 3", 1, (9,), 2)
    assert [(tier.tier, tier.clients, tier.answers, tier.accepted) for tier in seen.tiers] == [
        ("memory=24MiB", 3, 24, 24),
        ("memory=16MiB,down=2MiB", 3, 24, 23),
        ("experts=25%", 2, 16, 16),
        ("flops=40GFLOP,up=1.5MiB", 2, 16, 16),
    ]
    first = seen.tiers[0]
    used = [line["real"]["memory_bytes"] / line["budget"]["memory_bytes"] for line in ledger if line["client"] % 4 == 0]
    assert (first.part, first.of) == (max(used), "memory")
    assert first.worst_loss == max(rounds[-1]["loss_clients"][0::4])


def test_a_run_that_grows_is_followed_line_by_line(tmp_path: Path) -> None:
    path = tmp_path / "run"
    watcher = Watcher(path)
    assert watcher.look().state == "not begun"
    rest = unfinished(path, rounds=2, clients=4)
    with exclusive(path):
        seen = watcher.look()
        assert (seen.state, seen.round, len(seen.loss_R)) == ("running", 2, 3)
        assert 0 < seen.seconds_left <= 6 * seen.round_seconds
        for line in rest:
            with (path / "metrics.jsonl").open("ab") as file:
                file.write(line[:-9])
                file.flush()
                before = watcher.look()
                file.write(line[-9:])
            after, record = watcher.look(), json.loads(line)
            grew = record["type"] == "round"
            assert (before.round, after.round) == (record["round"] - 1, record["round"] - (not grew))
            assert sum(after.answers.values()) == sum(before.answers.values()) + (not grew)
        fresh = Watcher(path).look()
        assert replace(fresh, silent_seconds=0.0) == replace(after, silent_seconds=0.0)
        assert (after.round, after.seconds_left) == (8, 0.0)
    assert watcher.look().state == "stopped"


def test_a_resumed_run_counts_no_line_twice(tmp_path: Path) -> None:
    path = tmp_path / "run"
    rest = unfinished(path, rounds=3, clients=4)
    watcher = Watcher(path)
    kept = lines_of(path)
    with (path / "metrics.jsonl").open("ab") as file:
        file.write(b"".join(rest[:3]))  # of a round that was not committed
    assert sum(watcher.look().answers.values()) == 15
    with (path / "metrics.jsonl").open("r+b") as file:
        file.truncate(sum(map(len, kept)))
    assert sum(watcher.look().answers.values()) == 12
    with (path / "metrics.jsonl").open("ab") as file:
        file.write(b"".join(rest))
    seen = watcher.look()
    assert sum(seen.answers.values()) == 32
    assert len(seen.loss_R) == 9


def test_a_run_that_takes_the_place_of_another_is_seen_alone(tmp_path: Path) -> None:
    path = tmp_path / "run"
    make_run(path, clients=4)
    watcher = Watcher(path)
    watcher.look()
    for name in ("metrics.jsonl", "ledger.jsonl", "summary.json", "config.toml"):
        (path / name).unlink()
    with exclusive(path):
        seen = watcher.look()
        assert (seen.state, seen.round, seen.answers, seen.tiers) == ("preparing", -1, {}, ())
    make_run(path, clients=4, rounds=3, algorithm="random", seed=1)
    seen = watcher.look()
    assert (seen.state, seen.round, seen.rounds, sum(seen.answers.values())) == ("finished", 3, 3, 12)
    assert seen.title.startswith("random experts: ")


def test_a_run_that_died_is_stopped_and_one_without_a_checkpoint_cannot_go_on(tmp_path: Path) -> None:
    unfinished(tmp_path / "run", rounds=2, clients=4)
    seen = Watcher(tmp_path / "run").look()
    assert (seen.state, seen.resumable, seen.seconds_left) == ("stopped", False, None)
    (tmp_path / "run" / "checkpoint").mkdir()
    (tmp_path / "run" / "checkpoint" / "checkpoint.json").write_text("{}")
    assert Watcher(tmp_path / "run").look().resumable


@pytest.mark.parametrize("listed", [True, False])
def test_a_lock_is_seen_wherever_it_is_held_and_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, listed: bool
) -> None:
    if not listed:  # as for a process of another container, or without /proc
        monkeypatch.setattr(locking, "LOCKS", tmp_path / "absent")
    assert in_use(tmp_path) is False
    code = f"""
from pathlib import Path
from fedmoe_core.simulation.directory.claim import exclusive
with exclusive(Path({str(tmp_path)!r})):
    print("held", flush=True)
    input()
"""
    with subprocess.Popen([sys.executable, "-c", code], stdin=-1, stdout=-1, text=True, env={**os.environ}) as holder:
        assert holder.stdout is not None
        assert holder.stdin is not None
        assert holder.stdout.readline() == "held\n"
        assert [in_use(tmp_path) for _ in range(3)] == [True] * 3
        holder.stdin.close()
    assert in_use(tmp_path) is False
    with exclusive(tmp_path):  # what was looked at can be held at once
        assert in_use(tmp_path) is True


def test_a_lock_in_the_list_is_not_touched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / LOCK).touch()
    facts = (tmp_path / LOCK).stat()
    device = f"{os.major(facts.st_dev):02x}:{os.minor(facts.st_dev):02x}"
    tried: list[int] = []
    monkeypatch.setattr(locking, "LOCKS", tmp_path / "locks")
    monkeypatch.setattr(locking.fcntl, "flock", lambda file, how: tried.append(how))
    for inode, kind, known in ((facts.st_ino, "FLOCK", True), (facts.st_ino, "POSIX", False), (1, "FLOCK", False)):
        tried.clear()
        (tmp_path / "locks").write_text(f"7: {kind}  ADVISORY  WRITE 4242 {device}:{inode} 0 EOF\n8: OFDLCK\n")
        assert in_use(tmp_path) is known
        assert bool(tried) is not known


def test_a_lock_that_is_a_link_or_a_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_text("")
    (tmp_path / LOCK).symlink_to(tmp_path / "elsewhere")
    assert in_use(tmp_path) is None
    (tmp_path / LOCK).unlink()
    (tmp_path / LOCK).mkdir()
    assert in_use(tmp_path) is False


def test_looking_writes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "run"
    make_run(path, clients=4)
    before = {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in sorted(path.rglob("*")) if file.is_file()}
    Watcher(path).look()
    after = {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in sorted(path.rglob("*")) if file.is_file()}
    assert before == after


HOSTILE = [
    b"not JSON\n",
    b"[1, 2]\n",
    b'{"type": "round", "round": -3}\n',
    b'{"type": "round", "round": 1e400, "loss": 1}\n',
    b'{"type": "round", "round": 4, "loss": "low"}\n',
    b'{"type": "round", "round": 4, "loss_clients": [[1]]}\n',
    b'{"type": "client", "round": 4, "client": 18446744073709551616, "status": "ok"}\n',
    b'{"type": "client", "round": 4, "client": 0, "status": "\xff\xfe"}\n',
    b"[" * 100_000 + b"\n",
    b"\0" * 1000 + b"\n",
]


@pytest.mark.parametrize("line", HOSTILE, ids=range(len(HOSTILE)))
def test_a_line_that_no_run_writes_is_counted_and_passed_over(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "run"
    make_run(path, clients=4, rounds=3)
    for name in ("metrics.jsonl", "ledger.jsonl"):
        lines = lines_of(path, name)
        (path / name).write_bytes(b"".join([*lines[:5], line, *lines[5:]]))
    seen = Watcher(path).look()
    assert seen.problems == ("1 line of metrics.jsonl cannot be read",)
    assert (seen.round, sum(seen.answers.values()), len(seen.loss_R)) == (3, 12, 4)


@pytest.mark.parametrize("text", ["", "clients = 'x'", "budgets = [1]", "clients = 99999999999", "[[[", "\ud800"])
def test_a_configuration_that_no_run_writes_does_not_stop_the_watcher(tmp_path: Path, text: str) -> None:
    path = tmp_path / "run"
    make_run(path, clients=4, rounds=3)
    (path / "config.toml").write_bytes(text.encode("utf-8", "surrogatepass"))
    (path / "summary.json").write_text("[]")
    seen = Watcher(path).look()
    assert (seen.state, seen.round) == ("finished", 3)
    assert seen.problems[0].endswith("must hold a table of keys, not this list; run again, or remove it")


def test_a_marker_of_another_version_is_a_run(tmp_path: Path) -> None:
    path = tmp_path / "run"
    make_run(path, clients=4)
    (path / "summary.json").unlink()
    (path / MARKER).write_text(json.dumps({"format": "fedmoe-run", "format_version": 99, "id": "x"}))
    assert Watcher(path).look().state == "stopped"
