"""Writes the directory of a run that never happened, in exactly the formats that the simulator writes."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from fedmoe_core.config.run_config import Config
from fedmoe_core.data.federated import corpus_digest
from fedmoe_core.simulation.directory.claim import MARKER, claimed
from fedmoe_core.simulation.identity import code_version

TIERS = ("memory=24MiB", "memory=16MiB,down=2MiB", "experts=25%", "flops=40GFLOP,up=1.5MiB")
EXPERT_BYTES = 100_000
IDENTITY = {
    "corpus_sha256": corpus_digest("stdlib"),
    "model_sha256": "",
    "code": code_version("transformers"),
    "torch": version("torch"),
}
PACKAGES = ("asyncio", "email", "unittest", "tkinter", "idlelib", "encodings", "xml", "ctypes", "pydoc", "http")


def make_run(
    path: Path,
    *,
    algorithm: str = "hfedmoe",
    clients: int = 10,
    sampled: int = 0,
    layers: int = 2,
    experts: int = 16,
    rounds: int = 8,
    seed: int = 0,
    gain: float = 0.06,
    classification: bool = False,
    tiers: tuple[str, ...] = TIERS,
    **summary_changes: Any,
) -> Path:
    """A run whose held-out loss falls by ``gain`` nats; ``summary_changes`` overwrite keys of summary.json.

    ``sampled`` clients are drawn in each round; 0 = all of them take part in every round.
    """
    rng = np.random.default_rng([seed, len(algorithm), clients])
    path.mkdir(parents=True, exist_ok=True)
    data = "csv:news.csv" if classification else "stdlib"
    config = replace(
        Config.load(overrides=[f"data={data}"]),
        algorithm=algorithm,
        clients=clients,
        clients_per_round=sampled,
        rounds=rounds,
        seed=seed,
        budgets=tiers,
        out=str(path),
        threads=2,
    )
    if not (path / MARKER).exists():
        with claimed(path, force=False) as claim:
            claim.begin(IDENTITY)
            (path / "config.toml").write_text(config.to_toml())
    (path / "config.toml").write_text(config.to_toml())
    writer = _Writer(rng, clients=clients, layers=layers, experts=experts, rounds=rounds, sampled=sampled or clients)
    metrics, ledger = writer.records(gain=gain, classification=classification, tiers=tiers)
    _write_lines(path / "metrics.jsonl", metrics)
    _write_lines(path / "ledger.jsonl", ledger)
    _write(path / "partition.json", _partition(rng, clients, classification=classification))
    before, *_, after = [record for record in metrics if record["type"] == "round"]
    held = [int(np.sum(record["held_LE"])) for record in metrics if record["type"] == "client"]
    summary = {
        "algorithm": algorithm,
        "label": {"hfedmoe": "HFedMoE", "random": "random experts", "fedavg": "FedAvg"}[algorithm],
        "task": "classification" if classification else "causal_lm",
        "seed": seed,
        "rounds": rounds,
        "loss_before": before["loss"],
        "loss_after": after["loss"],
        "accuracy_before": before["accuracy"],
        "accuracy_after": after["accuracy"],
        "worst_client_loss": max(after["loss_clients"]),
        "bytes_down": after["bytes_down_total"],
        "bytes_up": after["bytes_up_total"],
        "flops": after["flops_total"],
        "peak_memory_bytes": max(line["real"]["memory_bytes"] for line in ledger),
        "budget_violations": 0,
        "refused_updates": sum(len(r.get("refused", ())) for r in metrics),
        "seconds": after["seconds"] * rounds,
        "engine_seconds": after["engine_seconds"] * rounds,
        "client_seconds": (after["seconds"] - after["engine_seconds"]) * rounds,
        "budgeted": True,
        **IDENTITY,
        "model_hash": "07ac" * 16,
        "experts_held_min": min(held),
        "experts_held_max": max(held),
    }
    _write(path / "summary.json", {**summary, **summary_changes})
    return path


class _Writer:
    def __init__(
        self, rng: np.random.Generator, *, clients: int, layers: int, experts: int, rounds: int, sampled: int
    ) -> None:
        self.rng, self.clients, self.layers, self.experts, self.rounds = rng, clients, layers, experts, rounds
        self.draw_rng, self.sampled = np.random.default_rng(clients), sampled
        self.importance_CLE = rng.gamma(0.7, 1.0, (1, layers, experts)) + rng.gamma(
            0.5, 0.5, (clients, layers, experts)
        )

    def records(self, *, gain: float, classification: bool, tiers: tuple[str, ...]) -> tuple[list[Any], list[Any]]:
        rng, clients = self.rng, self.clients
        metrics: list[Any] = []
        ledger: list[Any] = []
        level = (0.9 if classification else 4.31) + 0.12 * np.sin(
            1.0 + np.arange(clients)
        )  # one start for every method
        totals = {"bytes_down": 0, "bytes_up": 0, "flops": 0.0}
        for number in range(self.rounds + 1):
            done = 1 - np.exp(-3 * number / self.rounds)
            losses = level - gain * done * rng.uniform(0.7, 1.3, clients)
            refused: list[Any] = []
            covered = np.zeros((self.layers, self.experts), bool)
            drawn_D = np.sort(self.draw_rng.choice(clients, self.sampled if number else 0, replace=False))
            for client in drawn_D.tolist():
                record, entry = self._client(number, client, tiers[client % len(tiers)], losses[client])
                if number == 2 and client == drawn_D[-1]:
                    record |= {"status": "failed", "error": "loss is NaN at step 3", "loss_last": None}
                    refused.append({"client": client, "reason": "loss is NaN at step 3"})
                covered |= np.array(record["trained_LE"], bool)
                for key in totals:
                    totals[key] += entry["real"][key]
                metrics.append(record)
                ledger.append(entry)
            accuracies = 0.7 + 0.1 * done + rng.normal(0, 0.01, clients) if classification else None
            metrics.append(
                {
                    "type": "round",
                    "round": number,
                    "loss": float(losses.mean()),
                    "accuracy": None if accuracies is None else float(accuracies.mean()),
                    "loss_clients": losses.tolist(),
                    "accuracy_clients": None if accuracies is None else accuracies.tolist(),
                    **{f"{key}_total": value for key, value in totals.items()},
                    "seconds": 3.3 + float(rng.uniform(0, 0.3)),
                    "engine_seconds": 0.31,
                    "refused": refused,
                    "importance_LE": (self.importance_CLE.mean(0) * rng.uniform(0.9, 1.1, covered.shape)).tolist(),
                    "lost_mass": 0.31 - 0.02 * number,
                    "load_cv": 0.5 + 0.01 * number if number else None,
                    "coverage": float(covered.mean()) if number else None,
                }
            )
        return metrics, ledger

    def _client(self, number: int, client: int, tier: str, loss: float) -> tuple[dict[str, Any], dict[str, Any]]:
        rng = self.rng
        keep = max(1, self.experts // 4 + client % 3)
        score_LE = self.importance_CLE[client] * rng.uniform(0.6, 1.4, (self.layers, self.experts))
        held_LE = score_LE >= np.sort(score_LE, axis=1)[:, -keep][:, None]
        trained_LE = held_LE & (score_LE >= np.median(score_LE[held_LE])) if client % 4 == 3 else held_LE
        count = int(held_LE.sum())
        cost = {
            "memory_bytes": 4_000_000 + 16 * EXPERT_BYTES // 4 * count,
            "flops": 3.3e10 + 2e9 * (client % 3),
            "bytes_down": EXPERT_BYTES * count,
            "bytes_up": EXPERT_BYTES * int(trained_LE.sum()),
            "experts": count,
        }
        budget: dict[str, float | None] = dict.fromkeys(cost)
        for part in tier.split(","):
            name, _, amount = part.partition("=")
            key = {"memory": "memory_bytes", "down": "bytes_down", "up": "bytes_up"}.get(name, name)
            limit = cost[key] * 1.06 if amount.endswith(("iB", "FLOP")) else self.layers * self.experts // 2
            budget[key] = float(round(limit))
        real = {key: value * 0.97 if key in ("memory_bytes", "flops") else value for key, value in cost.items()}
        record = {
            "type": "client",
            "round": number,
            "client": client,
            "tier": tier,
            "held_LE": held_LE.astype(int).tolist(),
            "trained_LE": trained_LE.astype(int).tolist(),
            "loss_first": float(loss + 0.05),
            "loss_last": float(loss - 0.02),
            "steps": 8,
            "top_k": 2,
            "status": "ok",
            "error": "",
        }
        entry = {
            "round": number,
            "client": client,
            "budget": budget,
            "predicted": cost,
            "real": {**real, "seconds": 0.3},
        }
        return record, entry


def _partition(rng: np.random.Generator, clients: int, *, classification: bool) -> dict[str, Any]:
    if classification:
        names = ["World", "Sports", "Business", "Sci/Tech"]
        counts = rng.multinomial(500, [0.25] * 4, clients) * rng.dirichlet([0.5] * 4, clients)
        return {
            "names": names,
            "clients": [f"client {c}" for c in range(clients)],
            "counts": counts.astype(int).tolist(),
        }
    names = [PACKAGES[c % len(PACKAGES)] + ("" if c < len(PACKAGES) else f" {c}") for c in range(clients)]
    return {"names": names, "clients": names, "counts": np.diag(rng.integers(40, 400, clients)).tolist()}


def _write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content))


def _write_lines(path: Path, records: list[Any]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
