"""Predict a layer whose frozen experts are stored in few bits: decoded first, and read as codes by every product.

    python -m bench.aot.formats                  # Qwen3-30B-A3B, all experts frozen, on an H100: the docs' table
    python -m bench.aot.formats --tokens 8192    # where both are as fast, `gpu/experts/memory.py` changes over

Milliseconds by `roofline.expected`, of kernels that are compiled ahead of time; no GPU has confirmed any. The first run
compiles some 80 kernels, a few minutes.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from unittest import mock

from bench.aot import run as aot
from bench.aot.cases import QWEN, Case
from bench.aot.sass import compiled_all
from bench.aot.table import GPU_OF, Step
from fedmoe_kernels.formats import FORMATS
from fedmoe_kernels.gpu.experts import call


def predicted(case: Case, arch: str, *, first: bool) -> tuple[float, float]:
    """Return (forward, forward and backward) in ms where frozen slots are decoded `first`, or in every product."""
    with mock.patch.object(call, "decodes", return_value=first):
        ((_, passes),) = aot.collect([case], [arch], "").items()
    jobs = list(dict.fromkeys(job for pairs in passes.values() for _, job in pairs))
    codes = dict(zip(jobs, compiled_all(jobs), strict=True))
    rows = {name: [aot._row(case, *pair, codes) for pair in pairs] for name, pairs in passes.items()}
    found = Step(arch, case, rows).passes()
    return found["forward"]["expected_ms"], found["forward + backward"]["expected_ms"]


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.aot.formats", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", choices=GPU_OF, default="sm_90")
    parser.add_argument("--tokens", type=int, default=QWEN.T)
    parser.add_argument("--format", action="append", choices=FORMATS, help="may be given again; all without")
    chosen = parser.parse_args()
    layer = replace(QWEN, T=chosen.tokens, Bt=0)
    print("| frozen experts | forward | forward and backward | the same, every product decoding |")
    print("| --- | --- | --- | --- |")
    print("| bfloat16 | {} | {} | |".format(*predicted(layer, chosen.arch, first=False)), flush=True)
    for form in chosen.format or FORMATS:
        case = replace(layer, name=form, format=form)
        first, within = (predicted(case, chosen.arch, first=yes) for yes in (True, False))
        print("| `{}` | {} | {} | {} and {} |".format(form, *first, *within), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
