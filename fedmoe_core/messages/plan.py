"""What the server decides for one client in one round, and the work besides training that it may ask for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from hashlib import sha256
from typing import Literal, Protocol

import numpy as np
from torch import Tensor

from fedmoe_core.base.tensor_key import TensorKey
from fedmoe_core.budget.cost_model import CostModel, Mode
from fedmoe_core.budget.limits import NOTHING, Budget, BudgetError, Cost
from fedmoe_core.config.run_config import TrainConfig
from fedmoe_core.data.batches import Batch
from fedmoe_core.layer.lora import FACTORS
from fedmoe_core.layer.router_loss import AuxLoss
from fedmoe_core.layer.slots import OwnRows
from fedmoe_core.messages.measure import Measure
from fedmoe_core.messages.profile import ClientProfile
from fedmoe_core.model.adapter import ModelAdapter
from fedmoe_core.model.submodel import SubModel


class BatchRule(Protocol):
    """Which experts learn from a batch, given what a forward pass over it has shown.

    Attributes:
        count: most experts that it ever chooses for one batch; costs are predicted with it.
    """

    @property
    def count(self) -> int: ...

    def __call__(self, profile: ClientProfile) -> np.ndarray: ...


Reads = Literal["permitted", "all", "int4"]
Batches = Callable[[], Iterable[Batch]]  # from the start at every call


@dataclass(frozen=True)
class ProbeContext:
    """What a probe may use; it is the client's, so nothing of it but the probe's answer reaches the server.

    Attributes:
        adapter: the live model. Before training it may be configured in any way (all experts, quantised rows, other
            masks), as local training configures it again; after training it holds the trained sub-model.
        params: the global model, read only.
        plan: the client's plan; its ``seed`` is the source of anything random.
        train: settings of local training, for batches and losses alike.
        batches: the batches of this round's local training, from the start at every call.
        validation: the client's validation batches; none where the algorithm does not need them.
        log_prior_C: what the client's logit-adjusted training adds to a classifier's logits. An evaluation of its own
            model has to add it too; None where nothing is adjusted.
    """

    adapter: ModelAdapter
    params: Mapping[str, Tensor]
    plan: ExpertPlan
    train: TrainConfig
    batches: Batches
    validation: Batches
    log_prior_C: Tensor | None = None


class Probe(Protocol):
    """A client's measurement: tensors by name, for the algorithm's ``client`` to read in ``LocalResult.probed``.

    Its operations and traffic are declared by the plan's ``surcharge``; ``CostModel.forward_flops`` and
    ``forward_memory`` have the closed forms. Its peak memory is measured, so a surcharge that understates it shows as
    a broken budget. Gradients that it leaves are cleared.

    Attributes:
        measures: what it answers, by name. An answer of another form never reaches the algorithm.
        reads: experts that it reads of the global model: those that the plan permits, all, or all in 4 bits. A real
            device is sent those, so the surcharge has to hold their bytes.
    """

    @property
    def measures(self) -> Mapping[str, Measure]: ...
    @property
    def reads(self) -> Reads: ...
    def __call__(self, context: ProbeContext) -> Mapping[str, Tensor]: ...


@dataclass(frozen=True)
class Extras:
    """What an algorithm asks of a client besides training its experts; what each wish costs and does to the model.

    A new wish is a field here, with its part in ``costs`` or ``shape``, and the one place where it takes effect. A wish
    that only changes costs and form needs no second place: a system of your own inherits this class and overrides both.

    Attributes:
        rows: rows of expert and router tensors that this client gets instead of the global ones, by key
            (``moe.{l}.router``) and expert id: a personal gate, a merged expert. Its deltas are relative to them.
        alias_LE: int (L, E); an absent expert with an alias is served by the slot of that permitted expert, and may be
            chosen by top-k; -1 = none. None = no absent expert is served.
        surcharge: work that the algorithm makes the client do besides training (profiling, probing), declared in closed
            form; part of ``predicted`` and of the real cost (``Cost.with_extra``), so the budget holds for both.
            ``planning`` adds what validation costs.
        before, after: what the client measures on the live model before and after local training.
        aux: auxiliary loss of the routers, added to the task's at every local step.
        validate: evaluate the trained sub-model on the client's validation data; the algorithm needs_validation.
        keeps: kinds of tensors that train here and are not sent back, "router" or "expert"; their trained rows are in
            ``LocalResult.kept``. A kept router is the client's own gate, so it is not sent to it either.
        train_router: False freezes the router rows too, while experts train; such a router is in ``keeps``, for nothing
            of it changes.
        lora_rank: rank of this client's adapters, at most that of the declared ``LoraSpec``; None = all ranks of the
            state's factors, or no adapters where the state has none.
        cached_LE: experts whose frozen base, under adapters, the client still has from an earlier round; none of them
            in its first, for a real device keeps what comes with such a plan. None = nothing is kept there.
        out_scale_L: start of a trainable factor on each MoE layer's output, which never leaves the client (FLAME);
            what it became is in ``LocalResult.kept`` under ``moe.{l}.out_scale``. None = no such factor.
        per_batch: chooses which of the trainable experts learn from each batch, after a scoring pass over it; every
            expert must then be permitted and trainable. None = all of them learn from every batch.
    """

    rows: OwnRows = field(default_factory=dict)
    alias_LE: np.ndarray | None = None
    surcharge: Cost = NOTHING
    before: Probe | None = None
    after: Probe | None = None
    aux: AuxLoss | None = None
    validate: bool = False
    keeps: frozenset[str] = frozenset()
    train_router: bool = True
    lora_rank: int | None = None
    cached_LE: np.ndarray | None = None
    out_scale_L: tuple[float, ...] | None = None
    per_batch: BatchRule | None = None

    @property
    def measures(self) -> dict[str, Measure]:
        """What the client's probes answer, by name."""
        return {name: one for probe in (self.before, self.after) if probe for name, one in probe.measures.items()}

    @property
    def reads(self) -> Reads:
        """What the client's probes read of the global model."""
        asked = {probe.reads for probe in (self.before, self.after) if probe}
        return "all" if "all" in asked else "int4" if "int4" in asked else "permitted"

    def costs(self, model: CostModel, *, in_state: bool, local_steps: int) -> CostModel:
        """Return the cost model of a client that is asked for these things.

        Args:
            model: of a client that is asked for nothing, with adapters of ``lora_rank`` where there are any.
            in_state: whether the adapters are part of the global model.
            local_steps: the most of a round.
        """
        if self.out_scale_L is not None:
            # Scaled routing weights live until the backward; the factor has a gradient, moments and a step count.
            scaled = model.num_layers * (model.tokens * model.top_k * 4 + 64)
            model = replace(model, trunk=replace(model.trunk, buffer_bytes=model.trunk.buffer_bytes + scaled))
        count = None if self.per_batch is None else self.per_batch.count
        return replace(
            model,
            train_router=self.train_router,
            router_travels="router" not in self.keeps,
            adapters_travel=self.sends_adapters(in_state=in_state),
            experts_return="expert" not in self.keeps,
            aux_tables=0 if self.aux is None else self.aux.tables,
            chosen_per_batch=count,
            chosen_in_round=None if count is None else min(model.total_experts, count * local_steps),
        )

    def shape(self, submodel: SubModel) -> SubModel:
        """Return the sub-model in the form that these wishes give it."""
        return replace(
            submodel,
            rows=self.rows,
            alias_LE=self.alias_LE,
            train_router=self.train_router,
            lora_rank=self.lora_rank,
            out_scale_L=self.out_scale_L,
        )

    def served(self, permitted_LE: np.ndarray) -> np.ndarray:
        """Return the experts that a token may choose: those permitted, and those that a permitted one serves."""
        return permitted_LE if self.alias_LE is None else permitted_LE | (self.alias_LE >= 0)

    def taught(self, trainable_LE: np.ndarray) -> np.ndarray:
        """Return the trainable experts and those that a trainable one serves, bool (L, E)."""
        if self.alias_LE is None:
            return trainable_LE
        by_LE = np.take_along_axis(trainable_LE, self.alias_LE.clip(0, self.alias_LE.shape[1] - 1), axis=1)
        return trainable_LE | (by_LE & (self.alias_LE >= 0))

    def sends_adapters(self, *, in_state: bool) -> bool:
        """Tell whether a client is sent its adapters: the state's, or those in ``rows``; fresh ones it makes itself."""
        return in_state or any(TensorKey.parse(key).name in FACTORS for key in self.rows)


