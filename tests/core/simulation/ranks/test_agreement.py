"""Ranks that are about to do different things are refused by name, all of them, before anything is written."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import TINY, write_notes

from fedmoe_core.simulation import launch
from fedmoe_core.simulation.process_group import Ranks
from fedmoe_core.simulation.ranks.agreement import TROUBLE, compare


class Told(Ranks):
    """A rank whose peers have answered already."""

    others: list[dict[str, Any]]

    def gather(self, value: Any) -> list[Any]:
        return [value, *self.others]


def refusal_of(mine: dict[str, Any], *others: dict[str, Any]) -> str:
    ranks = Told(0, 1 + len(others))
    object.__setattr__(ranks, "others", list(others))
    try:
        compare(ranks, mine, "mend it")
    except ValueError as error:
        return str(error)
    return ""


def test_equal_facts_pass_and_unlike_ones_are_named_with_rank_field_and_both_values() -> None:
    mine = {"code": "0.1.0+a", "train.lr": 0.1, "seed": 3}
    assert refusal_of(mine, dict(mine), dict(mine)) == ""
    other = mine | {"train.lr": 0.2}
    assert refusal_of(mine, other) == "rank 1 differs from rank 0 in train.lr (0.2, not 0.1); mend it"
    assert refusal_of(mine, mine, other, other, mine, other).startswith("ranks 2-3, 5 differ from rank 0 in train.lr")
    assert "the code of fedmoe (0.1.0+b, not 0.1.0+a)" in refusal_of(mine, mine | {"code": "0.1.0+b"})
    assert refusal_of(mine, {}).endswith("seed (None, not 3); mend it")


def test_a_digest_is_shortened_and_many_differences_are_counted() -> None:
    said = refusal_of({"corpus_sha256": "a" * 64}, {"corpus_sha256": "b" * 64})
    assert "the content of data (bbbbbbbbbbbb, not aaaaaaaaaaaa)" in said
    assert " and 2 more; " in refusal_of(dict.fromkeys("vwxyz", 1), dict.fromkeys("vwxyz", 2))


def test_the_trouble_of_one_rank_is_every_rank_s_refusal() -> None:
    said = refusal_of({"seed": 1}, {TROUBLE: "notes.jsonl: no such file"})
    assert said == "rank 1 of 2 cannot start: notes.jsonl: no such file"


# Both ranks get words; rank 1 gets some more.
STARTING = """
import json, os, sys
from fedmoe_core import Config, simulate
from fedmoe_core.simulation.observer import NullObserver

common, of_rank_1, told = json.loads(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3]
rank = os.environ["RANK"]
try:
    simulate.run(Config.load(overrides=common + of_rank_1 * (rank == "1")), observer=NullObserver())
except ValueError as error:
    open(f"{told}/said-{rank}", "w").write(str(error))
"""


def sayings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], of_rank_1: list[str]) -> list[str]:
    """What two real ranks say when they refuse to start."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
    script = tmp_path / "starting.py"
    script.write_text(STARTING)
    arguments = [json.dumps(words), json.dumps(of_rank_1), str(tmp_path)]
    launch.run_ranks(arguments, ranks=2, threads=1, program=(str(script),))
    return [(tmp_path / f"said-{rank}").read_text() for rank in range(2)]


@pytest.mark.parametrize("unlike", ["configuration", "corpus", "no corpus"])
def test_two_processes_with_unlike_words_or_files_both_refuse_and_leave_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unlike: str
) -> None:
    notes = write_notes(tmp_path / "notes.jsonl")
    others = {
        "configuration": (["train.lr=0.125"], "rank 1 differs from rank 0 in train.lr (0.125, not 0.002)"),
        "corpus": (
            [f"data=jsonl:{write_notes(tmp_path / 'other.jsonl', lines=41)}"],
            "rank 1 differs from rank 0 in the content of data (",
        ),
        "no corpus": ([f"data=jsonl:{tmp_path / 'gone.jsonl'}"], "rank 1 of 2 cannot start: "),
    }
    more, expected = others[unlike]
    out = tmp_path / "run"
    words = [*TINY, "ranks=2", f"data=jsonl:{notes}", f"cache={tmp_path / 'cache'}", f"out={out}"]
    said = sayings(tmp_path, monkeypatch, words, more)
    assert said[0] == said[1]
    assert said[0].startswith(expected)
    assert not out.exists()
    assert not (tmp_path / "cache").exists()
