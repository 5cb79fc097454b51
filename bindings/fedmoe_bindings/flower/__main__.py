"""Start a command of Flower's that talks to the other side alone: ``python -m fedmoe_bindings.flower flwr run``.

Flower sends usage facts, looks for updates and installs packages while it runs, unless its environment says otherwise.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

COMMANDS = ("flwr", "flower-superlink", "flower-supernode")
SWITCHES = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "HF_HUB_OFFLINE": "1",
}


def quiet(environment: Mapping[str, str]) -> dict[str, str]:
    """Return an environment in which what is not said already is switched off."""
    return {**SWITCHES, **environment}


def main(words: Sequence[str]) -> None:
    """Become the command, with these switches.

    Raises:
        SystemExit: no such command, or Flower is not installed.
    """
    if not words or words[0] not in COMMANDS:
        raise SystemExit(f"say which command of Flower to start: {', '.join(COMMANDS)}")
    beside = Path(sys.executable).with_name(words[0])
    found = str(beside) if beside.exists() else shutil.which(words[0])
    if found is None:
        raise SystemExit(f"{words[0]} is not installed; pip install 'fedmoe-core[flower]'")
    # Flower's commands start each other by name, which an environment that is not activated would not find.
    path = os.pathsep.join([str(Path(found).parent), os.environ.get("PATH", os.defpath)])
    os.execve(found, [words[0], *words[1:]], {**quiet(os.environ), "PATH": path})


if __name__ == "__main__":
    main(sys.argv[1:])
