"""Text and its facts, read from a folder that ``datasets.Dataset.save_to_disk`` wrote."""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

from fedmoe_core.data.corpus import Corpus, entry_of, read_bytes
from fedmoe_core.data.packed.read_parquet import COLUMNS, EXTRA
from fedmoe_core.data.read_folder import files_below
from fedmoe_core.data.records import Record, corpus_of


def read_dataset(root: Path) -> Corpus:
    """Read the columns that a JSON Lines file has as fields; class labels come by their names.

    Raises:
        ValueError: datasets is absent, the folder holds several splits or no dataset, or rows cannot be used.
        OSError: ``root`` is not a folder, or a file cannot be read.
    """
    try:
        import datasets
    except ModuleNotFoundError:
        raise ValueError(f"data=hf:{root} needs datasets, which is not installed; {EXTRA}") from None
    digest = dataset_digest(root)
    if (root / "dataset_dict.json").is_file():
        splits = sorted(file.parent.name for file in root.glob("*/dataset_info.json"))
        raise ValueError(f"{root} holds the splits {', '.join(splits)}; name one of them, as in data=hf:{root}/train")
    try:
        data = datasets.load_from_disk(str(root))
    except FileNotFoundError:
        raise ValueError(f"{root} holds no dataset; name a folder that Dataset.save_to_disk wrote") from None
    names = getattr(data.features.get("label"), "names", ())

    def rows() -> Iterator[tuple[str, Record]]:
        kept = data.select_columns([name for name in COLUMNS if name in data.column_names])
        for number, row in enumerate(kept, start=1):
            label = row.get("label")
            if isinstance(label, int) and 0 <= label < len(names):
                row["label"] = names[label]
            yield f"{root} row {number}", row

    return corpus_of(f"hf:{root}", rows(), digest=digest)


def dataset_digest(root: Path) -> str:
    """Return the sha256 (hex) over every path, length and content of the folder's files, in sorted order."""
    digest = sha256()
    for path in files_below(root):
        digest.update(entry_of(path.relative_to(root), read_bytes(path)))
    return digest.hexdigest()
