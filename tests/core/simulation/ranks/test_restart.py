"""A launcher's restart goes on with its own run, begins one again that has no checkpoint, and touches no other."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
from tiny_runs import TINY, fedmoe_here, write_notes

from fedmoe_core.base.files import json_digest
from fedmoe_core.config.run_config import Config
from fedmoe_core.simulation import launch
from fedmoe_core.simulation.identity import Identity
from fedmoe_core.simulation.process_group import Ranks
from fedmoe_core.simulation.ranks.restart import kind_of_start


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    place = tmp_path_factory.mktemp("restart")
    return [*TINY, f"data=jsonl:{write_notes(place / 'notes.jsonl')}", f"cache={place / 'cache'}"]


def start(words: list[str], out: Path, *, force: bool = False) -> str:
    config = Config.load(overrides=[*words, f"out={out}"]).resolved()
    return kind_of_start(Ranks(), config, out, sources=lambda: Identity.of(config), force=force)


@pytest.mark.parametrize("name", [launch.ATTEMPT, launch.REQUEUED])
def test_only_a_restart_looks_for_a_run(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    for each in (launch.ATTEMPT, launch.REQUEUED):
        monkeypatch.delenv(each, raising=False)
    assert not launch.restarted()
    monkeypatch.setenv(name, "0")
    assert not launch.restarted()
    monkeypatch.setenv(name, "10")
    assert launch.restarted()


def test_a_restart_goes_on_with_its_own_run_alone(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    assert fedmoe_here("simulate", *words, f"out={out}", "--quiet").returncode == 0
    assert start(words, out) == "begin"
    monkeypatch.setenv(launch.ATTEMPT, "1")
    assert start(words, out) == "go on"
    assert start(words, out, force=True) == "go on"  # the first attempt has already replaced what was there
    assert start([*words, "seed=9"], out) == "begin"
    assert start(words, tmp_path / "other") == "begin"
    marker = out / "fedmoe-run.json"
    facts = json.loads(marker.read_text())
    old = {key: value for key, value in facts.items() if key != "digest"} | {"code": "0.0.1+old"}
    marker.write_text(json.dumps({**old, "digest": json_digest(old)}))
    assert start(words, out, force=True) == "begin"  # an old run, which --force was to replace
    assert start(words, out) == "go on"  # and then `resume` says that the code is another one
    marker.write_text(json.dumps(facts))
    (out / "checkpoint" / "checkpoint.json").unlink()
    assert start(words, out) == "begin again"


def test_the_same_command_again_gives_the_same_run(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    command = ("simulate", *words, f"out={out}", "--quiet")
    assert fedmoe_here(*command).returncode == 0
    first = json.loads((out / "summary.json").read_text())["model_hash"]
    assert fedmoe_here(*command).returncode == 2  # no launcher says that it is a restart
    monkeypatch.setenv(launch.REQUEUED, "1")
    assert fedmoe_here(*command).returncode == 0  # nothing was left to do
    for path in (out / "checkpoint").iterdir():
        path.unlink()
    assert fedmoe_here(*command).returncode == 0  # begun again
    assert json.loads((out / "summary.json").read_text())["model_hash"] == first
    done = fedmoe_here(*command, "seed=9")
    assert done.returncode == 2
    assert "already holds a run" in done.stderr


SHARING = """
import sys, torch
from fedmoe_core.simulation.process_group import open_ranks
from fedmoe_core.simulation.ranks.restart import share

whole = {
    "bits": torch.tensor([0.1, -0.0, float("nan"), float("inf")], dtype=torch.bfloat16),
    "scalar": torch.tensor(2**62 + 1),
    "flags": torch.tensor([[True, False]]),
    "turned": torch.arange(6.0, dtype=torch.float64).view(2, 3).T,
    "empty": torch.empty(0, 4),
}
with open_ranks(2, torch.device("cpu")) as ranks:
    found = share(ranks, whole if ranks.leads else {})
    assert list(found) == list(whole)
    for key, tensor in whole.items():
        assert found[key].dtype == tensor.dtype and found[key].shape == tensor.shape
        assert torch.equal(found[key].nan_to_num(7), tensor.nan_to_num(7))
    open(f"{sys.argv[1]}/{ranks.rank}", "w").close()
"""


def test_rank_0_s_tensors_reach_the_others_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
    script = tmp_path / "sharing.py"
    script.write_text(SHARING)
    launch.run_ranks([str(tmp_path)], ranks=2, threads=1, program=(str(script),))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1", "sharing.py"]
