"""What rank 0 writes of a run: configuration, metrics, ledger, checkpoint and summary, all safe to interrupt."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from hashlib import sha256
from typing import Any

import numpy as np
from torch import Tensor

from fedmoe_core.base.files import json_text, require_file, write_json, write_whole
from fedmoe_core.budget.limits import Budget
from fedmoe_core.privacy.account import spent, spent_in_all
from fedmoe_core.server.state import ServerState, pack_state
from fedmoe_core.simulation.clock.times import has_clock, time_facts, time_summary
from fedmoe_core.simulation.directory.checkpoint import save_checkpoint
from fedmoe_core.simulation.directory.claim import Claim
from fedmoe_core.simulation.directory.health import kept_budgets, nothing_trained
from fedmoe_core.simulation.directory.history import require_history
from fedmoe_core.simulation.directory.lines import client_record, guard_facts, guard_summary, ledger_line, results_of
from fedmoe_core.simulation.directory.prefix_log import PrefixLog
from fedmoe_core.simulation.directory.seal import SUMMARY, sealed
from fedmoe_core.simulation.directory.secret_file import write_secret
from fedmoe_core.simulation.directory.standing import AFRESH, Standing
from fedmoe_core.simulation.evaluation import HeldOut
from fedmoe_core.simulation.round import Round
from fedmoe_core.simulation.worlds.federation import Federation

METRICS, LEDGER, PARTITION = "metrics.jsonl", "ledger.jsonl", "partition.json"
Records = Sequence[Mapping[str, Any]]
REFUSED = ("failed", "refused")  # an update that came late is on record as that


class RunLog:
    """What rank 0 writes. A round is on record once its checkpoint is; later lines are cut off on resume."""

    def __init__(self, claim: Claim, world: Federation) -> None:
        self.out, self.run, self.world = claim.path, claim.id, world
        out = self.out
        self.totals: dict[str, float] = {"bytes_down_total": 0, "bytes_up_total": 0, "flops_total": 0.0}
        if has_clock(world.population):
            self.totals["virtual_seconds_total"] = 0.0
        self.unbilled_seconds = 0.0  # of the last commit; its round's line was written before it
        self.metrics, self.ledger = PrefixLog(out / METRICS), PrefixLog(out / LEDGER)
        self.partition = _partition_text(world)

    @classmethod
    def create(cls, claim: Claim, world: Federation) -> RunLog:
        """Start a run directory: an earlier run's files go, then the marker, configuration and partition come."""
        claim.begin(world.identity.facts())
        log, out = cls(claim, world), claim.path
        write_whole(out / "config.toml", world.config.to_toml())
        write_whole(out / PARTITION, log.partition)
        if world.secret is not None:
            write_secret(out, world.secret)
        log.metrics, log.ledger = PrefixLog.create(out / METRICS), PrefixLog.create(out / LEDGER)
        return log

    @classmethod
    def reopen(cls, claim: Claim, world: Federation, standing: Standing, state: ServerState) -> RunLog:
        """Continue a run directory from its checkpoint: the lines that it counted stay, those of a later round go.

        Raises:
            ValueError: a log or the partition is not what this run wrote; nothing was changed, except that lines of a
                round without a checkpoint may be gone.
        """
        log = cls(claim, world)
        log._require_partition(standing.partition)
        log.metrics = PrefixLog.reopen(log.metrics.path, standing.metrics, round=standing.round)
        log.ledger = PrefixLog.reopen(log.ledger.path, standing.ledger, round=standing.round)
        require_history(log.out, state)
        try:
            records, entries = log.metrics.read(), log.ledger.read()
            log._summary(state, "", records, entries)  # as after the last round: what it reads is there
            for line in records:
                if line["type"] == "round":
                    log.totals = {name: line[name] + 0 for name in log.totals}
        except (KeyError, IndexError, TypeError, AttributeError, ArithmeticError, ValueError) as error:
            why = f"{type(error).__name__}: {error}"
            raise ValueError(f"the logs in {log.out} hold what no run writes ({why:.80}); {AFRESH}") from error
        return log

    def _require_partition(self, on_record: str) -> None:
        """Refuse another partition than the run's; write the file again where it is missing, for it can be made."""
        path = self.out / PARTITION
        if sha256(self.partition.encode()).hexdigest() != on_record:
            raise ValueError(
                f"the data of {self.out} are dealt to the clients otherwise than when it began; resume with the fedmoe "
                "and the files that began it"
            )
        require_file(path, most=len(self.partition.encode()))
        if not path.exists():
            write_whole(path, self.partition)
        if path.read_bytes() != self.partition.encode():
            raise ValueError(f"{path} was changed; remove it, and resume writes it again")

    def commit(self, state: ServerState, beside: Mapping[str, Tensor] | None = None) -> None:
        """Write the checkpoint atomically, with what a run carries ``beside`` its state; then the round is played.

        The key of the round before goes once the checkpoint has come: after a kill in between the old one is there, and
        leads to the next.
        """
        began, config = time.perf_counter(), self.world.config
        secret = None if self.world.secret is None else self.world.secret.at(state.round)
        standing = Standing(
            round=state.round,
            run=self.run,
            identity=self.world.identity.facts(),
            metrics=self.metrics.prefix(),
            ledger=self.ledger.prefix(),
            partition=sha256(self.partition.encode()).hexdigest(),
            secret="" if secret is None else secret.digest,
        )
        tensors = pack_state(state) | dict(beside or {})
        save_checkpoint(self.out / "checkpoint", tensors, standing.facts(), config.decisive())
        if secret is not None:
            write_secret(self.out, secret)
        self.unbilled_seconds = time.perf_counter() - began

    def before(self, held: HeldOut) -> dict[str, Any]:
        """Write the line of the warm model, round 0."""
        line = {"type": "round", "round": 0, **results_of(held), **self.totals}
        line |= {"seconds": held.seconds, "engine_seconds": 0.0, "refused": []}
        self.metrics.append(line)
        return line

    def round(self, played: Round, held: HeldOut | None, state: ServerState) -> dict[str, Any]:
        """Write the lines of one round: every client's, the ledger's, and the round's own, which it returns."""
        began, number = time.perf_counter(), played.index + 1
        plans = {plan.client: plan for plan in played.plans}
        budgets = self.world.population.budgets
        self.ledger.append(*[ledger_line(number, u, plans[u.client], budgets, played.time) for u in played.updates])
        trained = [plans[u.client].trainable_LE & (u.expert_weight_LE > 0) for u in played.updates if u.status == "ok"]
        profiles = [update.profile for update in played.updates if update.profile is not None]
        lost = [profile.lost_mass_L / np.maximum(profile.tokens_L, 1) for profile in profiles]
        costs = [update.cost for update in played.updates]
        for name in ("bytes_down", "bytes_up", "flops"):
            self.totals[f"{name}_total"] += sum(getattr(cost, name) for cost in costs)
        if played.time is not None:
            self.totals["virtual_seconds_total"] += played.time.seconds
        logging = time.perf_counter() - began + self.unbilled_seconds
        line = {
            "type": "round",
            "round": number,
            **({} if held is None else results_of(held)),
            **self.totals,
            "seconds": played.seconds + logging + (0.0 if held is None else held.seconds),
            "engine_seconds": played.engine_seconds + logging,
            "refused": [{"client": u.client, "reason": u.error} for u in played.updates if u.status in REFUSED],
            **time_facts(played.time, played.updates),
            "applied": played.applied,
            **spent(self.world.config, number),
            **guard_facts(played.guard),
            **({"cohorts": played.cohorts} if played.cohorts else {}),
        }
        if self.world.population.spec.num_layers:
            line |= {
                "importance_LE": self.world.algorithm.importance(state).tolist(),
                "lost_mass": float(np.mean(lost)) if lost else None,
                "load_cv": self._load_cv(played),
                "coverage": float(np.mean(np.any(trained, axis=0))) if trained else 0.0,
            }
        self.metrics.append(*[client_record(number, u, plans[u.client], budgets) for u in played.updates], line)
        return line

    def _load_cv(self, played: Round) -> float | None:
        """Coefficient of variation of the load, the data of the clients that trained an expert; mean over layers."""
        samples_C, done = self.world.population.samples_C, {u.client for u in played.updates if u.status == "ok"}
        loads = [samples_C[plan.client] * plan.trainable_LE for plan in played.plans if plan.client in done]
        return float(np.mean([coefficient_of_variation(load_E) for load_E in sum(loads)])) if loads else None

    def finish(self, state: ServerState, model_hash: str) -> dict[str, Any]:
        """Write ``summary.json`` from what the logs hold, so that a resumed run sums up the same."""
        summary = sealed(self.out, self._summary(state, model_hash, self.metrics.read(), self.ledger.read()))
        write_json(self.out / SUMMARY, summary)
        return summary

    def _summary(self, state: ServerState, model_hash: str, records: Records, entries: Records) -> dict[str, Any]:
        config, held_data = self.world.config, self.world.holdings
        rounds = [line for line in records if line["type"] == "round"]
        judged = [line for line in rounds if "evaluate_seconds" in line]
        first, last = judged[0], judged[-1]
        held = [int(entry["real"]["experts"]) for entry in entries if entry["real"]["experts"]]
        return {
            "algorithm": config.algorithm,
            "label": self.world.algorithm.label(config),
            "task": held_data.task,
            "seed": config.seed,
            "rounds": state.round,
            "loss_before": first["loss"],
            "loss_after": last["loss"],
            "accuracy_before": first["accuracy"],
            "accuracy_after": last["accuracy"],
            "worst_client_loss_before": _worst(first, "loss", max),
            "worst_client_loss": _worst(last, "loss", max),
            "worst_client_accuracy": _worst(last, "accuracy", min),
            **_personal_summary(last, self.world.population.budgets),
            "bytes_down": rounds[-1]["bytes_down_total"],
            "bytes_up": rounds[-1]["bytes_up_total"],
            "flops": rounds[-1]["flops_total"],
            "peak_memory_bytes": max((entry["real"]["memory_bytes"] for entry in entries), default=0),
            "experts_held_min": min(held, default=0),
            "experts_held_max": max(held, default=0),
            **kept_budgets(entries),
            **time_summary(self.world.population, self.world.holdings.clients, rounds),
            **spent_in_all(config, state.round),
            **guard_summary(rounds),
            "refused_updates": sum(len(line["refused"]) for line in rounds),
            **(how_clients_ran(records) if config.cohort.clients != 1 else {}),
            "nothing_trained": nothing_trained(records, config.min_clients),
            "seconds": math.fsum(line["seconds"] for line in rounds),
            "engine_seconds": math.fsum(line["engine_seconds"] for line in rounds),
            "client_seconds": math.fsum(entry["real"]["seconds"] for entry in entries),
            **self.world.identity.facts(),
            "model_hash": model_hash,
            "threads": config.threads,
            "partition": held_data.partition,
        }


