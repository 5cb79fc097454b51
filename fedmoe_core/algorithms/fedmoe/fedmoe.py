"""FedMoE (arXiv 2408.11304): a coarse sub-model for each client, then experts added or pruned where it stops improving.

Equation and section numbers are the paper's. Tags: [P] read in the paper, [E] our reading where the paper is silent. A
client's first participation is its stage one: those whose budget bears the whole model profile it on validation data.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from fedmoe_core.algorithms.base import Algorithm, NextModel
from fedmoe_core.algorithms.fedmoe.full_model_probe import WholeModelProbe, affordable_probe, model_rest
from fedmoe_core.algorithms.fedmoe.prefix_search import prefix_search, prefixes
from fedmoe_core.algorithms.fedmoe.similarity import (
    adjust_experts,
    cosine_similarity,
    most_similar,
    pooled_profile,
    recommended_change,
    weighted_profile,
)
from fedmoe_core.config.systems import Equation, System
from fedmoe_core.layer.router_loss import SwitchBalance
from fedmoe_core.messages.plan import ExpertPlan, Extras
from fedmoe_core.messages.profile import ClientProfile
from fedmoe_core.messages.result import LocalResult
from fedmoe_core.messages.update import ClientUpdate, Weights
from fedmoe_core.model.spec import Evaluation
from fedmoe_core.selection.importance import cumulative
from fedmoe_core.selection.within_budget import Allowance
from fedmoe_core.server.means import Sums, modular_mean
from fedmoe_core.server.planning import client_allowance, plan_of_masks
from fedmoe_core.server.state import Population, ServerState, recall, remember

NEW, SETTLED, TRIAL, FROZEN = range(4)  # no own sub-model yet; has one; has a changed one; keeps it for good


@dataclass(frozen=True)
class ClientMap:
    """The paper's client-expert map with each client's profiles and history; a row per client, in the server's memory.

    Attributes:
        probe_CLE: p of stage one, by the full model; 0 where the client did not probe.
        usage_CLE: p of stage two, by the client's own sub-model; 0 outside it and where nothing was heard.
        held_CLE: the experts of the sub-model; none while ``phase_C`` is NEW.
        before_CLE: those before the change that is on TRIAL.
        best_C: best validation quality so far.
        stale_C: participations since.
        phase_C: NEW, SETTLED, TRIAL or FROZEN.
    """

    probe_CLE: np.ndarray
    usage_CLE: np.ndarray
    held_CLE: np.ndarray
    before_CLE: np.ndarray
    best_C: np.ndarray
    stale_C: np.ndarray
    phase_C: np.ndarray

    @classmethod
    def of(cls, state: ServerState, population: Population) -> ClientMap:
        """Return a copy of what the state remembers; a fresh state knows nothing about any client."""
        if state.memory:
            return recall(cls, state.memory)
        clients = len(population.budgets)
        shape = (clients, *population.every_LE.shape)
        masks = np.zeros(shape, dtype=bool), np.zeros(shape, dtype=bool)
        counts = np.zeros(clients, dtype=np.int64), np.full(clients, NEW, dtype=np.int64)
        return cls(np.zeros(shape), np.zeros(shape), *masks, np.full(clients, -np.inf), *counts)

    def stage_one(self, client: int, population: Population) -> np.ndarray:
        """Return p of eq. 3: the client's own probe; else the mean of the probes by data volume [P]; else the server's
        own pass over public data [E]. All clients of a run have the same task, so the mean is over all that probed."""
        if self.probe_CLE[client].any():
            return np.asarray(self.probe_CLE[client])
        probed = np.flatnonzero(self.probe_CLE.any(axis=(1, 2)))
        if len(probed):
            return pooled_profile(self.probe_CLE[probed], population.samples_C[probed])
        return cumulative(population.prior.hits_LE, population.prior.tokens_L)


@dataclass(frozen=True)
class FedMoE(Algorithm):
    """The paper's two stages under the budgets of this package: memory, traffic, count and operations."""

    needs_validation: ClassVar[bool] = True
    wishes: ClassVar[tuple[type, ...]] = (WholeModelProbe, SwitchBalance)
    card: ClassVar[System] = System(
        name="fedmoe",
        title="FedMoE",
        paper="Mei et al., FedMoE, arXiv 2408.11304",
        equations=(
            Equation("1", "P", "local loss, labels smoothed, plus the Switch balance loss over the experts present"),
            Equation("3", "P", "the most used experts of each layer, as deep as a share of the budget allows"),
            Equation(
                "stage one", "P", "LoRA on every expert of the full model, then its activations on validation data"
            ),
            Equation(
                "stage one, mean", "P", "mean profile by data volume for clients that cannot hold the whole model"
            ),
            Equation("algorithm 1", "P", "unused experts stay, a single holder replaces, several are averaged"),
            Equation("algorithm 1, router", "P", "router rows in the same pattern; dense parameters by FedAvg"),
            Equation("4-6", "P", "similar clients, how many experts to add or remove, and which"),
            Equation("trial", "P", "a changed sub-model that brings no improvement is reverted and frozen"),
            Equation(
                "constants", "E", "reserve, patience, K, balance weight and smoothing (0), none given in the paper"
            ),
        ),
        approximated=(
            "stage one, 5 times a round's steps on adapters, is part of a client's first round, which also trains a "
            "sub-model by the profiles known so far; a client whose budget does not pay all 5 tunes less, down to none",
            "in language modelling, minus the validation loss stands for accuracy",
        ),
    )

    adapters = "own"  # those of stage one; they are never aggregated

    def plan(self, state: ServerState, clients: Sequence[int]) -> list[ExpertPlan]:
        """Plan each client's sub-model by the client-expert map; its first with a probe, where it can bear one."""
        known = ClientMap.of(state, self.population)  # once: it has arrays of all clients
        return [self._plan(state, known, client) for client in clients]

    def _plan(self, state: ServerState, known: ClientMap, client: int) -> ExpertPlan:
        facts, extras = self.population, self._extras()
        if known.phase_C[client] != NEW:
            return plan_of_masks(facts, state, client, known.held_CLE[client], extras=extras)
        first = state.visits[client] == 0
        probing = affordable_probe(
            facts, client, extras, tunings=facts.config.fedmoe.tunings, first_participation=first
        )
        if probing is not None:
            extras = replace(extras, before=probing[0], surcharge=replace(probing[1], memory_bytes=0, experts=0))
        held_LE = self._coarse(known, client, client_allowance(facts, client, first_participation=first, extras=extras))
        if probing is not None:
            surcharge = replace(probing[1], bytes_down=model_rest(facts, held_LE))
            extras = replace(extras, surcharge=surcharge)
        return plan_of_masks(facts, state, client, held_LE, extras=extras)

    def client(self, plan: ExpertPlan, result: LocalResult) -> Weights:
        """Return deltas of experts that it used, |D_c| each, router rows alike; its profile and validation quality."""
        samples = self.population.sample_weight(plan.client)
        used_LE = samples * (plan.trainable_LE & (result.profile.rows_LE > 0))
        return Weights(
            experts_LE=used_LE,
            routers_LE=used_LE,
            private=result.probed,  # its bytes are in the plan's surcharge
        )

    def apply(self, state: ServerState, sums: Sums, updates: Sequence[ClientUpdate]) -> NextModel:
        """Do modular aggregation; then stage one ends for the new, stage two goes on for the others (algorithm 1).

        The mean of one delta is that delta: where a single client used an expert, its copy replaces the server's.
        """
        params = modular_mean(sums, state.params)
        known = ClientMap.of(state, self.population)
        before = replace(known, held_CLE=known.held_CLE.copy())  # advice must not depend on who was heard first
        for update in updates:
            if "probe" in update.private:
                known.probe_CLE[update.client] = update.private["probe"].numpy()
            if update.validation_profile is not None and known.phase_C[update.client] != NEW:
                known.usage_CLE[update.client] = self._usage(known, update.client, update.validation_profile)
        for update in updates:
            if update.validation is None:
                continue
            if known.phase_C[update.client] == NEW:
                allowance = client_allowance(
                    self.population, update.client, first_participation=False, extras=self._extras()
                )
                known.held_CLE[update.client] = self._coarse(known, update.client, allowance)
                known.phase_C[update.client] = SETTLED
            else:
                self._adapt(known, before, update.client, self.quality(update.validation))
        return params, remember(known)

    def quality(self, found: Evaluation) -> float:
        """Return the accuracy on validation data [P]; minus the loss where the task has no classes [E]."""
        by_accuracy = self.population.spec.task == "classification"
        return (found.correct if by_accuracy else -found.loss_sum) / found.count

    def _extras(self) -> Extras:
        """What every client does besides training: balance its router (eq. 1) and validate (algorithm 1)."""
        weight = self.population.config.fedmoe.balance
        return Extras(aux=SwitchBalance(weight, served_only=True) if weight > 0 else None, validate=True)

    def _coarse(self, known: ClientMap, client: int, allowance: Allowance) -> np.ndarray:
        """Eq. 3 within a share of the budget; within all of it where that share cannot hold an expert per layer [E]."""
        p_LE, fill = known.stage_one(client, self.population), self.population.config.fedmoe.fill
        least_D = allowance.base_D + (allowance.costs_DLE * prefixes(p_LE, 0.0)).sum(axis=(1, 2))
        if (least_D > np.floor(fill * allowance.limits_D)).any():
            fill = 1.0
        return prefix_search(p_LE, allowance.costs_DLE, allowance.limits_D, base_D=allowance.base_D, fill=fill)

    def _usage(self, known: ClientMap, client: int, profile: ClientProfile) -> np.ndarray:
        """p of the sub-model, a moving average over participations; an expert's first p is taken whole [E]."""
        old_LE, new_LE = known.usage_CLE[client], cumulative(profile.rows_LE, profile.tokens_L)
        step_LE = np.where(old_LE > 0, self.population.config.fedmoe.smoothing, 1.0)
        return np.where(profile.held_LE, old_LE + step_LE * (new_LE - old_LE), 0.0)

    def _adapt(self, known: ClientMap, before: ClientMap, client: int, quality: float) -> None:
        """One participation of stage two: after ``patience`` of them without improvement, change, or revert and freeze.

        An improvement while a change is on trial makes the change stand [E].
        """
        phase, improved = known.phase_C[client], quality > known.best_C[client]
        known.best_C[client] = max(quality, known.best_C[client])
        known.stale_C[client] = 0 if improved else known.stale_C[client] + 1
        if improved and phase == TRIAL:
            known.phase_C[client] = SETTLED
        if known.stale_C[client] < self.population.config.fedmoe.patience or phase == FROZEN:
            return
        if phase == TRIAL:
            known.held_CLE[client], known.phase_C[client] = known.before_CLE[client], FROZEN
            return
        held_LE = self._recommended(replace(known, held_CLE=before.held_CLE), client)
        if not np.array_equal(held_LE, known.held_CLE[client]):
            known.before_CLE[client] = known.held_CLE[client]
            known.held_CLE[client], known.phase_C[client], known.stale_C[client] = held_LE, TRIAL, 0

    def _recommended(self, known: ClientMap, client: int) -> np.ndarray:
        """Apply eqs. 4-6: as many experts as similar clients have, by their profiles, within the whole budget."""
        p_CLE = known.usage_CLE * known.held_CLE
        similarity_CC = cosine_similarity(p_CLE)
        others = [other for other in most_similar(similarity_CC, client, len(p_CLE)) if p_CLE[other].any()]
        similar = others[: self.population.config.fedmoe.similar]
        change = recommended_change(known.held_CLE.sum(axis=(1, 2)), client, similar)
        if change == 0:
            return np.asarray(known.held_CLE[client])
        phat_LE = weighted_profile(p_CLE, similarity_CC[client], similar)
        allowance = client_allowance(self.population, client, first_participation=False, extras=self._extras())
        return adjust_experts(
            known.held_CLE[client], phat_LE, change, costs_DLE=allowance.costs_DLE, limits_D=allowance.free_D
        )
