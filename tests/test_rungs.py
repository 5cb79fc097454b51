"""What proves the Triton kernels without a GPU, each in a process of its own, as part of the ordinary run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDER = "tests/interpret"
# The three files that take longest have a process of their own, so that workers can share them; one takes the rest.
ALONE = ("test_moe_mlp.py", "test_half_precision.py", "test_data_gradient.py")
PARTS = {name: [f"{FOLDER}/experts/{name}"] for name in ALONE}
PARTS["the rest"] = [FOLDER, *(f"--ignore={FOLDER}/experts/{name}" for name in ALONE)]


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("part", PARTS)
def test_interpreter(part: str) -> None:
    """Every kernel in Triton's interpreter, against the float64 reference; alone: make interpret."""
    pytest.importorskip("triton", reason="triton is not installed on this platform")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", *PARTS[part]]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_import_leaves_triton_alone() -> None:
    """The package works where triton does not exist, and costs no import of it where it does."""
    command = (
        "import sys, fedmoe_kernels, fedmoe_core; assert not any(m.split('.')[0] == 'triton' for m in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
