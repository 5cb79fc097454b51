"""What the kernels are meant to reach on one H100, held against a file of results: met, not met or not measured.

No goal is beyond what this repository's own model predicts for the code as it is (`roofline.expected`; a test holds
the goals to it). The best that portable Triton kernels are known to claim at this shape is 501 forward and 413 for both
passes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from bench.common.roofline import Layer

Record = dict[str, Any]
QWEN = "qwen3-30b-a3b"
RATES = {"fwd": 460, "fwd+bwd": 430}  # TFLOP/s at T = 32768, all experts trainable
NEAR_ROOF = 75  # percent of the roofline at T = 1024
COLD = ("eager", "graph")
MADE_FOR = "H100"


@dataclass(frozen=True)
class Goal:
    """One goal and what became of it.

    Attributes:
        text: what is asked for.
        wanted: the number that must be reached, at least, or at most where `most`.
        measured: what was, None = not measured.
        note: what the measurement was, or what is missing.
    """

    text: str
    wanted: float
    measured: float | None
    note: str
    most: bool = False

    @property
    def verdict(self) -> str:
        if self.measured is None:
            return "not measured"
        met = self.measured <= self.wanted if self.most else self.measured >= self.wanted
        return "met" if met else "not met"


def goals(data: Record) -> list[Goal]:
    """Judge all goals by one file's rows; a rehearsal measures none of them."""
    rows = [] if data["about"]["rehearsal"] else data["rows"]
    return [
        *(_rate(rows, name, wanted) for name, wanted in RATES.items()),
        *(_near_roof(rows, name) for name in ("fwd", "fwd+bwd")),
        _faster(rows, "eighth-quarter", 1.4, "T = 32768"),
        _faster(rows, "small-eighth-quarter", 2.0, "T = 1024"),
        _memory(rows),
        _against_sonic(rows),
    ]


def summary(data: Record) -> list[str]:
    """Write a line for each goal, with a warning where the GPU is not the one the goals were made for."""
    gpu = data["about"]["gpu"]
    lines = []
    if gpu is not None and MADE_FOR not in gpu:
        lines.append(f"The goals are for one {MADE_FOR}; this is {gpu}, whose peaks differ.")
    for goal in goals(data):
        found = "" if goal.measured is None else f" {goal.measured:.4g} {'<=' if goal.most else '>='} {goal.wanted:g}?"
        lines.append(f"{goal.verdict:>12}: {goal.text}{found} ({goal.note})")
    return lines


def _find(rows: list[Record], **fields: Any) -> list[Record]:
    return [row for row in rows if all(row.get(key) == value for key, value in fields.items())]


def _ours(rows: list[Record], case: str, name: str) -> Record | None:
    """Find fedmoe's fastest cold row of a case: for few tokens a graph's replay may beat the eager launch."""
    found = [
        row for row in _find(rows, shape=QWEN, case=case, peer="fedmoe", **{"pass": name}) if row["launch"] in COLD
    ]
    return min(found, key=lambda row: row["ms"], default=None)


def _rate(rows: list[Record], name: str, wanted: float) -> Goal:
    row = _ours(rows, "all", name)
    text = f"{name} of {QWEN} at T = 32768, TFLOP/s"
    return Goal(text, wanted, row and row["TFLOP/s"], "no row" if row is None else f"{row['ms']:.3f} ms")


def _near_roof(rows: list[Record], name: str) -> Goal:
    row = _ours(rows, "small", name)
    text = f"{name} of {QWEN} at T = 1024, percent of the roofline (memory-bound there)"
    note = "no row" if row is None else f"{row['ms']:.3f} ms, {row['launch']}; roofline of: {row['roofline of']}"
    return Goal(text, NEAR_ROOF, row and row["percent_of_roofline"], note)


def _faster(rows: list[Record], case: str, wanted: float, tokens: str) -> Goal:
    """Compare both sides, each launched in the way that suits it best."""
    text = f"an eighth of the experts, a quarter of them trainable, {tokens}: times the best peer with full storage"
    ours = _ours(rows, case, "fwd+bwd")
    theirs = [
        row
        for row in _find(rows, shape=QWEN, case=case, **{"pass": "fwd+bwd"})
        if row["peer"] not in ("fedmoe", "dense") and row["stores_all"] and row["launch"] in COLD
    ]
    best = min(theirs, key=lambda row: row["ms"], default=None)
    if ours is None or best is None:
        return Goal(text, wanted, None, "no row")
    note = f"{ours['ms']:.3f} ms {ours['launch']} against {best['ms']:.3f} ms of {best['peer']} {best['launch']}"
    return Goal(text, wanted, best["ms"] / ours["ms"], note)


def _memory(rows: list[Record]) -> Goal:
    """Return measured over predicted, the worst of all cases: a budget is broken as soon as one is above 1."""
    found = [row for row in rows if row["peer"] == "fedmoe" and row.get("MB predicted") and row.get("MB")]
    worst = max(found, key=lambda row: row["MB"] / row["MB predicted"], default=None)
    text = "peak memory of a step over what the cost model predicts, worst case"
    if worst is None:
        return Goal(text, 1.0, None, "no row with a prediction", most=True)
    note = f"{worst['shape']}/{worst['case']}: {worst['MB']:.0f} MB, predicted {worst['MB predicted']:.0f} MB"
    return Goal(text, 1.0, worst["MB"] / worst["MB predicted"], note, most=True)


def _against_sonic(rows: list[Record]) -> Goal:
    """Compare bytes kept between the passes; without a run of SonicMoE, its published form: x, z and indices."""
    row = _ours(rows, "all", "fwd+bwd")
    sonic = _find(rows, shape=QWEN, case="all", peer="sonicmoe", launch="eager", **{"pass": "fwd+bwd"})
    text = f"activation memory of {QWEN} at T = 32768 over SonicMoE's"
    if row is None or row["MB kept"] is None:
        return Goal(text, 1.0, None, "no row", most=True)
    if sonic:
        return Goal(text, 1.0, row["MB kept"] / sonic[0]["MB kept"], "both measured", most=True)
    T, H, inner, E, K = row["sizes"]
    # y of the same size as x stands in for it: both are (T, H), and the measurement sees y and not x.
    formula = Layer(T, H, inner, E, K).kept_bytes / 1e6
    note = f"{row['MB kept']:.0f} MB; SonicMoE did not run, its closed form gives {formula:.0f} MB"
    return Goal(text, 1.0, row["MB kept"] / formula, note, most=True)
