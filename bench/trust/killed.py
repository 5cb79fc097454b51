"""One case: the processes of a run, one of them killed, what is left looked for, the run resumed to its end."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random
from tempfile import mkdtemp
from typing import Any

from bench.trust.jobs import Ending, Job
from bench.trust.phases import arm
from fedmoe_core.simulation import run as simulate
from fedmoe_core.simulation.launch import LAUNCHED, PEER_LOST, PeerLostError
from fedmoe_core.simulation.observer import NullObserver

SETTLE = 3.0  # seconds after which the others of a killed rank are told to stop, as the launcher does
PATIENCE = 60.0  # seconds in which they then have to end
STOP_ROUND = "after the checkpoint counts"  # where a run is killed whose resume is then killed
TOLD = (0, -signal.SIGKILL, -signal.SIGTERM, PEER_LOST)  # how a process of a run with a kill may end


@dataclass(frozen=True)
class Case:
    """What is killed, and when.

    Attributes:
        ranks: processes of the run.
        seed: draws the moments and the victims.
        phase: a named moment; empty for random ones.
        victim: the rank that is killed at the phase.
        in_resume: whether that is a moment of a resume; the run before it is killed too.
    """

    ranks: int
    seed: int
    phase: str = ""
    victim: int = 0
    in_resume: bool = False


@dataclass
class Killed:
    """What came of a case: how often something was killed, how the run went on, and what was wrong in the end."""

    case: Case
    kills: int = 0
    resumes: int = 0
    begun_again: int = 0
    left: int = 0
    trouble: str = ""
    differs: list[str] = field(default_factory=list)

    @property
    def good(self) -> bool:
        """Whether the run ended as one never killed, and left nothing."""
        return not (self.left or self.trouble or self.differs)

    def record(self) -> dict[str, Any]:
        """Return it for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Stage:
    """Where cases play.

    Attributes:
        job: what runs.
        root: of all folders.
        ending: of the run that was never killed.
        seconds: that it took, by number of ranks.
    """

    job: Job
    root: Path
    ending: Ending
    seconds: Mapping[int, float]

    @classmethod
    def of(cls, job: Job, root: Path, ranks: Sequence[int]) -> Stage:
        """Play the run that is never killed, in processes of its own, on each number of ranks.

        Raises:
            RuntimeError: it fails, or ends otherwise on another number of ranks.
        """
        place, seconds, endings = root / "whole", dict[int, float](), []
        # Once in this process, with one thread: what the forks inherit is imported and the cache is filled. A fork that
        # had to import the rest itself would take ten times as long as its run.
        job.run(place / "run")
        for count in ranks:
            shutil.rmtree(place / "run", ignore_errors=True)
            began = time.monotonic()
            if any(wait_for(start_ranks(job, place, count))):
                raise RuntimeError(f"the run that is not killed failed: {_words(place)}")
            seconds[count] = time.monotonic() - began
            endings.append(Ending.of(place / "run"))
        if endings[1:] != endings[:-1]:
            raise RuntimeError("the run that is not killed ends otherwise on another number of ranks")
        return cls(job, root, endings[0], seconds)

    def play(self, case: Case, rng: Random) -> Killed:
        """Play a case to its end: start, kill, resume, perhaps kill again, resume.

        What was killed is resumed even where a summary is there: who saw only the kill does not know of it.
        """
        place, found = Path(mkdtemp(dir=self.root)), Killed(case)
        (place / "cache").symlink_to(self.root / "whole" / "cache")
        for hook in [*self._hooks(case, rng), None]:
            before = found.kills
            if self._attempt(case, found, place, (hook, rng)) or found.kills == before:
                break
        if not found.trouble:
            found.differs = self._differs(place / "run")
        shutil.rmtree(place)
        return found

    def _hooks(self, case: Case, rng: Random) -> list[str]:
        """What kills each start: a named moment, or "" for a random one."""
        if case.in_resume:
            return [STOP_ROUND, case.phase]
        return [case.phase] if case.phase else [""] * rng.choice([1, 1, 2, 3])

    def _attempt(self, case: Case, found: Killed, place: Path, kill: tuple[str | None, Random]) -> bool:
        """Start the run, or go on with it, with this kill or none; return whether something is wrong."""
        hook, rng = kill
        resume = (place / "run" / "checkpoint" / "checkpoint.json").is_file()
        found.resumes += resume
        found.begun_again += not resume and (place / "run").exists()
        processes = start_ranks(self.job, place, case.ranks, resume=resume, hook=(case.victim, hook or ""))
        if hook == "":
            time.sleep(rng.uniform(0, self.seconds[case.ranks]))
            for process in rng.choice([processes, *([process] for process in processes)]):
                process.send(signal.SIGKILL)
        codes = wait_for(processes)
        found.left += sum(code is None for code in codes)
        states = [process.state() for process in processes]
        for process in processes:
            process.send(signal.SIGKILL)
        killed = -signal.SIGKILL in codes
        found.kills += killed
        if any(code not in (TOLD if killed else (0,)) for code in codes):
            found.trouble = f"ended with {codes}, {states}: {_words(place)}"
        return bool(found.trouble or found.left)

    def _differs(self, out: Path) -> list[str]:
        if not (out / "summary.json").is_file():
            return ["it has no summary"]
        ending = Ending.of(out)
        return [
            name for name in ("model_hash", "lines", "files") if getattr(ending, name) != getattr(self.ending, name)
        ]


