"""Bytes in a Flower message and out of it: one array of bytes, which Flower sends in pieces and never unpickles."""

from __future__ import annotations

from typing import Any

from flwr.app import Array, ArrayRecord, RecordDict

RECORD, ARRAY = "fedmoe", "bytes"


def packed(data: bytes) -> Any:
    """Return the content of a message."""
    return RecordDict({RECORD: ArrayRecord({ARRAY: Array("uint8", (len(data),), "fedmoe", data)})})


def unpacked(content: Any) -> bytes:
    """Return the bytes in a message's content.

    Raises:
        ValueError: it holds something else.
    """
    try:
        data = content[RECORD][ARRAY].data
    except Exception:  # what came may be anything, and raise anything
        raise ValueError("a message holds no bytes of fedmoe's") from None
    if type(data) is not bytes:
        raise ValueError(f"a message holds a {type(data).__name__}, not bytes")
    return data
