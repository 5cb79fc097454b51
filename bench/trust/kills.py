"""Runs killed with -9 at random and at named moments, then resumed: the same bits and lines as one never killed.

    python -m bench.trust.kills [--moments 50] [--ranks 1 2] [--mixture] [--some] [--first 0] [--out FILE]

Each case kills one process of a run (on two ranks one of them, or all), waits for the others to end by themselves,
perhaps kills the resumed run too, and resumes until the run ends. A process that imported torch once forks all of
them. What the launcher of the real command does when it or a rank is killed is in tests/test_launch.py.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory

from bench.common.machine import machine
from bench.common.markdown import table
from bench.trust.jobs import MOE, PLAIN
from bench.trust.killed import Case, Killed, Stage
from bench.trust.phases import OF_A_RESUME, PHASES


def cases_of(ranks: int, *, moments: int, first: int) -> list[Case]:
    """List the cases for a number of ranks: random moments, and every phase on every rank that has it."""
    cases = [Case(ranks, seed=first + number) for number in range(moments)]
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
        "at random moments": sum(not killed.case.phase for killed in mine),
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
        for ranks in asked.ranks:
            cases = cases_of(ranks, moments=asked.moments, first=asked.first)
            if asked.some and ranks > 1:
                cases = [*cases[: asked.moments], *cases[asked.moments :: 5]]
            found += [stage.play(case, Random(f"{stage.job.name} {case}")) for case in cases]
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
