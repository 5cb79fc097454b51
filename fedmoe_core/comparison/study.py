"""A comparison as it was asked: systems, seeds and settings, and the record that it leaves."""

from __future__ import annotations

import json
import shlex
import sys
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from fedmoe_core.base.files import write_json
from fedmoe_core.base.wording import another_configuration, differing
from fedmoe_core.comparison.jobs import Job, Variant, config_of, make_jobs, parse_seeds, parse_variants
from fedmoe_core.comparison.record import Earlier
from fedmoe_core.comparison.run_figures import RunFigures
from fedmoe_core.comparison.table import Row
from fedmoe_core.config.run_config import usable_cores
from fedmoe_core.config.systems import ALGORITHMS, RETIRED, concerns
from fedmoe_core.simulation.identity import Identity
from fedmoe_core.simulation.worlds.found_plain import plain_of, sources_of

ALGORITHM = "algorithm="
OWN = frozenset({"algorithm", "seed", "threads"})  # a system's, a run's; and threads are told apart below


@dataclass(frozen=True)
class Study:
    """What to compare.

    Attributes:
        words: a configuration file and ``key=value`` words that all systems share.
        variants: the systems; the first is the subject, which the others are tested against.
        seeds: of every system.
        out: the directory of the comparison.
        workers: most runs at once; every one gets its share of the cores.
        target: quality (mean over clients) that "to the target" means; None = by seed, midway from best start to end.
        beside: an earlier comparison under the same words; its other systems are shown in the table, not run again.
    """

    words: tuple[str, ...]
    variants: tuple[Variant, ...]
    seeds: tuple[int, ...]
    out: Path
    workers: int
    target: float | None = None
    beside: Earlier | None = None

    @classmethod
    def of(
        cls,
        words: Sequence[str],
        *,
        systems: str,
        seeds: str,
        out: Path,
        workers: int = 0,
        target: float | None = None,
        variants: Path | None = None,
        beside: Path | None = None,
    ) -> Study:
        """Make a study from the command line's words.

        Args:
            words: shared by all systems.
            systems: names separated by commas: algorithms, or labels of ``variants``; "all" is every algorithm.
            seeds: such as ``0-7``.
            out, target: as the attributes.
            workers: 0 = one for every two cores.
            variants: a TOML file with a table ``[systems]`` of labels, each a list of words.
            beside: the ``compare.json`` of an earlier comparison.

        Raises:
            ValueError: a system that is neither an algorithm nor a label, no seed, or an earlier comparison
                that cannot be shown with this one.
            OSError: a file cannot be read.
        """
        named: Mapping[str, Any] = {}
        if variants is not None:
            named = tomllib.loads(variants.read_text("utf-8")).get("systems", {})
        every = list(named) if named else list(ALGORITHMS)
        chosen = every if systems == "all" else [name.strip() for name in systems.split(",") if name.strip()]
        study = cls(
            tuple(words),
            tuple(parse_variants(chosen, named)),
            parse_seeds(seeds),
            out,
            workers or max(1, usable_cores() // 2),
            target,
            Earlier.read(beside) if beside else None,
        )
        if study.beside:
            study.runs_beside()  # refuses here, not after hours of runs
        return study

    @property
    def threads(self) -> int:
        """Threads of each run: the cores divided by the workers."""
        return max(1, usable_cores() // self.workers)

    @cached_property
    def identity(self) -> Identity:
        """Digests of the data, the model and the code that all systems share, as they are now."""
        config = config_of(self.words)
        return sources_of(config, plain_of(config, None))

    def jobs(self) -> list[Job]:
        """List all runs of the study."""
        return make_jobs(self.words, self.variants, self.seeds, out=self.out, threads=self.threads)

    def shared(self) -> dict[str, Any]:
        """Return what all systems share: decisive settings by dotted key, in JSON's types."""
        decisive = config_of(self.words).decisive()
        kept: dict[str, Any] = json.loads(json.dumps({key: value for key, value in decisive.items() if key not in OWN}))
        return kept

    def runs_beside(self) -> dict[str, list[RunFigures]]:
        """Return the earlier comparison's runs of the systems that this one does not run itself, of its seeds.

        A setting that the earlier record does not know came later: it stood at what is now its default, or it was not
        there. Settings that only newly run systems would read may differ.

        Raises:
            ValueError: the record was made under other settings or threads, from other data or another model, or lacks
                a seed.
        """
        earlier = self.beside
        if earlier is None:
            return {}
        earlier.identity.require_same_sources(self.identity, str(earlier.path), config_of(self.words))
        mine = {variant.label for variant in self.variants}
        found = {label: runs for label, runs in earlier.measured.items() if label not in mine}
        words = [word for label in found for word in earlier.systems[label]]
        taken = {word.partition("=")[2] for word in words if word.startswith(ALGORITHM)}
        was = {key: value for key, value in earlier.shared.items() if concerns(key, taken)}
        now = {key: value for key, value in {**self.shared(), **RETIRED}.items() if key in was}
        if unlike := differing(was, now):
            raise ValueError(
                f"{earlier.path} was made under {another_configuration(unlike)}; "
                "run its systems again under these words"
            )
        if earlier.threads != self.threads:
            raise ValueError(
                f"{earlier.path} was run with {earlier.threads} threads a run and not {self.threads}, which changes "
                "sums; choose --workers so that each run gets the same"
            )
        for label, runs in found.items():
            lacking = sorted(set(self.seeds) - {run.seed for run in runs})
            if lacking:
                raise ValueError(f"{earlier.path} lacks seed {lacking[0]} of {label}; choose --seeds that it has")
        return {label: [run for run in runs if run.seed in self.seeds] for label, runs in found.items()}


def write_record(study: Study, measured: Mapping[str, Sequence[RunFigures]], rows: Sequence[Row]) -> None:
    """Write ``compare.json``: the command, what was shared, every system's words, and every run's numbers."""
    own = {variant.label: list(variant.words) for variant in study.variants}
    earlier = study.beside
    other = {label: list(earlier.systems.get(label, ())) for label in measured if label not in own} if earlier else {}
    record = {
        "command": shlex.join(["fedmoe", *sys.argv[1:]]),
        "words": list(study.words),
        "shared": study.shared(),
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
