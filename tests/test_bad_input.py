"""What a user gets wrong ends in one sentence, a non-zero status and no half-written run; by the command itself."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from tiny_runs import TINY, fedmoe, fedmoe_here, write_notes
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

Done = subprocess.CompletedProcess[str]
Simulate = Callable[..., tuple[Done, Path]]


@pytest.fixture(scope="module")
def notes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_notes(tmp_path_factory.mktemp("corpus") / "notes.jsonl")


@pytest.fixture
def simulate(notes: Path, tmp_path: Path) -> Simulate:
    def run(
        *words: str, flags: tuple[str, ...] = ("--quiet",), command: Callable[..., Done] = fedmoe_here
    ) -> tuple[Done, Path]:
        out = tmp_path / "out"
        where = [f"data=jsonl:{notes}", f"out={out}", f"cache={notes.parent / 'cache'}"]
        return command("simulate", *TINY, *where, *words, *flags), out

    return run


@pytest.fixture(scope="module")
def finished(notes: Path) -> Path:
    """A run of one round, to be copied and damaged."""
    out = notes.parent / "finished"
    where = [f"data=jsonl:{notes}", f"out={out}", f"cache={notes.parent / 'cache'}"]
    done = fedmoe_here("simulate", *TINY, *where, "--quiet")
    assert done.returncode == 0, done.stderr
    return out


def one_sentence(done: Done, *fragments: str) -> None:
    """Refused, with one line on stderr that holds the offender and the remedy, and nothing on stdout."""
    assert done.returncode != 0
    assert done.stdout == ""
    assert done.stderr.endswith("\n")
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert "Traceback" not in line
    assert not line.endswith(".")
    for fragment in fragments:
        assert fragment in line


def assert_nothing_written(out: Path) -> None:
    """At most the directory itself."""
    assert not out.exists() or list(out.iterdir()) == []


BAD_VALUES = {
    "an unknown key": ("train.lrr=1", ("'train.lrr'", "did you mean 'train.lr'?")),
    "an unknown word": ("train.trunk=frozzen", ("train.trunk='frozzen'", "did you mean 'frozen'?")),
    "an unknown algorithm": ("algorithm=hfedmo", ("algorithm='hfedmo'", "did you mean 'hfedmoe'?")),
    "an unknown source": ("data=cvs:news.csv", ("data='cvs:news.csv'", "did you mean 'csv:news.csv'?")),
    "a number out of range": ("selection.lam=1.5", ("selection.lam=1.5", "from 0.0 to 1.0")),
    "no number": ("rounds=many", ("rounds='many'", "give a whole number")),
    "a budget of nothing known": (
        "budgets=experts=2;memroy=3MiB",
        ("'memroy' is not a resource", "did you mean 'memory'?"),
    ),
    "k above E": ("model_config.top_k=9", ("model_config.top_k=9 exceeds model_config.experts=8", "lower it")),
    "more sampled than there are": ("clients_per_round=9", ("clients_per_round=9 exceeds clients=4", "lower it")),
    "a config file that is not there": ("nowhere.toml", ("nowhere.toml does not exist", "check the path")),
}


@pytest.mark.parametrize("case", BAD_VALUES)
def test_a_bad_word_is_refused_with_the_nearest_good_one(case: str, simulate: Simulate) -> None:
    word, fragments = BAD_VALUES[case]
    done, out = simulate(word, command=fedmoe)
    one_sentence(done, *fragments)
    assert not out.exists()


def test_inv1_too_few_experts_are_refused_before_the_warm_up(simulate: Simulate, tmp_path: Path) -> None:
    # At this many steps a warm-up would take an hour.
    done, out = simulate("budgets=experts=1", "warmup.steps=1000000", f"cache={tmp_path / 'cache'}")
    one_sentence(done, "client 0", "experts budget 1 expert", "one expert per MoE layer", "at least 2 experts")
    assert_nothing_written(out)
    assert list((tmp_path / "cache").rglob("warmup-*")) == []


def test_inv1_too_little_memory_is_refused_with_the_amount_that_does(simulate: Simulate) -> None:
    done, out = simulate("budgets=unlimited;memory=10KiB", command=fedmoe)
    one_sentence(done, "client 1", "memory budget 10.0 KiB", "at least ", "KiB is needed")
    assert_nothing_written(out)
    needed = done.stderr.split("at least ")[1].split(" is needed")[0].replace(" ", "")
    done, out = simulate(f"budgets=memory={needed}")
    assert done.returncode == 0, done.stderr
    assert json.loads((out / "summary.json").read_text())["budget_violations"] == 0


def test_a_model_without_moe_layers_is_refused(simulate: Simulate, tmp_path: Path) -> None:
    dense = tmp_path / "dense"
    dense.mkdir()
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 320, **sizes}
    (dense / "config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    tokenizer.train_from_iterator(["a b"], trainers.BpeTrainer(vocab_size=260, special_tokens=["</s>"]))
    tokenizer.save(str(dense / "tokenizer.json"))
    (dense / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    save_file({"model.embed_tokens.weight": np.zeros((320, 16), np.float32)}, dense / "model.safetensors")
    done, out = simulate(f"model={dense}")
    one_sentence(done, "(llama) is not a Mixture of Experts", "use a MoE model")
    assert_nothing_written(out)


def rows(count: int, label: str = "{}") -> str:
    return "".join(f"{label.format(row % 2)},text number {row}\n" for row in range(count))


BAD_TABLES = {
    "no text column": ("label\nsport\nnews\n", "has a label column but no text column", "write the label first"),
    "a missing column": ("label,text\nsport,a goal\nnews\n", "line 3 has 1 columns where line 1 has 2", "repair"),
    "an empty text": ("label,text\nsport,a goal\nnews,  \n", "line 3 has an empty text", "fill it or drop the row"),
    "one class": ("label,text\n" + rows(20, "sport"), "has one class, 'sport'", "needs at least two"),
    "no row": ("label,text\n", "holds no row", "give one row a text"),
    "fewer rows than clients": ("label,text\n" + rows(20), "clients=50", "use clients <= "),
}


@pytest.mark.parametrize("case", BAD_TABLES)
def test_a_bad_table_is_refused_by_its_line(case: str, simulate: Simulate, tmp_path: Path) -> None:
    text, *fragments = BAD_TABLES[case]
    table = tmp_path / "news.csv"
    table.write_text(text)
    done, out = simulate(f"data=csv:{table}", "clients=50")
    one_sentence(done, *fragments)
    assert_nothing_written(out)


def test_a_client_without_data_is_refused(simulate: Simulate, tmp_path: Path) -> None:
    notes = write_notes(tmp_path / "few.jsonl", owners="wxyz")
    with notes.open("a") as file:
        file.write(json.dumps({"text": "alone", "client": "owner-v"}) + "\n")
    done, out = simulate(f"data=jsonl:{notes}", "clients=5")
    one_sentence(done, "client ", "would own 1 piece of text and needs 2", "lower clients")
    assert_nothing_written(out)


@pytest.mark.parametrize(
    ("words", "fragments"),
    [
        (("model=nonsense",), ("'nonsense'", "owner/name")),
        (("data=jsonl:nowhere.jsonl",), ("nowhere.jsonl does not exist", "check the file name")),
        (("clients=400", "partition=iid"), ("clients=400", "use clients <= ")),
    ],
    ids=["an unknown model", "a missing data file", "more clients than pieces"],
)
def test_a_model_or_data_that_cannot_serve_is_refused(
    words: tuple[str, ...], fragments: tuple[str, ...], simulate: Simulate
) -> None:
    done, out = simulate(*words)
    one_sentence(done, *fragments)
    assert_nothing_written(out)


def test_an_out_below_a_file_is_refused(simulate: Simulate, notes: Path) -> None:
    before = notes.read_bytes()
    done, _ = simulate(f"out={notes}/run")
    one_sentence(done, f"{notes}/run", "choose another directory with out=")
    assert notes.read_bytes() == before


def test_an_out_that_may_not_be_written_is_refused(simulate: Simulate, tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    locked.mkdir()
    locked.chmod(0o500)
    if os.access(locked, os.W_OK):
        pytest.skip("this user (root) may write everywhere, so a refusal cannot be provoked")
    done, _ = simulate(f"out={locked / 'run'}")
    one_sentence(done, str(locked), "choose another directory with out=")
    assert list(locked.iterdir()) == []


def test_debug_shows_the_traceback(simulate: Simulate) -> None:
    done, out = simulate("train.lrr=1", flags=("--debug",), command=fedmoe)
    assert done.returncode != 0
    assert "Traceback (most recent call last)" in done.stderr
    assert "unknown key 'train.lrr'" in done.stderr
    assert not out.exists()


def test_with_progress_on_the_error_is_still_one_line_and_the_last(simulate: Simulate) -> None:
    done, _ = simulate("data=jsonl:nowhere.jsonl", flags=(), command=fedmoe)
    *before, last = done.stderr.splitlines()
    assert last.startswith("error: ")
    assert "nowhere.jsonl does not exist" in last
    assert not any(line.startswith("error") or "Traceback" in line for line in before)


def flip(run: Path) -> None:
    (file,) = (run / "checkpoint").glob("*.safetensors")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def foreign(run: Path) -> None:
    (run / "checkpoint" / "checkpoint.json").write_text(json.dumps({"model": "of somebody else"}))


def of_the_cache(run: Path) -> None:
    """A checkpoint of ours, whole, but of a warm-up and not of a run."""
    (warm,) = (run.parent / "cache").rglob("warmup-*")
    shutil.rmtree(run / "checkpoint")
    shutil.copytree(warm, run / "checkpoint")


def other_settings(run: Path) -> None:
    path = run / "config.toml"
    text = path.read_text()
    assert "local_steps = 2" in text
    path.write_text(text.replace("local_steps = 2", "local_steps = 3"))


def half_a_config(run: Path) -> None:
    path = run / "config.toml"
    path.write_text(path.read_text() + "\n[train\n")


DAMAGE: dict[str, tuple[Callable[[Path], None], tuple[str, ...]]] = {
    "one bit off": (flip, (".safetensors is damaged", "start the run afresh")),
    "foreign": (foreign, ("checkpoint.json is not a fedmoe checkpoint", "start the run afresh")),
    "of a warm-up": (of_the_cache, ("checkpoint.json was made under another configuration", "start afresh")),
    "of other settings": (other_settings, ("train.local_steps = 2 then, 3 now", "resume with the configuration")),
    "config cut short": (half_a_config, ("config.toml is not valid TOML", "correct it there")),
    "no run": (lambda run: (run / "config.toml").unlink(), ("holds no run", "give the directory")),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_inv11_resume_refuses_what_is_not_its_own_checkpoint(case: str, finished: Path, tmp_path: Path) -> None:
    damage, fragments = DAMAGE[case]
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    shutil.copytree(finished.parent / "cache", tmp_path / "cache")
    damage(run)
    before = {path: sha256(path.read_bytes()).digest() for path in run.rglob("*") if path.is_file()}
    command = fedmoe if case == "one bit off" else fedmoe_here
    one_sentence(command("resume", run, "--quiet"), *fragments)
    after = {path: sha256(path.read_bytes()).digest() for path in run.rglob("*") if path.is_file()}
    assert after == before


def test_a_run_in_which_nothing_trained_fails_with_the_first_reason(simulate: Simulate) -> None:
    done, out = simulate("aggregation.norm_bound=1e-12")
    assert done.returncode == 1
    why = "all 4 updates failed or were refused; client 0 in round 1: L2 norm"
    assert f"nothing trained ({why}" in done.stdout
    assert done.stderr.startswith(f"error: nothing trained: {why}")
    assert "is above norm_bound 1e-12" in done.stderr
    again = fedmoe_here("resume", out, "--quiet")
    assert again.returncode == 1
    assert again.stderr == done.stderr


def test_a_comparison_in_which_nothing_trained_fails_and_reaches_no_target(notes: Path, tmp_path: Path) -> None:
    words = [*TINY, f"data=jsonl:{notes}", f"cache={notes.parent / 'cache'}", "aggregation.norm_bound=1e-12"]
    options = ["--systems", "fedavg", "--seeds", "0", "--workers", "1", "--out", tmp_path / "study"]
    done = fedmoe("compare", *words, *options, "--quiet")
    assert done.returncode == 1
    assert "| fedavg (nothing trained in 1 seed) | 1 |" in done.stdout
    assert "| fedavg | 0 of 1 | n/a |" in done.stdout
    assert f"error: {tmp_path}/study/runs/fedavg/seed-0: nothing trained: all 4 updates" in done.stderr
