"""The environment of the processes that tests start: this checkout and the tests' own helpers are on Python's path."""

from __future__ import annotations

import os

from bench.common.checkout import ROOT, environment

SUPPORT = [str(ROOT / "tests" / "support" / folder) for folder in ("federated", "kernels", "bench")]
CHANGES_CODE = ("TRITON_INTERPRET", "FEDMOE_TILES")  # variables by which a process compiles something else


def of_a_child(**more: str) -> dict[str, str]:
    """Return this process's environment without what changes what is compiled, and with `more`."""
    paths = os.pathsep.join(filter(None, [*SUPPORT, os.environ.get("PYTHONPATH", "")]))
    whole = {name: value for name, value in environment(PYTHONPATH=paths).items() if name not in CHANGES_CODE}
    return whole | more
