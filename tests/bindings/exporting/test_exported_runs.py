"""Which runs can be exported: stopped and buffered ones, those that judged no client's own model; and which cannot."""

from __future__ import annotations

import json
import re
import shutil

import pytest
from exported_runs import SAME, Ran, held_out, loss_of, stock

from fedmoe_core.config.run_config import Config
from fedmoe_core.exporting.export import Order, export, told
from fedmoe_core.simulation import run as simulate
from fedmoe_core.simulation.observer import NullObserver


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


def test_a_run_on_real_devices_is_refused(runs, tmp_path):
    copy = shutil.copytree(runs("hfedmoe").path, tmp_path / "run")
    lines = [json.loads(line) for line in (copy / "ledger.jsonl").read_text().splitlines()]
    wired = [json.dumps(line | {"wire": {"bytes_down": 1, "bytes_up": 1}}) + "\n" for line in lines]
    (copy / "ledger.jsonl").write_text("".join(wired))
    with pytest.raises(ValueError, match="was trained on real devices, whose data are not here"):
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
