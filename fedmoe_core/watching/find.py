"""Which runs a path stands for: the run in it, the runs below it, or one that is still to come."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fedmoe_core.simulation.directory.claim import MARKER

# From a run's directory up to where a comparison of it lies: RUNS/SYSTEM/SEED below its folder.
DEPTHS = ("*", "*/*", "*/*/*")


def find_runs(paths: Sequence[Path]) -> tuple[list[Path], bool]:
    """Return the runs, each once, and whether a folder of runs is among the paths, in which more may appear.

    A path that is given alone may hold no run yet; of several, those without one are passed over, files too, so that a
    shell's ``runs/*`` will do.

    Raises:
        ValueError: the only path is a file, or none of several holds a run.
    """
    below = {path: runs_below(path) for path in paths}
    found = dict.fromkeys(run for path in paths for run in below[path] or _alone(path, len(paths) == 1))
    if not found:
        raise ValueError(f"none of {len(paths)} paths holds a run; give the directories that runs named as out")
    return list(found), any(below.values())


def runs_below(path: Path) -> list[Path]:
    """Return the runs in a folder that is not a run itself, sorted."""
    if (path / MARKER).exists() or not path.is_dir():
        return []
    return sorted(found.parent for depth in DEPTHS for found in path.glob(f"{depth}/{MARKER}"))


def _alone(path: Path, only: bool) -> list[Path]:
    if only and path.exists() and not path.is_dir():
        raise ValueError(f"{path} is not a directory; give the directory of a run")
    return [path] if only or (path / MARKER).is_file() else []
