"""``fedmoe export``: it says what it wrote, and answers mistakes in a sentence."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from small_plain import made
from tiny_runs import TINY, fedmoe_here, write_notes

from fedmoe_core.config.run_config import Config
from fedmoe_core.simulation import run as simulate
from fedmoe_core.simulation.observer import NullObserver


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("export")
    words = [*TINY, f"data=jsonl:{write_notes(place / 'notes.jsonl')}", f"cache={place / 'cache'}"]
    done = fedmoe_here("simulate", *words, "eval.personal=true", f"out={place / 'run'}", "--quiet")
    assert done.returncode == 0, done.stderr
    return place / "run"


def test_it_says_what_it_wrote_and_replaces_it_by_force_alone(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    before = {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}
    done = fedmoe_here("export", run, out, "--client", "3", "--quiet")
    assert done.returncode == 0, done.stderr
    own = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["personal_loss_C"][3]
    first, last = done.stdout.splitlines()
    assert first == (
        f"client 3's own model: 8 of 8 experts a layer, 2 a token, held-out loss {own:.4f} (on record {own:.4f})"
    )
    assert last.startswith(f"wrote {out}: ")
    assert last.endswith(" KiB")
    again = fedmoe_here("export", run, out, "--quiet")
    assert (again.returncode, again.stdout) == (2, "")
    assert again.stderr == f"error: {out} already holds an export; replace it with --force, or choose another OUT\n"
    done = fedmoe_here("export", run, out, "--force", "--json", "--quiet")
    facts = json.loads(done.stdout)
    assert facts["client"] is None
    assert facts["bytes"] == sum(path.stat().st_size for path in out.iterdir())
    assert facts["loss"] == pytest.approx(facts["recorded"], rel=1e-4)
    assert {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()} == before


def refused(*words: str | Path) -> str:
    done = fedmoe_here("export", *words, "--quiet")
    assert done.returncode == 2, done.stdout
    assert done.stderr.count("\n") == 1
    return done.stderr.removeprefix("error: ").strip()


def test_mistakes_are_answered_in_a_sentence(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (tmp_path / "notes").mkdir()
    assert refused(tmp_path / "notes", out).endswith("holds no run; give the directory that a run named as out")
    assert refused(tmp_path / "none", out).endswith("holds no run; give the directory that a run named as out")
    assert refused(run, out, "--client", "4") == "client 4 is not in this run; it has clients 0 to 3"
    assert "neither a client's number nor global" in refused(run, out, "--client", "first")
    assert refused(run, out, "--format", "gguf") == "format 'gguf' is unknown; choose hf or peft"
    assert "is not empty and is not an export" in refused(run, run, "--force")
    assert not out.exists()


def test_a_run_without_its_checkpoint_or_with_a_damaged_one_is_refused(run: Path, tmp_path: Path) -> None:
    copy, out = shutil.copytree(run, tmp_path / "run"), tmp_path / "out"
    (tensors,) = (copy / "checkpoint").glob("*.safetensors")
    content = tensors.read_bytes()
    tensors.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert "is damaged: its sha256 is not the one in checkpoint.json" in refused(copy, out)
    tensors.write_bytes(content[:-1])
    assert "bytes instead of" in refused(copy, out)
    (copy / "checkpoint" / "checkpoint.json").unlink()
    assert refused(copy, out) == f"{copy} has no checkpoint yet; let the run finish a round, then export it"
    assert not out.exists()


def test_other_data_is_refused(run: Path, tmp_path: Path) -> None:
    copy, notes = shutil.copytree(run, tmp_path / "run"), run.parent / "notes.jsonl"
    content = notes.read_bytes()
    try:
        notes.write_bytes(content.replace(b"w", b"v"))
        assert "was made from other content of data=" in refused(copy, tmp_path / "out")
    finally:
        notes.write_bytes(content)


def test_a_plain_models_run_is_refused_with_what_to_do(tmp_path: Path) -> None:
    config = Config.load(overrides=["adapter=own", "clients=2", "rounds=1", f"out={tmp_path / 'run'}", "threads=1"])
    simulate.run(config, adapter=made(), observer=NullObserver())
    said = refused(tmp_path / "run", tmp_path / "out")
    assert "has trained a plain torch model, which transformers does not know" in said
    assert "load_checkpoint(RUN/checkpoint)" in said
    assert not (tmp_path / "out").exists()
