"""The published accuracy tables: every method over three seeds, resumable, with naive Bayes next to classification.

    python -m bench.study.run stdlib            # the demo's job: loss on held-out text
    python -m bench.study.run ag_news FILE.csv  # accuracy on the papers' AG News

It stays beside `fedmoe compare`, whose record has neither naive Bayes nor the global model's loss before training;
docs/study.md and docs/results.md print both. A finished run whose configuration is unchanged is read, not run again.
Writes bench/results/study-JOB.json and prints the table in Markdown.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from bench.common.checkout import RESULTS, ROOT, command, environment
from bench.common.markdown import table
from bench.study.naive_bayes import naive_bayes_accuracy
from fedmoe_core.config.run_config import Config
from fedmoe_core.data.federated import load_data

SEEDS = (0, 1, 2)
METHODS = {
    "stdlib": {
        "HFedMoE, score taylor (the demo)": ["algorithm=hfedmoe"],
        "HFedMoE, score ib (eq. 14, beta 0.1)": ["algorithm=hfedmoe", "selection.score=ib", "selection.beta=0.1"],
        "HFedMoE, score taylor, eq. 17 undamped": ["algorithm=hfedmoe", "aggregation.experts=participation"],
        "random experts": ["algorithm=random"],
        "FedAvg, all experts (no budget allows it)": ["algorithm=fedavg"],
    },
    "ag_news": {
        "HFedMoE": ["algorithm=hfedmoe"],
        "random experts": ["algorithm=random"],
        "FedAvg, all experts (no budget allows it)": ["algorithm=fedavg"],
    },
}


def summary_of(words: Sequence[str], out: Path) -> dict[str, Any]:
    """Read the summary of one run, from disk if a run of this very configuration is finished there."""
    files = [word for word in words if word.endswith(".toml")]
    overrides = [word for word in words if not word.endswith(".toml")]
    wanted = Config.load(Path(files[0]) if files else None, overrides).resolved()
    if (out / "summary.json").exists() and not Config.load(out / "config.toml").diff(wanted):
        return json.loads((out / "summary.json").read_text())
    run = command("fedmoe_core.cli", "simulate", *words, f"out={out}", "--force", "--quiet")
    subprocess.run(run, env=environment(), check=True, stdout=subprocess.DEVNULL)
    return json.loads((out / "summary.json").read_text())


def row_of(name: str, runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Make one line of the table: per seed, and mean and standard deviation of the change."""
    key = "loss" if runs[0]["accuracy_after"] is None else "accuracy"
    before, after = ([run[f"{key}_{when}"] for run in runs] for when in ("before", "after"))
    gains = [b - a for a, b in zip(before, after, strict=True)]
    return {
        "method": name,
        "measure": key,
        "before": before,
        "after": after,
        "mean_after": statistics.mean(after),
        "mean_change": statistics.mean(gains),
        "sd_change": statistics.stdev(gains),
        "worst_client_loss": [run["worst_client_loss"] for run in runs],
        "gigabytes": statistics.mean(run["bytes_down"] + run["bytes_up"] for run in runs) / 1e9,
        "budgeted": all(run["budgeted"] for run in runs),
        "budget_violations": sum(run["budget_violations"] for run in runs),
        "seconds": statistics.mean(run["seconds"] for run in runs),
    }


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """Write the rows as a table."""
    measure, seeds = rows[0]["measure"], "/".join(map(str, SEEDS))
    heads = ["method", f"{measure} before, seeds {seeds}", "after", "change, mean ± sd", "moved", "budgets exceeded"]
    lines = []
    for row in rows:
        before, after = (" / ".join(f"{value:.3f}" for value in row[when]) for when in ("before", "after"))
        change = f"{row['mean_change']:+.3f} ± {row['sd_change']:.3f}"
        moved = f"{row['gigabytes']:.2f} GB"
        over = row["budget_violations"] if row["budgeted"] else "not bound"
        lines.append([row["method"], before, after, change, moved, str(over)])
    return "\n".join(table(heads, lines))


def main() -> None:
    """Run, print and write one study."""
    parser = argparse.ArgumentParser(prog="python -m bench.study.run", description=__doc__.splitlines()[0])
    parser.add_argument("job", choices=sorted(METHODS))
    parser.add_argument("file", nargs="?", help="the CSV of ag_news")
    arguments = parser.parse_args()
    if arguments.job == "ag_news" and not arguments.file:
        parser.error("ag_news needs its CSV file")
    base = [str(ROOT / "examples/demo.toml")] if arguments.job == "stdlib" else [f"data=csv:{arguments.file}"]
    rows = []
    for number, (name, words) in enumerate(METHODS[arguments.job].items()):
        runs = []
        for seed in SEEDS:
            print(f"{name}, seed {seed}", file=sys.stderr)
            out = ROOT / "runs" / "study" / arguments.job / f"{number}-{seed}"
            runs.append(summary_of([*base, *words, f"seed={seed}"], out))
        rows.append(row_of(name, runs))
    result: dict[str, Any] = {"job": arguments.job, "seeds": list(SEEDS), "rows": rows}
    if arguments.job == "ag_news":
        result["naive_bayes"] = [naive_bayes_accuracy(load_data(f"csv:{arguments.file}", seed=seed)) for seed in SEEDS]
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    result |= {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": sys.version.split()[0],
        "threads": Config.load(None, []).resolved().threads,
        "commit": commit.stdout.strip(),
    }
    path = RESULTS / f"study-{arguments.job}.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(markdown(rows))
    if "naive_bayes" in result:
        print(f"\nnaive Bayes on the same labels: {' / '.join(f'{value:.3f}' for value in result['naive_bayes'])}")


if __name__ == "__main__":
    main()
