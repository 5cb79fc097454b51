"""Federated algorithms, one file each: ``init``, ``plan``, ``client`` and ``apply`` over an immutable state."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import ClassVar, Literal

import numpy as np
from torch import Tensor

from fedmoe_core.config.run_config import Config
from fedmoe_core.config.systems import System, place_of, title_of
from fedmoe_core.layer.graft import GraftSpec
from fedmoe_core.layer.lora import LoraSpec
from fedmoe_core.messages.plan import ExpertPlan
from fedmoe_core.messages.profile import ClientProfile
from fedmoe_core.messages.result import LocalFailure, LocalResult
from fedmoe_core.messages.update import ClientUpdate, Weights, failed_update, finished_update
from fedmoe_core.selection.importance import client_scores
from fedmoe_core.server.means import Sums
from fedmoe_core.server.reading import unlike
from fedmoe_core.server.state import Population, ServerState, initial_state

# The tensors that change, by key, and the algorithm's own memory; None keeps the memory as it is.
NextModel = tuple[dict[str, Tensor], Mapping[str, Tensor] | None]


def kept(updates: Sequence[ClientUpdate], name: str) -> dict[str, Tensor]:
    """Return what clients have sent for the memory under one name: ``NAME/CLIENT`` and the tensor."""
    return {f"{name}/{update.client}": update.private[name] for update in updates if name in update.private}


def heard(updates: Sequence[ClientUpdate]) -> dict[int, ClientProfile]:
    """Return what the clients that trained have measured, by client."""
    return {update.client: update.profile for update in updates if update.profile is not None}


@dataclass(frozen=True)
class Algorithm(ABC):
    """What the simulator asks of an algorithm: a frozen dataclass that inherits this and adds no field.

    A system writes ``plan``, ``client`` and ``apply``; where no client's plan depends on another's it inherits
    ``EachAlone`` and writes ``plan_client`` instead of ``plan``. All methods are pure: same arguments, same answer, on
    every rank. What an algorithm learns goes into ``ServerState.memory`` by way of ``apply``. What it needs before the
    first round it declares, by ``lora``, ``graft`` and these:

    Attributes:
        population: the fixed facts of the run.
        card: what ``fedmoe systems`` says of it.
        needs_validation: hold back a tenth of every client's private data, for plans with ``validate``.
        has_global_model: False where clients share no model (local gates): global loss and accuracy are then null,
            and the run is judged by ``personal`` models.
        settings: of a system that is not part of fedmoe, a frozen dataclass: a section of the configuration, which it
            reads as ``population.config.settings``. None where it has none; ours are fields of ``Config``.
        adapters: "shared" where the experts carry adapters of the configured rank that are part of the global model,
            "own" where those live for one round of one client, "optional" where ``train.experts=lora`` gives the
            experts shared ones, and nothing does otherwise. "" where experts always train as a whole.
        asynchronous: True where clients may train on models of different age (``time.mode=buffered``): a client's plan
            is the same with any others planned for in one call, and ``apply`` moves the current model by means of
            deltas. A subclass inherits it, so one that plans or applies otherwise sets it False.
        sums_alone: True where the server can be private (``[privacy]``): what a client measured reaches other clients
            through ``sums`` alone. So ``apply`` makes the model of nothing else, and a client's plan depends on the
            model, on public numbers and on the client's own past. A subclass inherits it, as ``asynchronous``.
        sees_conflict: True where ``apply`` reads ``sums.agreement``: how far each client's change of an expert agrees
            with the sum of all, found by a second visit of the round's updates, which wait on disk for it.
        wishes: classes of the probes, auxiliary losses and batch rules in this system's plans. On a real device a plan
            is data: it names one of these classes, with its fields, and the device makes it again. They are frozen
            dataclasses of numbers, texts, tuples and arrays.
        trains_trunk: False where the trunk stays frozen whatever ``train.trunk`` says (a classification head trains).
    """

    population: Population
    card: ClassVar[System]
    needs_validation: ClassVar[bool] = False
    has_global_model: ClassVar[bool] = True
    adapters: ClassVar[Literal["", "shared", "own", "optional"]] = ""
    asynchronous: ClassVar[bool] = False
    sums_alone: ClassVar[bool] = False
    sees_conflict: ClassVar[bool] = False
    trains_trunk: ClassVar[bool] = True
    wishes: ClassVar[tuple[type, ...]] = ()
    settings: ClassVar[type | None] = None

    @classmethod
    def lora(cls, config: Config) -> LoraSpec | None:
        """Return the adapters that the experts of this run carry, by ``adapters``; None for a run without.

        Raises:
            ValueError: ``train.experts=lora`` for a system that trains whole experts, or few bits for experts that
                train or are aggregated.
        """
        asked, few_bits = config.train.experts == "lora", config.lora.frozen_format
        if asked and cls.adapters in ("", "own"):
            raise ValueError(
                f"train.experts=lora is not for algorithm={config.algorithm!r}, which aggregates whole experts; choose "
                "hfedmoe, random, most_activated, reap_experts, fedavg or fedavg_smallest, or a system of adapters"
            )
        shared = cls.adapters == "shared" or (asked and cls.adapters == "optional")
        if few_bits != "none" and not shared:
            raise ValueError(
                f"lora.frozen_format={few_bits} stores experts in few bits, and those of algorithm="
                f"{config.algorithm!r} train; set train.experts=lora, or frozen_format=none"
            )
        if not shared and cls.adapters != "own":
            return None
        frozen_format = None if few_bits == "none" else few_bits
        return LoraSpec(config.lora.rank, config.lora.alpha, in_state=shared, frozen_format=frozen_format)

    @classmethod
    def graft(cls, config: Config) -> GraftSpec | None:
        """Return the mixture to graft onto every MoE block, which is then what the run trains; None for no mixture."""
        return None

    def init(self, params: dict[str, Tensor]) -> ServerState:
        """Return the state before the first round; by default nothing is known about any client."""
        return initial_state(params, len(self.population.budgets))

    @abstractmethod
    def plan(self, state: ServerState, clients: Sequence[int]) -> list[ExpertPlan]:
        """Return one plan per sampled client, each inside that client's budget."""

    @abstractmethod
    def client(self, plan: ExpertPlan, result: LocalResult) -> Weights:
        """Return how much the result of a client that finished its plan counts, and what goes back with it."""

    @abstractmethod
    def apply(self, state: ServerState, sums: Sums, updates: Sequence[ClientUpdate]) -> NextModel:
        """Return the tensors of the model that change, and the whole memory of the next state (None keeps it).

        ``sums`` are exact, over all ranks; ``updates`` carry no deltas here, only reports, those of failed and refused
        clients too.
        """

    def answer(self, plan: ExpertPlan, result: LocalResult | LocalFailure) -> ClientUpdate:
        """Return what a client sends back: its deltas under the weights of ``client``, or the report of its failure.

        A result that is not as its plan asks is such a failure, and ``client`` never reads it.
        """
        sample_weight = self.population.sample_weight(plan.client)
        if isinstance(result, LocalFailure):
            return failed_update(plan, result, sample_weight=sample_weight)
        if fault := unlike(plan, result, self.population.spec):
            return failed_update(plan, LocalFailure(result.cost, fault), sample_weight=sample_weight)
        samples = int(self.population.samples_C[plan.client])
        return finished_update(plan, result, self.client(plan, result), samples=samples, sample_weight=sample_weight)

    def advance(self, state: ServerState, sums: Sums, updates: Sequence[ClientUpdate]) -> ServerState:
        """Return the next state: model and memory of ``apply``, the profiles just heard, and one more visit each."""
        changed, memory = self.apply(state, sums, updates)
        planned = [update.client for update in updates]
        return state.advance({**state.params, **changed}, heard(updates), planned, memory=memory)

    def personal(self, state: ServerState, client: int) -> ExpertPlan:
        """Return the model that this client would deploy, as the plan that makes it: by default its next plan."""
        return self.plan(state, [client])[0]

    def scores(self, state: ServerState) -> list[np.ndarray]:
        """Return one score per (layer, expert) and client; by default the one that ``[selection]`` names."""
        rule, pooled = self.population.config.selection, not self.population.config.privacy.clip
        return client_scores(
            state.profiles, self.population.prior, rule.score, lam=rule.lam, beta=rule.beta, pooled=pooled
        )

    def importance(self, state: ServerState) -> np.ndarray:
        """Return how much each expert matters, (L, E), which the log of a round shows: by default the mean score."""
        return np.asarray(np.mean(self.scores(state), axis=0))

    @classmethod
    def label(cls, config: Config) -> str:
        """Return what people call a run of this system; by default its title."""
        return title_of(config.algorithm)


