"""The ClientApp: a message becomes bytes, a device of fedmoe's answers them, and the answer goes back."""

from __future__ import annotations

from typing import Any

from flwr.app import Message
from flwr.clientapp import ClientApp

from fedmoe_bindings.flower.envelope import packed, unpacked
from fedmoe_core.simulation.remote.node import greeted, worked
from fedmoe_core.simulation.remote.words import Words


def query(message: Any, context: Any) -> Any:
    """Answer a greeting by what this device is and has; its words are those of ``--node-config``."""
    _, description = greeted(Words.of(context.node_config), unpacked(message.content))
    return Message(packed(description), reply_to=message)


def train(message: Any, context: Any) -> Any:
    """Answer a task. Flower starts a process for each message, so model and data are read again."""
    answer = worked(Words.of(context.node_config), unpacked(message.content))
    return Message(packed(answer), reply_to=message)


app = ClientApp()
app.query()(query)
app.train()(train)
