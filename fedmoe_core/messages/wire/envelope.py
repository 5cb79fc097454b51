"""A message as bytes: a checksum, and a safetensors file whose metadata is one JSON object of a known form.

Nothing in it is code, and nothing is believed before it was checked: length, checksum, header, names, types. Tensors of
any dtype travel as they are, bfloat16 too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from hashlib import sha256
from typing import Any, TypeVar

import msgspec
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

VERSION = 1
CHECKSUM = 32  # bytes of sha256, in front
LARGEST_HEADER = 16 << 20  # bytes of names, shapes and the JSON; 150 bytes a tensor are usual
HEAD = "fedmoe"  # the key of the JSON in the metadata
H = TypeVar("H")


class WireError(ValueError):
    """Bytes that are not the message they should be."""


def seal(head: Any, tensors: Mapping[str, Tensor]) -> bytes:
    """Put a head and tensors into bytes.

    Args:
        head: a ``msgspec.Struct`` of numbers, texts and records.
        tensors: of any shape and dtype that safetensors knows; they may share memory.
    """
    text = msgspec.json.encode(head, enc_hook=lambda number: number.item()).decode()  # numpy's numbers
    own = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    body = safetensors.torch.save(own, metadata={HEAD: text, "version": str(VERSION)})
    return sha256(body).digest() + body


def unseal(data: bytes, kind: type[H], *, largest: int) -> tuple[H, dict[str, Tensor]]:
    """Read what ``seal`` wrote.

    Args:
        data: bytes from anywhere.
        kind: the head's class; unknown and missing fields and values of other types are refused.
        largest: bytes that such a message may have.

    Raises:
        WireError: too long, damaged, cut short, of another version or form; one sentence.
    """
    if type(data) is not bytes:
        raise WireError(f"a message is a {type(data).__name__}, not bytes")
    if len(data) > largest:
        raise WireError(f"a message has {len(data)} bytes, and {largest} are the most that it may have")
    body = data[CHECKSUM:]
    if len(body) < 8 or sha256(body).digest() != data[:CHECKSUM]:
        raise WireError("a message is damaged or cut short: it does not match its checksum")
    length = int.from_bytes(body[:8], "little")
    if length > min(LARGEST_HEADER, len(body) - 8):
        raise WireError(f"a message has a header of {length} bytes, more than there may be")
    text = _head_of(body[8 : 8 + length])
    try:
        tensors = safetensors.torch.load(body)
    except (SafetensorError, ValueError, KeyError, RuntimeError, TypeError) as error:
        raise WireError(f"a message holds no tensors that can be read ({error!s:.80})") from None
    try:
        head = msgspec.json.decode(text, type=kind, strict=True)
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise WireError(f"a message has a head of another form ({error!s:.80})") from None
    return head, tensors


def _head_of(header: bytes) -> str:
    """The JSON in the metadata of a safetensors header."""
    try:
        found = json.loads(header, object_pairs_hook=_once)
        metadata = found["__metadata__"]
        version, text = metadata["version"], metadata[HEAD]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise WireError(f"a message has no head of fedmoe's ({type(error).__name__})") from None
    if version != str(VERSION):
        raise WireError(f"a message has version {version!r:.20}, and this fedmoe reads {VERSION}; use one version")
    if type(text) is not str:
        raise WireError("a message has no head of fedmoe's")
    return text


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name twice")
    return found


def by_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors whose name begins with ``prefix/``, without it."""
    return {name.removeprefix(f"{prefix}/"): t for name, t in tensors.items() if name.startswith(f"{prefix}/")}


def with_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors under ``prefix/NAME``."""
    return {f"{prefix}/{name}": tensor for name, tensor in tensors.items()}


def array_of(tensors: Mapping[str, Tensor], name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Any:
    """Return a table of numbers as numpy has it.

    Raises:
        WireError: it is missing, or of another dtype or shape.
    """
    tensor = tensors.get(name)
    if tensor is None or tensor.dtype != dtype or tuple(tensor.shape) != shape:
        what = "missing" if tensor is None else f"{tensor.dtype} {tuple(tensor.shape)}"
        raise WireError(f"{name} is {what}, not {dtype} {shape}")
    return tensor.numpy().copy()
