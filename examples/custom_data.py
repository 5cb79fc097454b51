"""Your own texts: one JSON object a line, with the client that owns it, and a label if there is something to classify.

python examples/custom_data.py [FOLDER]
"""

import json
import random
import sys
from pathlib import Path

from fedmoe_core import Config, simulate

WORDS = {
    "sport": ["match", "goal", "team", "season", "coach", "score"],
    "money": ["market", "bank", "profit", "shares", "price", "trade"],
}


def write_texts(path: Path) -> None:
    """Six people; each writes mostly about one of two subjects. Put your own texts here."""
    draw = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for row in range(600):
            person = row % 6
            favorite, other = ("sport", "money") if person < 3 else ("money", "sport")
            subject = favorite if draw.random() < 0.8 else other
            text = " ".join(draw.choices(WORDS[subject], k=2) + draw.choices(WORDS["sport"] + WORDS["money"], k=8))
            file.write(json.dumps({"text": text, "label": subject, "client": f"person {person}"}) + "\n")


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/custom-data")
    folder.mkdir(parents=True, exist_ok=True)
    write_texts(folder / "texts.jsonl")
    words = [
        f"data=jsonl:{folder / 'texts.jsonl'}",
        "partition=domain",  # every client in the file is a client of the run
        "clients=4",
        "rounds=3",
        "warmup.steps=20",
        "warmup.labels_per_class=4",  # the server knows four texts of each label; the clients know all of theirs
        "budgets=experts=25%;experts=50%",
        f"out={folder / 'run'}",
    ]
    summary = simulate.run(Config.load(overrides=words), force=True)
    print(f"accuracy {summary['accuracy_before']:.0%} -> {summary['accuracy_after']:.0%}")


if __name__ == "__main__":
    main()
