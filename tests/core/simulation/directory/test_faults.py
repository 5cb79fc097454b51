"""Faults of the machine, such as closed streams, a full disk, a folder that goes: one sentence, and a resumable run."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

import pytest
from checkpoint_cases import in_child
from rank_processes import popen

from bench.trust.jobs import PLAIN, Ending
from fedmoe_core.base.files import json_digest
from fedmoe_core.simulation import run as simulate
from fedmoe_core.simulation.directory.claim import exclusive
from fedmoe_core.simulation.observer import NullObserver

HOUSE = Path(__file__).parents[4]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Ending:
    out = tmp_path_factory.mktemp("whole") / "run"
    PLAIN.run(out)
    return Ending.of(out)


class At(NullObserver):
    """Does something once a round is on record."""

    def __init__(self, round: int, act: Callable[[], object]) -> None:
        self.round, self.act = round, act

    def on_round(self, round: int, rounds: int, record: object) -> None:
        if round == self.round:
            self.act()


def failed(out: Path, act: Callable[[], object]) -> str:
    """The one sentence with which a run ends to which something happens after its second round."""
    with pytest.raises(OSError) as caught:
        simulate.run(PLAIN.config(out), observer=At(2, act))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def resumed(out: Path) -> Ending:
    simulate.resume(out, observer=NullObserver())
    return Ending.of(out)


def environment() -> dict[str, str]:
    paths = [str(HOUSE), str(HOUSE / "kernels"), str(HOUSE / "bindings")]
    outer = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return {**outer, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}


def test_a_folder_that_is_moved_away_is_one_sentence_and_nothing_is_made_in_its_stead(
    tmp_path: Path, whole: Ending
) -> None:
    out, away = tmp_path / "run", tmp_path / "away"
    assert "ledger.jsonl is gone; put its folder back and resume" in failed(out, lambda: out.rename(away))
    assert not out.exists()
    away.rename(out)
    assert resumed(out) == whole


def test_a_folder_that_is_removed_is_one_sentence(tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert "is gone" in failed(out, lambda: shutil.rmtree(out))
    assert not out.exists()


def test_a_checkpoint_that_is_removed_is_written_again(tmp_path: Path, whole: Ending) -> None:
    out = tmp_path / "run"
    simulate.run(PLAIN.config(out), observer=At(2, lambda: shutil.rmtree(out / "checkpoint")))
    assert Ending.of(out) == whole


@pytest.mark.parametrize("room", [0, 100, 1500])
def test_a_full_disk_ends_a_run_that_can_go_on(tmp_path: Path, whole: Ending, room: int) -> None:
    """A limit on the size of each file stands for it: the longest, which is ledger.jsonl, reaches it first."""
    out = tmp_path / "run"

    def fill() -> None:
        size = (out / "ledger.jsonl").stat().st_size + room
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    def play() -> None:
        assert "ledger.jsonl cannot be written (File too large); mend that and resume" in failed(out, fill)

    assert in_child(play) == 0
    assert resumed(out) == whole


def test_a_log_that_becomes_a_link_or_a_pipe_is_never_written_through(tmp_path: Path, whole: Ending) -> None:
    for name, form in (("ledger.jsonl", "a symbolic link"), ("metrics.jsonl", "a pipe")):
        out, kept = tmp_path / f"run-{name}", tmp_path / f"kept-{name}"

        def turn(path: Path = out / name, kept: Path = kept, form: str = form) -> None:
            path.rename(kept)
            if form == "a pipe":
                os.mkfifo(path)
            else:
                path.symlink_to(kept)

        before = len(whole.lines)
        assert f"{name} is {form}" in failed(out, turn)
        assert len(kept.read_text().splitlines()) < before
        (out / name).unlink()
        kept.rename(out / name)
        assert resumed(out) == whole


def test_a_read_only_folder_is_one_sentence_and_the_run_goes_on_once_it_may_write(
    tmp_path: Path, whole: Ending
) -> None:
    """Root passes every permission bit, so as root the run is another user's."""
    out = tmp_path / "run"
    for folder in (tmp_path, *tmp_path.parents):
        if os.geteuid() == 0 and folder.is_relative_to(Path("/tmp")) and folder != Path("/tmp"):
            folder.chmod(0o777)

    def play() -> None:
        if os.geteuid() == 0:
            os.setuid(65534)
        assert "Permission denied" in failed(out, lambda: (out / "checkpoint").chmod(0o555))

    assert in_child(play) == 0
    (out / "checkpoint").chmod(0o777)
    assert resumed(out) == whole


