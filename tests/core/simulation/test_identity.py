"""A run knows its data, its model and its code by content: what changed under a name is refused, what moved is not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from synthetic_run import make_run
from tiny_runs import TINY, write_notes

from fedmoe_core.base.files import json_digest
from fedmoe_core.comparison.compare import compare
from fedmoe_core.comparison.jobs import other_runs
from fedmoe_core.comparison.study import Study
from fedmoe_core.config.run_config import Config
from fedmoe_core.data.federated import corpus_digest, load_corpus
from fedmoe_core.simulation import run as simulate
from fedmoe_core.simulation.directory.claim import read_facts
from fedmoe_core.simulation.identity import Identity, code_version, model_digest


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    return write_notes(tmp_path / "notes.jsonl")


def config(notes: Path, *words: str, out: str = "run") -> Config:
    where = [f"data=jsonl:{notes}", f"out={notes.parent / out}", f"cache={notes.parent / 'cache'}"]
    return Config.load(None, [*TINY, "rounds=2", *where, *words])


def stop_after(config: Config, rounds: int) -> Path:
    """A run that was interrupted after so many rounds."""

    class Stop(simulate.NullObserver):
        def on_round(self, round: int, rounds_: int, record: object) -> None:
            if round == rounds:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        simulate.run(config, observer=Stop())
    return Path(config.out)


def rewrite(path: Path) -> None:
    """Other text under the same name, as many lines and owners as before."""
    lines = path.read_text().splitlines()
    path.write_text("\n".join(line.replace("a", "q") for line in lines) + "\n")


@pytest.mark.parametrize("source", ["stdlib", "jsonl", "csv", "folder"])
def test_the_quick_digest_is_that_of_the_parsed_corpus(source: str, notes: Path, tmp_path: Path) -> None:
    table = tmp_path / "news.csv"
    table.write_text("".join(f'{1 + row % 2},"text {row}, quoted"\r\n' for row in range(20)))
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "a.txt").write_text("some text")
    named = {"jsonl": f"jsonl:{notes}", "csv": f"csv:{table}", "folder": f"folder:{tmp_path}"}.get(source, source)
    assert corpus_digest(named) == load_corpus(named).sha256


def test_the_file_is_read_once_so_text_and_digest_are_of_the_same_bytes(notes: Path, monkeypatch) -> None:
    reads, read_bytes = [], Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda self: reads.append(self) or read_bytes(self))
    load_corpus(f"jsonl:{notes}")
    assert reads == [notes]


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_a_pipe_is_refused_because_resume_could_not_read_it_again(kind: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    told: list[str] = []

    def read() -> None:
        try:
            load_corpus(Config.load(None, [f"data={kind}:{tmp_path / 'pipe'}"]).data)
        except ValueError as error:
            told.append(str(error))

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    reader.join(timeout=20)
    assert not reader.is_alive(), "reading a pipe hangs"
    assert "is a pipe or a device" in told[0]


def test_resume_refuses_other_data_and_goes_on_with_the_same_data_elsewhere(notes: Path, tmp_path: Path) -> None:
    whole = simulate.run(config(notes, out="whole"))
    run = stop_after(config(notes), 1)
    kept = notes.read_text()
    rewrite(notes)
    with pytest.raises(ValueError, match=r"was made from other content of data=jsonl:.*restore it"):
        simulate.resume(run)
    notes.unlink()
    moved = tmp_path / "moved.jsonl"
    moved.write_text(kept)
    saved = run / "config.toml"
    saved.write_text(saved.read_text().replace(str(notes), str(moved)))
    assert simulate.resume(run)["model_hash"] == whole["model_hash"]


def test_resume_refuses_other_code_unless_told(notes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = stop_after(config(notes), 1)
    made = Identity.of(config(notes))
    monkeypatch.setattr("fedmoe_core.simulation.identity.code_version", lambda *of: "9.9+edited")
    with pytest.raises(ValueError, match=r"was made by fedmoe .* and this is 9.9\+edited; .*--other-code"):
        simulate.resume(run)
    assert simulate.resume(run, other_code=True)["rounds"] == 2
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"was made by torch 1\.0"):
        replace(made, torch="1.0").require_same_code(made, "x")


def test_resume_refuses_the_checkpoint_of_another_run(notes: Path) -> None:
    run = stop_after(config(notes), 1)
    other = stop_after(config(notes, out="other"), 1)
    for path in (run / "checkpoint").iterdir():
        path.unlink()
    for path in (other / "checkpoint").iterdir():
        (run / "checkpoint" / path.name).write_bytes(path.read_bytes())
    with pytest.raises(ValueError, match="belongs to another run"):
        simulate.resume(run)


def test_the_marker_the_checkpoint_and_the_summary_name_the_same_sources(notes: Path) -> None:
    settings = config(notes)
    summary = simulate.run(settings)
    identity = Identity.of(settings)
    facts = read_facts(Path(settings.out))
    checkpoint = json.loads((Path(settings.out) / "checkpoint" / "checkpoint.json").read_text())
    assert facts is not None
    for record in (facts, summary, checkpoint["meta"]["identity"]):
        assert Identity.read(record) == identity
    assert checkpoint["meta"]["run"] == facts["id"]
    assert Identity.read({**summary, "model_sha256": None}) is None


def test_a_wrong_word_with_force_leaves_the_finished_run(notes: Path) -> None:
    simulate.run(config(notes, "rounds=1"))
    run = notes.parent / "run"
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    for words in (["data=jsonl:nowhere.jsonl"], ["budgets=memory=1KiB"], ["model=nowhere"], ["adapter=nobody"]):
        with pytest.raises((ValueError, OSError)):
            simulate.run(Config.load(None, [*TINY, f"data=jsonl:{notes}", f"out={run}", *words]), force=True)
        assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_paths_in_a_saved_configuration_are_absolute(notes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(notes.parent)
    settings = Config.load(None, [*TINY, f"data=jsonl:{notes.name}", "out=run", "cache=cache"])
    simulate.run(settings)
    monkeypatch.chdir("/")
    assert Config.load(notes.parent / "run" / "config.toml").data == f"jsonl:{notes}"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A checkpoint as transformers saves it, with a byte-level tokenizer of its own."""
    from stock_models import CAUSAL, config_of
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    folder = tmp_path / "model"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(
        ["words"], trainers.BpeTrainer(vocab_size=280, special_tokens=["</s>"], initial_alphabet=alphabet)
    )
    settings = config_of("mixtral")
    settings.vocab_size = tokenizer.get_vocab_size()
    CAUSAL["mixtral"](settings).save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    return folder


