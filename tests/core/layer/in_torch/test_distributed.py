"""The layer on two ranks: DDP, FSDP2 with and without mixed precision, and a distributed checkpoint that resumes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[3] / "support" / "models" / "on_two_ranks.py"


@pytest.mark.timeout(180)
@pytest.mark.parametrize("what", [("ddp", "fsdp"), ("mixed", "resume")], ids="-".join)
def test_the_layer_on_two_ranks(what: tuple[str, ...], tmp_path: Path) -> None:
    """Each kind of layer trains as one process does with both ranks' tokens, with adapters and with nothing trained."""
    ranks = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(rank), str(tmp_path), *what],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [process.communicate(timeout=150)[0] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert [process.returncode for process in ranks] == [0, 0], "\n".join(said)[-4000:]
