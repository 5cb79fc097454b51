"""What the noise of a private run costs: numbers a second from the seed, as simulations draw, and from a secret.

    python -m bench.noise [--numbers 1000000] [--repeats 9] [--small] [--out FILE]

One thread, the ways in turn. ``float64`` is numpy's normal numbers, rounded. They are not fit for privacy and show what
exactness costs. No time is reported unless each way's variance is the Gaussian's.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from bench.common.checkout import RESULTS
from bench.common.machine import machine
from fedmoe_core.base.rng import counter_rng
from fedmoe_core.privacy.chance import Secret
from fedmoe_core.privacy.discrete_gaussian import discrete_gaussian

SIGMA = 12_000_000  # in the middle of 2^23 to 2^24, where the noise of every run lies
DEVIATIONS = 6  # standard errors by which a variance may miss: less than one run in 10^8


def ways(numbers: int) -> dict[str, Callable[[], np.ndarray]]:
    """Return the ways to draw by name; the seed's is the peer of the secret's."""
    secret = Secret.new()
    return {
        "seed": lambda: discrete_gaussian(SIGMA, numbers, counter_rng(0, "bench")),
        "secret": lambda: discrete_gaussian(SIGMA, numbers, secret.draws("bench")),
        "float64": lambda: np.rint(counter_rng(0, "bench").normal(0.0, SIGMA, numbers)).astype(np.int64),
    }


def seconds(numbers: int, repeats: int) -> dict[str, list[float]]:
    """Time every way in turn, once unreported; refuses to time numbers of another variance."""
    contenders = ways(numbers)
    found: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(repeats + 1):
        for name, way in contenders.items():
            start = time.perf_counter()
            drawn = way()
            spent = time.perf_counter() - start
            if turn:
                found[name].append(spent)
            elif abs((drawn / SIGMA).var() - 1) > DEVIATIONS * (2 / numbers) ** 0.5:
                raise SystemExit(f"the numbers of {name} have another variance; no time is worth reporting")
    return found


def main(arguments: list[str] | None = None) -> None:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(prog="python -m bench.noise", description=__doc__)
    parser.add_argument("--numbers", type=int, default=1_000_000)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--small", action="store_true", help="a trial of the command, not a measurement")
    parser.add_argument("--out", type=Path, help=f"where the record goes, such as {RESULTS}/noise-cpu.json")
    chosen = parser.parse_args(arguments)
    numbers, load = 1000 if chosen.small else chosen.numbers, os.getloadavg()[0]
    found = seconds(numbers, chosen.repeats)
    rates = {name: numbers / statistics.median(spent) for name, spent in found.items()}
    table = Table("drawn from", "median, ms", "million numbers/s", title=f"{numbers:,} numbers, sigma {SIGMA:,}")
    for name, spent in found.items():
        table.add_row(name, f"{1e3 * statistics.median(spent):.1f}", f"{rates[name] / 1e6:.2f}")
    Console().print(table)
    if chosen.out:
        record = {"machine": machine(), "load": load, "numbers": numbers, "sigma": SIGMA}
        record |= {"numbers_a_second": rates, "seconds": found}
        chosen.out.parent.mkdir(parents=True, exist_ok=True)
        chosen.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
