"""Parquet files and saved datasets: the same corpus as a JSON Lines file of the same rows."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from fedmoe_core.config.run_config import is_labeled
from fedmoe_core.data.federated import corpus_digest, load_corpus

datasets = pytest.importorskip("datasets")
pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

TALK = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]
ROWS = {
    "text": [{"text": f"text {n}", "client": "ann" if n % 2 else "bob", "other": n} for n in range(12)],
    "label": [{"text": f"text {n}", "label": n % 2, "other": n} for n in range(12)],
    "messages": [{"messages": TALK, "domain": n % 3} for n in range(12)],
}


def write(kind: str, rows: list[dict[str, object]], folder: Path) -> str:
    folder.mkdir(exist_ok=True)
    if kind == "jsonl":
        (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
        return f"jsonl:{folder / 'rows.jsonl'}"
    if kind == "hf":
        datasets.Dataset.from_list(rows).save_to_disk(folder / "saved")
        return f"hf:{folder / 'saved'}"
    for name, part in (("a", rows[:7]), ("b", rows[7:])):
        parquet.write_table(pyarrow.Table.from_pylist(part), folder / f"{name}.parquet")
    return f"parquet:{folder}"


@pytest.mark.parametrize("fields", ROWS)
@pytest.mark.parametrize("kind", ["parquet", "hf"])
def test_tables_give_what_lines_give(kind: str, fields: str, tmp_path: Path) -> None:
    lines = load_corpus(write("jsonl", ROWS[fields], tmp_path / "lines"))
    source = write(kind, ROWS[fields], tmp_path / "rows")
    table = load_corpus(source)
    for name in ("texts", "task", "class_names", "domain_names", "conversations"):
        assert getattr(table, name) == getattr(lines, name), name
    assert (table.domains_P == lines.domains_P).all()
    assert is_labeled(source) == (fields == "label")
    assert table.sha256 == corpus_digest(source)
    assert corpus_digest(write(kind, ROWS[fields][::-1], tmp_path / "other")) != table.sha256


def test_one_parquet_file_may_be_named(tmp_path: Path) -> None:
    write("parquet", ROWS["label"], tmp_path)
    source = f"parquet:{tmp_path / 'a.parquet'}"
    assert is_labeled(source)
    with pytest.raises(ValueError, match="has 3 rows and each class needs 5"):
        load_corpus(source)


def test_class_labels_come_by_name(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_list(ROWS["label"]).cast_column("label", datasets.ClassLabel(names=["ham", "spam"]))
    rows.save_to_disk(tmp_path / "saved")
    assert load_corpus(f"hf:{tmp_path / 'saved'}").class_names == ("ham", "spam")


def test_tables_that_cannot_be_used_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"gone\.parquet does not exist"):
        load_corpus(f"parquet:{tmp_path / 'gone.parquet'}")
    with pytest.raises(ValueError, match=r"holds no \.parquet file; name"):
        load_corpus(f"parquet:{tmp_path}")
    with pytest.raises(ValueError, match="holds no dataset; name a folder"):
        load_corpus(f"hf:{tmp_path}")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 nonsense PAR1")
    assert not is_labeled(f"parquet:{tmp_path}")
    with pytest.raises(ValueError, match=r"bad\.parquet is not a whole parquet file"):
        load_corpus(f"parquet:{tmp_path}")
    source = write("parquet", [{"text": "a"}, {"text": None}], tmp_path / "none")
    with pytest.raises(ValueError, match=r"a\.parquet row 2: 'text' is missing"):
        load_corpus(source)
    split = datasets.Dataset.from_list(ROWS["text"])
    datasets.DatasetDict({"train": split, "test": split}).save_to_disk(tmp_path / "splits")
    with pytest.raises(ValueError, match="holds the splits test, train; name one of them"):
        load_corpus(f"hf:{tmp_path / 'splits'}")
    assert len(load_corpus(f"hf:{tmp_path / 'splits' / 'train'}").texts) == 12


@pytest.mark.parametrize(("kind", "package"), [("parquet", "pyarrow"), ("hf", "datasets")])
def test_an_absent_package_is_named(kind: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        ValueError, match=rf"needs {package}, which is not installed; pip install 'fedmoe-core\[data\]'"
    ):
        load_corpus(f"{kind}:{tmp_path}")
