"""What a client measures: router statistics and importance while it trains, its loss where it validates, and probes."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import cast

import numpy as np
import torch
from torch import Tensor

from fedmoe_core.budget.peak_memory import resident_bytes, tensor_bytes, trace_memory
from fedmoe_core.data.batches import Batch
from fedmoe_core.layer.recording import Tape, recording
from fedmoe_core.messages.plan import Probe, ProbeContext
from fedmoe_core.messages.profile import ClientProfile, ExpertFeedback, profile_arrays
from fedmoe_core.model.adapter import ModelAdapter
from fedmoe_core.model.spec import Evaluation, PlaceLosses
from fedmoe_core.model.submodel import SubModel
from fedmoe_kernels import RouterStats

ROUTER_FIELDS = ("tokens", "hits_E", "prob_sum_E", "prob_max_E", "plogp_sum_E", "lost_mass")  # of RouterStats
IMPORTANCE = ("rows_B", "taylor_B", "taylor_abs_B", "fisher_B", "grad_sq_B", "reap_B")  # of the layers' scores
NO_DATA = "there is no validation data; declare needs_validation = True in the algorithm"


class ProfileSums:
    """Router statistics and importance sums of a round, added up over micro-batches in global coordinates.

    Rows and importance come from the backward pass. With a ``tape`` none runs. Rows are then counted by the choices on
    the tape, and importance is 0.
    """

    def __init__(self, adapter: ModelAdapter, *, tape: Tape | None = None) -> None:
        self._adapter, self._tape = adapter, tape
        self._stats: list[RouterStats] = []
        self._chosen_LE = np.zeros((len(adapter.moe), adapter.spec.num_experts))
        self._harvested: dict[str, np.ndarray] = {}

    def add_batch(self) -> None:
        """Take each layer's statistics of the forward that just ran; call once per micro-batch."""
        last = [cast(RouterStats, layer.last_stats) for layer in self._adapter.moe]
        self._stats = [total + new for total, new in zip(self._stats, last, strict=True)] if self._stats else last
        if self._tape is not None:
            self._chosen_LE += np.stack([self._tape.rows_E(layer) for layer in range(len(self._chosen_LE))])

    def rows_LE(self) -> np.ndarray:
        """Count the rows that each held expert has processed so far. One host sync a layer."""
        return self._scores("rows_B") if self._tape is None else self._chosen_LE

    def harvest(self) -> None:
        """Take the importance sums out of the layers, which lose them when their experts change."""
        self._harvested = {name: self._scores(name) for name in IMPORTANCE}
        for layer in self._adapter.moe:
            if layer.scores is not None:
                layer.scores.reset()

    def _scores(self, name: str) -> np.ndarray:
        """One importance sum of every layer, scattered to global coordinates."""
        sums_LE = np.zeros((len(self._adapter.moe), self._adapter.spec.num_experts))
        for sums_E, layer in zip(sums_LE, self._adapter.moe, strict=True):
            if layer.scores is not None and self._tape is None:
                sums_E[list(layer.experts)] = getattr(layer.scores, name).double().cpu().numpy()
        return sums_LE + self._harvested[name] if self._harvested else sums_LE

    def finish(self) -> ClientProfile:
        """Return the profile in global coordinates, float64."""
        layers = self._adapter.moe
        held_LE = np.zeros((len(layers), self._adapter.spec.num_experts), dtype=bool)
        for held_E, layer in zip(held_LE, layers, strict=True):
            held_E[list(layer.experts)] = True
        names = ROUTER_FIELDS
        router = {n: np.stack([np.asarray(getattr(s, n), dtype=np.float64) for s in self._stats]) for n in names}
        importance = {name: self._scores(name) for name in IMPORTANCE if name != "rows_B"}
        return profile_of(router, importance | {"rows_B": self.rows_LE()}, held_LE)


def profile_of(
    router: Mapping[str, np.ndarray], importance: Mapping[str, np.ndarray], held_LE: np.ndarray
) -> ClientProfile:
    """Make a profile of what was measured.

    Args:
        router: by the names of ``RouterStats``, a leading L before each shape.
        importance: by the names of ``IMPORTANCE``, (L, E) in global coordinates.
        held_LE: experts that were held.
    """
    return ClientProfile(
        tokens_L=router["tokens"],
        hits_LE=router["hits_E"],
        prob_sum_LE=router["prob_sum_E"],
        prob_max_LE=router["prob_max_E"],
        plogp_sum_LE=router["plogp_sum_E"],
        lost_mass_L=router["lost_mass"],
        rows_LE=importance["rows_B"],
        taylor_LE=importance["taylor_B"],
        taylor_abs_LE=importance["taylor_abs_B"],
        fisher_LE=importance["fisher_B"],
        grad_sq_LE=importance["grad_sq_B"],
        reap_sum_LE=importance["reap_B"],
        held_LE=held_LE,
    )


