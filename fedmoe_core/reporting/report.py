"""What a run, or several, came to: the lines for the terminal and the page."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from fedmoe_core.base.files import write_whole
from fedmoe_core.reporting.run import read_runs
from fedmoe_core.reporting.verdict import compare, line


def report(run_dirs: Sequence[Path], *, out: Path | None = None) -> tuple[Path, list[str]]:
    """Write one self-contained HTML page and return where it lies, with the lines for the terminal.

    The first run is the subject: the verdict sets it against each of the others.

    Raises:
        ValueError: no run given, or a directory without a run.
        OSError: a file cannot be read or written.
    """
    if not run_dirs:
        raise ValueError("no run given; name at least one run directory")
    runs = read_runs(run_dirs)
    if out is None:
        one = len(runs) == 1
        out = (
            runs[0].path / "report.html" if one else Path(os.path.commonpath(run.path for run in runs)) / "report.html"
        )
    from fedmoe_core.reporting.page import render

    verdicts = compare(runs)
    text = render(runs, verdicts)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(out, text)
    return out, [*(line(run) for run in runs), *verdicts]
