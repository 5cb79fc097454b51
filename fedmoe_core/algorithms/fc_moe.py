"""FC-MoE (arXiv 2606.15625): experts averaged by importance, conflicts projected away and kept by their clients.

The paper was not opened. Its abstract [A] names three mechanisms. Their formulas are from an AI-written digest of it,
which was not checked, and from our reading where that is silent: both are [E]. What follows by algebra is [D].
Shapes: C clients, L MoE layers, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from fedmoe_core.algorithms.base import Algorithm, NextModel
from fedmoe_core.config.systems import Equation, System
from fedmoe_core.layer.slots import OwnRows
from fedmoe_core.messages.plan import ExpertPlan
from fedmoe_core.messages.result import LocalResult
from fedmoe_core.messages.update import ClientUpdate, Weights
from fedmoe_core.model.spec import ParamSpec
from fedmoe_core.server.agreement import square_norms
from fedmoe_core.server.blocks import square_sum
from fedmoe_core.server.means import Sums, dense_mean, gate_mean
from fedmoe_core.server.planning import make_plan
from fedmoe_core.server.state import ServerState


@dataclass(frozen=True)
class FcMoE(Algorithm):
    """Two visits of a round's updates: the first sums them to the consensus, the second finds who is against it.

    A projected change differs from the change by a multiple of the consensus alone. So what the second visit has to
    bring is one number for each client and expert, and a residual is such a number and the consensus of its round [D].

    Among few clients conflicts are rare: each one's own change is part of the consensus, and changes of a few steps are
    nearly at right angles to each other, so that a client has to be outweighed to be against it [D].
    """

    card: ClassVar[System] = System(
        name="fc_moe",
        title="FC-MoE",
        paper="Lu et al., Conflict-Aware Federated Fine-Tuning of LLMs with MoE, arXiv 2606.15625",
        equations=(
            Equation("three parts", "A", "importance-aware weights, a projection on the consensus, retained residuals"),
            Equation("importance", "E", "c = activation frequency x norm of the change, by client and expert (digest)"),
            Equation("frequency", "E", "the expert's share of the rows that the client trained on in the layer"),
            Equation("norm", "E", "over lr * local steps * sqrt(values), cut at 1: one factor for all clients"),
            Equation("consensus", "E", "g = sum c d / sum c over the clients that trained the expert (digest)"),
            Equation("projection", "E", "where <d, g> < 0: d' = d - <d, g> / ||g||^2 g; else d' = d (digest)"),
            Equation("conflict", "E", "an expert's tensors are one vector; where g is 0 nothing is projected"),
            Equation("aggregation", "E", "the expert moves by sum c d' / sum c (the digest has no formula)"),
            Equation("aggregation, again", "D", "= g (1 - sum over conflicts of c <d, g> / (||g||^2 sum c))"),
            Equation(
                "retention", "E", "the next round starts from the global expert + lambda (d - d'), lambda .5 (digest)"
            ),
            Equation("retention, when", "E", "in the next round in which the client holds the expert, and then once"),
            Equation("choice", "E", "the paper trains every expert; under a budget by [selection], as HFedMoE"),
            Equation("router, trunk", "E", "means by |D_c|: each router row over the clients that trained it"),
        ),
        approximated=(
            "whether the paper weighs projected changes by the same c as the consensus, and whether it counts a change "
            "from the re-anchored start, is not known; both are assumed here",
            "the residual is the client's: the server's memory stands in for its disk, and the anchored rows travel "
            "instead of the global ones, which costs no byte",
        ),
        missing=("convergence with Switch Transformers and one epoch a round was not reproduced",),
    )

    sees_conflict = True

    def init(self, params: dict[str, Tensor]) -> ServerState:
        """Return the first state, in which no client has kept anything."""
        shape_CLE = (len(self.population.budgets), *self.population.every_LE.shape)
        memory = {"kappa": torch.zeros(shape_CLE, dtype=torch.float64), "born": torch.full(shape_CLE, -1)}
        return replace(super().init(params), memory=memory)

    def plan(self, state: ServerState, clients: Sequence[int]) -> list[ExpertPlan]:
        """Plan the experts of largest score within each budget; each client goes on from its own residuals."""
        scores = self.scores(state)
        plans = [make_plan(self.population, state, client, scores[client]) for client in clients]
        return [replace(p, extras=replace(p.extras, rows=self.anchored(state, p))) for p in plans]

    def anchored(self, state: ServerState, plan: ExpertPlan) -> OwnRows:
        """Return the experts of a plan that its client starts with a residual: global + lambda * kappa * consensus."""
        kappa_LE, born_LE = (state.memory[name][plan.client].numpy() for name in ("kappa", "born"))
        retention, rows = self.population.config.fc_moe.retention, dict[str, Mapping[int, Tensor]]()
        for spec in self._experts if retention else ():
            held_E = plan.permitted_LE[spec.layer] & (born_LE[spec.layer] >= 0)
            own = {}
            for expert in np.flatnonzero(held_E).tolist():
                old = state.params[spec.key][expert]
                consensus = state.memory[direction(int(born_LE[spec.layer, expert]), spec.key)][expert]
                residual = consensus.to(old.device, torch.float64) * float(kappa_LE[spec.layer, expert])
                own[expert] = residual.mul_(retention).add_(old).to(old.dtype)
            if own:
                rows[spec.key] = own
        return rows

    @property
    def _experts(self) -> list[ParamSpec]:
        return [spec for spec in self.population.spec.params if spec.kind == "expert"]

    def client(self, plan: ExpertPlan, result: LocalResult) -> Weights:
        """Weigh each expert by frequency x norm of its change, and what is not an expert by |D_c|."""
        samples, train = self.population.sample_weight(plan.client), self.population.config.train
        squares_LE, values_L = np.zeros(plan.trainable_LE.shape), np.zeros(len(plan.trainable_LE))
        for spec in self._experts:
            if (delta := result.deltas.get(spec.key)) is not None:
                squares_LE[spec.layer, plan.trainable_LE[spec.layer]] += [square_sum(row) for row in delta]
                values_L[spec.layer] += delta[0].numel()
        reach_L = train.lr * train.local_steps * np.sqrt(np.maximum(values_L, 1))
        importance_LE = frequency(result.profile.rows_LE) * np.sqrt(squares_LE) / reach_L[:, None]
        return Weights(
            experts_LE=np.minimum(importance_LE, 1.0) * plan.trainable_LE,
            routers_LE=samples * plan.trainable_LE,
            gate=samples,
        )

    def apply(self, state: ServerState, sums: Sums, updates: Sequence[ClientUpdate]) -> NextModel:
        """Move each expert by the mean of the projected changes; remember what was taken out of each client's."""
        shape_LE = self.population.every_LE.shape
        unit = sums.settings.resolution
        squares_LE = square_norms(sums.specs, sums.numerators, shape_LE=shape_LE, unit=unit)
        den_LE = sums.expert_den_LE.cpu().numpy()
        kappa = {c: opposition(dot_LE, squares_LE, den_LE) for c, dot_LE in sums.agreement.items()}
        weights = {u.client: sums.settings.quantize(u.expert_weight_LE) for u in updates if u.client in kappa}
        gain_LE = regained([weights[c] for c in kappa], list(kappa.values()), den_LE)
        params, found = {**gate_mean(sums, state.params), **dense_mean(sums, state.params)}, dict[str, Tensor]()
        for spec in sums.specs:
            if spec.kind == "expert":
                old, den_E = state.params[spec.key], torch.from_numpy(den_LE[spec.layer]).to(torch.float64)
                params[spec.key] = sums.mean(spec.key, old, den_E / torch.from_numpy(gain_LE[spec.layer]))
                consensus = sums.mean(spec.key, torch.zeros_like(old), den_E)
                found[direction(state.round, spec.key)] = consensus.cpu()
        return params, self._remembered(state, updates, kappa, found)

    def _remembered(
        self,
        state: ServerState,
        updates: Sequence[ClientUpdate],
        kappa: Mapping[int, np.ndarray],
        found: Mapping[str, Tensor],
    ) -> dict[str, Tensor]:
        """What each client that was heard still keeps; a consensus that no client's residual needs any more goes."""
        kappas, born = state.memory["kappa"].clone(), state.memory["born"].clone()
        for update in updates:
            if update.client not in kappa or update.profile is None:
                continue  # it failed or was refused: its residual waits
            held_LE, fresh_LE = torch.from_numpy(update.profile.held_LE), torch.from_numpy(kappa[update.client])
            kappas[update.client] = torch.where(held_LE, fresh_LE, kappas[update.client])
            now_LE = torch.where(fresh_LE < 0, state.round, -1)
            born[update.client] = torch.where(held_LE, now_LE, born[update.client])
        rounds = {int(number) for number in born.unique() if number >= 0}
        directions = {key: value for key, value in state.memory.items() if key.startswith("direction/")} | dict(found)
        needed = {key: value for key, value in directions.items() if int(key.split("/")[1]) in rounds}
        return {"kappa": kappas, "born": born, **needed}


