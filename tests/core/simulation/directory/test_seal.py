"""A finished run whose files were changed afterwards is shown as it lies there, and the report says which they are."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from bench.trust.jobs import PLAIN
from fedmoe_core.reporting.report import report
from fedmoe_core.simulation import run as simulate
from fedmoe_core.simulation.directory.seal import SEALED, SUMMARY, changed_since
from fedmoe_core.simulation.observer import NullObserver


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finished") / "run"
    PLAIN.run(out)
    return out


def edit(path: Path) -> None:
    """A number in it becomes another: JSON and TOML stay what they are."""
    text = path.read_text()
    place = next(place for place, sign in enumerate(text) if sign in "12345678" and text[place - 1] in " .")
    path.write_text(text[:place] + "9" + text[place + 1 :])


@pytest.mark.parametrize("name", [*SEALED, SUMMARY])
def test_a_changed_file_is_named_by_the_report(finished: Path, tmp_path: Path, name: str) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    assert changed_since(run) == ()
    _, before = report([run])
    edit(run / name)
    assert changed_since(run) == (name,)
    page, lines = report([run])
    said = f"{run}: {name} changed after the run ended; this shows what lies there now"
    assert (len(lines), lines[-1]) == (len(before) + 1, said)
    assert f"{name} changed after the run ended" in page.read_text()


def test_a_missing_file_is_changed_and_a_summary_of_an_older_fedmoe_has_no_digests(
    finished: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    (run / "ledger.jsonl").unlink()
    assert changed_since(run) == ("ledger.jsonl",)
    body = json.loads((run / SUMMARY).read_text())
    del body["digest"], body["files"]
    (run / SUMMARY).write_text(json.dumps(body))
    assert changed_since(run) == ()


def test_a_resumed_run_that_had_ended_seals_its_summary_again(finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    edit(run / SUMMARY)
    simulate.resume(run, observer=NullObserver())
    assert changed_since(run) == ()
