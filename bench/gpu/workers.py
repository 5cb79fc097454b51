"""Checks in separate processes, several at once: each compiles kernels on one core, and may end its process.

A worker reads names from its standard input and answers each with one line of JSON. One that dies or takes too long
fails the check it was at, and another worker takes its place.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from queue import Empty, Queue

from bench.common import checkout
from bench.gpu.measure.behave import Skipped
from bench.gpu.measure.correct import Check
from bench.gpu.measure.store import Record, sentence
from bench.gpu.plan import RUN

SECONDS = 240  # for one check, most of it compilation
GRACE = 2.0  # seconds after the end for checks that have begun; then their workers are ended


def result(name: str, run: Check) -> Record:
    """What one check found."""
    try:
        status, detail = "passed", run()
    except Skipped as reason:
        status, detail = "skipped", str(reason)
    except AssertionError as error:
        status, detail = "failed", str(error)
    except Exception as error:
        status, detail = "failed", sentence(error)
    return {"name": name, "part": "correct", "status": status, "detail": detail}


def serve(checks: Mapping[str, Check]) -> None:
    """Live a worker's life; what checks print goes to the standard error, for the output is spoken for."""
    answers, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        name = line.strip()
        print(json.dumps(result(name, checks[name])), file=answers, flush=True)


def run(names: Sequence[str], jobs: int, options: Sequence[str], until: float) -> Iterator[Record]:
    """Yield results as they come, by `jobs` workers; what is not begun at `until` and done soon after has none."""
    waiting: Queue[str] = Queue()
    for name in names:
        waiting.put(name)
    found: Queue[Record | None] = Queue()
    workers: list[subprocess.Popen[str]] = []
    common = (waiting, found.put, options, until, workers)
    threads = [threading.Thread(target=_drive, args=common, daemon=True) for _ in range(jobs)]
    for thread in threads:
        thread.start()
    working = jobs
    while working:
        try:
            record = found.get(timeout=max(0.05, until + GRACE - time.monotonic()))
        except Empty:
            for worker in workers:
                worker.kill()
            return
        working -= record is None
        if record is not None:
            yield record
    for thread in threads:
        thread.join()


def _drive(
    waiting: Queue[str],
    tell: Callable[[Record | None], None],
    options: Sequence[str],
    until: float,
    workers: list[subprocess.Popen[str]],
) -> None:
    """Give names to one worker, one by one, until there are none; end by telling None."""
    worker = None
    try:
        while time.monotonic() < until:
            try:
                name = waiting.get_nowait()
            except Empty:
                return
            if worker is None:
                worker = _start(options)
                workers.append(worker)
            record = _ask(worker, name)
            if record is None:
                record = {"name": name, "part": "correct", "status": "failed", "detail": _end(worker)}
                worker = None
            tell(record)
    finally:
        if worker is not None:
            _end(worker)
        tell(None)


def _start(options: Sequence[str]) -> subprocess.Popen[str]:
    command, streams = checkout.command(RUN, "worker", *options), {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    return subprocess.Popen(command, env=checkout.environment(), text=True, **streams)


def _ask(worker: subprocess.Popen[str], name: str) -> Record | None:
    """Return the worker's answer, None when it ended or was ended for taking too long."""
    assert worker.stdin is not None
    assert worker.stdout is not None
    alarm = threading.Timer(SECONDS, worker.kill)
    alarm.start()
    try:
        worker.stdin.write(name + "\n")
        worker.stdin.flush()
        answer = worker.stdout.readline()
    except BrokenPipeError:
        return None
    finally:
        alarm.cancel()
    return json.loads(answer) if answer else None


def _end(worker: subprocess.Popen[str]) -> str:
    """Close a worker and say how it ended."""
    assert worker.stdin is not None
    assert worker.stdout is not None
    with contextlib.suppress(BrokenPipeError):
        worker.stdin.close()
    worker.stdout.close()
    try:
        code = worker.wait(timeout=20)
    except subprocess.TimeoutExpired:
        worker.kill()
        code = worker.wait()
    return f"its process ended with code {code}" + (f" (after {SECONDS} s: too long)" if code == -9 else "")
