"""The files of a stopped run changed in many ways, each then resumed: refused in one sentence, or the same ending.

    python -m bench.trust.files [--count 1000] [--first 0] [--mixture] [--out FILE]

A change is drawn by its number, so one that was found can be made again. All happens in this process: a resume of the
plain run takes a tenth of a second.
"""

from __future__ import annotations

import argparse
import json
import signal
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory

from bench.common.machine import machine
from bench.trust.jobs import MOE, PLAIN, Ending, Job, fresh_copy, lines_of, stop_after
from bench.trust.mutations import Scene, mutate
from fedmoe_core.simulation import run as simulate
from fedmoe_core.simulation.directory.log import LEDGER, METRICS
from fedmoe_core.simulation.observer import NullObserver

PATIENCE = 60  # seconds after which a resume hangs
LONGEST = 700  # characters of one sentence


class HangError(BaseException):
    """A resume took longer than ``PATIENCE``."""


@dataclass(frozen=True)
class Judged:
    """What came of one change.

    Attributes:
        number: of the change.
        what: was done.
        outcome: "refused", "harmless", "carried" (a forged log was kept as it was forged, and the model is the same),
            or what must not be: "silent", "traceback", "hang", "damage".
        words: of the error, if any.
    """

    number: int
    what: str
    outcome: str
    words: str = ""

    @property
    def good(self) -> bool:
        """Whether that may be."""
        return self.outcome in ("refused", "harmless", "carried")


@dataclass(frozen=True)
class Field:
    """The runs that changes are made on.

    Attributes:
        job: what ran.
        root: of all folders.
        stopped, other: runs that were stopped, of two seeds.
        ending: of the run that was not.
    """

    job: Job
    root: Path
    stopped: Path
    other: Path
    ending: Ending

    @classmethod
    def of(cls, job: Job, root: Path) -> Field:
        """Make the runs."""
        job.run(root / "whole")
        stop_after(job, root / "stopped", root / "whole", round=2)
        stop_after(job, root / "other", root / "whole", round=2, seed=1)
        return cls(job, root, root / "stopped", root / "other", Ending.of(root / "whole"))

    def judge(self, number: int) -> Judged:
        """Make one change on a copy of the stopped run, resume that, and look what came of it."""
        run, outside = self.root / "run", self.root / "outside"
        fresh_copy(self.stopped, run)
        fresh_copy(self.other, outside)
        what = mutate(Scene(run, self.other, outside, Random(number)), number)
        before, theirs = _tree(run), _tree(outside)
        outcome, words = self._resume(run, what)
        if _tree(outside) != theirs:
            return Judged(number, what, "damage", "a file outside of the run was changed")
        if outcome == "refused" and (lost := _lost(before, _tree(run), self.stopped)):
            return Judged(number, what, "damage", f"{lost} was changed by a resume that was refused ({words})")
        return Judged(number, what, outcome, words)

    def _resume(self, run: Path, what: str) -> tuple[str, str]:
        forged = lines_of(run) if what.startswith("forged") and (run / LEDGER).is_file() and _readable(run) else ()
        try:
            with _no_longer_than(PATIENCE):
                simulate.resume(run, observer=NullObserver())
        except (ValueError, OSError) as error:
            words = str(error)
            return ("refused" if words and "\n" not in words and len(words) < LONGEST else "traceback"), words
        except HangError:
            return "hang", ""
        except Exception as error:  # whatever else comes out of a resume is what this looks for
            return "traceback", f"{type(error).__name__}: {error}"
        ending = Ending.of(run)
        if ending == self.ending:
            return "harmless", ""
        same = ending.model_hash == self.ending.model_hash
        if (
            same
            and what.startswith(("forged metrics", "forged ledger"))
            and set(_of_rounds(forged)) <= set(ending.lines)
        ):
            return "carried", ""
        return "silent", "another model" if not same else "other lines or files"


def _of_rounds(lines: tuple[str, ...]) -> list[str]:
    return [line for line in lines if json.loads(line).get("round") in (0, 1, 2)]


def _readable(run: Path) -> bool:
    """Whether both logs end with a cut line that can be passed over, as those of a stopped run."""
    for name in (METRICS, LEDGER):
        text = (run / name).read_text()
        whole = text[: text.rfind("\n") + 1]
        (run / name).write_text(whole)
    return True


@contextmanager
def _no_longer_than(seconds: int) -> Iterator[None]:
    def ring(*_: object) -> None:
        raise HangError

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def _tree(root: Path) -> dict[str, object]:
    """What lies below a folder: files by content, all else by its kind; a file of a terabyte by its size."""
    found: dict[str, object] = {}
    for path in sorted(root.rglob("*")):
        status, name = path.lstat(), str(path.relative_to(root))
        if path.is_symlink():
            found[name] = path.readlink()
        elif path.is_file():
            found[name] = status.st_size if status.st_size > 1 << 30 else path.read_bytes()
        else:
            found[name] = status.st_mode
    return found


def _lost(before: Mapping[str, object], after: Mapping[str, object], stopped: Path) -> str:
    """Name what a refused resume changed, lines after those that the checkpoint counts aside."""
    for name, was in before.items():
        now = after.get(name)
        if name in (METRICS, LEDGER) and isinstance(now, bytes) and isinstance(was, bytes) and was.startswith(now):
            now = was if len(now) >= _counted(before, name, stopped) else now
        if now != was:
            return name
    return ""


def _counted(before: Mapping[str, object], name: str, stopped: Path) -> int:
    """Bytes of a log that its checkpoint counts; where that was damaged, those that it counted before."""
    found = before.get("checkpoint/checkpoint.json")
    for text in (found if isinstance(found, bytes) else b"", (stopped / "checkpoint/checkpoint.json").read_bytes()):
        with suppress(ValueError, KeyError, TypeError):
            return int(json.loads(text)["meta"][name.partition(".")[0]]["bytes"])
    return 0


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--mixture", action="store_true", help="a mixture of experts; a second a change")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    began = time.perf_counter()
    with TemporaryDirectory() as root:
        field = Field.of(MOE if asked.mixture else PLAIN, Path(root))
        found = [field.judge(number) for number in range(asked.first, asked.first + asked.count)]
    counts = Counter(judged.outcome for judged in found)
    bad = [judged for judged in found if not judged.good]
    record = {
        "machine": machine(),
        "job": field.job.name,
        "first": asked.first,
        "changes": len(found),
        "outcomes": dict(sorted(counts.items())),
        "kinds": len({judged.what.split(":")[-1] for judged in found}),
        "bad": [vars(judged) for judged in bad],
        "seconds": round(time.perf_counter() - began, 1),
    }
    text = json.dumps(record, indent=1)
    if asked.out:
        asked.out.write_text(text + "\n")
    print(text)
    raise SystemExit(bool(bad))


if __name__ == "__main__":
    main()