def direction(round: int, key: str) -> str:
    """Return what the memory calls the consensus of a round on one tensor."""
    return f"direction/{round}/{key}"


def frequency(rows_LE: np.ndarray) -> np.ndarray:
    """Return each expert's share of the rows of its layer, (L, E); 0 in a layer without rows.

    Example:
        >>> frequency(np.array([[3.0, 1.0]]))
        array([[0.75, 0.25]])
    """
    return rows_LE / np.maximum(rows_LE.sum(axis=1, keepdims=True), 1)


def opposition(dot_LE: np.ndarray, squares_LE: np.ndarray, den_LE: np.ndarray) -> np.ndarray:
    """Return kappa = <d, g> / ||g||^2 where it is negative, else 0: how much of the consensus a change would undo [E].

    Args:
        dot_LE: <d, N>, N = sum of weight x change, see ``agreements``.
        squares_LE: ||N||^2.
        den_LE: sum of weights, g = N / den.

    Example:
        >>> opposition(np.array([[-2.0, 2.0]]), np.array([[8.0, 8.0]]), np.array([[2, 2]]))
        array([[-0.5,  0. ]])
    """
    against_LE = (dot_LE < 0) & (squares_LE > 0)
    return np.where(against_LE, den_LE * dot_LE / np.where(squares_LE > 0, squares_LE, 1.0), 0.0)


def regained(weights: Sequence[np.ndarray], kappas: Sequence[np.ndarray], den_LE: np.ndarray) -> np.ndarray:
    """Return by what the consensus is multiplied once conflicts are projected: 1 - sum_c w_c kappa_c / sum_c w_c [D].

    A projection takes a multiple of g out of a change, so the mean of projected changes is a multiple of g as well. It
    is no longer than the longest change: projections shorten.

    Args:
        weights: of each client, integers (L, E).
        kappas: of the same clients in the same order, see ``opposition``.
        den_LE: sum of all weights.
    """
    taken_LE = np.zeros(den_LE.shape)
    for weight_LE, kappa_LE in zip(weights, kappas, strict=True):
        taken_LE += weight_LE * kappa_LE
    return 1.0 - taken_LE / np.maximum(den_LE, 1)
