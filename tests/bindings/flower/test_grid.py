"""The Exchange over a Flower grid: one node's trouble is its own, whatever it is."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("flwr")

from flwr.app import ConfigRecord, MetricRecord, RecordDict

from fedmoe_bindings.flower import server
from fedmoe_bindings.flower.envelope import packed, unpacked
from fedmoe_bindings.flower.server import GridExchange
from fedmoe_core.simulation.remote.exchange import FailedReply


class Reply:
    """As much of a reply as the exchange reads."""

    def __init__(self, content: Any, reason: str = "") -> None:
        self.content, self.error = content, self
        self.reason = reason

    def has_error(self) -> bool:
        return bool(self.reason)


class Grid:
    """Nodes 1 to 8, each with a habit of its own."""

    def __init__(self) -> None:
        self.answered: set[str] = set()

    def push_messages(self, messages: list[Any]) -> list[str | None]:
        (message,) = messages
        node = message.metadata.dst_node_id
        assert unpacked(message.content) == b"hello %d" % node
        if node == 2:
            raise ConnectionError("gone")
        return [None] if node == 3 else [f"m{node}"]

    def pull_messages(self, numbers: list[str]) -> list[Reply]:
        (number,) = numbers
        if number == "m8":
            return []  # never answers
        assert number not in self.answered
        self.answered.add(number)
        if number == "m4":
            raise RuntimeError("no such object")
        contents = {
            "m1": packed(b"good"),
            "m6": RecordDict({"fedmoe": MetricRecord({"bytes": 1.0})}),
            "m7": RecordDict({"other": ConfigRecord({"bytes": b"x"})}),
        }
        return [Reply(contents.get(number), "raised\nsomething" if number == "m5" else "")]


def sent(content: Any, node: int, kind: str, *, ttl: float) -> SimpleNamespace:
    """As much of a message as the grid reads; Flower makes its own only within a run."""
    assert (kind, ttl) == ("train", 1.0)
    return SimpleNamespace(content=content, metadata=SimpleNamespace(dst_node_id=node))


def test_each_node_answers_or_fails_by_itself_and_the_time_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "Message", sent)
    messages = [(node, b"hello %d" % node) for node in range(1, 9)]
    found = dict(GridExchange(Grid()).send("train", messages, 1.0))
    assert found.pop(1) == b"good"
    assert all(isinstance(reply, FailedReply) for reply in found.values())
    assert {node: str(reply) for node, reply in found.items()} == {
        2: "Flower could not send it its message",
        3: "Flower could not send it its message",
        4: "sent what Flower cannot read (RuntimeError)",
        5: "its app failed (raised something)",
        6: "a message holds no bytes of fedmoe's",
        7: "a message holds no bytes of fedmoe's",
    }


def test_bytes_come_back_as_they_went() -> None:
    data = bytes(range(256)) * 5
    assert unpacked(packed(data)) == data