@dataclass
class Process:
    """A rank of a run, forked from this process, which imported all that it needs."""

    number: int
    code: int | None = None

    @classmethod
    def start(cls, work: Callable[[], None], place: Path, environment: Mapping[str, str], hook: str) -> Process:
        """Fork a process that does ``work``; it dies at the moment that ``hook`` names."""
        number = os.fork()
        if number:
            return cls(number)
        code = 1
        try:
            os.environ.update(environment)
            with (place / f"words-{environment['RANK']}").open("a") as words:
                os.dup2(words.fileno(), 1)
                os.dup2(words.fileno(), 2)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            if hook:
                arm(hook)
            work()
            code = 0
        except PeerLostError:
            code = PEER_LOST
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)

    def poll(self) -> int | None:
        """Return the exit status, minus the number of a signal; None while it runs."""
        if self.code is None:
            number, status = os.waitpid(self.number, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if number else None
        return self.code

    def state(self) -> str:
        """Say what it does, as the system tells it; empty once it ended."""
        if self.poll() is not None:
            return ""
        tasks = Path(f"/proc/{self.number}/task").iterdir()
        told = [(task / "stat").read_text().rpartition(")")[2].split()[0] for task in tasks]
        return f"threads {''.join(told)}, waiting in {Path(f'/proc/{self.number}/wchan').read_text()}"

    def send(self, signal_: int) -> None:
        """Send a signal, if it still runs."""
        if self.poll() is None:
            os.kill(self.number, signal_)


def start_ranks(
    job: Job, place: Path, ranks: int, *, resume: bool = False, hook: tuple[int, str] = (0, "")
) -> list[Process]:
    """Fork the ranks of a run in ``place/run``.

    Args:
        job: what runs.
        place: of the run, the cache and the words of the processes.
        ranks: how many.
        resume: go on with the run; else it begins, and replaces what is there.
        hook: the rank that dies, and at which moment; "" for none.
    """
    out = place / "run"

    def work() -> None:
        if resume:
            simulate.resume(out, observer=NullObserver())
        else:
            job.run(out, f"ranks={ranks}", force=True)

    shared = mkdtemp(dir=place, prefix="meeting-")
    common = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), LAUNCHED: shared, "GLOO_SOCKET_IFNAME": "lo"}
    if ranks == 1:
        common = {}
    return [
        Process.start(
            work,
            place,
            {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {"RANK": "0"},
            hook[1] if rank == hook[0] else "",
        )
        for rank in range(ranks)
    ]


def wait_for(processes: Sequence[Process]) -> list[int | None]:
    """Wait until all have ended, those that outlive another one by being told to; None for one that does not end."""
    began = time.monotonic()
    first: float | None = None
    while None in (codes := [process.poll() for process in processes]) and time.monotonic() - began < PATIENCE:
        if first is None and any(code is not None for code in codes):
            first = time.monotonic()
        if first is not None and time.monotonic() - first > SETTLE:
            for process in processes:
                process.send(signal.SIGTERM)
        time.sleep(0.005)
    return [process.code for process in processes]


def _words(place: Path) -> str:
    """The last lines that the processes said."""
    return " / ".join(path.read_text("utf-8", "replace")[-600:] for path in sorted(place.glob("words-*")))
