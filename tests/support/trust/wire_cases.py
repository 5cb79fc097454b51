"""Hostile answers as bytes, generated from a good one: none of them may be accepted.

What a client may well send (another cost, another loss, other weights inside the bounds) is left out.
"""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Callable, Iterator
from hashlib import sha256
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

Case = tuple[str, bytes]
STRANGE: dict[str, Any] = {
    "null": None,
    "true": True,
    "list": [1],
    "object": {"a": 1},
    "text": "\x00",
    "huge": 1 << 70,
    "negative": -1,
    "fraction": 0.5,
    "number as text": "1",
    "deep": json.loads("[" * 200 + "]" * 200),
}


class Run:
    """Does something when it is read by pickle."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (exec, ("raise SystemExit('a pickle was read')",))


def sealed(body: bytes) -> bytes:
    """With the checksum that belongs to it: what is wrong then is inside."""
    return sha256(body).digest() + body


def taken_apart(good: bytes) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The head and the tensors of a good answer."""
    body = good[32:]
    length = int.from_bytes(body[:8], "little")
    head = json.loads(json.loads(body[8 : 8 + length])["__metadata__"]["fedmoe"])
    return head, safetensors.torch.load(body)


def put_together(head: Any, tensors: dict[str, Tensor], *, version: str = "1") -> bytes:
    text = head if isinstance(head, str) else json.dumps(head)
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    return sealed(safetensors.torch.save(whole, metadata={"fedmoe": text, "version": version}))


def cases(good: bytes, seed: int) -> Iterator[Case]:
    """Every hostile answer that comes of a good one."""
    head, tensors = taken_apart(good)
    yield from damaged(good, np.random.default_rng(seed))
    yield from headers(good)
    yield from heads(head, tensors)
    yield from tampered(head, tensors)


def one_number(tensor: Tensor, value: float) -> Tensor:
    changed = tensor.clone()
    changed.view(-1)[0] = value
    return changed


def measured(head: dict[str, Any], tensors: dict[str, Tensor]) -> Iterator[Case]:
    """What was measured or kept: left out, of another form, and numbers that cannot be."""
    ours = [name for name in tensors if name.partition("/")[0] in ("probed", "kept")]
    for name in ours:
        for kind, value in (("below zero", -0.5), ("1e31", 1e31), ("-1e31", -1e31), ("NaN at one place", float("nan"))):
            if kind != "below zero" or name.startswith("probed"):
                yield f"{name} {kind}", put_together(head, {**tensors, name: one_number(tensors[name], value)})
        yield f"{name} in float32 or float64", put_together(head, {**tensors, name: _other_width(tensors[name])})
        other = "kept" if name.startswith("probed") else "probed"
        moved = {key: tensor for key, tensor in tensors.items() if key != name}
        yield f"{name} under {other}", put_together(head, {**moved, f"{other}/{name.split('/')[1]}": tensors[name]})
        yield f"{name} among the changes", put_together(head, {**moved, f"delta/{name.split('/')[1]}": tensors[name]})
    for part in ("probed", "kept"):
        if any(name.startswith(part) for name in ours):
            left = {key: tensor for key, tensor in tensors.items() if not key.startswith(part)}
            yield f"nothing {part}", put_together(head, left)
            yield f"a {part} of nothing", put_together(head, {**tensors, f"{part}/": torch.zeros(0)})


def claiming(good: bytes, value: float) -> bytes:
    """A good answer whose measurements are all ``value``, or as near to it as its plan allows: a client may say so."""
    head, tensors = taken_apart(good)
    for name, tensor in tensors.items():
        if name.startswith("probed"):
            tensors[name] = torch.full_like(tensor, min(value, 1.0) if name.endswith(("freq", "probe")) else value)
        elif name.startswith(("profile", "validation_profile")) and value == 0 and not name.endswith("held_LE"):
            tensors[name] = torch.zeros_like(tensor)
    if head["validation"]:
        head["validation"]["loss_sum"] = -1e308 if value else 1e308
    return put_together(head, tensors)


