"""Runs killed with -9 at random and at named moments, then resumed: the same bits and lines as one never killed.

    python -m bench.trust.kills [--moments 50] [--ranks 1 2] [--mixture] [--some] [--first 0] [--out FILE]

Each case kills one process of a run (on two ranks one of them, or all), waits for the others to end by themselves,
perhaps kills the resumed run too, and resumes until the run ends. Random moments are drawn until so many have hit a
process that still ran. A process that imported torch once forks all of
them. What the launcher of the real command does when it or a rank is killed is in tests/test_launch.py.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from collections.abc import Callable
from itertools import count
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory

from bench.common.machine import machine
from bench.common.markdown import table
from bench.trust.jobs import MOE, PLAIN
from bench.trust.killed import Case, Killed, Stage
from bench.trust.phases import OF_A_RESUME, PHASES


def at_random(ranks: int, moments: int, *, first: int, play: Callable[[Case], Killed]) -> list[Killed]:
    """Play cases of random moments until ``moments`` of them have killed something; those that came late count too."""
    found: list[Killed] = []
    for seed in count(first):
        if sum(killed.kills > 0 for killed in found) == moments:
            break
        found.append(play(Case(ranks, seed=seed)))
    return found


def phases_of(ranks: int, *, first: int) -> list[Case]:
    """List the cases of every phase on every rank that has it."""
    cases: list[Case] = []
    for name in dict.fromkeys(phase.name for phase in PHASES):
        everywhere = any(phase.everywhere for phase in PHASES if phase.name == name)
        victims = range(ranks) if everywhere else [0]
        cases += [
            Case(ranks, seed=first, phase=name, victim=victim, in_resume=name in OF_A_RESUME) for victim in victims
        ]
    return cases


def summary_of(found: list[Killed], ranks: int) -> dict[str, object]:
    """Sum up the cases of a number of ranks."""
    mine = [killed for killed in found if killed.case.ranks == ranks]
    return {
        "ranks": ranks,
        "cases": len(mine),
        "killed at random moments": sum(not killed.case.phase and killed.kills > 0 for killed in mine),
        "at named phases": sum(bool(killed.case.phase) for killed in mine),
        "ended before the kill": sum(not killed.kills for killed in mine),
        "killed more than once": sum(killed.kills > 1 for killed in mine),
        "resumed": sum(killed.resumes > 0 for killed in mine),
        "begun again": sum(killed.begun_again > 0 for killed in mine),
        "same bits, lines and files": sum(not killed.differs and not killed.trouble for killed in mine),
        "processes left": sum(killed.left for killed in mine),
        "errors": sum(bool(killed.trouble) for killed in mine),
    }


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--moments", type=int, default=50)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--mixture", action="store_true", help="a mixture of experts; some seconds a case")
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--some", action="store_true", help="on several ranks every fifth phase; for the tests")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    began = time.perf_counter()
    with TemporaryDirectory(prefix="fedmoe-kills-") as root:
        stage = Stage.of(MOE if asked.mixture else PLAIN, Path(root), asked.ranks)
        found: list[Killed] = []

        def play(case: Case) -> Killed:
            return stage.play(case, Random(f"{stage.job.name} {case}"))

        for ranks in asked.ranks:
            found += at_random(ranks, asked.moments, first=asked.first, play=play)
            cases = phases_of(ranks, first=asked.first)
            found += [play(case) for case in cases[:: 5 if asked.some and ranks > 1 else 1]]
    rows = [summary_of(found, ranks) for ranks in asked.ranks]
    bad = [killed for killed in found if not killed.good]
    record = {
        "machine": machine(),
        "job": stage.job.name,
        "whole": stage.ending.model_hash,
        "results": rows,
        "kills by phase": dict(Counter(killed.case.phase or "random" for killed in found if killed.kills)),
        "not met": sorted({killed.case.phase for killed in found if killed.case.phase and not killed.kills}),
        "bad": [killed.record() for killed in bad],
        "seconds": round(time.perf_counter() - began, 1),
    }
    text = json.dumps(record, indent=1)
    if asked.out:
        asked.out.write_text(text + "\n")
    print(text)
    print("\n".join(table(list(rows[0]), [[str(value) for value in row.values()] for row in rows])))
    raise SystemExit(bool(bad))


if __name__ == "__main__":
    main()
