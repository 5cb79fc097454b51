"""transformers' own modelling tests, from a checkout of theirs: with fedmoe's experts they must pass where others pass.

    python -m bench.upstream.run CHECKOUT [FAMILY ...] [--workers 2] [--out FILE]

CHECKOUT is a clone of transformers, at a release that fedmoe supports; its own source runs, not what is installed. The
environment needs what its tests need (`pip install -e "CHECKOUT[torch,testing]"`). Tests that fail with our experts are
run again with "eager" and "grouped_mm": one that passes there fails because of us. Families that the file holds already
are not run again. The exit code is 1 if anything fails because of us, or a family could not be tested.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.common.checkout import RESULTS, command, environment
from bench.common.machine import about
from bench.upstream.plugin import OPTION, PROPERTY

# One of each kind of rule, activation and layout, and what most people fine-tune; none whose tests need torchvision.
FAMILIES = (
    *("mixtral", "qwen2_moe", "qwen3_moe", "qwen3_next", "olmoe", "phimoe", "deepseek_v2", "deepseek_v3"),
    *("deepseek_v4", "gpt_oss", "granitemoe", "glm4_moe", "nemotron_h", "jamba", "minimax", "minimax_m2"),
    *("lfm2_moe", "ernie4_5_moe", "flex_olmo", "dots1", "hunyuan_v1_moe", "switch_transformers", "dbrx", "jetmoe"),
)
OTHERS = ("eager", "grouped_mm")
VERSION = "import transformers; print(transformers.__version__)"
FACTS = ("cpu", "torch", "python", "commit", "date")


def tested(checkout: Path, experts: str, tests: Sequence[str], workers: int) -> dict[str, dict[str, Any]]:
    """Run tests with one experts implementation.

    Returns:
        For each test what became of it ("passed", "failed", "skipped") and how many models it made with these experts.

    Raises:
        RuntimeError: pytest ran none of them; with its last words.
    """
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        words = ("-q", "-p", "bench.upstream.plugin", OPTION, experts, "-n", str(workers), "-W", "ignore")
        asked = [*command("pytest", *words), "--show-capture=no", "--tb=line", f"--junitxml={report}", *tests]
        where = environment(PYTHONPATH=str(checkout / "src"))
        done = subprocess.run(asked, cwd=checkout, env=where, capture_output=True, text=True, check=False)
        if not report.exists() or done.returncode not in (0, 1):
            last = "\n".join((done.stdout + done.stderr).splitlines()[-15:])
            raise RuntimeError(f"pytest ended with {done.returncode} in {checkout}:\n{last}")
        cases = list(ET.parse(report).iter("testcase"))
        lost = next((case for case in cases if not case.get("classname")), None)
        if lost is not None:  # the file itself did not import
            said = "".join(lost.itertext()).strip().splitlines()
            raise RuntimeError(f"{lost.get('name')} cannot be collected: {said[-1] if said else 'no reason given'}")
        return dict(map(_outcome, cases))


def _outcome(case: ET.Element) -> tuple[str, dict[str, Any]]:
    module, _, owner = case.get("classname", "").rpartition(".")
    path = "/".join(module.split(".")) + ".py"
    bad = any(case.find(kind) is not None for kind in ("failure", "error"))
    became = "failed" if bad else "skipped" if case.find("skipped") is not None else "passed"
    made = [int(each.get("value", 0)) for each in case.iter("property") if each.get("name") == PROPERTY]
    return f"{path}::{owner}::{case.get('name')}", {"became": became, "models": sum(made)}


def family_row(checkout: Path, family: str, workers: int) -> dict[str, Any]:
    """Run one family's modelling tests with our experts, and with others' what fails."""
    path = f"tests/models/{family}/test_modeling_{family}.py"
    ours = tested(checkout, "fedmoe", [path], workers)
    counts = {kind: sum(t["became"] == kind for t in ours.values()) for kind in ("passed", "failed", "skipped")}
    reached = sum(t["became"] == "passed" and t["models"] > 0 for t in ours.values())
    failed = sorted(name for name, test in ours.items() if test["became"] == "failed")
    there = {other: tested(checkout, other, failed, workers) if failed else {} for other in OTHERS}
    passing = {name: [o for o in OTHERS if there[o].get(name, {}).get("became") == "passed"] for name in failed}
    return counts | {
        "passed_with_our_experts": reached,
        "because_of_us": {name: others for name, others in passing.items() if others},
        "fail_everywhere": [name for name, others in passing.items() if not others],
    }


def made_with(checkout: Path) -> dict[str, Any]:
    """Name the machine, and the version and revision of the transformers that is tested.

    Raises:
        ValueError: there is no such clone, or what is in it does not import.
    """
    if not (checkout / "tests" / "models").is_dir():
        raise ValueError(f"{checkout} has no tests/models; give a clone of transformers")
    where = environment(PYTHONPATH=str(checkout / "src"))
    asked = subprocess.run([sys.executable, "-c", VERSION], env=where, capture_output=True, text=True, check=False)
    if asked.returncode:
        reason = asked.stderr.strip().splitlines()[-1]
        raise ValueError(f"the transformers of {checkout} does not import ({reason}); install what it needs")
    git = ["git", "-C", str(checkout), "rev-parse", "--short=12", "HEAD"]
    revision = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip() or None
    known = about("cpu", tiny=False)
    return {name: known[name] for name in FACTS} | {
        "transformers": asked.stdout.split()[-1],
        "transformers_revision": revision,
    }


def counts_of(row: dict[str, Any]) -> tuple[int, ...]:
    """Count what passed, what of it made models with our experts, what was skipped, fails with any, because of us."""
    kept = (row["passed"], row["passed_with_our_experts"], row["skipped"])
    return (*kept, len(row["fail_everywhere"]), len(row["because_of_us"]))


def total(rows: dict[str, Any]) -> tuple[int, ...]:
    """Add the counts of all families."""
    return tuple(map(sum, zip(*map(counts_of, rows.values()), strict=True)))


def table(rows: dict[str, Any]) -> Table:
    """Lay the counts out, and their sum."""
    made = Table("family", "passed", "with our experts", "skipped", "fail with any experts", "fail because of us")
    for family, row in rows.items():
        made.add_row(family, *map(str, counts_of(row)), end_section=family == list(rows)[-1])
    if rows:
        made.add_row(f"{len(rows)} families", *map(str, total(rows)))
    return made


def main() -> int:
    """Run every family that the file lacks, and write the file after each."""
    parser = argparse.ArgumentParser(prog="python -m bench.upstream.run", description=__doc__)
    parser.add_argument("checkout", type=Path)
    parser.add_argument("families", nargs="*", default=FAMILIES)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, default=None, help="default: bench/results/upstream-VERSION.json")
    chosen = parser.parse_args()
    checkout = chosen.checkout.resolve()
    try:
        facts = made_with(checkout)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error
    out = chosen.out or RESULTS / f"upstream-{facts['transformers']}.json"
    rows: dict[str, Any] = json.loads(out.read_text())["families"] if out.exists() else {}
    asked = [family for family in chosen.families if family not in rows]
    for number, family in enumerate(asked, 1):
        print(f"{family} ({number} of {len(asked)})", flush=True)
        try:
            rows[family] = family_row(checkout, family, chosen.workers) | {"commit": facts["commit"]}
        except RuntimeError as error:
            print(f"{family} was not tested: {error}", flush=True)
            continue
        out.write_text(json.dumps({"made_with": facts, "families": dict(sorted(rows.items()))}, indent=1) + "\n")
    Console(width=130).print(table(rows))
    for test in (test for row in rows.values() for test in row["because_of_us"]):
        print(f"fails because of us: {test}")
    print(f"written to {out}")
    return int(any(family not in rows or rows[family]["because_of_us"] for family in chosen.families))


if __name__ == "__main__":
    sys.exit(main())