def _partition_text(world: Federation) -> str:
    """``partition.json``: who owns how much of what; it follows from data and configuration alone."""
    held = world.holdings
    counts = {"names": held.names_D, "clients": held.clients, "counts": held.counts_CD.tolist()}
    return json_text(counts)


def how_clients_ran(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Count client rounds in cohorts, cohorts, and client rounds alone by the reason for it."""
    answered = [line for line in records if line["type"] == "client"]
    return {
        "clients_in_cohorts": sum(line.get("cohort", 1) > 1 for line in answered),
        "cohorts": sum(len(line.get("cohorts", ())) for line in records),
        "clients_alone": dict(Counter(line["alone"] for line in answered if line.get("alone"))),
    }


def _worst(line: Mapping[str, Any], kind: str, pick: Any) -> float | None:
    """The worst client's figure: of the global model, or of the clients' own where no global one exists."""
    values = line[f"{kind}_clients"] if line["loss_clients"] else line.get(f"personal_{kind}_C")
    return pick(values) if values else None


def _personal_summary(line: Mapping[str, Any], budgets: tuple[Budget, ...]) -> dict[str, Any]:
    """Each client's own model after the last round, and by tier (the budget's own words) its mean and its worst."""
    loss_C, accuracy_C = line.get("personal_loss_C"), line.get("personal_accuracy_C")
    tiers: dict[str, dict[str, Any]] = {}
    members_of: dict[str, list[int]] = {}
    for client, budget in enumerate(budgets if loss_C else ()):
        members_of.setdefault(budget.name, []).append(client)
    for name, members in members_of.items():
        tiers[name] = {"clients": len(members)}
        for kind, values, pick in (("loss", loss_C, max), ("accuracy", accuracy_C, min)):
            own = [values[client] for client in members] if values else []
            tiers[name] |= {f"{kind}_mean": float(np.mean(own)) if own else None}
            tiers[name] |= {f"{kind}_worst": pick(own) if own else None}
    return {"personal_loss_C": loss_C, "personal_accuracy_C": accuracy_C, "personal_tiers": tiers or None}


def coefficient_of_variation(load_E: np.ndarray) -> float:
    """Return standard deviation over mean of the load: the paper's measure of balance [N]; 0 without any load."""
    return float(load_E.std() / load_E.mean()) if load_E.sum() > 0 else 0.0
