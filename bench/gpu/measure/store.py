"""The file that a GPU run writes into as it goes, so that a run that was cut off goes on where it stopped.

One JSON object: `about` (machine, versions, sources), `ceilings`, `checks`, `rows` (times), `kernels` (times of
single launches), `left_out` (contenders that were not timed, and why), `finished` (cases) and `attempts` (what was
begun that may take the process down), `routing` (routing alone), `models` (whole models), `tuned` (tiles) and
`counters` (of the GPU's own profiler). A file made of other kernels or versions is never added to: its numbers are of
something else. Rows that were timed while a check was red carry its name; they are not hidden.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench.common.machine import slug

# What must agree for a finished row to stand. A driver's patch level and the harness go with every record instead, and
# so do the tiles: results of tuned tiles stand beside those of static ones.
AGREE = ("device", "rehearsal", "gpu", "torch", "triton", "kernels")
MARKS = ("gpu", "driver", "torch", "triton", "commit", "kernels", "harness", "tiles", "device")
LISTS = ("checks", "rows", "routing", "models", "kernels", "tuned", "counters", "left_out", "finished", "attempts")
TIMED = ("rows", "routing", "models", "kernels")  # lists of times, which a red check marks
NOT_A_GPU = "NOT GPU NUMBERS: a rehearsal of the script on tiny shapes; nothing here says how fast anything is"
Record = dict[str, Any]


def sentence(error: BaseException) -> str:
    """Say an error on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def stem(about: Record) -> str:
    """Name a file: gpu-NAME for a GPU's real shapes, rehearsal-DEVICE for all else; the date follows."""
    return f"rehearsal-{about['device']}" if about["rehearsal"] else f"gpu-{slug(about['gpu'])}"


def refuse_name(about: Record, path: Path) -> None:
    """Refuse to put a rehearsal's numbers under the name of a GPU's."""
    if about["rehearsal"] and path.name.startswith("gpu-"):
        raise ValueError(f"{path.name} is a name for a GPU's results, and this is a rehearsal; name it otherwise")


class Store:
    """Results so far, saved after every addition.

    Args:
        about: this machine and what is measured, from `machine.about`.
        folder: where results lie; the newest file of the same GPU that agrees with `about` is continued.
        path: a chosen file instead.

    Raises:
        ValueError: for a rehearsal under the name of a GPU's results.
    """

    def __init__(self, about: Record, folder: Path, path: Path | None = None) -> None:
        self.about = about
        self.path = path or folder / f"{stem(about)}-{about['date']}.json"
        refuse_name(about, self.path)
        self.data: Record = {"about": about, "ceilings": {}} | {name: [] for name in LISTS}
        if about["rehearsal"]:
            self.data = {"warning": NOT_A_GPU} | self.data
        older = [self.path] if path else sorted(folder.glob(f"{stem(about)}-*.json"), reverse=True)
        for candidate in (candidate for candidate in older if candidate.exists()):
            found = json.loads(candidate.read_text())
            if all(found["about"].get(key) == about[key] for key in AGREE):
                self.path, self.data = candidate, {name: [] for name in LISTS} | found
                return
        if self.path.exists():  # made today of other kernels: set aside, for it may be the only copy
            other = json.loads(self.path.read_text())["about"].get("kernels", "older")
            self.path.rename(self.path.with_suffix(f".{other}.json"))

    def add(self, name: str, records: Iterable[Record]) -> None:
        """Append to one of `LISTS`; every record carries what it was made with."""
        marks = {key: self.about[key] for key in MARKS}
        self.data[name].extend(marks | record for record in records)
        self.save()

    def replace(self, name: str, key: Record, records: Iterable[Record]) -> None:
        """Put new records where those with the values of `key` and this run's tiles were, in one step on disk too."""
        old = self.find(name, **key)
        self.data[name] = [record for record in self.data[name] if not any(record is other for other in old)]
        self.add(name, records)

    @contextmanager
    def attempt(self, record: Record) -> Iterator[None]:
        """Write down what may take the process down before it is done; only a process that ended leaves it there."""
        self.add("attempts", [record])
        made = self.data["attempts"][-1]
        try:
            yield
        finally:
            self.data["attempts"].remove(made)
            self.save()

    def find(self, name: str, /, **fields: Any) -> list[Record]:
        """Find the records of a list that have these values, all of this run's tiles."""
        fields = {"tiles": self.about["tiles"]} | fields
        return [r for r in self.data[name] if all(r.get(key) == value for key, value in fields.items())]

    def save(self) -> None:
        """Mark the rows by the checks that are red now, write the whole file and rename it into place."""
        red = sorted({check["name"] for check in self.data["checks"] if check["status"] == "failed"})
        for row in (row for name in TIMED for row in self.data[name]):
            row["red"] = red
        self.path.parent.mkdir(parents=True, exist_ok=True)
        draft = self.path.with_suffix(".tmp")
        draft.write_text(json.dumps(self.data, indent=1, allow_nan=False) + "\n")
        os.replace(draft, self.path)
