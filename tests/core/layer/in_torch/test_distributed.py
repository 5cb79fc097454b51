"""The layer on two ranks: DDP, FSDP2 with and without mixed precision, and a distributed checkpoint that resumes."""

from __future__ import annotations

from pathlib import Path

import pytest
from ranks import run_ranks

SCRIPT = Path(__file__).parents[3] / "support" / "models" / "on_two_ranks.py"


@pytest.mark.timeout(180)
@pytest.mark.parametrize("what", [("ddp", "fsdp"), ("mixed", "resume")], ids="-".join)
def test_the_layer_on_two_ranks(what: tuple[str, ...], tmp_path: Path) -> None:
    """Each kind of layer trains as one process does with both ranks' tokens, with adapters and with nothing trained."""
    run_ranks(SCRIPT, tmp_path, *what)
