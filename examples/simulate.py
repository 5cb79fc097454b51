"""Fine-tune over four clients with four sizes of memory, from Python, and write the report.

python examples/simulate.py [OUT]
"""

import sys
from pathlib import Path

from fedmoe_core import Config, simulate
from fedmoe_core.reporting.report import report

SETTINGS = [
    "clients=4",
    "rounds=3",
    "budgets=memory=12.5%;memory=25%;memory=50%;memory=100%",
    "selection.score=taylor",
    "train.lr=2e-3",
    "warmup.steps=20",  # the small model's stand-in for pretraining; the default, 300, takes a minute
]


def main() -> None:
    out = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/example")
    config = Config.load(overrides=[*SETTINGS, f"out={out}"])
    summary = simulate.run(config, force=True)  # replaces an earlier run of fedmoe in `out`, and nothing else
    print(f"held-out loss {summary['loss_before']:.3f} -> {summary['loss_after']:.3f}")
    print(f"moved {(summary['bytes_down'] + summary['bytes_up']) / 1e6:.0f} MB, budgets exceeded: ", end="")
    print(summary["budget_violations"])
    page, _ = report([out])
    print(f"open {page}")


if __name__ == "__main__":
    main()
