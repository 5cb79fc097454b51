"""The commands `first` and `second`: parts in boxes of seconds, whatever becomes of any of them, and a summary.

    bash bench/gpu.sh first --seconds 300
    bash bench/gpu.sh second

A part that hangs, crashes or is late is ended with everything it started, and the next begins. All that a part found
is on disk by then. What is finished is not run again, so that `second`, or `first` once more, goes on where a session
stopped: results are looked for in RESULTS, then in runs/gpu (a machine that is still warm), then in .gpu/results.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from bench.common import checkout
from bench.gpu import summary
from bench.gpu.plan import CACHE, LEAST, MACHINE, RUN, SECONDS, Ended, Part, parts
from bench.gpu.process import TILES, Processes

ROOT = checkout.ROOT
KEPT, CARRIED = ROOT / "runs" / "gpu", ROOT / ".gpu" / "results"
AGAIN, NOT_READY = 75, 3
ATTEMPTS = 3
LAST = 6.0  # seconds for the summary
FILL = Part("compile", 600, ("fill",), module=CACHE)


class Runner(Protocol):
    """How parts are run; `process.Processes`, and a fake one in the tests."""

    def run(self, part: Part, seconds: float, following: Part | None) -> int | None: ...

    def beside(self, part: Part) -> None: ...

    def close(self) -> None: ...


def status_of(code: int | None) -> str:
    """Say an exit code in a word."""
    if code is None:
        return "late"
    return {0: "done", 1: "red", 2: "refused", NOT_READY: "not ready", AGAIN: "cut"}.get(code, "crashed")


class Conductor:
    """Runs a command's parts against the clock.

    Args:
        runner: of the parts.
        clock: seconds that only grow.
        folder: of the results.
        say: prints a line.
        kept: where results are copied after every part, None = nowhere.
    """

    def __init__(
        self, runner: Runner, clock: Callable[[], float], folder: Path, *, say: Callable[[str], None], kept: Path | None
    ) -> None:
        self.runner, self.clock, self.folder, self.say, self.kept = runner, clock, folder, say, kept
        self.path = folder / "parts.json"
        found = json.loads(self.path.read_text()) if self.path.exists() else {}
        self.ended: dict[str, Ended] = {name: Ended(**fields) for name, fields in found.items()}

    def conduct(self, plan: Sequence[Part], seconds: float) -> None:
        """Run all parts for which there is time; the time that one leaves is for those after it."""
        began = self.clock()
        until = began + seconds - LAST
        todo = [part for part in plan if part.always or self._open(part.name)]
        try:
            for place, part in enumerate(todo):
                left = until - self.clock()
                box = max(min(part.seconds, left), left - sum(later.seconds for later in todo[place + 1 :]))
                if part.tuned and not (self.folder / "tiles.json").exists():
                    self._note(part, "left out", None, began, 0.0)
                    self.say(f"-- {part.name}: left out, for no tiles have been found yet")
                elif box < LEAST:
                    self._note(part, "no time", None, began, 0.0)
                    self.say(f"-- {part.name}: no time is left")
                else:
                    following = next((p for p in todo[place + 1 :] if p.module == RUN), None)
                    self._run(part, box, following, began)
        finally:
            self.runner.close()
            self._tidy()

    def _open(self, name: str) -> bool:
        """Tell whether a part is still to be done: it has not ended well, nor with a red check (that is a result)."""
        return name not in self.ended or self.ended[name].status not in ("done", "red")

    def _run(self, part: Part, box: float, following: Part | None, began: float) -> None:
        """Run a part in its box; one that lost the GPU's context or its process begins again while there is time."""
        start = self.clock()
        self.say(f"== {part.name}, at most {box:.0f} s")
        code: int | None = None
        for _ in range(ATTEMPTS):
            left = start + box - self.clock()
            if left < LEAST:
                break
            self._note(part, "running", None, began, self.clock() - start)
            code = self.runner.run(part, left, following)
            if status_of(code) not in ("cut", "crashed"):
                break
            self.say(f"-- {part.name} ended with code {code}")
        self._note(part, status_of(code), code, began, self.clock() - start)
        self.say(f"-- {part.name}: {status_of(code)} after {self.clock() - start:.1f} s")
        if part.name == "cache" and status_of(code) != "done":
            self.runner.beside(FILL)  # compiles on the other cores while what is ready is timed
        self._tidy()

    def _note(self, part: Part, status: str, code: int | None, began: float, seconds: float) -> None:
        """Write down how a part ended, at once and whole."""
        at = round(self.clock() - began, 1)
        self.ended[part.name] = Ended(status, code, at, round(seconds, 1), part.must)
        draft = self.path.with_suffix(".tmp")
        draft.write_text(json.dumps({name: asdict(ended) for name, ended in self.ended.items()}, indent=1) + "\n")
        os.replace(draft, self.path)

    def _tidy(self) -> None:
        """Remove what an ended process was writing, and copy the results to where the next command finds them."""
        for path in (*self.folder.glob("*.tmp"), *self.folder.glob("*.draft")):
            path.unlink(missing_ok=True)
        if self.kept is not None and self.kept.resolve() != self.folder.resolve():
            self.kept.mkdir(parents=True, exist_ok=True)
            for path in (path for path in self.folder.iterdir() if path.is_file()):
                shutil.copy2(path, self.kept / path.name)


