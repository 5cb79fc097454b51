"""Which system suits your data? Run two under the same budgets and seeds, test the differences, print the table.

python examples/compare.py [OUT]
"""

import sys
from pathlib import Path

from fedmoe_core.compare import Study, compare

SHARED = ["clients=4", "rounds=2", "warmup.steps=20", "budgets=memory=25%;memory=100%"]


def main() -> None:
    study = Study.of(
        SHARED,
        systems="hfedmoe,random",  # the first is the one that the others are tested against
        seeds="0-1",  # a real comparison needs about eight
        out=Path(sys.argv[1] if len(sys.argv) > 1 else "runs/compare-example"),
    )
    # A finished run is not run again; stop the script and start it once more, and it goes on.
    missing, lines, notes = compare(study, lambda ended, left: print(f"{ended.job.name}: {ended.error or 'done'}"))
    print("\n".join(lines))
    for note in [*notes, *(f"missing: {job.name}" for job in missing)]:
        print(note)


if __name__ == "__main__":
    main()
