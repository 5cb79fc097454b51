"""Puts the checkout's own packages first on Python's path, so that ``python -m bench.…`` runs with nothing installed.

A command imports this before all that needs fedmoe_kernels; the checkout is on the path already.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

sys.path[:0] = [path for path in map(str, (ROOT, ROOT / "kernels", ROOT / "bindings")) if path not in sys.path[:4]]
