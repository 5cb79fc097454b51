"""The GPU run, `bash bench/gpu.sh`: correctness, compute-sanitizer, times against peers, a table, plots, the goals.

    python bench/gpu.py [PART] [--shapes NAME,...] [--cases NAME,...] [--results DIR]
    python bench/gpu.py --device cpu --tiny            # rehearse the whole script without a GPU

PART is correct, sanitize, warm (compile for `time` on all cores), time, kernels (each launch alone), plot, or all. Each
part writes into one JSON file as it goes and skips what is finished there for the same sources, versions and GPU. A
part that runs out of its minutes ends with code 75: start it again.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
# Nothing need be installed: the checkout's own packages come first.
sys.path[:0] = [str(path) for path in (HERE, HERE.parent / "kernels", HERE.parent / "bindings", HERE.parent)]
PARTS = ("correct", "sanitize", "warm", "time", "kernels", "plot")
MINUTES = 8.5


def main(argv: Sequence[str] | None = None) -> int:
    """Run the parts that are asked for; the exit code is the first that is not 0."""
    options = parse(argv)
    import gpu_parts  # imports torch and the packages of the checkout

    if options.part in ("worker", "sanitized"):
        gpu_parts.serve(options)
        return 0
    try:
        run = gpu_parts.Run.begin(options)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    until = time.monotonic() + 60 * options.minutes
    for part in PARTS if options.part == "all" else (options.part,):
        code = run.part(part, until)
        if code:
            return code
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", default="all", choices=(*PARTS, "all", "sanitized", "worker"))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes: a rehearsal, whose numbers mean nothing")
    parser.add_argument("--shapes", default="", help="names of bench/cases.py, by commas; default: all")
    parser.add_argument("--cases", default="", help="likewise")
    parser.add_argument("--peer", type=Path, action="append", default=[], help="a file with contender() -> Contender")
    parser.add_argument("--results", type=Path, default=None, help="folder; default: bench/results, rehearsals runs/")
    parser.add_argument("--out", type=Path, default=None, help="one file of your choice instead")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="after which nothing new is begun")
    parser.add_argument("--jobs", type=int, default=None, help="processes for `correct`; default: 8 on a GPU, else 1")
    parser.add_argument("--rounds", type=int, default=None, help="timed rounds; default 25, at least 20 on a GPU")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
