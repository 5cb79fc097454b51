"""What a short GPU session found, in at most forty lines whose last one is the verdict."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.gpu.plan import Ended

MOST_LINES = 40
MOST_RED = 8
LOUDEST = 6


def summary(command: str, folder: Path, ended: Mapping[str, Ended]) -> tuple[list[str], list[str]]:
    """Return the lines, and the names of what is red: failed checks, and parts that did not end as they must."""
    data = newest(folder)
    checks = data.get("checks", [])
    red = [check["name"].replace(",", "") for check in checks if check["status"] == "failed"]
    red += [name for name, end in ended.items() if bad(end) and name not in red]
    lines = ["parts: " + ", ".join(f"{name} {end.status} {end.seconds:.0f}s" for name, end in ended.items())]
    lines += [f"{name}: {value:.4g}" for name, value in data.get("ceilings", {}).items()]
    counts = {status: sum(check["status"] == status for check in checks) for status in ("passed", "failed", "skipped")}
    lines.append("checks: " + ", ".join(f"{count} {status}" for status, count in counts.items()))
    lines += [f"  FAILED {check['name']}: {check['detail'][:160]}" for check in checks if check["status"] == "failed"][
        :4
    ]
    lines += kernels(data.get("kernels", []))
    lines += routing(data.get("routing", []))
    lines += models(data.get("models", []))
    lines += times(data.get("rows", []))
    lines += [
        f"tiles of {found['family']} at {found['rows']} rows: {found['ms']:.4f} ms" for found in data.get("tuned", [])
    ][-5:]
    lines += left_out(data.get("left_out", []))
    more = f" and {len(red) - MOST_RED} more" if len(red) > MOST_RED else ""
    verdict = f"{command.upper()} RED {','.join(red[:MOST_RED])}{more}" if red else f"{command.upper()} OK"
    return [line[:400] for line in lines[: MOST_LINES - 1]] + [verdict], red


def newest(folder: Path) -> dict[str, Any]:
    """Read the newest file of results; {} where there is none that can be read."""
    for path in sorted(folder.glob("*-20*.json"), key=lambda path: path.stat().st_mtime, reverse=True):
        try:
            return json.loads(path.read_text())
        except ValueError:
            continue
    return {}


def bad(end: Ended) -> bool:
    """Tell whether a part's end is a fault: a red result, a crash, a hang; or a must that is not finished."""
    if end.status in ("red", "crashed", "late", "refused", "running"):
        return True
    return end.must and end.status != "done"


def kernels(rows: list[dict[str, Any]]) -> list[str]:
    """Say the launches that take longest, each beside its prediction."""
    found = []
    for row in sorted(rows, key=lambda row: -row["ms"])[:LOUDEST]:
        likely = "" if row["expected ms"] is None else f" (predicted {row['expected ms']:.3f})"
        found.append(f"{row['case']}: {row['kernel']} {row['ms']:.3f} ms{likely}, {row['TFLOP/s']:.0f} TFLOP/s")
    return found


def times(rows: list[dict[str, Any]]) -> list[str]:
    """Say forward + backward of every case in a line: each contender's milliseconds, and fedmoe's rate and ratio."""
    found: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in rows:
        if row["pass"] == "fwd+bwd":
            tuned = " tuned" if row.get("tiles") else ""
            found.setdefault((row["shape"], row["case"], row["launch"] + tuned), []).append(row)
    lines = []
    for (shape, case, launch), group in found.items():
        own = next((row for row in group if row["peer"] == "fedmoe"), None)
        ratio = own["ratio_to_best_peer"] if own else None
        rate = f"; {own['TFLOP/s']:.0f} TFLOP/s" if own else ""
        said = ", ".join(f"{row['peer']} {row['ms']:.2f}" for row in sorted(group, key=lambda row: row["ms"]))
        lines.append(f"{shape}/{case} {launch}: {said}{rate}" + (f", {ratio:.2f} times the best peer" if ratio else ""))
    return lines


def routing(rows: list[dict[str, Any]]) -> list[str]:
    """Say routing alone, a line for each router: microseconds of the device and of the host, by pass."""
    found: dict[str, dict[str, list[str]]] = {}
    for row in rows:
        cells = found.setdefault(row["router"], {}).setdefault(row["peer"], [])
        cells.append(f"{row['pass']} {row['us']:.0f} us (host {row['host us']:.0f})")
    return [
        f"routing alone, {router}: " + "; ".join(f"{peer} {', '.join(cells)}" for peer, cells in peers.items())
        for router, peers in found.items()
    ]


def models(rows: list[dict[str, Any]]) -> list[str]:
    """Say a whole model's tokens a second, a line for each batch."""
    found: dict[str, list[str]] = {}
    for row in rows:
        name = f"{row['model']}, {' x '.join(map(str, row['batch']))} tokens"
        found.setdefault(name, []).append(f"{row['peer']} {row['tokens/s']:.0f} ({row['ms']:.2f} ms)")
    return [f"tokens/s, {name}: {', '.join(cells)}" for name, cells in found.items()]


def left_out(records: list[dict[str, Any]]) -> list[str]:
    """Name who was not timed, with one reason each."""
    reasons = {record["peer"]: f"{record['status']}: {record['reason'][:100]}" for record in records}
    return [f"not timed everywhere: {peer}, {reason}" for peer, reason in list(reasons.items())[:5]]
