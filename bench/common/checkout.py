"""Puts the checkout's own packages first on Python's path, so that a script here runs with nothing installed.

A script imports this before all that needs fedmoe_kernels; its own folder is on the path already.
"""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent

sys.path[:0] = [
    path for path in map(str, (HERE, ROOT / "kernels", ROOT / "bindings", ROOT)) if path not in sys.path[:4]
]
