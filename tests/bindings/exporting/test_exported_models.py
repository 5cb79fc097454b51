"""What ``fedmoe export`` writes, loaded by transformers and peft alone, is the model that the run's report judged."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
import yaml
from peft import PeftModel
from tiny_corpus import make_config
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from fedmoe_core.algorithms.base import algorithm_class
from fedmoe_core.config.run_config import Config
from fedmoe_core.data.batches import eval_batches
from fedmoe_core.data.federated import load_data
from fedmoe_core.exporting.export import Exported, Order, export, told
from fedmoe_core.simulation import run as simulate
from fedmoe_core.simulation.observer import NullObserver
from fedmoe_core.simulation.prepare import cache_directory

SAME = 1e-4  # relative, of a held-out loss
# 12.5 % is one expert a layer on the average, so that layers differ; a learning rate at which two rounds show.
WORDS = (
    "eval.personal=true",
    "train.lr=3e-2",
    "warmup.steps=25",
    "train.local_steps=6",
    "model_config.expert_width=32",
)
BUDGETS = "budgets=memory=30%;memory=55%;memory=100%;memory=80%"
SYSTEMS = {
    "hfedmoe": (),
    "hfedmoe_plus": (),
    "fedmoe": (),
    "flex_moe": (),
    "flux": (),
    "fedavg": (),
    "random": (),
    "flame": ("lora.rank=4",),
    "hetlora": ("lora.rank=4",),
    "flexlora": ("lora.rank=4",),
    "hfedmoe-lora": ("algorithm=hfedmoe", "train.experts=lora", "lora.rank=4"),
    "hfedmoe-nf4": ("algorithm=hfedmoe", "train.experts=lora", "lora.rank=4", "lora.frozen_format=nf4"),
    "hfedmoe-trunk": ("algorithm=hfedmoe", "train.trunk=fedavg"),
}


# Clients whose own models hold more experts in one layer than in the other.
UNEVEN = (("hfedmoe_plus", 0), ("fedmoe", 0), ("random", 0), ("hfedmoe-lora", 0), ("hfedmoe-nf4", 0))


@dataclass(frozen=True)
class Ran:
    """A finished run, and the last line of its records."""

    config: Config
    path: Path

    @property
    def rounds(self) -> list[dict]:
        lines = [json.loads(line) for line in (self.path / "metrics.jsonl").read_text().splitlines()]
        return [line for line in lines if line["type"] == "round"]

    @property
    def last(self) -> dict:
        return self.rounds[-1]

    def losses(self, client: int) -> list[float]:
        return [line["personal_loss_C"][client] for line in self.rounds]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs by name, each played once."""
    make, played = make_config(tmp_path_factory.mktemp("runs"), tmp_path_factory.getbasetemp() / "shared"), {}

    def ran(name: str, *words: str) -> Ran:
        key = (name, *words)
        if key not in played:
            system = SYSTEMS.get(name, ())
            named = () if any(word.startswith("algorithm=") for word in system) else (f"algorithm={name}",)
            config = make(*WORDS, BUDGETS, *named, *system, *words, out_name=f"{name}-{len(played)}").resolved()
            simulate.run(config, observer=NullObserver())
            played[key] = Ran(config, Path(config.out))
        return played[key]

    return ran


def data_of(config: Config):
    """The data of a run, read again."""
    return load_data(
        config.data,
        clients=config.clients,
        partition=config.partition,
        seed=config.seed,
        tokenizer=config.tokenizer,
        vocab_size=config.model_config.vocab_size,
        labels_per_class=config.warmup.labels_per_class,
        validation=algorithm_class(config.algorithm).needs_validation,
        cache=cache_directory(config),
    )


def held_out(config: Config, client: int):
    """The batches that a client's model is judged on."""
    test = data_of(config).clients[client].test
    return list(eval_batches(test, batch_size=4, seq_len=config.train.seq_len, sequences=config.eval.sequences))


