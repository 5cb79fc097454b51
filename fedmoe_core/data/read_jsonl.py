"""Text and its facts, read from a JSON Lines file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

from fedmoe_core.data.corpus import Corpus, decode, read_bytes
from fedmoe_core.data.records import Record, corpus_of


def read_jsonl(path: Path) -> Corpus:
    """Read one JSON object per line: ``text`` or ``messages``, and on every line or on none ``label``, ``client``, ...

    Raises:
        ValueError: a broken line, an empty text or a field that some lines lack; the message names the line.
        OSError: the file cannot be read.
    """
    raw = read_bytes(path)
    return corpus_of(f"jsonl:{path}", _jsonl_records(decode(raw, path), path), digest=sha256(raw).hexdigest())


def _jsonl_records(raw: str, path: Path) -> Iterator[tuple[str, Record]]:
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
        yield f"{path} line {line}", record