NO_EXTRAS = Extras()


@dataclass(frozen=True)
class ExpertPlan:
    """One client's part in one round: its experts, its work, what that will cost, and what else is asked of it.

    Shapes: L MoE layers, E experts per layer. Masks are boolean numpy arrays in global coordinates. ``planning`` makes
    plans.

    Attributes:
        client: index of the client, 0..C-1.
        round: index of the round, from 0.
        permitted_LE: experts the client may store and run.
        trainable_LE: the permitted experts that also get a weight gradient; a subset of ``permitted_LE``.
        top_k: experts per token (k'), at most the model's own k; lowered only by a FLOP budget.
        local_steps: optimizer steps; the client also stops before the step that would pass the FLOP budget.
        seed: seed of everything random on the client in this round.
        budget: the limits that bind the client; unlimited where the algorithm ignores them (FedAvg).
        predicted: what the cost model expects; inside ``budget`` in every resource, or the plan is refused.
        first_participation: whether the frozen trunk travels to the client with this plan.
        mode: "compact" counts the permitted experts against an expert budget, "backward-masked" the trainable ones.
        extras: what the algorithm asks of the client besides.

    Example:
        >>> from fedmoe_core.budget.limits import Budget, Cost
        >>> held, trains = np.array([[True, True, False]]), np.array([[True, False, False]])
        >>> work = dict(client=0, round=0, permitted_LE=held, trainable_LE=trains, top_k=1, local_steps=2, seed=0)
        >>> ExpertPlan(**work, budget=Budget(experts=2), predicted=Cost(experts=2)).counted_experts
        2
        >>> ExpertPlan(**work, budget=Budget(experts=1), predicted=Cost(experts=2))  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        fedmoe_core.budget.limits.BudgetError: client 0: the plan exceeds its budget (experts: 2 experts used, 1 ...
    """

    client: int
    round: int
    permitted_LE: np.ndarray
    trainable_LE: np.ndarray
    top_k: int
    local_steps: int
    seed: int
    budget: Budget
    predicted: Cost
    first_participation: bool = True
    mode: Mode = "compact"
    extras: Extras = NO_EXTRAS

    @cached_property
    def id(self) -> str:
        """16 hex digits over who is asked, in which round, for which experts and work; an answer has to name them."""
        work = (self.client, self.round, self.top_k, self.local_steps, self.seed, self.mode, self.permitted_LE.shape)
        masks = np.packbits([self.permitted_LE, self.trainable_LE]).tobytes()
        return sha256(repr(work).encode() + masks).hexdigest()[:16]

    @property
    def counted_experts(self) -> int:
        """Experts that an expert budget counts."""
        if self.extras.per_batch is not None:
            return self.extras.per_batch.count
        return int((self.permitted_LE if self.mode == "compact" else self.trainable_LE).sum())

    @property
    def served_LE(self) -> np.ndarray:
        """Experts that a token may choose: those permitted, and those served by a permitted one."""
        return self.extras.served(self.permitted_LE)

    @property
    def taught_LE(self) -> np.ndarray:
        """Experts whose rows meet a trainable slot: those trainable, and those served by a trainable one."""
        return self.extras.taught(self.trainable_LE)

    def submodel(self, *, train_dense: bool) -> SubModel:
        """Return the client's sub-model, as ``ModelAdapter.configure`` takes it."""
        plain = SubModel(self.permitted_LE, self.trainable_LE, top_k=self.top_k, lora_seed=self.seed)
        return self.extras.shape(replace(plain, train_dense=train_dense))

    def __post_init__(self) -> None:
        if self.permitted_LE.shape != self.trainable_LE.shape:
            raise ValueError(
                f"client {self.client}: permitted_LE {self.permitted_LE.shape} and trainable_LE "
                f"{self.trainable_LE.shape} differ in shape; both must be (layers, experts)"
            )
        if (self.trainable_LE & ~self.permitted_LE).any():
            raise ValueError(f"client {self.client}: a trainable expert is not permitted; trainable must be a subset")
        empty = np.flatnonzero(~self.permitted_LE.any(axis=1))
        if empty.size:
            raise ValueError(f"client {self.client}: layer {empty[0]} has no permitted expert; permit at least one")
        if self.extras.alias_LE is not None:
            self._check_alias(self.extras.alias_LE)
        if self.extras.per_batch is not None and not self.trainable_LE.all():
            raise ValueError(f"client {self.client}: per_batch chooses among all experts; permit and train all of them")
        if strange := sorted(self.extras.keeps - {"router", "expert"}):
            raise ValueError(f"client {self.client}: keeps={strange}; only the router and the expert can stay behind")
        if not self.extras.train_router and "router" not in self.extras.keeps:
            raise ValueError(f"client {self.client}: a frozen router has nothing to send; add router to keeps")
        if over := self.budget.violations(self.predicted):
            raise BudgetError(f"client {self.client}: the plan exceeds its budget ({over[0]}); plan less")

    def _check_alias(self, alias_LE: np.ndarray) -> None:
        if alias_LE.dtype.kind != "i" or alias_LE.shape != self.permitted_LE.shape:
            raise ValueError(
                f"client {self.client}: alias_LE is {alias_LE.dtype} {alias_LE.shape}; "
                f"it must be whole numbers of shape {self.permitted_LE.shape}"
            )
        for layer, expert in np.argwhere(alias_LE >= 0):
            by = alias_LE[layer, expert]
            if by >= alias_LE.shape[1] or not self.permitted_LE[layer, by]:
                raise ValueError(
                    f"client {self.client}: expert {expert} of layer {layer} is served by expert {by}, which is not "
                    "permitted; permit it or name another"
                )
            if self.permitted_LE[layer, expert] and by != expert:
                raise ValueError(
                    f"client {self.client}: expert {expert} of layer {layer} is permitted and served by expert {by}; "
                    "only absent experts have an alias"
                )
