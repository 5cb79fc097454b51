"""Named fields, from whatever file they come, checked and made a corpus."""

from __future__ import annotations

from collections.abc import Iterable

from fedmoe_core.data.conversations import Conversation, read_turns, text_of, whole
from fedmoe_core.data.corpus import Corpus, cut, make_corpus

Record = dict[str, object]
OPTIONAL = ("label", "client", "domain", "messages")  # each on all records or on none


def corpus_of(source: str, records: Iterable[tuple[str, Record]], *, digest: str) -> Corpus:
    """Make a corpus of records with ``text``, or ``messages`` (see ``read_turns``), and ``OPTIONAL`` fields.

    With labels each record is one row; without, a text is a document that is cut into pieces, and a conversation is one
    piece.

    Args:
        source: as ``Corpus.source``.
        records: each with where it stands, such as ``notes.jsonl line 3``.
        digest: as ``Corpus.sha256``.

    Raises:
        ValueError: no record, an empty text or a field that some records lack; the message says where.
    """
    known: set[str] | None = None
    texts: list[str] = []
    labels: list[str] = []
    domains: list[str] = []
    conversations: list[Conversation] = []
    for where, record in records:
        has = {field for field in OPTIONAL if field in record}
        known = has if known is None else known
        if strange := [field for field in OPTIONAL if field in has ^ known]:
            raise ValueError(f"{where}: {strange[0]!r} is on some lines only; give it to all lines or to none")
        if "messages" in has:
            if clash := [field for field in ("text", "label") if field in record]:
                raise ValueError(f"{where} has both 'messages' and {clash[0]!r}; give one of them")
            conversations.append(read_turns(record["messages"], where))
            pieces = [text_of(conversations[-1])]
        else:
            text = _text(record, where)
            pieces = [text] if "label" in has else cut(text)
        group = next((field for field in ("client", "domain") if field in has), None)
        texts += pieces
        domains += [_name(record, group, where) if group else "all"] * len(pieces)
        if "label" in has:
            labels.append(_name(record, "label", where))
    if known is None:
        raise ValueError(f"{source.partition(':')[2]} holds no line; give one JSON object per line, each with a text")
    return make_corpus(
        source,
        texts,
        domains=domains,
        labels=labels or None,
        digest=digest,
        conversations=tuple(conversations) or None,
    )


def _text(record: Record, where: str) -> str:
    text = record.get("text")
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{where}: 'text' is missing, empty or not a string; fill it or drop the line")
    return whole(text)


def _name(record: Record, field: str, where: str) -> str:
    """A label, client or domain as a string."""
    value = record[field]
    if isinstance(value, bool) or not isinstance(value, str | int) or not str(value).strip():
        raise ValueError(f"{where}: {field!r} must be a non-empty string or a whole number, not {value!r}")
    return str(value).strip()
