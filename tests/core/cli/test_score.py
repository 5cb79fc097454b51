"""``fedmoe score``: it ranks the experts of every layer, writes every score, and answers mistakes in a sentence."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tiny_runs import TINY, fedmoe_here, write_notes

from fedmoe_core.selection.names import BEST, RANKINGS


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    place = tmp_path_factory.mktemp("score")
    return [*TINY, f"data=jsonl:{write_notes(place / 'notes.jsonl')}", f"cache={place / 'cache'}", "--batches", "2"]


def test_every_layer_is_ranked_and_all_scores_are_written(words: list[str], tmp_path: Path) -> None:
    done = fedmoe_here("score", *words, "--by", "frequency", "--top", "3", "--out", str(tmp_path / "scores.json"))
    assert done.returncode == 0, done.stderr
    facts = json.loads((tmp_path / "scores.json").read_text())
    assert list(facts["scores"]) == list(RANKINGS)
    assert all(np.shape(score_LE) == (2, 8) for score_LE in facts["scores"].values())
    assert all(np.ptp(score_LE) > 0 for score_LE in facts["scores"].values())
    tokens = facts["tokens"]
    assert tokens == [2 * 2 * 32] * 2  # batches, sequences, places
    assert [sum(tokens_E) for tokens_E in facts["tokens_by_expert"]] == [2 * n for n in tokens]  # two choices each
    said = done.stdout.splitlines()
    assert said[0].startswith("frequency: share of the tokens")
    assert sum(line.startswith("MoE layer") for line in said) == 2
    rows = [line.split() for line in said if line.split()[0].isdigit()]
    assert len(rows) == 2 * 3
    for number, row in enumerate(rows):
        layer, place = divmod(number, 3)
        expert = facts["ranking"][layer][place]
        count = facts["tokens_by_expert"][layer][expert]
        assert row[0] == str(place + 1)
        assert row[1] == str(expert)
        assert float(row[2]) == pytest.approx(count / tokens[layer], rel=1e-3)
        assert row[3] == f"{count:,}"


def test_json_is_the_same_every_time_and_the_default_is_the_best(words: list[str]) -> None:
    first, second = (fedmoe_here("score", *words, "--json", "--quiet") for _ in range(2))
    assert first.returncode == 0, first.stderr
    assert first.stdout == second.stdout
    assert json.loads(first.stdout)["by"] == BEST


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--by", "taylr"], "unknown score 'taylr'; did you mean 'taylor'?"),
        (["--by", "42"], "choose one of taylor"),
        (["model=nowhere"], "nowhere"),
    ],
)
def test_a_mistake_is_answered_in_one_sentence(words: list[str], more: list[str], said: str) -> None:
    done = fedmoe_here("score", *words, *more)
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr
