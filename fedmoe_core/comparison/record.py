"""The finished runs of an earlier comparison, read back from its ``compare.json``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedmoe_core.comparison.run_figures import RunFigures
from fedmoe_core.simulation.identity import Identity


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
    measured: Mapping[str, tuple[RunFigures, ...]]

    @classmethod
    def read(cls, path: Path) -> Earlier:
        """Read the record at ``path``.

        Raises:
            ValueError: it was not written by a comparison of this version.
            OSError: it cannot be read.
        """
        try:
            record = json.loads(path.read_text("utf-8"))
            measured = {label: tuple(map(RunFigures.of, runs)) for label, runs in record["runs"].items()}
            systems = {label: tuple(words) for label, words in record["systems"].items()}
            identity = Identity.read(record["identity"])
            if identity is None:
                raise ValueError("it does not say which data and model its runs were made from")
            return cls(path, record["threads"], identity, record["shared"], systems, measured)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{path} was not written by this version of fedmoe ({error}); run the comparison again"
            ) from error
