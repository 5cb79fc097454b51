"""Every example runs as printed, on a CPU and without a network, and stays short enough to read at a glance."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HOUSE = Path(__file__).parents[1]
EXAMPLES = HOUSE / "examples"
SCRIPTS = sorted(EXAMPLES.glob("*.py"))
LONGEST = 60  # lines
# What each must print, so that one that fails quietly is seen.
SAYS = {
    "compare": r"\| hfedmoe \| 2 \|",
    "custom_algorithm": r"held-out loss \d+\.\d+ -> \d+\.\d+",
    "custom_data": r"accuracy \d+% -> \d+%",
    "cut_to_budget": r"budget 1\.43 MiB: 8 experts a layer\n(.*\n)*same to the bit on fedmoe: True",
    "export_model": r"client 0's own model: 2 of 8 experts a layer.*\n(.*\n)*wrote .*client-0: .*\ndef main\(",
    "finetune_two_experts": r"(moved: rows \[2, 5\] of moe\.[01]\.w_(in|out)\n){4}$",
    "moe_layer": r"all experts: 6\.\d+ MB, a quarter: 1\.\d+ MB",
    "plan_budgets": r"cannot hold one expert per MoE layer; at least [\d.]+ MiB is needed",
    "plain_model": r"accuracy [\d.]+% -> \d\d\.\d%\n$",
    "qlora_on_a_budget": r"LoRA on nf4: 2\d of 32 experts in 9\.\d+ of 10 .*\nstep  0: loss 5(.*\n)*step 20: loss 4",
    "score_experts": r"layer 1: expert  importance  used  tokens\n( +\d +\d+\.\d% +\d+% +\d+\n){8}",
    "simulate": r"budgets exceeded: 0\nopen .*report\.html",
    "swap_experts": r"largest difference of a logit: \d\.\de-0[67]\n(.*\n)*swapped back, the same to the bit: True",
}


def environment() -> dict[str, str]:
    """This checkout's packages; the home and the cache are the session's, so that equal data is encoded once."""
    paths = [str(HOUSE / part) for part in ("kernels", "bindings", ".")]
    return {**os.environ, "GOMP_SPINCOUNT": "1000", "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}


def test_every_example_is_here_and_short() -> None:
    assert {path.stem for path in SCRIPTS} == set(SAYS)
    for path in SCRIPTS:
        assert len(path.read_text().splitlines()) < LONGEST, path.name


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_an_example_runs(script: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(script)]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    assert re.search(SAYS[script.stem], done.stdout), done.stdout


def test_the_notebook_runs_from_top_to_bottom(tmp_path: Path) -> None:
    """Its cells in one process, as a kernel would run them; display() shows HTML, which is collected."""
    notebook = json.loads((EXAMPLES / "quickstart.ipynb").read_text())
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] for cell in notebook["cells"] if cell["cell_type"] == "code")
    assert not any(line.startswith(("!", "%")) for cell in cells for line in cell.splitlines())
    shown = "class HTML:\n    def __init__(self, data): self.data = data\n"
    shown += "import sys, types\nmodule = types.ModuleType('IPython.display')\nmodule.HTML = HTML\n"
    shown += "sys.modules.update({'IPython': types.SimpleNamespace(version_info=(9, 0)), 'IPython.display': module})\n"
    script = tmp_path / "notebook.py"
    script.write_text(shown + "\n\n".join(cells) + "\nassert '<svg' in page.data\n")
    done = subprocess.run(
        [sys.executable, str(script)],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