def _other_width(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype == torch.float64 else tensor.double()


def damaged(good: bytes, rng: np.random.Generator) -> Iterator[Case]:
    """Cut short, flipped, random, pickled."""
    body = good[32:]
    lengths = {
        *range(48),
        *(1 << power for power in range(6, 24)),
        *(len(good) - back for back in (1, 2, 7, 8, 9, 100)),
    }
    for length in sorted(length for length in lengths if length < len(good)):
        yield f"cut to {length}", good[:length]
        yield f"cut to {length} and sealed", sealed(body[:length]) if length < len(body) else good[:-1]
    yield "with a byte more", good + b"\0"
    yield "with a byte more, sealed", sealed(body + b"\0")
    for place in rng.integers(0, len(good) * 8, size=150):
        flipped = bytearray(good)
        flipped[place // 8] ^= 1 << (place % 8)
        yield f"bit {place} flipped", bytes(flipped)
    for size in rng.integers(0, 5000, size=60):
        noise = rng.bytes(int(size))
        yield f"{size} random bytes", noise
        yield f"{size} random bytes, sealed", sealed(noise)
    saved = io.BytesIO()
    torch.save({"delta/moe.0.w_in": torch.zeros(2)}, saved)
    for name, data in (("a pickle", pickle.dumps(Run())), ("torch.save", saved.getvalue())):
        yield name, data
        yield f"{name}, sealed", sealed(data)
        yield f"{name} behind a header's length", sealed(len(data).to_bytes(8, "little") + data)


def headers(good: bytes) -> Iterator[Case]:
    """Headers that lie about lengths, names and places."""
    body = good[32:]
    length = int.from_bytes(body[:8], "little")
    text, data = body[8 : 8 + length], body[8 + length :]
    for power in range(64):
        for lie in ((1 << power) - 1, 1 << power):
            if lie != length:
                yield f"a header of {lie} bytes", sealed(lie.to_bytes(8, "little") + body[8:])

    def with_text(changed: bytes) -> bytes:
        return sealed(len(changed).to_bytes(8, "little") + changed + data)

    names = [name for name in json.loads(text) if name != "__metadata__"]
    for name in names:
        again = json.dumps({name: json.loads(text)[name]})[1:-1].encode()
        yield f"{name} twice", with_text(text.rstrip()[:-1] + b"," + again + b"}")
        for offsets in ([0, 1 << 40], [-1, 4], [4, 0], [0.5, 1], "ab"):
            changed = json.loads(text)
            changed[name]["data_offsets"] = offsets
            yield f"{name} at {offsets}", with_text(json.dumps(changed).encode())
        for shape in ([1 << 62, 4], [-1], [], "a", [[1]]):
            changed = json.loads(text)
            changed[name]["shape"] = shape
            yield f"{name} of shape {shape}", with_text(json.dumps(changed).encode())
    for name, changed in (
        ("no metadata", json.dumps({name: json.loads(text)[name] for name in names}).encode()),
        ("a list", b"[]"),
        ("deep", b"[" * 100_000),
        ("not unicode", b"\xff" * 64),
        ("metadata twice", text.rstrip()[:-1] + b',"__metadata__":{}}'),
    ):
        yield f"header: {name}", with_text(changed)


def heads(head: dict[str, Any], tensors: dict[str, Tensor]) -> Iterator[Case]:
    """Heads with a field of another type, missing, unknown, or for somebody else."""
    for field in head:
        if field != "validation":
            yield f"{field} missing", put_together({key: value for key, value in head.items() if key != field}, tensors)
        for kind, value in STRANGE.items():
            if field == "validation" and value is None:
                continue
            if (field == "error" and isinstance(value, str)) or (field == "losses" and kind == "list"):
                continue
            yield f"{field} is {kind}", put_together({**head, field: value}, tensors)
    for field in head["cost"]:
        for kind, value in STRANGE.items():
            if field in ("flops", "seconds") and kind in ("fraction", "huge"):
                continue
            yield f"cost.{field} is {kind}", put_together({**head, "cost": {**head["cost"], field: value}}, tensors)
    for field, value in (("client", head["client"] + 1), ("round", head["round"] + 1), ("plan_id", "0" * 16)):
        yield f"another {field}", put_together({**head, field: value}, tensors)
    yield "another run", put_together({**head, "session": "f" * 32}, tensors)
    yield "an unknown field", put_together({**head, "extra": 1}, tensors)
    yield "a loss that is no number", put_together(json.dumps({**head, "losses": [float("nan")]}), tensors)
    yield (
        "a loss too large for JSON",
        put_together(json.dumps(head).replace('"losses": [', '"losses": [1e999, '), tensors),
    )
    yield "more steps than asked", put_together({**head, "losses": head["losses"] * 2}, tensors)
    yield "another version", put_together(head, tensors, version="2")
    yield "an empty head", put_together("", tensors)
    yield (
        "a validation that was not asked for",
        put_together({**head, "validation": {"loss_sum": 1.0, "count": 1, "correct": 1}}, tensors),
    )


def tampered(head: dict[str, Any], tensors: dict[str, Tensor]) -> Iterator[Case]:
    """Tensors that are missing, of another form, or with values that no client can have."""
    changes: dict[str, Callable[[Tensor], Tensor]] = {
        "with a dimension more": lambda t: t[None],
        "that would broadcast": lambda t: t[:1] if t.ndim and t.shape[0] > 1 else t.reshape(-1)[:0],
        "flat": lambda t: t.reshape(-1) if t.ndim != 1 else t.reshape(1, -1),
        "longer": lambda t: torch.cat([t, t]) if t.ndim else t.repeat(2),
        "empty": lambda t: t.reshape(-1)[:0],
        "of whole numbers": lambda t: t.to(torch.int64),
        "of complex numbers": lambda t: t.to(torch.complex64),
    }
    values: dict[str, Callable[[Tensor], Tensor]] = {
        "NaN": lambda t: torch.full_like(t, float("nan")),
        "one NaN": lambda t: one_number(t, float("nan")),
        "infinity": lambda t: torch.full_like(t, float("inf")),
        "minus infinity": lambda t: torch.full_like(t, float("-inf")),
        "1e38": lambda t: torch.full_like(t, 1e38),
    }
    for name, tensor in tensors.items():
        if name == "trained/LE":
            continue
        yield f"{name} missing", put_together(head, {key: t for key, t in tensors.items() if key != name})
        yield (
            f"{name} renamed",
            put_together(head, {f"{key}x" if key == name else key: t for key, t in tensors.items()}),
        )
        fitting = changes | (values if tensor.is_floating_point() else {})
        for kind, change in fitting.items():
            yield f"{name} {kind}", put_together(head, {**tensors, name: change(tensor)})
    for name in (
        "delta/dense.model.embed_tokens.weight",
        "delta/moe.9.w_in",
        "delta/",
        "other/x",
        "x",
        "kept/moe.0.w_in",
    ):
        yield f"{name} beside", put_together(head, {**tensors, name: torch.zeros(2, 2)})
    yield "measurements that were not asked for", put_together(head, {**tensors, "probed/x": torch.zeros(1)})
    yield "past the bound", put_together(head, {**tensors, "delta/moe.0.x": torch.zeros(8 << 20, dtype=torch.uint8)})
    everywhere = torch.ones_like(tensors["trained/LE"])
    if not tensors["trained/LE"].all():
        yield "learnt everywhere", put_together(head, {**tensors, "trained/LE": everywhere})
