"""What the server knows: the fixed facts of the population, and the state that every round replaces."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from fedmoe_core.budget.cost_model import CostModel
from fedmoe_core.budget.limits import Budget
from fedmoe_core.config.run_config import Config
from fedmoe_core.messages.profile import ClientProfile, profile_arrays
from fedmoe_core.model.spec import ModelSpec

R = TypeVar("R")


@dataclass(frozen=True)
class Population:
    """Facts fixed before the first round.

    Attributes:
        config: the resolved configuration.
        spec: the model's sizes.
        budgets: one per client.
        costs: the cost model, calibrated on this model, batch, sequence and backend.
        samples_C: |D_c|, private tokens or rows of each client.
        prior: the server's own pass over public data with the full model; stands in for clients not yet heard.
        counts_CD: what each holds: private rows by class (classification) or tokens by domain; None = unknown.
        validation_tokens_C: tokens, padding included, of each client's validation pass; None where no algorithm of
            this run needs validation.
        absent: clients that no plan brings inside ``time.deadline``; they are never drawn.
        lora_costs: the cost model under adapters of the declared rank, where ``costs`` is not that one already.
    """

    config: Config
    spec: ModelSpec
    budgets: tuple[Budget, ...]
    costs: CostModel
    samples_C: np.ndarray
    prior: ClientProfile
    counts_CD: np.ndarray | None = None
    validation_tokens_C: np.ndarray | None = None
    lora_costs: CostModel | None = None
    absent: frozenset[int] = frozenset()

    @property
    def every_LE(self) -> np.ndarray:
        """The mask of all experts, bool (L, E)."""
        return np.ones((self.spec.num_layers, self.spec.num_experts), dtype=bool)

    def costs_at(self, lora_rank: int | None) -> CostModel:
        """Return the cost model of a client with adapters of this rank; None as ``ExpertPlan.lora_rank``.

        Raises:
            ValueError: no adapters were declared, or not of such a rank.
        """
        if lora_rank is None:
            return self.costs
        model = self.costs if self.costs.lora_rank is not None else self.lora_costs
        if model is None or model.lora_rank is None:
            raise ValueError(f"a plan asks for adapters of rank {lora_rank}; declare them by the algorithm's lora()")
        if not 1 <= lora_rank <= model.lora_rank:
            raise ValueError(f"a plan asks for adapters of rank {lora_rank}; 1 to {model.lora_rank} were declared")
        return replace(model, lora_rank=lora_rank)

    def sample_weight(self, client: int) -> float:
        """Return |D_c| over the largest |D_c|, in (0, 1]; 1 for all when weighting is "uniform"."""
        if self.config.aggregation.weighting == "uniform":
            return 1.0
        return float(self.samples_C[client] / self.samples_C.max())


@dataclass(frozen=True)
class ServerState:
    """All that a checkpoint needs.

    Attributes:
        round: rounds applied so far.
        params: the global model in global coordinates.
        profiles: each client's latest profile, None while it has not reported.
        visits: how many plans each client has been sent (the frozen trunk travels with the first).
        memory: the algorithm's own state by name, tensors of any dtype on the CPU; empty where it needs none. Numbers
            and counters go in as tensors, so that a checkpoint holds them and a resumed run has the same bits.
        norms_RG: usual norms of the last rounds, for the guard's bound (``guard.bounds``); None where no guard has one.
    """

    round: int
    params: dict[str, Tensor]
    profiles: tuple[ClientProfile | None, ...]
    visits: tuple[int, ...]
    memory: Mapping[str, Tensor] = field(default_factory=dict)
    norms_RG: np.ndarray | None = None

    def advance(
        self,
        params: dict[str, Tensor],
        reports: dict[int, ClientProfile],
        planned: list[int],
        *,
        memory: Mapping[str, Tensor] | None = None,
    ) -> ServerState:
        """Return the next round's state: new parameters, fresher profiles, one more visit for every planned client.

        ``memory`` replaces the algorithm's own state as a whole; None keeps it.
        """
        profiles, visits = list(self.profiles), list(self.visits)
        for client, profile in reports.items():
            profiles[client] = profile
        for client in set(planned):
            visits[client] += 1
        kept = self.memory if memory is None else memory
        return replace(
            self, round=self.round + 1, params=params, profiles=tuple(profiles), visits=tuple(visits), memory=kept
        )


def initial_state(params: dict[str, Tensor], clients: int) -> ServerState:
    """Return the state before the first round: no client has been visited or heard."""
    return ServerState(0, params, (None,) * clients, (0,) * clients)


def remember(record: object) -> dict[str, Tensor]:
    """Turn a record of arrays into ``ServerState.memory``, by field name; ``recall`` is the inverse."""
    return {item.name: torch.from_numpy(getattr(record, item.name)) for item in fields(record)}  # type: ignore[arg-type]


def recall(kind: type[R], memory: Mapping[str, Tensor]) -> R:
    """Rebuild the record of arrays of class ``kind`` that ``remember`` took apart; its arrays are copies."""
    return kind(**{item.name: memory[item.name].numpy().copy() for item in fields(kind)})  # type: ignore[arg-type]


def pack_state(state: ServerState) -> dict[str, Tensor]:
    """Put every tensor of the state under one flat naming, for a checkpoint; ``unpack_state`` is the inverse."""
    packed = {f"params/{key}": tensor for key, tensor in state.params.items()}
    packed |= {f"memory/{key}": tensor for key, tensor in state.memory.items()}
    packed["visits"] = torch.tensor(state.visits, dtype=torch.int64)
    if state.norms_RG is not None:
        packed["guard/norms"] = torch.from_numpy(state.norms_RG)
    heard = {client: profile for client, profile in enumerate(state.profiles) if profile is not None}
    if heard:
        # One tensor a field: with one for each client and field, names and offsets took longer to write than numbers.
        packed["profiles/clients"] = torch.tensor(list(heard), dtype=torch.int64)
        arrays = [profile_arrays(profile) for profile in heard.values()]
        for name in arrays[0]:
            packed[f"profiles/{name}"] = torch.from_numpy(np.stack([each[name] for each in arrays], dtype=np.float64))
    return packed


def unpack_state(packed: dict[str, Tensor], *, round: int, device: torch.device | str = "cpu") -> ServerState:
    """Rebuild what ``pack_state`` took apart, the model on ``device``, the algorithm's memory on the CPU.

    Raises:
        ValueError: the checkpoint holds no model or no visit counts.
    """
    if "visits" not in packed or not any(key.startswith("params/") for key in packed):
        raise ValueError("the checkpoint holds no fedmoe server state; start the run again with --force")
    return _unpacked(packed, round=round, device=device)


def pack_older(state: ServerState, newer: ServerState) -> dict[str, Tensor]:
    """Pack what ``state`` does not share with ``newer``; ``unpack_older`` is the inverse.

    States share objects: a tensor that did not train, the profile of a client that was not heard in between.
    """
    heard = zip(state.profiles, newer.profiles, strict=True)
    changed = replace(
        state,
        params=_unlike(state.params, newer.params),
        profiles=tuple(None if profile is known else profile for profile, known in heard),
        memory=_unlike(state.memory, newer.memory),
    )
    packed = pack_state(changed)
    unheard = [c for c, profile in enumerate(state.profiles) if profile is None and newer.profiles[c] is not None]
    if unheard:
        packed["unheard"] = torch.tensor(unheard, dtype=torch.int64)
    # A checkpoint has names for tensors alone: what the older state does not remember is named by an empty one.
    return packed | {f"unknown/{key}": torch.empty(0) for key in newer.memory if key not in state.memory}


def unpack_older(
    packed: dict[str, Tensor], newer: ServerState, *, round: int, device: torch.device | str = "cpu"
) -> ServerState:
    """Rebuild what ``pack_older`` took apart; what it shares with ``newer`` is shared again."""
    own = _unpacked(packed, round=round, device=device)
    unheard = set(packed["unheard"].tolist()) if "unheard" in packed else set()
    profiles = [
        None if client in unheard else profile or newer.profiles[client] for client, profile in enumerate(own.profiles)
    ]
    remembered = {key: tensor for key, tensor in newer.memory.items() if f"unknown/{key}" not in packed}
    params, memory = {**newer.params, **own.params}, {**remembered, **own.memory}
    return replace(own, params=params, profiles=tuple(profiles), memory=memory)


def _unlike(tensors: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in tensors.items() if tensor is not others.get(key)}


def _unpacked(packed: dict[str, Tensor], *, round: int, device: torch.device | str) -> ServerState:
    visits = tuple(packed["visits"].tolist())
    params = {key.removeprefix("params/"): t.to(device) for key, t in packed.items() if key.startswith("params/")}
    profiles: list[ClientProfile | None] = [None] * len(visits)
    for client, arrays in _profiles(packed).items():
        arrays["held_LE"] = arrays["held_LE"].astype(bool)
        profiles[client] = ClientProfile(**arrays)
    memory = {key.removeprefix("memory/"): tensor for key, tensor in packed.items() if key.startswith("memory/")}
    norms = packed["guard/norms"].numpy() if "guard/norms" in packed else None
    return ServerState(round, params, tuple(profiles), visits, memory, norms)


def _profiles(packed: dict[str, Tensor]) -> dict[int, dict[str, np.ndarray]]:
    """Find each heard client's arrays: rows of a tensor for each field, or a tensor for each client as once written."""
    found: dict[int, dict[str, np.ndarray]] = {}
    heard = packed["profiles/clients"].tolist() if "profiles/clients" in packed else None
    for key, tensor in packed.items():
        kind, _, rest = key.partition("/")
        if kind != "profiles" or rest == "clients":
            continue
        if heard is None:
            client, _, name = rest.partition("/")
            found.setdefault(int(client), {})[name] = tensor.numpy()
        else:
            for client, array in zip(heard, tensor.numpy(), strict=True):
                found.setdefault(client, {})[rest] = array
    return found
