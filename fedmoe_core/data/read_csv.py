"""Classification rows from a CSV file: find the columns, undo the escapes that old corpora carry."""

from __future__ import annotations

import csv
import html
import io
import re
from hashlib import sha256
from pathlib import Path

from fedmoe_core.data.corpus import Corpus, decode, make_corpus, read_bytes

LABEL_COLUMNS = ("label", "class", "class index", "class_index", "category", "target")
GROUP_COLUMNS = ("client", "domain")
IGNORED_COLUMNS = ("", "id", "index")

_APOSTROPHE = re.compile(r" ?&?#(?:39|146);(?=(?:s|t|d|m|re|ve|ll)\b|\W|$)")
_LOST_AMPERSAND = re.compile(r"(?<!&)(#\d{2,5};|\b(?:quot|amp|lt|gt|nbsp|apos);)")
_TAG = re.compile(r"</?(?:a|b|i|p|br|em|font|img|span|strong)(?=[\s/>])[^<>]*>", re.IGNORECASE)


def clean(text: str) -> str:
    r"""Turn a web-harvested field into plain text.

    AG News writes line breaks as a lone backslash and has lost the ampersand of many entities: ``doesn #39;t``,
    `` #36;10``, ``quot;``. Entities become characters, backslashes spaces (``\$`` becomes ``$``), the commonest HTML
    tags and runs of blanks one space; tickers such as ``<TXN.N>`` stay.
    """
    text = _APOSTROPHE.sub("'", text)
    text = html.unescape(_LOST_AMPERSAND.sub(r"&\1", html.unescape(text)))
    text = text.replace("\\$", "$").replace("\\", " ")
    text = text.encode("utf-8", errors="replace").decode("utf-8")
    return " ".join(_TAG.sub(" ", text).split())


def read_csv(path: Path) -> Corpus:
    """Read the label, then one or more text columns, which are joined by a blank; quoting as in RFC 4180.

    A first line that holds one of LABEL_COLUMNS is a header: the label may then stand anywhere, and a ``client`` or
    ``domain`` column names the row's domain. When ``<stem>_classes.txt`` lies next to the file and the labels are 1..n,
    its n lines name the classes.

    Raises:
        ValueError: no text column, a row of another width, an empty text or label, one class, not UTF-8, not CSV.
        OSError: the file cannot be read.
    """
    raw = read_bytes(path)
    rows = _rows(decode(raw, path), path)
    header = [cell.strip().casefold() for cell in rows[0][1]] if rows else []
    label_at, group_at = 0, None
    ignored: set[int] = set()
    if any(cell in LABEL_COLUMNS for cell in header):
        label_at = next(index for index, cell in enumerate(header) if cell in LABEL_COLUMNS)
        group_at = next((index for index, cell in enumerate(header) if cell in GROUP_COLUMNS), None)
        ignored = {index for index, cell in enumerate(header) if cell in IGNORED_COLUMNS}
        rows = rows[1:]
    if not rows:
        raise ValueError(f"{path} holds no row; give one row a text, its label first")
    width = len(header)
    text_at = [index for index in range(width) if index not in {label_at, group_at, *ignored}]
    if not text_at:
        raise ValueError(f"{path} has a label column but no text column; write the label first, then the text")
    texts, labels, domains = [], [], []
    for line, row in rows:
        if len(row) != width:
            raise ValueError(f"{path} line {line} has {len(row)} columns where line 1 has {width}; repair the row")
        text = clean(" ".join(row[index] for index in text_at))
        if not text:
            raise ValueError(f"{path} line {line} has an empty text; fill it or drop the row")
        texts.append(text)
        labels.append(_filled(row[label_at], "label", path, line))
        domains.append("all" if group_at is None else _filled(row[group_at], header[group_at], path, line))
    class_names = _class_names(path, set(labels))
    if class_names:
        labels = [class_names[int(label) - 1] for label in labels]
    digest = sha256(raw).hexdigest()
    return make_corpus(f"csv:{path}", texts, domains=domains, labels=labels, digest=digest, class_names=class_names)


def _rows(text: str, path: Path) -> list[tuple[int, list[str]]]:
    """Non-blank rows with the number of the line each begins on."""
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    rows: list[tuple[int, list[str]]] = []
    begin = 1
    try:
        for row in reader:
            if row:
                rows.append((begin, row))
            begin = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(f"{path} line {reader.line_num} is not valid CSV ({error}); repair the row") from None
    return rows


def _filled(cell: str, column: str, path: Path, line: int) -> str:
    if not cell.strip():
        raise ValueError(f"{path} line {line} has an empty {column}; fill it or drop the row")
    return cell.strip()


def _class_names(path: Path, labels: set[str]) -> tuple[str, ...]:
    """The lines of ``<stem>_classes.txt`` where that file exists and the labels are its line numbers; else empty."""
    beside = path.with_name(f"{path.stem}_classes.txt")
    if not beside.is_file():
        return ()
    names = tuple(name.strip() for name in decode(read_bytes(beside), beside).splitlines() if name.strip())
    fits = len(set(names)) == len(names) and labels <= {str(number) for number in range(1, len(names) + 1)}
    return names if fits else ()
