"""Named moments of a run, each a call into fedmoe: a process that asks for one is killed there, by itself, with -9."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedmoe_core.server.accumulator import Accumulator
from fedmoe_core.simulation import round as rounds
from fedmoe_core.simulation import run as simulate
from fedmoe_core.simulation.directory import checkpoint, log, prefix_log
from fedmoe_core.simulation.worlds.moe import MoEWorld
from fedmoe_core.simulation.worlds.plain import PlainWorld

Test = Callable[..., bool]


@dataclass(frozen=True)
class Phase:
    """A moment: before, in the middle of or after a call that a test picks by its arguments.

    Attributes:
        name: in words.
        owner, call: where the called function is looked up.
        when: "before" or "after" the call.
        picks: whether a call counts, by its arguments.
        nth: which of those that count.
        everywhere: whether every rank makes the call, or rank 0 alone.
    """

    name: str
    owner: Any
    call: str
    when: str = "before"
    picks: Test = lambda *given: True
    nth: int = 1
    everywhere: bool = False

    def arm(self) -> None:
        """Let this process die at this moment. For a process that ends by it: what was patched is not put back."""
        real, count = getattr(self.owner, self.call), 0

        def deadly(*given: Any, **named: Any) -> Any:
            nonlocal count
            hit = self.picks(*given)
            count += hit
            last = hit and count == self.nth
            if last and self.when == "before":
                die()
            found = real(*given, **named)
            if last:
                die()
            return found

        setattr(self.owner, self.call, deadly)


def die() -> None:
    """End this process as the system does when memory runs out."""
    os.kill(os.getpid(), signal.SIGKILL)


def _named(part: str) -> Test:
    return lambda *given: any(isinstance(each, Path) and part in each.name for each in given)


def _log(name: str) -> Test:
    return lambda *given: given[0].path.name == name


@dataclass(frozen=True)
class HalfALine(Phase):
    """The moment at which half of what a log gets is on disk."""

    def arm(self) -> None:
        """Let this process die in the middle of the writing."""
        count = 0

        def half(descriptor: int, data: bytes, offset: int) -> None:
            nonlocal count
            count += 1
            os.pwrite(descriptor, data[: len(data) // 2] if count == self.nth else data, offset)
            if count == self.nth:
                die()

        setattr(self.owner, self.call, half)


@dataclass(frozen=True)
class HalfATensorFile(Phase):
    """The moment at which safetensors has written half of a file, under a name of its own beside the one given."""

    def arm(self) -> None:
        """Let this process die in the middle of the writing."""
        real, count = getattr(self.owner, self.call), 0

        def half(tensors: Any, path: Path, *given: Any, **named: Any) -> None:
            nonlocal count
            count += 1
            if count == self.nth:
                (path.parent / ".tmpAb3dEf").write_bytes(b"half")
                die()
            real(tensors, path, *given, **named)

        setattr(self.owner, self.call, half)


SECOND = 3  # calls of a save: before the first round, after it, and this one, which is after the second
WORLDS = (PlainWorld, MoEWorld)
PHASES = (
    *(Phase("before an evaluation", world, "evaluate", nth=2, everywhere=True) for world in WORLDS),
    *(Phase("after an evaluation", world, "evaluate", "after", nth=2, everywhere=True) for world in WORLDS),
    *(Phase("before training a round", world, "training", nth=2, everywhere=True) for world in WORLDS),
    Phase("before an update is summed", Accumulator, "add", nth=3, everywhere=True),
    Phase("after an update is summed", Accumulator, "add", "after", nth=3, everywhere=True),
    Phase("before ranks' sums meet", rounds, "settle", nth=2, everywhere=True),
    Phase("after ranks' sums met", rounds, "settle", "after", nth=2, everywhere=True),
    Phase("before the ledger's lines", prefix_log.PrefixLog, "append", picks=_log("ledger.jsonl"), nth=2),
    HalfALine("in the ledger's lines", prefix_log, "_write_all", nth=4),
    Phase("between ledger and metrics", prefix_log.PrefixLog, "append", "after", picks=_log("ledger.jsonl"), nth=2),
    HalfALine("in the metrics' lines", prefix_log, "_write_all", nth=5),
    Phase("between metrics and checkpoint", prefix_log.PrefixLog, "append", "after", _log("metrics.jsonl"), nth=3),
    Phase("before the tensor file", checkpoint, "save_file", nth=SECOND),
    HalfATensorFile("in the tensor file", checkpoint, "save_file", nth=SECOND),
    Phase("after the tensor file", checkpoint, "save_file", "after", nth=SECOND),
    Phase("before the tensor file has its name", os, "replace", picks=_named("tensors"), nth=SECOND),
    Phase("after the tensor file has its name", os, "replace", "after", _named("tensors"), nth=SECOND),
    Phase("before the checkpoint counts", os, "replace", picks=_named("checkpoint.json"), nth=SECOND),
    Phase("after the checkpoint counts", os, "replace", "after", _named("checkpoint.json"), nth=SECOND),
    Phase("before old tensors go", checkpoint, "_sweep", nth=SECOND),
    Phase("after old tensors went", checkpoint, "_sweep", "after", nth=SECOND),
    Phase("before the first checkpoint", checkpoint, "save_file"),
    Phase("before the configuration", log, "write_whole", picks=_named("config.toml")),
    Phase("before the marker has its name", Path, "replace", picks=_named("fedmoe-run.json")),
    Phase("before the configuration has its name", Path, "replace", picks=_named("config.toml")),
    Phase("between configuration and partition", log, "write_whole", "after", _named("config.toml")),
    Phase("after the partition", log, "write_whole", "after", _named("partition.json")),
    Phase("before the summary", log, "write_json", picks=_named("summary.json")),
    Phase("before the summary has its name", Path, "replace", picks=_named("summary.json")),
    Phase("after the summary", log, "write_json", "after", picks=_named("summary.json")),
    Phase("before the checkpoint is read", simulate, "load_checkpoint"),
    Phase("after the checkpoint was read", simulate, "load_checkpoint", "after"),
    Phase("before the logs are cut", prefix_log.PrefixLog, "reopen", picks=_named("metrics.jsonl")),
    Phase("between cutting the logs", prefix_log.PrefixLog, "reopen", "after", _named("metrics.jsonl")),
)
OF_A_RESUME = frozenset(phase.name for phase in PHASES[-4:])


def arm(name: str) -> None:
    """Arm every phase of this name; of those of two worlds the run meets one."""
    for phase in PHASES:
        if phase.name == name:
            phase.arm()
