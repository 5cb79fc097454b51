"""Honest clients, but for three answers."""

from __future__ import annotations

import pickle
from typing import Any

from flwr.app import Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fedmoe_bindings.flower import client
from fedmoe_bindings.flower.envelope import packed, unpacked
from fedmoe_core.messages.wire.task import read_task


def train(message: Any, context: Any) -> Any:
    """Client 0 sends numbers in round 1, client 1 raises in round 1 and sends a pickle in round 2; from 0."""
    plan = read_task(unpacked(message.content), largest=1 << 30).plan
    match plan.client, plan.round:
        case 0, 1:
            return Message(RecordDict({"fedmoe": MetricRecord({"bytes": 1.0})}), reply_to=message)
        case 1, 1:
            raise RuntimeError("the disk is full")
        case 1, 2:
            return Message(packed(pickle.dumps(RuntimeError("a pickle"))), reply_to=message)
    return client.train(message, context)


app = ClientApp()
app.query()(client.query)
app.train()(train)
