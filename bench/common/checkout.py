"""The checkout: it comes first on Python's path, here and in the processes of bench that are started here.

`bench/__init__.py` imports this before all else, so that `python -m bench.NAME` runs from the checkout's folder with
nothing installed, and measures this checkout where another one is installed.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results"
PATHS = tuple(map(str, (ROOT, ROOT / "kernels", ROOT / "bindings")))

sys.path[:0] = [path for path in PATHS if path not in sys.path[:4]]


def command(module: str, *words: str) -> list[str]:
    """Return the command line that runs a module of this checkout by this Python; it needs `environment`."""
    return [sys.executable, "-m", module, *words]


def environment(**more: str) -> dict[str, str]:
    """Return this process's environment, with `more`, and the checkout on Python's path: `command` runs in any folder.

    A caller's own PYTHONPATH, of `more` or of this process, comes after the checkout.
    """
    named = {**os.environ, **more}
    return named | {"PYTHONPATH": os.pathsep.join(filter(None, [*PATHS, named.get("PYTHONPATH", "")]))}
