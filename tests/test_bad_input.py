"""Bad input through the real command: one sentence, a non-zero exit, no traceback, no half-written run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TINY = [
    *("threads=1", "clients=2", "rounds=1", "warmup.steps=3", "warmup.batch_size=2", "warmup.seq_len=16"),
    *("model_config.hidden_size=32", "model_config.heads=2", "model_config.kv_heads=1", "model_config.head_dim=16"),
    *("model_config.experts=4", "model_config.expert_width=16", "model_config.vocab_size=300"),
    *("train.batch_size=2", "train.seq_len=16", "train.local_steps=2", "eval.sequences=1", "budgets=unlimited"),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a good corpus and every kind of bad one."""
    folder = tmp_path_factory.mktemp("bad")
    rows = [{"text": f"note {n} of many words " * 20} for n in range(40)]
    (folder / "good.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "missing.csv").write_text("label\n1\n2\n")
    (folder / "empty.csv").write_text("label,text\n1,hello there\n2,\n")
    (folder / "one.csv").write_text("label,text\n1,hello\n1,world\n")
    (folder / "broken.jsonl").write_text('{"text": "a"}\n{broken\n')
    few = "".join(f"{n % 2},row number {n}\n" for n in range(12))
    (folder / "few.csv").write_text("label,text\n" + few)
    return folder


def command(place, *words, out="run", verb="simulate"):
    where = [f"cache={place / 'cache'}", f"out={place / out}"] if verb == "simulate" else []
    line = [sys.executable, "-m", "fedmoe_core.cli", verb, *where, *(TINY if where else []), *words]
    return subprocess.run(line, capture_output=True, text=True, timeout=120, cwd=place)


def refusal(done):
    """The one sentence of a refused command."""
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.stderr.strip().endswith(line)
    return line


CASES = {
    "unknown key": (["trian.lr=1"], ["trian.lr", "train.lr"]),
    "unknown value": (["algorithm=hfedmo"], ["hfedmo", "'hfedmoe'"]),
    "wrong type": (["rounds=many"], ["rounds", "many"]),
    "k above E": (["model_config.top_k=9"], ["top_k=9", "experts=4"]),
    "missing column": (["data=csv:missing.csv"], ["missing.csv", "text column"]),
    "empty text": (["data=csv:empty.csv"], ["empty.csv line 3", "empty text"]),
    "one class": (["data=csv:one.csv"], ["one.csv", "one class"]),
    "broken line": (["data=jsonl:broken.jsonl"], ["broken.jsonl line 2"]),
    "no such file": (["data=csv:nowhere.csv"], ["nowhere.csv", "does not exist"]),
    "unknown data": (["data=stdlb"], ["stdlb", "stdlib"]),
    "more clients than rows": (["data=csv:few.csv", "clients=10"], ["clients=10", "use clients"]),
    "bad budget": (["budgets=memry=3MiB", "data=jsonl:good.jsonl"], ["memry", "memory"]),
    "unknown model": (["model=nonsense", "data=jsonl:good.jsonl"], ["nonsense"]),
    "a budget too small": (["budgets=memory=10KiB", "data=jsonl:good.jsonl"], ["client 0", "at least"]),
}


@pytest.mark.parametrize(("words", "said"), CASES.values(), ids=CASES)
def test_one_sentence_and_nothing_half_written(place, words, said):
    line = refusal(command(place, *words))
    assert all(word in line for word in said), line
    run = place / "run"
    assert not run.exists() or not any(run.iterdir())


def test_a_model_without_moe_layers(place):
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=300, **sizes)).save_pretrained(place / "llama")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    tokenizer.train_from_iterator(["a b"], trainers.BpeTrainer(vocab_size=260, special_tokens=["</s>"]))
    tokenizer.save(str(place / "llama" / "tokenizer.json"))
    (place / "llama" / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    assert "llama" in refusal(command(place, "data=jsonl:good.jsonl", f"model={place / 'llama'}"))


def test_no_write_permission(place):
    (place / "file").write_text("")
    assert "cannot write" in refusal(command(place, "data=jsonl:good.jsonl", out="file/run"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_no_write_permission_by_mode(place):
    (place / "locked").mkdir(mode=0o500)
    assert "cannot write" in refusal(command(place, "data=jsonl:good.jsonl", out="locked/run"))


def test_debug_shows_the_traceback(place):
    done = command(place, "trian.lr=1", "--debug")
    assert done.returncode != 0
    assert "Traceback" in done.stderr


@pytest.fixture(scope="module")
def finished(place):
    done = command(place, "data=jsonl:good.jsonl", out="finished")
    assert done.returncode == 0, done.stderr
    return place / "finished"


def copied(run: Path, name: str) -> Path:
    import shutil

    target = run.with_name(name)
    shutil.copytree(run, target)
    return target


def test_resume_from_a_corrupt_checkpoint(place, finished):
    run = copied(finished, "corrupt")
    (state,) = (run / "checkpoint").glob("*.safetensors")
    state.write_bytes(state.read_bytes()[:1000])
    before = sorted(path.name for path in run.rglob("*"))
    assert state.name in refusal(command(place, str(run), verb="resume"))
    assert sorted(path.name for path in run.rglob("*")) == before


def test_resume_from_a_foreign_checkpoint(place, finished):
    run = copied(finished, "foreign")
    (run / "checkpoint" / "checkpoint.json").write_text('{"format": "something else"}')
    assert "checkpoint.json" in refusal(command(place, str(run), verb="resume"))


def test_resume_under_another_configuration(place, finished):
    run = copied(finished, "other")
    config = run / "config.toml"
    config.write_text(config.read_text().replace("local_steps = 2", "local_steps = 3"))
    assert "train.local_steps" in refusal(command(place, str(run), verb="resume"))


def test_resume_where_no_run_is(place):
    assert "nowhere" in refusal(command(place, str(place / "nowhere"), verb="resume"))