@torch.no_grad()
def loss_of(model, batches) -> float:
    """Mean next-token loss of a stock model, in nats."""
    total, count = 0.0, 0
    for batch in batches:
        logits = model(input_ids=batch.tokens_SN, attention_mask=batch.mask_SN.long()).logits.double()
        predicted = batch.mask_SN[:, 1:] & batch.mask_SN[:, :-1]
        total += float(cross_entropy(logits[:, :-1][predicted], batch.tokens_SN[:, 1:][predicted], reduction="sum"))
        count += int(predicted.sum())
    return total / count


def stock(folder: Path):
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def global_loss(model, config: Config) -> float:
    return float(np.mean([loss_of(model, held_out(config, client)) for client in range(config.clients)]))


@pytest.mark.parametrize("name", [name for name in SYSTEMS if name != "flex_moe"])
def test_the_global_model_is_the_judged_one(name, runs, tmp_path):
    ran = runs(name)
    done = export(ran.path, tmp_path / "out")
    found = global_loss(stock(tmp_path / "out"), ran.config)
    assert found == pytest.approx(ran.last["loss"], rel=SAME)
    assert done.sheet.loss == pytest.approx(ran.last["loss"], rel=SAME)
    before = ran.rounds[0]["loss"]
    assert abs(found - before) > 3 * SAME * before  # the model that federation started from would not do


@pytest.mark.parametrize(
    ("name", "client"),
    [*((name, 0) for name in SYSTEMS), ("hfedmoe", 3), ("random", 1), ("flame", 2), ("hfedmoe-lora", 1)],
)
def test_a_clients_own_model_is_the_judged_one(name, client, runs, tmp_path):
    ran = runs(name)
    recorded = ran.last["personal_loss_C"][client]
    uneven = (name, client) in UNEVEN
    if uneven:
        with pytest.raises(ValueError, match=rf"client {client} holds \d, \d experts in its layers.* --equal-experts$"):
            export(ran.path, tmp_path / "out", Order(client=client))
        assert not (tmp_path / "out").exists()
    done = export(ran.path, tmp_path / "out", Order(client=client, equal_experts=uneven))
    if uneven:
        assert_equalised(done, recorded)
        recorded = done.sheet.loss
    model = stock(tmp_path / "out")
    assert loss_of(model, held_out(ran.config, client)) == pytest.approx(recorded, rel=SAME)
    assert model.config.num_experts == done.sheet.counts_L[0]
    assert model.config.num_experts_per_tok == done.sheet.top_k <= model.config.num_experts
    kept = json.loads((tmp_path / "out" / "fedmoe.json").read_text())["kept_experts"]
    assert kept == [np.flatnonzero(kept_E).tolist() for kept_E in done.sheet.kept_LE]
    assert getattr(model.config, "fedmoe_kept_experts", [list(range(8))] * 2) == kept


def assert_equalised(done: Exported, recorded: float) -> None:
    """The note names what the client lost; what it had was on record, and it holds no more experts in all."""
    (note,) = (note for note in done.sheet.notes if "left out" in note)
    counts, before, after = re.search(r"has (\d+) experts? .* loss ([\d.]+) -> ([\d.]+)\.$", note).groups()
    assert done.sheet.counts_L == [int(counts)] * 2
    assert float(before) == pytest.approx(recorded, abs=1e-4)
    assert float(after) == pytest.approx(done.sheet.loss, abs=1e-4)
    assert note in told(done)


def test_an_expert_that_a_merged_one_serves_is_written_as_a_copy_of_it(runs, tmp_path):
    done = export(runs("flux").path, tmp_path / "out", Order(client=0))
    assert done.sheet.counts_L == [8, 8]
    assert any(re.search(r"holds 4 experts, of which merged ones serve 12 more", note) for note in done.sheet.notes)
    weights = stock(tmp_path / "out").model.layers[0].mlp.experts.down_proj
    assert len({expert.numpy().tobytes() for expert in weights.detach()}) < 8


def test_fewer_choices_and_the_outputs_factor_are_in_the_files_and_in_the_card(runs, tmp_path):
    done = export(runs("flame").path, tmp_path / "out", Order(client=0))
    assert done.sheet.top_k == 1
    card = (tmp_path / "out" / "README.md").read_text()
    assert "- It sends each token to 1 expert; the model it comes from, to 2." in card
    assert "- The client's factor on the output of each MoE layer is multiplied into its experts." in card


