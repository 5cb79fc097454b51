"""A rank waits for the others for a bounded time, hears signals meanwhile, and says which did not come."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from threading import Thread

import pytest
from rank_processes import hearing

from fedmoe_core.simulation import launch
from fedmoe_core.simulation.ranks.joining import JOIN, WAIT, meet, named, patience


def test_neighbours_are_named_as_a_span() -> None:
    assert named([3]) == "rank 3"
    assert named([1, 4, 5, 6]) == "ranks 1, 4-6"
    assert named([0, 1]) == "ranks 0-1"


def test_the_waits_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(JOIN, raising=False)
    assert patience(JOIN) == timedelta(minutes=10)
    assert patience(WAIT) == timedelta(minutes=30)
    monkeypatch.setenv(WAIT, "7200")
    assert patience(WAIT) == timedelta(hours=2)
    for text in ("soon", "0", "-3", "nan", "inf"):
        monkeypatch.setenv(WAIT, text)
        with pytest.raises(ValueError, match=f"{WAIT}='{text}' is not a number of seconds above 0"):
            patience(WAIT)


def test_ranks_that_do_not_come_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(JOIN, "0.2")
    with pytest.raises(launch.PeerLostError, match=r"rank 0 waited 0.2 s for ranks 1-2 of 3, which did not come"):
        meet(0, 3, tmp_path / "store")


def test_all_who_come_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(JOIN, "60")
    met = []
    threads = [Thread(target=lambda rank=rank: met.append(meet(rank, 3, tmp_path / "store"))) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(met) == 3


def test_a_later_attempt_does_not_take_an_earlier_one_s_ranks_for_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(JOIN, "0.2")
    with pytest.raises(launch.PeerLostError):
        meet(1, 2, tmp_path / "store")  # the rank of the first attempt
    monkeypatch.setenv(launch.ATTEMPT, "1")
    with pytest.raises(launch.PeerLostError, match="rank 0 waited"):
        meet(0, 2, tmp_path / "store")


def test_a_launcher_without_an_address_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(ValueError, match="MASTER_ADDR or MASTER_PORT is not; start ranks with torchrun"):
        meet(0, 2, None)


WAITING = """
import os
from pathlib import Path
from fedmoe_core.simulation.launch import stoppable
from fedmoe_core.simulation.ranks import joining
joining.time.sleep = lambda seconds, sleep=joining.time.sleep: (print("waiting", flush=True), sleep(seconds))
try:
    with stoppable():
        joining.meet(0, 2, None)
except KeyboardInterrupt:
    print("heard", flush=True)
"""


def test_a_rank_that_waits_hears_sigterm(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own wait does not return to Python until its time is up, half an hour by default."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), JOIN: "300"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PYTHONPATH", ":".join(path for path in sys.path if path))
    waiting = subprocess.Popen([sys.executable, "-c", WAITING], stdout=subprocess.PIPE, text=True, preexec_fn=hearing)
    try:
        assert waiting.stdout is not None
        assert waiting.stdout.readline() == "waiting\n"
        waiting.send_signal(signal.SIGTERM)
        said, _ = waiting.communicate(timeout=60)
    finally:
        waiting.kill()
        waiting.wait()
    assert said.endswith("heard\n")