def test_a_run_of_the_format_before_is_refused_by_name(tmp_path: Path) -> None:
    out = tmp_path / "run"
    PLAIN.run(out)
    path = out / "checkpoint" / "checkpoint.json"
    body = json.loads(path.read_text())
    del body["digest"]
    body |= {"format_version": 2, "meta": {"round": 4, "metrics_lines": 21, "ledger_lines": 16}}
    path.write_text(json.dumps({**body, "digest": json_digest(body)}))
    with pytest.raises(ValueError, match=r"has format version 2, this fedmoe reads 3; resume with the fedmoe that"):
        simulate.resume(out, observer=NullObserver())


def test_a_resume_of_a_run_that_still_runs_is_refused_and_disturbs_nothing(tmp_path: Path, whole: Ending) -> None:
    out = tmp_path / "run"
    told: list[str] = []

    def second() -> None:
        for again in (lambda: simulate.resume(out), lambda: PLAIN.run(out, force=True)):
            with pytest.raises(ValueError, match="is in use by another fedmoe process") as caught:
                again()
            told.append(str(caught.value))

    simulate.run(PLAIN.config(out), observer=At(2, second))
    assert len(told) == 2
    assert Ending.of(out) == whole


def command(*words: str | Path) -> list[str]:
    return [sys.executable, "-m", "fedmoe_core.cli", *map(str, words)]


def test_the_command_ends_well_though_its_streams_are_closed_full_or_unread(tmp_path: Path, whole: Ending) -> None:
    """One process for each state; they run side by side, for each spends its time on importing torch."""
    reading, broken = os.pipe()
    os.close(reading)
    with open("/dev/full", "wb") as full:
        states: dict[str, tuple[IO[bytes] | int | None, IO[bytes] | int | None, str]] = {
            "unread": (broken, broken, ""),
            "full progress": (subprocess.DEVNULL, full, ""),
            "full result": (full, subprocess.PIPE, ""),
            "closed": (None, None, "<&- >&- 2>&-"),
        }
        started = {
            name: subprocess.Popen(
                ["/bin/sh", "-c", f'exec "$@" {closing}', "sh", *command("simulate", *words_of(tmp_path / name))],
                stdout=out,
                stderr=err,
                env=environment(),
                cwd=HOUSE,
            )
            for name, (out, err, closing) in states.items()
        }
        os.close(broken)
        said = {name: process.communicate(timeout=200)[1] for name, process in started.items()}
    codes = {name: process.returncode for name, process in started.items()}
    assert codes == {"unread": 0, "full progress": 0, "full result": 2, "closed": 0}
    assert (
        said["full result"].decode().splitlines()[-1].startswith("error: standard output cannot be written (No space")
    )
    for name in states:
        ending = Ending.of(tmp_path / name)
        assert (ending.model_hash, ending.lines) == (whole.model_hash, whole.lines), name


def words_of(out: Path, *more: str) -> list[str]:
    return [*PLAIN.words, f"rounds={PLAIN.rounds}", f"out={out}", f"cache={out.parent / 'cache'}", *more]


def test_inv10_two_ranks_that_are_told_to_stop_leave_a_run_that_goes_on(tmp_path: Path) -> None:
    """Stopped by SIGTERM after some rounds on two ranks, resumed on one, to the bits of a run that was not stopped."""
    out, long = tmp_path / "run", ("rounds=40", "train.local_steps=20")
    words = words_of(out, *long, "ranks=2")
    started = popen(*command("simulate", *words, "--quiet")[1:], env=environment())
    metrics, deadline = out / "metrics.jsonl", time.monotonic() + 120
    while time.monotonic() < deadline and not (metrics.exists() and b'"round": 2,' in metrics.read_bytes()):
        time.sleep(0.01)
    started.send_signal(signal.SIGTERM)
    _, said = started.communicate(timeout=60)
    assert started.returncode == 130, said
    assert said.splitlines()[-1] == f"stopped; go on with: fedmoe resume {out}"
    saved = out / "config.toml"
    saved.write_text(saved.read_text().replace("ranks = 2", "ranks = 1"))
    PLAIN.run(tmp_path / "whole", *long)
    assert resumed(out) == Ending.of(tmp_path / "whole")


def test_a_comparison_names_the_run_that_another_process_holds(tmp_path: Path) -> None:
    from fedmoe_core.comparison.jobs import Variant, make_jobs, run_jobs

    words = list(PLAIN.words)
    (job,) = make_jobs(words, [Variant("FedAvg", ("algorithm=fedavg",))], [0], out=tmp_path / "study", threads=1)
    job.out.mkdir(parents=True)
    with exclusive(job.out), pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", environment()["PYTHONPATH"])
        (outcome,) = run_jobs([job], words, workers=1, watch=lambda *_: None)
    assert "is in use by another fedmoe process" in outcome.error
