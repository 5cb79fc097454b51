"""Text and its facts, read from a JSON Lines file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

from fedmoe_core.data.corpus import Corpus, cut, decode, make_corpus, read_bytes


def read_jsonl(path: Path) -> Corpus:
    """Read one JSON object per line: ``text``, and, on every line or on none, ``label`` and ``client`` or ``domain``.

    With labels each line is one row; without, it is a document that is cut into pieces.

    Raises:
        ValueError: a broken line, an empty text or a field that some lines lack; the message names the line.
        OSError: the file cannot be read.
    """
    raw = read_bytes(path)
    records = list(_jsonl_records(decode(raw, path), path))
    if not records:
        raise ValueError(f"{path} holds no line; give one JSON object per line, each with a text")
    fields = {field for field in ("label", "client", "domain") if field in records[0][1]}
    group_field = next((field for field in ("client", "domain") if field in fields), None)
    texts: list[str] = []
    labels: list[str] = []
    domains: list[str] = []
    for line, record in records:
        for field in ("label", "client", "domain"):
            if (field in record) != (field in fields):
                raise ValueError(
                    f"{path} line {line}: {field!r} is on some lines only; give it to all lines or to none"
                )
        text = record.get("text")
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"{path} line {line}: 'text' is missing, empty or not a string; fill it or drop the line")
        # A JSON escape can name half a surrogate pair, which no UTF-8 encoder takes.
        text = text.encode("utf-8", errors="replace").decode("utf-8")
        pieces = [text] if "label" in fields else cut(text)
        texts += pieces
        domains += [_name(record, group_field, path, line) if group_field else "all"] * len(pieces)
        if "label" in fields:
            labels.append(_name(record, "label", path, line))
    digest = sha256(raw).hexdigest()
    return make_corpus(f"jsonl:{path}", texts, domains=domains, labels=labels or None, digest=digest)


def _jsonl_records(raw: str, path: Path) -> Iterator[tuple[int, dict[str, object]]]:
    # Not splitlines(): JSON strings may hold U+2028 and its kin unescaped, which do not end a line here.
    for line, content in enumerate(raw.split("\n"), start=1):
        if not content.strip():
            continue
        try:
            record = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} line {line} is not valid JSON ({error}); repair or drop the line") from None
        if not isinstance(record, dict):
            raise ValueError(f'{path} line {line} is not a JSON object; write {{"text": ...}}')
        yield line, record


def _name(record: dict[str, object], field: str, path: Path, line: int) -> str:
    """A label, client or domain as a string."""
    value = record[field]
    if isinstance(value, bool) or not isinstance(value, str | int) or not str(value).strip():
        raise ValueError(f"{path} line {line}: {field!r} must be a non-empty string or a whole number, not {value!r}")
    return str(value).strip()