def statistics_bytes(profile: ClientProfile) -> int:
    """Return the bytes of a profile and of the two weights per expert that travel with it."""
    return sum(array.nbytes for array in profile_arrays(profile).values()) + 2 * profile.hits_LE.nbytes


@dataclass(frozen=True)
class Validation:
    """What a pass without gradients shows of a model: its loss, its router, and how well each expert's tokens fare."""

    total: Evaluation
    profile: ClientProfile
    feedback: ExpertFeedback


def validate(adapter: ModelAdapter, batches: Iterable[Batch], *, log_prior_C: Tensor | None = None) -> Validation:
    """Run one pass of the live model over ``batches``, without gradients; ``log_prior_C`` is added to class logits.

    Raises:
        ValueError: there is no batch.
    """
    total = Evaluation(0.0, 0)
    fare_3LE = np.zeros((3, len(adapter.moe), adapter.spec.num_experts))
    with recording(adapter.moe) as tape:
        sums = ProfileSums(adapter, tape=tape)
        for batch in batches:
            places = adapter.place_losses(batch, log_prior_C=log_prior_C)
            choices = [tape.choices(number) for number in range(len(tape.layers))]
            fare_3LE += fare(choices, places, adapter.spec.num_experts)
            total += places.total
            sums.add_batch()
    if not total.count:
        raise ValueError(NO_DATA)
    return Validation(total, sums.finish(), ExpertFeedback(*fare_3LE))


def fare(choices: Sequence[Tensor], places: PlaceLosses, num_experts: int) -> np.ndarray:
    """Return rows, loss and correct predictions by chosen expert of a forward, (3, L, E).

    Args:
        choices: of each layer the expert ids that tokens chose, (T, K), -1 = none.
        places: of the same tokens.
        num_experts: E.
    """
    loss_T, correct_T, counted_T = (t.reshape(-1) for t in (places.loss_SN, places.correct_SN, places.counted_SN))
    found = []
    for experts_TK in choices:
        row_R, _ = torch.nonzero((experts_TK >= 0) & counted_T[:, None], as_tuple=True)
        expert_R = experts_TK[(experts_TK >= 0) & counted_T[:, None]]
        terms = (torch.ones_like(loss_T), loss_T, correct_T)
        sums_3E = torch.zeros(3, num_experts, dtype=torch.float64, device=expert_R.device)
        for sum_E, term_T in zip(sums_3E, terms, strict=True):
            sum_E.index_add_(0, expert_R, term_T[row_R].double())
        found.append(sums_3E.cpu().numpy())
    return np.stack(found, axis=1)


def run_probe(
    probe: Probe | None, context: ProbeContext, device: torch.device, *, afresh: bool = False
) -> tuple[dict[str, Tensor], int]:
    """Return a probe's answer, detached and on the CPU, and its peak memory in bytes; nothing where there is no probe.

    ``afresh``: the live model is an earlier client's, and its experts must not count as the probe's memory. They are
    shed first, as far as a model can be without experts. What of the model outlives the probe's own configuring is
    counted once.
    """
    if probe is None:
        return {}, 0
    model, spec = context.adapter.model, context.adapter.spec
    if afresh:
        first_LE = np.zeros((spec.num_layers, spec.num_experts), dtype=bool)
        first_LE[:, 0] = True
        context.adapter.configure(context.params, SubModel(permitted_LE=first_LE))
    before = [weakref.ref(tensor) for tensor in (*model.parameters(), *model.buffers())]
    resident = resident_bytes(model)
    answer, trace = trace_memory(partial(probe, context), device)
    model.zero_grad(set_to_none=True)
    found = {name: tensor.detach().cpu().clone() for name, tensor in answer.items()}
    if device.type == "cpu":  # where freeing what was there before lowers no peak, see trace_memory
        alive = {id(tensor) for tensor in (ref() for ref in before) if tensor is not None}
        resident = tensor_bytes(tensor for tensor in (*model.parameters(), *model.buffers()) if id(tensor) in alive)
    return found, max(resident_bytes(model), resident + trace.peak)
