"""Clients that raise, leave, are late or hang: counted and named, the round ends, and the exit code tells."""

from __future__ import annotations

import faulthandler
import json
import signal
from pathlib import Path
from typing import Any

import pytest
from faulty import made
from tiny_runs import HOUSE, fedmoe

from fedmoe_core.base.files import read_json_lines
from fedmoe_core.client.failures import ClientTimeoutError, reason_of
from fedmoe_core.config.run_config import Config
from fedmoe_core.simulation import run as simulate
from fedmoe_core.simulation.cohorts.patience import patience
from fedmoe_core.simulation.observer import NullObserver

WORDS = ("clients=4", "rounds=3", "threads=1", "train.batch_size=6", "train.local_steps=3")
MIDWAY = 25  # of the calls of the loss: while a client of round 2 trains


def client_lines(out: Path) -> list[dict[str, Any]]:
    return [r for _, r in read_json_lines(out / "metrics.jsonl", json.loads) if r["type"] == "client"]


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("raises", "KeyError: 'a column that this client lacks' (in fault, line "),
        ("leaves", "SystemExit: no battery (in fault, line "),
        ("sleeps", "waited 0.2 s for client "),
    ],
)
@pytest.mark.parametrize("cohort", [1, 2])
def test_one_client_fails_is_named_and_the_round_goes_on(kind: str, said: str, cohort: int, tmp_path: Path) -> None:
    words = ("adapter=own", *WORDS, f"cohort.clients={cohort}", f"out={tmp_path / 'run'}")
    plain, config = made(kind, MIDWAY), Config.load(overrides=[*words, "train.timeout=0.2"])
    before = signal.getitimer(signal.ITIMER_REAL)[0]
    summary = simulate.run(config, adapter=plain, observer=NullObserver())
    lines = client_lines(tmp_path / "run")
    assert len(lines) == 12
    troubled = [line for line in lines if line["error"] or line.get("alone")]
    if cohort == 1:
        (line,) = troubled
        assert line["error"].startswith(said), line
        assert line["status"] == "failed"
        assert summary["refused_updates"] == 1
    else:  # the joint step failed, and then each of the two alone did not
        assert [line["status"] for line in troubled] == ["ok", "ok"]
        assert all(said.split(" for ")[0].replace("0.2", "0.4") in line["alone"] for line in troubled)
    assert summary["loss_after"] < summary["loss_before"]
    after = signal.getitimer(signal.ITIMER_REAL)[0]
    assert (before == after == 0) or before - 600 < after <= before, "the timer of others runs on"


def test_a_client_that_no_alarm_reaches_ends_the_run_which_goes_on_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = (HOUSE / "tests/support/trust", HOUSE / "tests/support/plain")
    monkeypatch.setenv("PYTHONPATH", ":".join(map(str, paths)))
    words = ("simulate", "-q", "adapter=faulty:adapter", *WORDS)
    whole = fedmoe(*words, f"out={tmp_path / 'whole'}")
    assert whole.returncode == 0, whole.stderr
    for kind, code in (("hangs", 4), ("holds", 1), ("dies", 7)):
        out = tmp_path / kind
        monkeypatch.setenv("FAULT", kind)
        monkeypatch.setenv("FAULT_AT", str(MIDWAY))
        ended = fedmoe(*words, "train.timeout=0.2", f"out={out}")
        assert ended.returncode == code, ended.stderr
        if kind == "hangs":
            assert "error: waited 0.2 s for client " in ended.stderr
            assert "which hangs where no alarm reaches it" in ended.stderr
        if kind == "holds":
            assert "in fault" in ended.stderr, "the stack that it hangs in"
        monkeypatch.delenv("FAULT_AT")
        resumed = fedmoe("resume", "-q", out)
        assert resumed.returncode == 0, resumed.stderr
        hashes = [json.loads((path / "summary.json").read_text())["model_hash"] for path in (tmp_path / "whole", out)]
        assert hashes[0] == hashes[1]


def test_patience_leaves_no_timer_and_no_handler() -> None:
    handler = signal.getsignal(signal.SIGALRM)
    left = signal.getitimer(signal.ITIMER_REAL)[0]
    with (
        pytest.raises(ClientTimeoutError, match=r"waited 0\.05 s for a client \(train\.timeout\)"),
        patience(0.05, "a client"),
    ):
        signal.pause()
    with patience(0, "a client"):
        assert signal.getsignal(signal.SIGALRM) is handler
    assert signal.getsignal(signal.SIGALRM) is handler
    assert (left == 0) == (signal.getitimer(signal.ITIMER_REAL)[0] == 0)


def test_an_alarm_on_the_way_out_of_patience_leaves_no_timer_either(monkeypatch: pytest.MonkeyPatch) -> None:
    """It interrupts contextlib's first line, so the block below ``yield`` runs only as the generator is dropped."""
    handler, cancelled, cancel = signal.getsignal(signal.SIGALRM), [], faulthandler.cancel_dump_traceback_later

    def noted() -> None:
        cancelled.append(cancel())

    monkeypatch.setattr(faulthandler, "cancel_dump_traceback_later", noted)
    late = patience(30, "a client")
    late.__enter__()
    assert signal.getsignal(signal.SIGALRM) is not handler
    del late
    assert signal.getsignal(signal.SIGALRM) is handler
    assert cancelled


def test_a_reason_is_one_short_sentence() -> None:
    assert reason_of(FloatingPointError("loss is NaN at step 3")) == "loss is NaN at step 3"
    assert reason_of(RuntimeError("\nout of memory\nand a page of advice")) == "RuntimeError: out of memory"
    assert len(reason_of(ValueError("x" * 10_000))) <= 300
    assert reason_of(KeyError()) == "KeyError"
