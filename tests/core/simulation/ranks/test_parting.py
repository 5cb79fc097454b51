"""Ranks that part leave no thread of gloo behind: one that lets go of a tensor while Python ends aborts the process."""

from __future__ import annotations

from pathlib import Path

import parting
import pytest
from tiny_runs import TINY, fedmoe, write_notes

pytestmark = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are counted in Linux's /proc")


def threads_during_and_after(*words: str) -> tuple[int, int]:
    ended = fedmoe(*words, prefix=(parting.__file__,))
    assert ended.returncode == 0, ended.stderr
    during, after = map(int, ended.stdout.split())
    return during, after


def test_no_thread_of_gloo_outlives_a_run(tmp_path: Path) -> None:
    notes = write_notes(tmp_path / "notes.jsonl")
    words = (*TINY, f"data=jsonl:{notes}", f"cache={tmp_path / 'cache'}", f"out={tmp_path / 'run'}", "ranks=2")
    during, after = threads_during_and_after("whole_run", *words)
    assert during > 0
    assert after == 0


def test_no_thread_of_gloo_outlives_a_lost_peer_while_its_error_is_held() -> None:
    during, after = threads_during_and_after("lost_peer")
    assert during > 0
    assert after == 0
