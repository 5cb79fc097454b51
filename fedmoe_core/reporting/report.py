"""What a run, or several, came to: the lines for the terminal and the page."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from fedmoe_core.base.files import write_whole
from fedmoe_core.reporting.results import changes, line, note
from fedmoe_core.reporting.run import read_runs


def report(run_dirs: Sequence[Path], *, out: Path | None = None) -> tuple[Path, list[str]]:
    """Write one self-contained HTML page and return where it lies, with the lines for the terminal.

    Several runs share the page, in the order given. It shows them; ``fedmoe compare`` tests their differences.

    Raises:
        ValueError: no run given, or a directory without a run.
        OSError: a file cannot be read or written.
    """
    if not run_dirs:
        raise ValueError("no run given; name at least one run directory")
    runs = read_runs(run_dirs)
    out = out or Path(os.path.commonpath(run.path for run in runs)) / "report.html"
    from fedmoe_core.reporting.page import render

    text = render(runs)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(out, text)
    said = note(runs)
    return out, [*map(line, runs), *(text for run in runs for text in changes(run)), *([said] if said else [])]
