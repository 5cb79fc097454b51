"""What ``fedmoe export`` writes, loaded by transformers and peft alone, is the model that the run's report judged."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import transformers
import yaml
from exported_runs import SAME, SYSTEMS, data_of, global_loss, held_out, loss_of, stock
from peft import PeftModel

from fedmoe_core.exporting.export import Exported, Order, export, told
from fedmoe_core.exporting.judged import equal_experts, opened, own_plan
from fedmoe_core.simulation.observer import NullObserver

# Clients whose own models hold more experts in one layer than in the other.
UNEVEN = (("hfedmoe_plus", 0), ("fedmoe", 0), ("random", 0), ("hfedmoe-lora", 0), ("hfedmoe-nf4", 0))


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
    [
        *((name, 0) for name in SYSTEMS),
        ("hfedmoe", 3),
        ("flex_moe", 2),
        ("random", 1),
        ("flame", 2),
        ("hfedmoe-lora", 1),
    ],
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


def test_with_fewer_experts_than_choices_a_token_goes_to_those_there_are(runs, tmp_path):
    ran = runs("hfedmoe", "budgets=experts=2;experts=100%")
    done = export(ran.path, tmp_path / "out", Order(client=0))
    config = stock(tmp_path / "out").config
    assert (config.num_experts, config.num_experts_per_tok, done.sheet.top_k) == (1, 1, 1)
    assert "It sends each token to 1 expert; the model it comes from, to 2." in done.sheet.notes
    found = loss_of(stock(tmp_path / "out"), held_out(ran.config, 0))
    assert found == pytest.approx(ran.losses(0)[-1], rel=SAME)


def test_equal_experts_stay_inside_the_budget(runs):
    ran = runs("hfedmoe_plus")
    with opened(ran.path, ran.config, NullObserver(), warm=True) as found:
        for client in (0, 1, 3):
            plan = own_plan(found, client)
            assert np.ptp(plan.permitted_LE.sum(axis=1)) > 0
            equal = equal_experts(plan, np.asarray(found.world.algorithm.scores(found.state)[client]))
            cost = found.world.population.costs.predict(equal.permitted_LE, equal.trainable_LE, local_steps=1)
            assert cost.memory_bytes <= plan.budget.memory_bytes


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
