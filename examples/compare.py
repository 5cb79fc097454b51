"""Which system suits your data? Run two under the same budgets and seeds, test the differences, print the table.

python examples/compare.py [OUT]
"""

import sys
from pathlib import Path

from custom_data import write_texts  # the example beside this one; put your own texts there

from fedmoe_core.comparison.compare import compare
from fedmoe_core.comparison.study import Study

SHARED = ["clients=4", "rounds=2", "warmup.steps=20", "warmup.labels_per_class=4", "budgets=experts=25%;experts=50%"]
QUICK = ["warmup.head_steps=10", "train.local_steps=4", "model_config.hidden_size=64", "model_config.heads=2"]


def main() -> None:
    out = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/compare-example")
    out.mkdir(parents=True, exist_ok=True)
    texts = out / "texts.jsonl"
    if not texts.exists():  # other texts under this name would be refused: the finished runs are of these
        write_texts(texts)
    study = Study.of(
        [*SHARED, *QUICK, f"data=jsonl:{texts}"],
        systems="hfedmoe,random",  # the first is the one that the others are tested against
        seeds="0-1",  # a real comparison needs about eight
        out=out,
    )
    # A finished run is not run again; stop the script and start it once more, and it goes on.
    found = compare(study, lambda ended, left: print(f"{ended.job.name}: {ended.error or 'done'}"))
    print("\n".join(found.lines))
    for note in [*found.notes, *found.problems, *(f"missing: {job.name}" for job in found.missing)]:
        print(note)


if __name__ == "__main__":
    main()