@dataclass(frozen=True)
class EachAlone(Algorithm):
    """A system in which a client's plan does not depend on who else takes part."""

    def plan(self, state: ServerState, clients: Sequence[int]) -> list[ExpertPlan]:
        """Plan each client alone."""
        return [self.plan_client(state, client) for client in clients]

    @abstractmethod
    def plan_client(self, state: ServerState, client: int) -> ExpertPlan:
        """Return one client's plan, inside its budget."""


def algorithm_class(name: str) -> type[Algorithm]:
    """Return the class of a system: ours, one that a package names, or your own as ``MODULE:CLASS``.

    Raises:
        ValueError: no such algorithm (the message names the nearest), the class is not an ``Algorithm``, or it lacks a
            method that every system writes.
    """
    module, _, attribute = place_of(name).partition(":")
    try:
        found = getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"algorithm {name!r} cannot be loaded ({error}); check the module and the class") from error
    if not (isinstance(found, type) and issubclass(found, Algorithm)):
        raise ValueError(
            f"algorithm {name!r} does not inherit fedmoe_core.algorithms.base.Algorithm; make it a subclass"
        )
    if found.__abstractmethods__:
        raise ValueError(f"algorithm {name!r} lacks {', '.join(sorted(found.__abstractmethods__))}; write them")
    return found
