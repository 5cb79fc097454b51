"""A run over the published Flower: real processes, TLS, keys; a device dies, others lie, and the model has the bits.

`make flower` runs this in an environment of its own, because Flower wants an older typer and an older rich.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny_corpus import make_config

pytest.importorskip("flwr")

from loopback import Loopback, until, write_key

from fedmoe_core.config.run_config import Config
from fedmoe_core.messages.result import LocalFailure
from fedmoe_core.simulation.cohorts import training
from fedmoe_core.simulation.observer import NullObserver
from fedmoe_core.simulation.run import run

HOUSE = Path(__file__).parents[3]
HONEST, HOSTILE = HOUSE / "examples" / "flower", HOUSE / "tests" / "support" / "trust" / "hostile_app"
LONGEST = 400  # seconds for a run whose rounds take 60 at most


@pytest.fixture(scope="module")
def loopback(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loopback]:
    with Loopback(tmp_path_factory.mktemp("flower"), clients=4) as started:
        yield started
    until(lambda: not started.processes(), 30)


def begun(loopback: Loopback, app: Path, config: Config) -> Path:
    """Start a run; its directory."""
    path = loopback.folder / f"{Path(config.out).name}.toml"
    path.write_text(config.to_toml())
    told = loopback.call("flwr", "run", str(app), "ours", "--run-config", f'config="{path}" wait=200')
    assert told.returncode == 0, told.stdout + told.stderr
    return Path(config.out)


def rounds(out: Path) -> list[dict[str, Any]]:
    path = out / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [line for line in lines if line["type"] == "round"]


def finished(loopback: Loopback, out: Path) -> dict[str, Any]:
    try:
        until((out / "summary.json").exists, LONGEST)
    except TimeoutError:
        raise AssertionError(loopback.said("link")[-3000:]) from None
    found: dict[str, Any] = json.loads((out / "summary.json").read_text())
    return found


def simulated(config: Config, failures: set[tuple[int, int]], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The simulator's run in which some (round, client), counted from 0, fail."""
    sound = training.local_round

    def local_round(adapter: Any, params: Any, plan: Any, **how: Any) -> Any:
        if (plan.round, plan.client) in failures:
            return LocalFailure(plan.predicted, "as over the network")
        return sound(adapter, params, plan, **how)

    monkeypatch.setattr(training, "local_round", local_round)
    return run(replace(config, out=f"{config.out}-simulated"), observer=NullObserver())


def private(loopback: Loopback, out: Path) -> None:
    """The secret of a run lies where its owner alone can read it, and in nothing that Flower keeps or says."""
    path = out / "secret.json"
    key = json.loads(path.read_text())["key"]
    assert path.stat().st_mode & 0o777 == 0o600
    files = [*loopback.folder.rglob("*"), *(path for path in out.rglob("*") if path.name != "secret.json")]
    for file in files:
        if file.is_file():
            content = file.read_bytes()
            assert key.encode() not in content, file
            assert bytes.fromhex(key) not in content, file


def refusals(out: Path) -> dict[tuple[int, int], str]:
    """Reasons by (round, client), counted from 0."""
    return {(line["round"] - 1, told["client"]): told["reason"] for line in rounds(out) for told in line["refused"]}


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "words",
    [("privacy.clip=0.05",), ("algorithm=flux", "rounds=2", "warmup.steps=6")],  # each with a trunk of its own to send
    ids=["clipped", "flux"],
)
def test_inv10_flower_gives_the_bits_of_the_simulator(
    loopback: Loopback, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]
) -> None:
    """Flux asks devices for measurements of its own. A clip without noise leaves bits to compare."""
    name = words[0].partition(".")[0].replace("=", "-")
    config = make_config(tmp_path, tmp_path / "shared")("train.timeout=120", "rounds=1", *words, out_name=name)
    out = begun(loopback, HONEST, config)
    there = finished(loopback, out)
    here = simulated(config, set(), monkeypatch)
    assert refusals(out) == {}
    assert there["model_hash"] == here["model_hash"]
    if config.privacy.clip:
        private(loopback, out)
    ledger = [json.loads(line) for line in (out / "ledger.jsonl").read_text().splitlines()]
    assert all(line["real"]["bytes_down"] < line["wire"]["down"] for line in ledger)
    assert all(line["real"]["bytes_up"] < line["wire"]["up"] for line in ledger)


@pytest.mark.timeout(900)
def test_inv10_a_device_that_dies_and_others_that_lie_are_named_and_leave_the_bits_of_a_run_without_them(
    loopback: Loopback, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(tmp_path, tmp_path / "shared")("train.timeout=60", "rounds=3", out_name="dying")
    out = begun(loopback, HOSTILE, config)
    until(lambda: len(rounds(out)) >= 2, LONGEST)  # round 1 is on record
    loopback.kill("node-3")
    there, told = finished(loopback, out), refusals(out)
    assert told[2, 3] in ("did not answer within 60 s", "is not connected")
    assert "holds no bytes of fedmoe" in told[1, 0]
    assert "its app failed" in told[1, 1]
    assert "does not match its checksum" in told[2, 1]
    # Whatever else a slow machine let fail is on record too, so the simulator can do the same.
    here = simulated(config, set(told), monkeypatch)
    assert there["model_hash"] == here["model_hash"]
    assert there["refused_updates"] == len(told)


@pytest.mark.timeout(200)
def test_inv12_no_process_of_a_deployment_tries_another_way_out(loopback: Loopback) -> None:
    """After whole runs: whatever Flower's commands and apps wanted, but for gRPC's own connections."""
    noted = loopback.noted()
    assert [line for line in noted if not line.endswith(": watched")] == []
    for command in ("flower-superlink", "flower-supernode", "flwr", "flwr-serverapp", "flwr-clientapp"):
        assert any(command in line.partition(": ")[0] for line in noted), noted
    probe = "import socket, contextlib\nwith contextlib.suppress(OSError): socket.getaddrinfo('example.invalid', 80)"
    subprocess.run([sys.executable, "-c", probe], env=loopback.environment, check=True)
    assert "example.invalid" in loopback.noted()[-1]


@pytest.mark.timeout(200)
@pytest.mark.parametrize("trouble", ["a certificate of another authority", "a key that is not registered"])
def test_who_does_not_belong_is_not_let_in(loopback: Loopback, trouble: str) -> None:
    write_key(loopback.folder, "stranger")
    wrong = trouble.startswith("a certificate")
    words = loopback.node_words("node-0" if wrong else "stranger", authority="wrong" if wrong else "right")
    name = "wrong-authority" if wrong else "stranger"
    loopback.start(name, "flower-supernode", *words, "--max-retries", "1", "--max-wait-time", "5")
    until(lambda: loopback.started[name].poll() is not None, 120)
    assert loopback.started[name].returncode != 0
    said = loopback.said(name).lower()
    assert ("certificate" in said) if wrong else ("failed to activate" in said), said[-1000:]
    assert os.getpid() not in loopback.processes()