def change_weights(model: Path) -> None:
    file = model / "model.safetensors"
    tensors = {key: tensor + 0.01 * torch.ones_like(tensor) for key, tensor in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})


def test_a_model_is_known_by_its_content_not_its_name_or_its_readme(model: Path, tmp_path: Path) -> None:
    before = model_digest(str(model))
    (model / "README.md").write_text("other words")
    assert model_digest(str(model)) == before
    model.rename(tmp_path / "renamed")
    assert model_digest(str(tmp_path / "renamed")) == before
    change_weights(tmp_path / "renamed")
    assert model_digest(str(tmp_path / "renamed")) != before
    assert model_digest("tiny") == ""
    assert model_digest("nobody/nothing-in-any-cache") == ""


def test_other_weights_under_the_same_name_do_not_read_the_old_warm_up(model: Path, tmp_path: Path) -> None:
    """A pretrained trunk's fresh classification head is trained once and kept, under the digest of the weights."""
    table = tmp_path / "news.csv"
    table.write_text("".join(f"{'ab'[row % 2]},{'xy'[row % 2]} words {row % 7}\n" for row in range(120)))
    words = [*TINY, f"data=csv:{table}", f"model={model}", "warmup.head_steps=2", "budgets=experts=50%"]

    def start(out: str, cache: str, *more: str) -> float:
        where = [f"out={tmp_path / out}", f"cache={tmp_path / cache}"]
        return float(simulate.run(Config.load(None, [*words, *where, *more]))["loss_before"])

    first = start("a", "cache")
    assert start("b", "cache") == first
    dropped = start("c", "cache", "train.token_dropout=0.9")
    assert dropped == start("d", "fresh", "train.token_dropout=0.9") != first
    change_weights(model)
    assert start("e", "cache") == start("f", "fresh") != first