ALONE = """
import sys
from transformers import AutoTokenizer, pipeline
answer = pipeline("text-generation", model=sys.argv[1])("wa is", max_new_tokens=4, do_sample=False)
print(answer[0]["generated_text"].startswith("wa is"), AutoTokenizer.from_pretrained(sys.argv[1])("wa, is").input_ids)
assert not [name for name in sys.modules if name.startswith("fedmoe")]
"""


def test_a_prompt_is_answered_without_fedmoe_and_without_a_network(runs, tmp_path):
    ran = runs("hfedmoe")
    export(ran.path, tmp_path / "out", Order(client=1))
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    command = [sys.executable, "-c", ALONE, str(tmp_path / "out")]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    tokens = data_of(ran.config).tokenizer.encode(["wa, is"])[0]
    assert done.stdout.strip() == f"True {tokens}"


@pytest.mark.parametrize("name", ["hfedmoe-lora", "hetlora", "flame", "hfedmoe-nf4"])
def test_peft_loads_the_adapters_over_the_model_that_federation_started_from(name, runs, tmp_path):
    ran = runs(name)
    done = export(ran.path, tmp_path / "out", Order("peft"))
    base = stock(tmp_path / "out" / "base")
    before = ran.rounds[0]["loss"]
    assert global_loss(base, ran.config) == pytest.approx(before, rel=SAME)
    found = PeftModel.from_pretrained(base, tmp_path / "out").eval()
    assert global_loss(found, ran.config) == pytest.approx(ran.last["loss"], rel=SAME)
    assert done.sheet.base == str(tmp_path / "out" / "base")
    assert front_matter(tmp_path / "out")["base_model"] == done.sheet.base


@pytest.mark.parametrize(
    ("name", "order", "says"),
    [
        ("hfedmoe", Order("peft"), r"algorithm='hfedmoe' of this run has no adapters .* --format hf"),
        ("flexlora", Order("peft"), r"algorithm='flexlora' of this run has no adapters"),
        ("hetlora", Order("peft", client=1), r"none of client 1's own; use --format hf"),
        ("hetlora", Order("peft", equal_experts=True), r"--equal-experts is for models.*leave it out"),
        ("hfedmoe", Order("gguf"), r"format 'gguf' is unknown; choose hf or peft"),
        ("hfedmoe", Order(client=4), r"client 4 is not in this run; it has clients 0 to 3"),
        ("flex_moe", Order(), r"algorithm='flex_moe' has no global model.* --client NUMBER"),
    ],
)
def test_what_no_file_can_hold_is_refused_by_name(name, order, says, runs, tmp_path):
    with pytest.raises(ValueError, match=says):
        export(runs(name).path, tmp_path / "out", order)
    assert not (tmp_path / "out").exists()


def test_grafts_are_refused_before_anything_is_read(runs, tmp_path):
    ran = runs("hfedmoe")
    copy = shutil.copytree(ran.path, tmp_path / "run")
    text = (copy / "config.toml").read_text().replace('algorithm = "hfedmoe"', 'algorithm = "fft_moe"')
    (copy / "config.toml").write_text(text)
    with pytest.raises(ValueError, match=r"'fft_moe' grafts a mixture beside every block"):
        export(copy, tmp_path / "out")


