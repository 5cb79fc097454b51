"""``compare.json``: what a comparison was asked and found, written whole, and read back for use in a later one."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedmoe_core.compare_table import Row
from fedmoe_core.files import write_json
from fedmoe_core.identity import Identity
from fedmoe_core.jobs import config_of
from fedmoe_core.measures import Measures
from fedmoe_core.names import concerns

if TYPE_CHECKING:
    from fedmoe_core.compare import Study

ALGORITHM = "algorithm="
OWN = frozenset({"algorithm", "seed", "threads"})  # a system's, a run's; and threads are told apart below


@dataclass(frozen=True)
class Earlier:
    """The finished runs of an earlier comparison.

    Attributes:
        path: its ``compare.json``.
        threads: of each run; sums depend on them.
        identity: digests of what its runs were made from, and the code that made them.
        shared: what its systems shared: decisive settings by dotted key, as JSON gives them back.
        systems: the words of every system.
        measured: the runs of every system.
    """

    path: Path
    threads: int
    identity: Identity
    shared: Mapping[str, Any]
    systems: Mapping[str, tuple[str, ...]]
    measured: Mapping[str, tuple[Measures, ...]]

    @classmethod
    def read(cls, path: Path) -> Earlier:
        """Read the record at ``path``.

        Raises:
            ValueError: it was not written by a comparison of this version.
            OSError: it cannot be read.
        """
        try:
            record = json.loads(path.read_text("utf-8"))
            measured = {label: tuple(map(Measures.of, runs)) for label, runs in record["runs"].items()}
            systems = {label: tuple(words) for label, words in record["systems"].items()}
            identity = Identity.read(record["identity"])
            if identity is None:
                raise ValueError("it does not say which data and model its runs were made from")
            return cls(path, record["threads"], identity, record["shared"], systems, measured)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{path} was not written by this version of fedmoe ({error}); run the comparison again"
            ) from error

    def runs(self, study: Study) -> dict[str, list[Measures]]:
        """Return the runs of the systems that ``study`` does not run itself, of its seeds.

        A setting that this record does not know came later: it stood at what is now its default, or it was not there.
        Settings that only newly run systems would read may differ.

        Raises:
            ValueError: the record was made under other settings or threads, from other data or another model, or lacks
                a seed.
        """
        self.identity.require_same_sources(study.identity, str(self.path), config_of(study.words))
        mine = {variant.label for variant in study.variants}
        found = {label: runs for label, runs in self.measured.items() if label not in mine}
        taken = {
            word.partition("=")[2] for label in found for word in self.systems[label] if word.startswith(ALGORITHM)
        }
        here = shared(study)
        other = [
            key
            for key, value in self.shared.items()
            if concerns(key, taken) and (key not in here or here[key] != value)
        ]
        if other:
            was, now = self.shared[other[0]], here.get(other[0], "unknown")
            raise ValueError(f"{self.path} has {other[0]}={was} and not {now}; run its systems again under these words")
        if self.threads != study.threads:
            raise ValueError(
                f"{self.path} was run with {self.threads} threads a run and not {study.threads}, which changes sums; "
                f"choose --workers so that each run gets {self.threads}"
            )
        for label, runs in found.items():
            lacking = sorted(set(study.seeds) - {run.seed for run in runs})
            if lacking:
                raise ValueError(f"{self.path} lacks seed {lacking[0]} of {label}; choose --seeds that it has")
        return {label: [run for run in runs if run.seed in study.seeds] for label, runs in found.items()}


def shared(study: Study) -> dict[str, Any]:
    """Return what all systems of a study share: decisive settings by dotted key, in JSON's types."""
    decisive = config_of(study.words).decisive()
    kept: dict[str, Any] = json.loads(json.dumps({key: value for key, value in decisive.items() if key not in OWN}))
    return kept


def write_record(study: Study, measured: Mapping[str, Sequence[Measures]], rows: Sequence[Row]) -> None:
    """Write ``compare.json``: the command, what was shared, every system's words, and every run's numbers."""
    own = {variant.label: list(variant.words) for variant in study.variants}
    earlier = study.beside
    other = {label: list(earlier.systems.get(label, ())) for label in measured if label not in own} if earlier else {}
    record = {
        "command": shlex.join(["fedmoe", *sys.argv[1:]]),
        "words": list(study.words),
        "shared": shared(study),
        "systems": own | other,
        "beside": {"record": str(earlier.path), "systems": list(other)} if earlier else None,
        "identity": study.identity.facts(),
        "seeds": list(study.seeds),
        "threads": study.threads,
        "python": sys.version.split()[0],
        "rows": [json.loads(json.dumps(asdict(row), default=float)) for row in rows],
        "runs": {label: [asdict(run) for run in runs] for label, runs in measured.items()},
    }
    write_json(study.out / "compare.json", record)