def test_the_code_version_covers_every_package_and_the_adapters(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, alone = code_version("transformers"), code_version("nobody's")
    assert whole != alone  # the bindings count where their adapter is used
    read_bytes = Path.read_bytes
    for file in ("moe.py", "reference.py", "losses.py"):
        edited = lambda self, file=file: read_bytes(self) + (b"#" if self.name == file else b"")  # noqa: E731
        monkeypatch.setattr(Path, "read_bytes", edited)
        assert code_version("transformers") != whole
        monkeypatch.undo()


def study_of(out: Path, notes: Path, systems: str, **more: Path) -> Study:
    words = [*TINY, f"data=jsonl:{notes}", f"cache={notes.parent / 'cache'}"]
    return Study.of(words, systems=systems, seeds="0", out=out, workers=1, **more)


def unheard(*_: object) -> None:
    """Nobody watches."""


def test_compare_refuses_runs_of_other_data_and_replaces_them_only_by_force(
    notes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
    compare(study_of(tmp_path / "study", notes, "fedavg"), unheard)
    summary = tmp_path / "study/runs/fedavg/seed-0/summary.json"
    before = summary.read_bytes()
    rewrite(notes)
    with pytest.raises(ValueError, match=r"other content of data=.*replace it with --force"):
        compare(study_of(tmp_path / "study", notes, "fedavg,random"), unheard)
    with pytest.raises(ValueError, match=r"compare.json was made from other content of data="):
        study_of(tmp_path / "second", notes, "random", beside=tmp_path / "study/compare.json")
    assert summary.read_bytes() == before
    found = compare(study_of(tmp_path / "study", notes, "fedavg"), unheard, force=True)
    assert (found.missing, found.problems, found.notes) == ([], [], [])
    assert found.lines
    assert summary.read_bytes() != before


def test_compare_refuses_runs_of_other_settings_and_foreign_directories(tmp_path: Path) -> None:
    study = Study.of(["rounds=8"], systems="random", seeds="0", out=tmp_path, workers=1)
    (job,) = study.jobs()
    make_run(job.out, algorithm="random", rounds=5)
    assert "holds a run of another configuration (" in other_runs([job])[job.out]
    with pytest.raises(ValueError, match=r"holds a run of another configuration .*replace it with --force"):
        compare(study, unheard)
    (job.out / "fedmoe-run.json").unlink()
    with pytest.raises(ValueError, match="fedmoe did not make it"):
        compare(study, unheard, force=True)


def test_compare_says_which_runs_other_code_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = Study.of([], systems="random", seeds="0-1", out=tmp_path, workers=1)
    for job in study.jobs():
        make_run(job.out, algorithm="random", tiers=job.config.budgets, seed=job.seed)
        text = replace(job.config).to_toml()
        (job.out / "config.toml").write_text(text)
    assert compare(study, unheard).notes == []
    own = study.identity.code
    for room in ("simulation.identity", "simulation.worlds.found_plain"):
        monkeypatch.setattr(f"fedmoe_core.{room}.code_version", lambda *of: "9.9+edited")
    later = Study.of([], systems="random", seeds="0-1", out=tmp_path, workers=1)
    assert compare(later, unheard).notes == [
        f"2 runs of this table came from fedmoe {own}, and this is 9.9+edited; --force runs them again"
    ]


def test_a_users_own_algorithm_is_compared_with_its_own_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its module counts as code of its runs alone: no run of an unchanged file is said to be of other code."""
    (tmp_path / "own_random.py").write_text("from fedmoe_core.algorithms.baselines import RandomExperts as Mine\n")
    monkeypatch.syspath_prepend(tmp_path)
    study = Study.of([], systems="own_random:Mine,random", seeds="0", out=tmp_path / "study", workers=1)
    for job in study.jobs():
        make_run(job.out, algorithm="random", tiers=job.config.budgets)
        (job.out / "config.toml").write_text(job.config.to_toml())
        marker = job.out / "fedmoe-run.json"
        code = code_version("transformers", job.config.algorithm)
        body = {**json.loads(marker.read_text()), "code": code}
        del body["digest"]
        marker.write_text(json.dumps({**body, "digest": json_digest(body)}))
    assert [job.other_code() for job in study.jobs()] == ["", ""]
    assert compare(study, unheard).notes == []
    with (tmp_path / "own_random.py").open("a") as file:
        file.write("# edited\n")
    assert [bool(job.other_code()) for job in study.jobs()] == [True, False]


def test_the_command_resumes_an_algorithm_that_lies_in_the_current_folder(
    notes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a process of its own, as a user types it: the installed command has no current folder on its path."""
    (notes.parent / "own_words.py").write_text("from fedmoe_core.algorithms.baselines import RandomExperts as Mine\n")
    command = "from fedmoe_core.cli.main import main; import sys; sys.path.remove(''); main()"
    words = [*TINY, "rounds=1", f"data=jsonl:{notes}", "out=run", "cache=cache", "algorithm=own_words:Mine"]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
    for verb in (["simulate", *words], ["resume", "run"]):
        done = subprocess.run(
            [sys.executable, "-c", command, *verb, "-q"], cwd=notes.parent, capture_output=True, text=True, timeout=200
        )
        assert done.returncode == 0, done.stderr
