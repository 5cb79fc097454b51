"""The tensorboard sink's event files, read back by TensorBoard: every step once, also after a kill and a resume."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from own_sinks import StopsAfter, watched
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2
from tiny_runs import write_notes

from fedmoe_bindings.tracking.tensorboard import TensorBoardSink
from fedmoe_core.budget.peak_memory import trace_memory
from fedmoe_core.config.run_config import Config
from fedmoe_core.simulation import run as simulate
from fedmoe_core.simulation.observer import NullObserver


@pytest.fixture(scope="module")
def notes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_notes(tmp_path_factory.mktemp("notes") / "notes.jsonl")


def read(out: Path) -> Any:
    found = EventAccumulator(str(out / "tensorboard"), size_guidance={"scalars": 0, "histograms": 0, "images": 0})
    return found.Reload()


def rounds_of(out: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["type"] == "round"]


def test_curves_importance_settings_and_summary(notes: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    summary = simulate.run(watched(notes, out, "tensorboard"), observer=NullObserver())
    found, rounds = read(out), rounds_of(out)
    losses = {event.step: event.value for event in found.Scalars("loss")}
    assert losses == pytest.approx({line["round"]: line["loss"] for line in rounds}, rel=1e-6)
    worst = [event.value for event in found.Scalars("tier_0_experts_12.5_/worst_client_loss")]
    assert worst == pytest.approx([line["loss_clients"][0] for line in rounds], rel=1e-6)
    assert [event.value for event in found.Scalars("summary/loss_after")] == pytest.approx([summary["loss_after"]])
    histograms = found.Histograms("importance/layer_1")
    assert [event.step for event in histograms] == [1, 2, 3]
    assert histograms[-1].histogram_value.sum == pytest.approx(sum(rounds[-1]["importance_LE"][1]))
    image = found.Images("importance")[-1]
    assert (image.step, image.width, image.height) == (3, 64, 16)
    (settings,) = [
        plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info.hparams
        for tag, content in found.PluginTagToContent("hparams").items()
        if tag.endswith("session_start_info")
    ]
    assert settings["train.lr"].number_value == 2e-3
    assert settings["algorithm"].string_value == "hfedmoe"


def test_after_a_kill_and_a_resume_every_step_is_there_once(notes: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    config = watched(notes, out, "tensorboard")
    with pytest.raises(KeyboardInterrupt):
        simulate.run(config, observer=StopsAfter(2))
    (file,) = (out / "tensorboard").iterdir()
    written = file.read_bytes()
    # A kill takes what was not on disk, here all from the last loss on and the end of the event before it.
    file.write_bytes(written[: written.rindex(b"\x04loss") - 30])
    assert [event.step for event in read(out).Scalars("loss")] == [0, 1]
    simulate.resume(out, observer=NullObserver())
    for name in ("loss", "seconds", "tier_0_experts_12.5_/loss", "summary/seconds"):
        steps = [event.step for event in read(out).Scalars(name)]
        assert steps == ([3] if name.startswith("summary") else [0, 1, 2, 3]), name


def test_no_torch_memory_is_taken_beside_a_client_that_trains(tmp_path: Path) -> None:
    sink = TensorBoardSink(Config.load(overrides=[f"out={tmp_path}", "clients=2"]))
    sink.on_start({})
    line = {"loss": 1.0, "loss_clients": [1.0, 2.0], "importance_LE": [[0.1] * 64] * 4}
    _, trace = trace_memory(lambda: sink.on_round(1, 2, line), torch.device("cpu"))
    sink.close()
    assert trace.peak == 0


def test_a_run_that_is_replaced_leaves_none_of_its_points(notes: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    simulate.run(watched(notes, out, "tensorboard"), observer=NullObserver())
    simulate.run(watched(notes, out, "tensorboard", "rounds=1", "seed=1"), observer=NullObserver(), force=True)
    losses = [event.value for event in read(out).Scalars("loss")]
    assert losses == pytest.approx([line["loss"] for line in rounds_of(out)], rel=1e-6)
