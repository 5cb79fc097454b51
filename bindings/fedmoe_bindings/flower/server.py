"""The ServerApp: rounds, log, checkpoint and resume are fedmoe's, and Flower carries the bytes.

Settings of the app (``[tool.flwr.app.config]``): ``config`` names the run's TOML on the server, ``wait`` the seconds
until all clients must have come, ``resume`` goes on with the run in ``out``.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flwr.app import Message
from flwr.serverapp import ServerApp

from fedmoe_bindings.flower.envelope import packed, unpacked
from fedmoe_core.config.run_config import Config
from fedmoe_core.simulation.remote.exchange import FailedReply, Kind
from fedmoe_core.simulation.remote.federation import found_remote
from fedmoe_core.simulation.run import resume, run

LOOK_AGAIN = 0.1  # seconds between two looks for replies; Flower's own send_and_receive takes 3
WAIT = 600.0  # seconds for clients to come, where the app does not say


@dataclass(frozen=True)
class GridExchange:
    """``Exchange`` over a Flower ``Grid``; an address is a node's id, which is random and used for nothing else."""

    grid: Any

    def addresses(self) -> list[int]:
        """Return the nodes that are connected now."""
        return list(self.grid.get_node_ids())

    def send(
        self, kind: Kind, messages: Iterable[tuple[int, bytes]], seconds: float
    ) -> Iterator[tuple[int, bytes | FailedReply]]:
        """Send one message to each node; yield replies as they come, and end after ``seconds``.

        Messages go and come one by one, so that a node which is gone or sends nonsense is a failure of its own.
        """
        until, waiting = time.monotonic() + seconds, dict[str, int]()
        for address, data in messages:
            if number := self._push(Message(packed(data), address, kind, ttl=seconds)):
                waiting[number] = address
            else:
                yield address, FailedReply("Flower could not send it its message")
        while waiting and time.monotonic() < until:
            for number in list(waiting):
                if (reply := self._reply(number)) is not None:
                    yield waiting.pop(number), reply
            if waiting:
                time.sleep(max(0.0, min(LOOK_AGAIN, until - time.monotonic())))

    def _push(self, message: Any) -> str:
        """Send a message; its number, empty where Flower could not take it."""
        try:
            found = list(self.grid.push_messages([message]))
        except Exception:  # Flower and its network raise of many kinds; a message that is lost costs one client a round
            return ""
        return found[0] if found and found[0] else ""

    def _reply(self, number: str) -> bytes | FailedReply | None:
        """The reply to a message, None while there is none."""
        try:
            replies = list(self.grid.pull_messages([number]))
        except Exception as error:  # an object that cannot be rebuilt, from a decoder of whatever kind
            return FailedReply(f"sent what Flower cannot read ({type(error).__name__})")
        if not replies:
            return None
        if replies[0].has_error():
            return FailedReply(f"its app failed ({' '.join(str(replies[0].error.reason).split())})"[:300])
        try:
            return unpacked(replies[0].content)
        except ValueError as error:
            return FailedReply(str(error))


def main(grid: Any, context: Any) -> None:
    """Run or resume what the app's settings name.

    Raises:
        ValueError, OSError: as ``simulate.run``.
    """
    settings = context.run_config
    if not settings.get("config"):
        raise ValueError('the app names no configuration; add config = "/path/run.toml" to its settings')
    config = Config.load(Path(settings["config"]))
    founder = found_remote(GridExchange(grid), wait=float(settings.get("wait", WAIT)))
    if settings.get("resume", False):
        resume(Path(config.out), founder=founder)
    else:
        run(config, force=bool(settings.get("force", False)), founder=founder)


app = ServerApp()
app.main()(main)
