"""A sink is an observer that keeps a run's curves somewhere; it is found by its name and made from a configuration."""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points

from fedmoe_core.base.wording import unknown
from fedmoe_core.config.run_config import Config
from fedmoe_core.simulation.observer import Observer

ENTRY_POINTS = "fedmoe.sinks"  # the group in which a package names its sinks, each as MODULE:CLASS
OURS = "fedmoe-core"  # whose sinks come with an extra of their name


class Sink(Observer):
    """An observer of one run, made before it starts, on rank 0; it is told of the start, of every round and of the end.

    ``on_start`` gets, besides what every observer does, ``run`` (the run's id, which a resumed run keeps) and
    ``resumed``. All calls but the first, which makes it, come from one thread that is not the run's. A sink makes no
    torch tensors: they would count in the peak of the client that trains meanwhile.

    Args:
        config: of the run, resolved.
    """

    def __init__(self, config: Config) -> None:
        self.config = config

    def last_told(self, first_round: int) -> int:
        """Return the last round of a resumed run that this sink still has; it is told those after it again.

        Args:
            first_round: the last round that the run has on record, which is what a sink has unless it knows better.
        """
        return first_round


def find_sinks(config: Config) -> dict[str, Sink]:
    """Make the sinks that ``watch.sinks`` names, by name.

    Raises:
        ValueError: a name that no package has, or a sink whose package is missing or does not load.
    """
    names = list(dict.fromkeys(filter(None, (name.strip() for name in config.watch.sinks.split(",")))))
    entries = {entry.name: entry for entry in entry_points(group=ENTRY_POINTS)} if names else {}
    for name in names:
        if name not in entries:
            raise unknown(f"watch.sinks={name!r}", name, sorted(entries))
    return {name: _made(entries[name], config) for name in names}


def _made(entry: EntryPoint, config: Config) -> Sink:
    ours = entry.dist is not None and entry.dist.name == OURS
    try:
        sink: Sink = entry.load()(config)
    except ImportError as error:
        remedy = f"pip install '{OURS}[{entry.name}]'" if ours else "install its package again"
        raise ValueError(f"watch.sinks={entry.name} cannot be loaded ({error}); {remedy}, or leave it out") from error
    except Exception as error:
        raise ValueError(f"watch.sinks={entry.name} cannot be made ({error}); mend that, or leave it out") from error
    return sink
