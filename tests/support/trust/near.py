"""Devices in this process, reached as real ones are: by bytes alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from fedmoe_core.simulation.remote.exchange import FailedReply, Kind
from fedmoe_core.simulation.remote.node import Node, greeted, worked
from fedmoe_core.simulation.remote.words import Words

Spoil = Callable[[int, int, bytes], Any]  # client, how many tasks it has had, its answer -> what arrives; None: nothing


class Near:
    """An ``Exchange`` over devices in this process, at addresses that say nothing.

    Attributes:
        sent: kind and size of every message, in order.
    """

    def __init__(self, *words: Words, spoil: Spoil = lambda client, turn, answer: answer) -> None:
        self.devices = {(7919 * (number + 3)) % 10007: each for number, each in enumerate(words)}
        self.nodes: dict[int, Node | None] = {}
        self.turns: dict[int, int] = {}
        self.spoil = spoil
        self.sent: list[tuple[Kind, int]] = []

    def addresses(self) -> list[int]:
        return list(self.devices)

    def send(
        self, kind: Kind, messages: Iterable[tuple[int, bytes]], seconds: float
    ) -> Iterator[tuple[int, bytes | FailedReply]]:
        for address, message in sorted(messages, reverse=True):
            self.sent.append((kind, len(message)))
            words = self.devices[address]
            if kind == "query":
                self.nodes[address], reply = greeted(words, message)
                yield address, reply
                continue
            turn = self.turns[address] = self.turns.get(address, 0) + 1
            reply = self.spoil(words.client, turn, worked(words, message, self.nodes[address]))
            if reply is not None:
                yield address, reply