def test_a_model_that_is_not_the_judged_one_is_not_written(runs, tmp_path):
    """A record that says another loss stands for other code, another torch or another machine."""
    copy = shutil.copytree(runs("hfedmoe").path, tmp_path / "run")
    lines = [json.loads(line) for line in (copy / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        if line["type"] == "round" and line["round"] == 2:
            line["loss"] *= 1.001
    (copy / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(ValueError, match=r"the global model has a held-out loss of .* on record; export with"):
        export(copy, tmp_path / "out")
    assert not (tmp_path / "out").exists()


class Stops(NullObserver):
    """Presses Ctrl-C when a round has been judged."""

    def __init__(self, after: int) -> None:
        self.after = after

    def on_round(self, number: int, rounds: int, line: dict) -> None:
        if number == self.after:
            raise KeyboardInterrupt


def test_a_run_that_was_stopped_gives_the_model_of_its_last_checkpoint(runs, tmp_path):
    """Its records may go on beyond it: a kill can come between a round's lines and its checkpoint."""
    ran = runs("hfedmoe")
    config = Config.load(ran.path / "config.toml", [f"out={tmp_path / 'run'}", "rounds=4"])
    with pytest.raises(KeyboardInterrupt):
        simulate.run(config, observer=Stops(3))
    stopped = Ran(config, tmp_path / "run")
    assert stopped.last["round"] == 3
    judged = stopped.losses(2)[-1]
    with (stopped.path / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(stopped.last | {"round": 4, "personal_loss_C": [9.0] * 4}) + "\n")
    done = export(stopped.path, tmp_path / "out", Order(client=2))
    assert done.recorded == judged
    assert loss_of(stock(tmp_path / "out"), held_out(config, 2)) == pytest.approx(judged, rel=SAME)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "after round 3 of 4" in card
    assert f"| {judged:.3f} |\n" in card


@pytest.mark.parametrize("words", [("time.mode=buffered", "time.buffer=2"), ("ranks=2",), ("cohort.clients=2",)])
def test_other_kinds_of_runs_give_the_judged_models_too(words, runs, tmp_path):
    paced = tuple(f"memory={share}%,speed=1e9,downlink=10Mbit,uplink=5Mbit" for share in (30, 100))
    buffered = words[0] == "time.mode=buffered"
    if words == ("ranks=2",):  # played by one process: what is asked here is whether such a configuration is read
        ran = runs("hfedmoe")
        shutil.copytree(ran.path, tmp_path / "run")
        text = (tmp_path / "run" / "config.toml").read_text()
        (tmp_path / "run" / "config.toml").write_text(re.sub(r"(?m)^ranks = 1$", "ranks = 2", text))
        ran = Ran(ran.config, tmp_path / "run")
    else:
        ran = runs("hfedmoe", *words, *((f"budgets={';'.join(paced)}",) if buffered else ()))
    for client in (None, 1):
        done = export(ran.path, tmp_path / f"out-{client}", Order(client=client, equal_experts=True))
        recorded = ran.last["loss"] if client is None else ran.losses(client)[-1]
        assert done.recorded == recorded
        assert done.sheet.loss == pytest.approx(recorded, rel=SAME)


def test_a_model_that_the_run_did_not_judge_is_written_and_says_so(runs, tmp_path):
    ran = runs("hfedmoe", "eval.personal=false")
    done = export(ran.path, tmp_path / "out", Order(client=1))
    assert done.recorded is None
    assert "(not on record)" in told(done)[0]
    assert "with eval.personal=true a run judges each client's own." in told(done)[1]
    assert loss_of(stock(tmp_path / "out"), held_out(ran.config, 1)) == pytest.approx(done.sheet.loss, rel=SAME)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| loss (nats) | n/a | n/a |" in card


def front_matter(folder: Path) -> dict:
    _, head, _ = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(head)


def test_the_card_says_where_the_model_comes_from(runs, tmp_path):
    ran = runs("hfedmoe")
    export(ran.path, tmp_path / "out", Order(client=3))
    head, card = front_matter(tmp_path / "out"), (tmp_path / "out" / "README.md").read_text()
    assert head["library_name"] == "transformers"
    assert head["pipeline_tag"] == "text-generation"
    assert {"fedmoe", "hfedmoe"} <= set(head["tags"])
    summary = json.loads((ran.path / "summary.json").read_text())
    first, last = (f"{ran.losses(3)[place]:.3f}" for place in (0, -1))
    for text in (
        summary["corpus_sha256"],
        f"| loss (nats) | {first} | {last} |",
        "| data | jsonl:notes.jsonl |",
        "| partition | domain |",
        "| rounds | 2 of 2 |",
        "| memory=30% | 1 |",
        "6 of 8 in each of 2 MoE layers, 2 for each token",
        f"- transformers {transformers.__version__}",
    ):
        assert text in card
    assert str(ran.path.parent) not in card  # a card travels
    facts = json.loads((tmp_path / "out" / "fedmoe.json").read_text())
    assert facts["model_sha256"] == summary["model_hash"]
    assert facts["budget"] == "memory=80%"
    assert facts["seed"] == 0
