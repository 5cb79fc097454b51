"""Flux (arXiv 2508.19078): tune the experts of most utility, merge all the others into the slots that are left.

Equation numbers are the paper's. Tags: [N] read through published notes, [E] our reading where the paper is silent.
Letters: ``L`` MoE layers, ``E`` experts of a layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from fedmoe_core.algorithms.base import Algorithm, NextModel
from fedmoe_core.algorithms.flux.clustering import expert_features
from fedmoe_core.algorithms.flux.forward_gradients import ForwardEstimates, estimate_cost
from fedmoe_core.algorithms.flux.four_bit_profile import QuantizedProfile, profile_cost
from fedmoe_core.algorithms.flux.merging import merge_budgets, merged_experts, plan_merge
from fedmoe_core.algorithms.flux.utility import Roles, assign_roles, exploit_share, first_utility, utility
from fedmoe_core.base.rng import counter_rng
from fedmoe_core.budget.limits import NOTHING, Cost
from fedmoe_core.config.systems import Equation, System
from fedmoe_core.messages.plan import ExpertPlan, Extras
from fedmoe_core.messages.result import LocalResult
from fedmoe_core.messages.update import ClientUpdate, Weights
from fedmoe_core.selection.importance import cumulative
from fedmoe_core.selection.within_budget import choose
from fedmoe_core.server.means import Sums, modular_mean
from fedmoe_core.server.planning import bears, plan_of_masks
from fedmoe_core.server.state import ServerState


@dataclass(frozen=True)
class Profile:
    """What the server knows of one client: f_e and abar_e of its last profile, and |grad| of e where measured, else -1.

    All are (L, E). The profile was measured on the model of the round before.
    """

    freq_LE: np.ndarray
    attention_LE: np.ndarray
    grad_LE: np.ndarray


@dataclass(frozen=True)
class Flux(Algorithm):
    """A round: roles by utility, one slot for each cluster of the experts that are not tuned, a profile for the next.

    The budget decides how many: N experts could be trained in it; ``flux.tune_share`` of N are tuned (trained or
    explored), and merged experts fill what is left, more of them where frozen slots are cheaper [E].
    """

    card: ClassVar[System] = System(
        name="flux",
        title="Flux",
        paper="Chen et al., Flux, EuroSys 2026, arXiv 2508.19078",
        equations=(
            Equation("profiling", "N", "frequency and mean attention by expert on a 4-bit copy, one round stale"),
            Equation("1", "N", "merged slots of each layer: depth over variance of frequency, as a share"),
            Equation("clustering", "N", "PCA features, one fused K-means for all layers, no cluster across layers"),
            Equation("2", "N", "merged weights by frequency times attention; tokens re-routed, the router unchanged"),
            Equation("3", "N", "utility: tokens times root mean squared gradient norm; frequency before any gradient"),
            Equation("4", "N", "the experts of most utility within the tuning budget"),
            Equation("epsilon", "N", "trained (exploit) and forward-only (explore) shares; exploitation grows"),
            Equation("forward-only", "E", "central differences along normal directions, mean of their squares"),
        ),
        approximated=(
            "the profile runs on the round's local batches, not on all of a client's data, and before training instead "
            "of during aggregation; its model is the round's, so the next plan uses it one round stale",
            "a client whose budget cannot bear the 4-bit model (it counts as all experts) is profiled by the router "
            "statistics of its own training, without attention",
            "the gradient norms of eq. 3 are those of batches, not of single tokens; an expert never measured has the "
            "mean norm of those that were",
            "the server merges and sends merged experts; the paper's clients merge",
            "a budget of one slot per layer leaves none to merge: the best expert of each layer is tuned alone",
            "router rows of trained experts are averaged by data volume (we could not obtain the paper's text on this)",
        ),
        missing=("profiling in parallel with aggregation: rounds here take turns, so it saves no time",),
    )

    wishes: ClassVar[tuple[type, ...]] = (QuantizedProfile, ForwardEstimates)

    def plan(self, state: ServerState, clients: Sequence[int]) -> list[ExpertPlan]:
        """Plan every client; features are of the global model, so they are made once for all."""
        pairs = zip(*map(self.population.spec.keys_of, ("w_in", "w_out")), strict=True)
        weights = [(state.params[w_in], state.params[w_out]) for w_in, w_out in pairs]
        features_LED = expert_features(weights, seed=self.population.config.seed)
        return [self._plan(state, client, features_LED) for client in clients]

    def _plan(self, state: ServerState, client: int, features_LED: np.ndarray) -> ExpertPlan:
        facts, chosen = self.population, self.population.config.flux
        known, profiling = self.profile(state, client), self._profiling(state, client)
        utility_LE = utilities(known)
        before = QuantizedProfile() if profiling != NOTHING else None
        found = self._roles(state, client, utility_LE, profiling)
        if found is None:
            best_LE = self._trainable(state, client, utility_LE, profiling)
            return plan_of_masks(facts, state, client, best_LE, extras=Extras(surcharge=profiling, before=before))
        roles, slots = found
        merged_LE = ~(roles.exploit_LE | roles.explore_LE)
        merge = plan_merge(
            features_LED,
            merged_LE,
            merge_budgets(known.freq_LE, merged_LE, slots),  # eq. 1
            freq_LE=known.freq_LE,
            attention_LE=known.attention_LE,
            seed=facts.config.seed,
        )
        explored = tuple((int(layer), int(expert)) for layer, expert in np.argwhere(roles.explore_LE))
        exploring = estimate_cost(facts.costs, merge.stored_LE, explored=len(explored), probes=chosen.probes)
        extras = Extras(
            rows=merged_experts(state.params, merge),  # eq. 2
            alias_LE=np.where(merge.stored_LE, -1, merge.alias_LE),
            surcharge=profiling.with_extra(exploring),
            before=before,
            after=ForwardEstimates(explored, chosen.sigma, chosen.probes) if explored else None,
        )
        return plan_of_masks(
            facts, state, client, merge.stored_LE, roles.exploit_LE, scores_LE=utility_LE, extras=extras
        )

    def client(self, plan: ExpertPlan, result: LocalResult) -> Weights:
        """Send the trained experts, the profile, and gradient norms measured or estimated."""
        samples = self.population.sample_weight(plan.client)
        profile, no_attention_LE = result.profile, torch.ones(plan.trainable_LE.shape, dtype=torch.float64)
        own_LE = torch.from_numpy(cumulative(profile.hits_LE, profile.tokens_L))
        grad_LE = np.where(plan.trainable_LE, np.sqrt(profile.grad_sq_LE / max(len(result.losses), 1)), -1.0)
        if isinstance(plan.extras.after, ForwardEstimates):
            for place in plan.extras.after.experts:
                grad_LE[place] = float(result.probed["norm_sq"][place]) ** 0.5
        return Weights(
            experts_LE=samples * (plan.trainable_LE & (profile.rows_LE > 0)),
            routers_LE=samples * plan.trainable_LE,
            gate=samples,
            private={  # the plan's surcharge holds its bytes
                "freq": result.probed.get("freq", own_LE),
                "attention": result.probed.get("attention", no_attention_LE),
                "grad": torch.from_numpy(grad_LE),
            },
        )

    def apply(self, state: ServerState, sums: Sums, updates: Sequence[ClientUpdate]) -> NextModel:
        """Apply FedAvg to each expert and router row over its trainers; keep the profiles for the next plan."""
        memory = dict(state.memory)
        for update in updates:
            if "grad" not in update.private:
                continue
            grad_LE, before_LE = update.private["grad"], memory.get(f"grad/{update.client}")
            if before_LE is not None:
                grad_LE = torch.where(grad_LE >= 0, grad_LE, before_LE)
            fresh = {"freq": update.private["freq"], "attention": update.private["attention"], "grad": grad_LE}
            memory |= {f"{name}/{update.client}": tensor for name, tensor in fresh.items()}
        params = modular_mean(sums, state.params)
        return params, memory

    def profile(self, state: ServerState, client: int) -> Profile:
        """Return the client's last report; before the first one the server's pass over public data."""
        if f"freq/{client}" in state.memory:
            return Profile(*(state.memory[f"{name}/{client}"].numpy() for name in ("freq", "attention", "grad")))
        prior = self.population.prior
        freq_LE = cumulative(prior.hits_LE, prior.tokens_L)
        return Profile(freq_LE, np.ones_like(freq_LE), np.full_like(freq_LE, -1.0))

    def _roles(
        self, state: ServerState, client: int, utility_LE: np.ndarray, profiling: Cost
    ) -> tuple[Roles, int] | None:
        """Eq. 4 with as many tuned experts as the budget allows, and how many merged slots fit next to them.

        None where no layer has a slot for merged experts. Exploring is given up before tuning is.
        """
        facts, chosen = self.population, self.population.config.flux
        room, layers = int(self._trainable(state, client, utility_LE, profiling).sum()), len(utility_LE)
        epsilon = exploit_share(
            state.round, start=chosen.epsilon_start, step=chosen.epsilon_step, most=chosen.epsilon_most
        )
        most = room if room == utility_LE.size else min(max(1, int(chosen.tune_share * room)), room - layers)
        for tuned in range(most, 0, -1):
            rng = counter_rng(facts.config.seed, "flux-roles", state.round, client)
            roles = assign_roles(utility_LE, tuned, epsilon, rng=rng)
            for tried in (roles, Roles(roles.exploit_LE, np.zeros_like(roles.explore_LE))):
                slots = self._merged_slots(state, client, tried, profiling)
                if slots is not None:
                    return tried, slots
        return None

    def _merged_slots(self, state: ServerState, client: int, roles: Roles, profiling: Cost) -> int | None:
        """B_non: the most merged experts that fit next to the tuned ones; None where a layer would go without."""
        tuned_LE = roles.exploit_LE | roles.explore_LE
        places = np.argwhere(~tuned_LE)
        least, most = int((~tuned_LE).any(axis=1).sum()), len(places)
        probes, explored = self.population.config.flux.probes, int(roles.explore_LE.sum())

        def fits(slots: int) -> bool:
            # A frozen slot costs the same in every layer, so any places stand for those that eq. 1 will choose.
            held_LE = tuned_LE.copy()
            held_LE[tuple(places[:slots].T)] = True
            exploring = estimate_cost(self.population.costs, held_LE, explored=explored, probes=probes)
            return bears(
                self.population, state, client, (held_LE, roles.exploit_LE), surcharge=profiling.with_extra(exploring)
            )

        if not fits(least):
            return None
        while least < most:
            middle = (least + most + 1) // 2
            least, most = (middle, most) if fits(middle) else (least, middle - 1)
        return least

    def _profiling(self, state: ServerState, client: int) -> Cost:
        """What profiling in 4 bits costs the client; nothing where its budget cannot bear that and some training."""
        cost = profile_cost(self.population)
        least_LE = self.population.every_LE & (np.arange(self.population.spec.num_experts) == 0)
        return cost if cost and bears(self.population, state, client, (least_LE, least_LE), surcharge=cost) else NOTHING

    def _trainable(self, state: ServerState, client: int, utility_LE: np.ndarray, profiling: Cost) -> np.ndarray:
        """The experts of most utility that the budget could hold and train, if nothing were merged."""
        budget, first = self.population.budgets[client].after(profiling), state.visits[client] == 0
        return choose(budget, self.population.costs, utility_LE, client=client, first_participation=first)[0]


def utilities(known: Profile) -> np.ndarray:
    """Compute eq. 3: |D_e| times the root mean squared gradient norm; norm(f_e) before any gradient, (L, E).

    |D_e| is proportional to f_e within a client. An expert never measured has the mean norm of those that were, by
    frequency [E].
    """
    measured_LE = known.grad_LE >= 0
    weight = float(known.freq_LE[measured_LE].sum())
    if weight == 0:
        return first_utility(known.freq_LE)
    usual = float((known.freq_LE * known.grad_LE)[measured_LE].sum()) / weight
    grad_LE = np.where(measured_LE, known.grad_LE, usual)
    return utility(known.freq_LE, known.freq_LE * grad_LE**2)
