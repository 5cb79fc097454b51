"""The command that says without a GPU what a step of every shape allocates, kept between the passes and at its peak.

python -m bench.gpu.dry [--arch sm_90]    # MB of every shape
"""

from __future__ import annotations

import argparse

from bench.aot.dry_step import sizes_of
from bench.common.cases import CLIENT_CASES, STANDARD
from bench.common.roofline import Layer
from fedmoe_kernels.tiles.lookup import SHARED


def main() -> None:
    """Print the table of eight shapes, everything trainable, with SonicMoE's closed form: x, z, 16 bytes a row."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.dry", description=main.__doc__)
    parser.add_argument("--arch", choices=SHARED, default="sm_90")
    arch = parser.parse_args().arch
    print(f"{'bfloat16, MB of 10^6 bytes':28}{'kept':>9}{'SonicMoE':>10}{'recompute':>11}{'peak':>9}{'recompute':>11}")
    for shape in STANDARD:
        sizes, again = (sizes_of(shape, CLIENT_CASES[0], arch, recompute=recompute) for recompute in (False, True))
        layer = Layer(shape.T, shape.H, shape.I, shape.E, shape.K, gated=shape.F == 2 * shape.I)
        cells = (sizes.kept, layer.kept_bytes, again.kept, sizes.peak, again.peak)
        print(f"{shape.name:28}" + "".join(f"{n / 1e6:{w}.1f}" for n, w in zip(cells, (9, 10, 11, 9, 11), strict=True)))


if __name__ == "__main__":
    main()
