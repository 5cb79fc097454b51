"""Text and its facts, read from one parquet file or from all of a folder."""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

from fedmoe_core.data.corpus import Corpus, entry_of, read_bytes
from fedmoe_core.data.read_folder import files_below
from fedmoe_core.data.records import OPTIONAL, Record, corpus_of

COLUMNS = ("text", *OPTIONAL)
EXTRA = "pip install 'fedmoe-core[data]'"


def read_parquet(path: Path) -> Corpus:
    """Read the columns that a JSON Lines file has as fields; other columns are passed over.

    Of a folder all ``.parquet`` files below it are read, in the sorted order of their folders and names.

    Raises:
        ValueError: pyarrow is absent, a file is not parquet, or its rows cannot be used; the message names the row.
        OSError: a file cannot be read.
    """
    try:
        import pyarrow
    except ModuleNotFoundError:
        raise ValueError(f"data=parquet:{path} needs pyarrow, which is not installed; {EXTRA}") from None
    files = [(inside, read_bytes(path / inside)) for inside in _files(path)]

    def rows() -> Iterator[tuple[str, Record]]:
        from pyarrow import parquet

        for inside, raw in files:
            try:
                table = parquet.ParquetFile(pyarrow.BufferReader(raw))
                columns = [name for name in COLUMNS if name in table.schema_arrow.names]
                found = [row for batch in table.iter_batches(columns=columns) for row in batch.to_pylist()]
            except (pyarrow.ArrowException, OSError) as error:
                raise ValueError(
                    f"{path / inside} is not a whole parquet file ({error!s:.80}); write it again"
                ) from None
            for number, row in enumerate(found, start=1):
                yield f"{path / inside} row {number}", row

    return corpus_of(f"parquet:{path}", rows(), digest=_digest(path, files))


def parquet_digest(path: Path) -> str:
    """Return the sha256 (hex) of the file; of a folder's files, over every path, length and content in order."""
    return _digest(path, ((inside, read_bytes(path / inside)) for inside in _files(path)))


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [Path()]
    found = [file.relative_to(path) for file in files_below(path) if file.suffix == ".parquet"]
    if not found:
        raise ValueError(f"{path} holds no .parquet file; name the folder or the file that has the rows")
    return found


def _digest(path: Path, files: Iterator[tuple[Path, bytes]] | list[tuple[Path, bytes]]) -> str:
    digest = sha256()
    for inside, raw in files:
        digest.update(raw if inside == Path() else entry_of(inside, raw))
    return digest.hexdigest()
