"""The GPU run, `bash bench/gpu.sh`: correctness, compute-sanitizer, times against peers, a table, plots, the goals.

    python -m bench.gpu.run [PART] [--shapes NAME,...] [--cases NAME,...] [--results DIR]
    python -m bench.gpu.run first --seconds 300       # many parts, each in a time box (conduct.py); second: more
    python -m bench.gpu.run --device cpu --tiny       # rehearse the whole script without a GPU

PART is facts (machine and ceilings), correct, sanitize, warm (compile for `time` on all cores), time, kernels (each
launch alone), routing (alone, against torch's), model (one of transformers, tokens/s), tune, ncu (counters), plot, or
all. Each part writes into one JSON file as it goes and skips what is finished there for the same kernels, versions and
GPU. A part that runs out of its minutes ends with code 75: start it again.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

PARTS = ("correct", "sanitize", "warm", "time", "routing", "model", "kernels", "plot")
MORE = ("facts", "tune", "ncu")
SERVING = ("worker", "sanitized", "profiled")
MINUTES = 8.5
MARGIN = 4.0  # seconds before the end of a box in which a part writes what it has


def main(argv: Sequence[str] | None = None) -> int:
    """Run the parts that are asked for; the exit code is the first that is not 0."""
    options = parse(argv)
    if options.part in ("first", "second"):
        from bench.gpu import conduct  # which imports neither torch nor what may take a process down

        return conduct.command(options.part, options)
    if options.part == "plot" and options.out is not None and options.out.exists():
        from bench.gpu import report  # at home: a file of results needs no GPU to be drawn

        for path in report.from_file(options.out):
            print(f"written: {path}")
        return 0
    from bench.gpu import parts  # imports torch and the packages of the checkout

    if options.wait:  # imported ahead of its turn; nothing has touched the GPU yet
        seconds = sys.stdin.readline().strip()
        if not seconds:
            return 0
        options.minutes = float(seconds) / 60
    if options.part in SERVING:
        parts.serve(options)
        return 0
    until = time.monotonic() + 60 * options.minutes - (MARGIN if options.wait else 0.0)
    try:
        run = parts.Run.begin(options)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    for part in PARTS if options.part == "all" else (options.part,):
        code = parts.run_part(run, part, until)
        if code:
            return code
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu.run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    choices = (*PARTS, *MORE, "all", "first", "second", *SERVING)
    parser.add_argument("part", nargs="?", default="all", choices=choices)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes: a rehearsal, whose numbers mean nothing")
    parser.add_argument("--shapes", default="", help="names of bench/common/cases.py, by commas; default: all")
    parser.add_argument("--cases", default="", help="likewise")
    parser.add_argument("--contenders", default="", help="likewise, of peers.py and peers_optional.py")
    parser.add_argument("--checks", choices=("bfloat16", "all"), default="all", help="of `correct`")
    parser.add_argument("--kernel-cases", default="", help="names of bench/aot/cases.py, by semicolons; default: all")
    parser.add_argument("--tools", default="", help="of compute-sanitizer, by commas; default: memcheck,racecheck")
    parser.add_argument("--count", type=int, default=0, help="checks that `sanitize` watches; default: all")
    parser.add_argument("--families", default="", help="kernels that `tune` searches, by commas; default: all")
    parser.add_argument("--walks", type=int, default=1, help="of `tune`: moves to a faster neighbour")
    parser.add_argument("--peer", type=Path, action="append", default=[], help="a file with contender() -> Contender")
    parser.add_argument("--results", type=Path, default=None, help="folder; default: bench/results, rehearsals runs/")
    parser.add_argument("--out", type=Path, default=None, help="one file of your choice instead")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="after which nothing new is begun")
    parser.add_argument("--seconds", type=float, default=None, help="of `first` and `second`; default: 300 and 420")
    parser.add_argument("--wait", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--jobs", type=int, default=None, help="processes for `correct`; default: 14 on a GPU, else 1")
    parser.add_argument("--rounds", type=int, default=None, help="timed rounds; default 25, at least 20 on a GPU")
    parser.add_argument("--sustained", type=float, default=None, help="seconds back to back; default 2, on a CPU 0")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