def command(name: str, options: argparse.Namespace) -> int:
    """Run `first` or `second` as processes; 0 where nothing is red, else 1."""
    began = time.monotonic()
    rehearsal = options.tiny or options.device != "cuda"
    folder = options.results or (ROOT / "runs" / ("rehearsal" if rehearsal else "gpu"))
    folder.mkdir(parents=True, exist_ok=True)
    if not rehearsal:
        take_earlier(folder, (KEPT, CARRIED))
    log = (folder / "log.txt").open("a", buffering=1)

    def say(line: str) -> None:
        line = f"T+{time.monotonic() - began:6.1f} {line}"
        print(line, flush=True)
        log.write(line + "\n")

    words = ("--device", options.device, *(("--tiny",) if options.tiny else ()), "--results", str(folder))
    words += ("--rounds", str(options.rounds)) if options.rounds else ()
    runner = Processes(words, environment_of(folder), lambda part, line: say(f"{part}| {line}"))
    conductor = Conductor(runner, time.monotonic, folder, say=say, kept=None if rehearsal else KEPT)

    def leave(number: int, frame: Any) -> None:
        raise SystemExit(128 + number)  # through every `finally`, which ends the parts

    signal.signal(signal.SIGTERM, leave)
    conductor.conduct(plan_of(name, tiny=options.tiny), options.seconds or SECONDS[name])
    lines, red = summary.summary(name, folder, conductor.ended)
    for line in lines:
        print(line, flush=True)
        log.write(line + "\n")
    log.close()
    return 1 if red else 0


def plan_of(name: str, *, tiny: bool) -> tuple[Part, ...]:
    """Return a command's parts; what `first` did not finish comes before what is new in `second`."""
    plan = parts(name, tiny=tiny)
    about = [part for part in plan if part.name in MACHINE]
    before = parts("first", tiny=tiny) if name == "second" else ()
    return (*about, *(part for part in (*before, *plan) if part.name not in MACHINE))


def take_earlier(folder: Path, places: Sequence[Path]) -> None:
    """Copy an earlier command's results into a folder that has none."""
    if (folder / "parts.json").exists():
        return
    for place in places:
        if place.resolve() != folder.resolve() and (place / "parts.json").exists():
            for path in (path for path in place.iterdir() if path.is_file()):
                shutil.copy2(path, folder / path.name)
            return


def environment_of(folder: Path) -> dict[str, str]:
    """Return the environment of the parts: the cache, the carried peers behind all else, and the session's tiles."""
    mine = {"PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1", "TRITON_CACHE_AUTOTUNING": "1"}
    mine["TRITON_CACHE_DIR"] = os.environ.get("TRITON_CACHE_DIR", str(ROOT / "runs" / "triton"))
    carried = [str(ROOT / "runs" / "peers"), str(ROOT / ".gpu" / "peers")]
    mine["PYTHONPATH"] = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH", ""), *carried]))
    mine[TILES] = str(folder / "tiles.json")
    return checkout.environment(**mine)


if __name__ == "__main__":
    print("run it as: bash bench/gpu.sh first", file=sys.stderr)
    sys.exit(2)
