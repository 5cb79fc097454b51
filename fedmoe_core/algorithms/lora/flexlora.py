"""FlexLoRA (arXiv 2402.11505): adapters of a rank for each client, averaged as products, cut again by their SVD.

The paper was not opened here: formulas are from notes [N], readings ours [E].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from fedmoe_core.algorithms.base import EachAlone, NextModel
from fedmoe_core.algorithms.largest_fit import UNCOUNTED, resident_plan
from fedmoe_core.algorithms.lora.factors import Factors, Spectrum, resize
from fedmoe_core.base.tensor_key import TensorKey
from fedmoe_core.config.systems import Equation, System
from fedmoe_core.layer.state import MATRICES
from fedmoe_core.messages.plan import ExpertPlan, Extras
from fedmoe_core.messages.result import LocalResult
from fedmoe_core.messages.update import ClientUpdate, Weights
from fedmoe_core.server.means import Sums, dense_mean, gate_mean
from fedmoe_core.server.state import Population, ServerState


@dataclass(frozen=True)
class FlexLora(EachAlone):
    """The products of all clients' adapters are summed exactly, and each client gets the best of that at its own rank.

    The global model is W + the sum. Clients keep the frozen W, and are sent the first r_k singular directions of it.
    """

    card: ClassVar[System] = System(
        name="flexlora",
        title="FlexLoRA",
        paper="Bai et al., FlexLoRA, arXiv 2402.11505",
        equations=(
            Equation("aggregation", "N", "Delta W = sum_k p_k B_k A_k, p_k = |D_k| over its sum"),
            Equation("redistribution", "N", "Delta W = U S V^T; client k starts from B = U_r S_r, A = V_r^T, r = r_k"),
            Equation("r_k", "E", "the largest rank whose local steps the client's budget pays"),
            Equation("router", "E", "trained and averaged by |D_k|"),
        ),
        approximated=UNCOUNTED,
    )

    adapters = "own"

    def init(self, params: dict[str, Tensor]) -> ServerState:
        """Remember the frozen experts, since the state holds them with the sum added."""
        frozen = {f"base/{key}": params[key].cpu().clone() for key in expert_keys(self.population)}
        return replace(super().init(params), memory=frozen)

    def plan_client(self, state: ServerState, client: int) -> ExpertPlan:
        """Plan all experts, each the frozen one and the best adapter of rank r_k for the sum."""

        def extras_of(_: Population, rank: int) -> Extras:
            return Extras(lora_rank=rank, rows=start_rows(state.memory, rank))

        return resident_plan(self.population, state, client, self.population.config.lora.rank, extras_of)

    def client(self, plan: ExpertPlan, result: LocalResult) -> Weights:
        """Return the trained product B_k A_k of every matrix under |D_k|."""
        samples = self.population.sample_weight(plan.client)
        products = {}
        for key in expert_keys(self.population):
            a, b = (result.kept[factor_key(key, letter)] for letter in "ab")
            products[key] = _scale(self.population) * Factors(a, b).product()
        weight_LE = samples * plan.trainable_LE
        return Weights(
            experts_LE=weight_LE,
            routers_LE=weight_LE,
            gate=samples,
            deltas={**result.deltas, **products},
            metrics={"rank": plan.extras.lora_rank or 0},
        )

    def apply(self, state: ServerState, sums: Sums, updates: Sequence[ClientUpdate]) -> NextModel:
        """Compute W + sum_k p_k B_k A_k, and its singular directions for the next plans."""
        params = {**gate_mean(sums, state.params, "fedavg"), **dense_mean(sums, state.params)}
        memory = dict(state.memory)
        rank, scale = self.population.config.lora.rank, _scale(self.population)
        for spec in sums.specs:
            if spec.kind != "expert" or spec.name not in MATRICES:
                continue
            base, den_E = state.memory[f"base/{spec.key}"], sums.expert_den_LE[spec.layer]
            summed = sums.mean(spec.key, base, den_E)
            voted_E = (den_E > 0).cpu()[:, None, None]
            whole = torch.where(voted_E, summed, state.params[spec.key].cpu())
            u, s, v = torch.linalg.svd((whole - base).double(), full_matrices=False)
            best = Spectrum(u, s, v).truncate(rank)
            memory[f"a/{spec.key}"], memory[f"b/{spec.key}"] = best.a.to(base), (best.b / scale).to(base)
            params[spec.key] = whole.to(state.params[spec.key])
        return params, memory


def expert_keys(population: Population) -> list[str]:
    """Return the keys of the experts' own matrices."""
    return [str(TensorKey(layer, f"w_{side}")) for layer in range(population.spec.num_layers) for side in ("in", "out")]


def factor_key(key: str, letter: str) -> str:
    """Return the key of a factor: ``moe.0.w_in`` and "a" give ``moe.0.a_in``."""
    return key.replace(".w_", f".{letter}_")


def start_rows(memory: Mapping[str, Tensor], rank: int) -> dict[str, Mapping[int, Tensor]]:
    """Return the frozen experts and the first ``rank`` singular directions of the sum; empty before the first round."""
    rows: dict[str, Mapping[int, Tensor]] = {}
    for name, a in memory.items():
        if not name.startswith("a/"):
            continue
        key = name.removeprefix("a/")
        cut = resize(Factors(a, memory[f"b/{key}"]), rank)
        rows[key] = dict(enumerate(memory[f"base/{key}"]))
        rows[factor_key(key, "a")], rows[factor_key(key, "b")] = dict(enumerate(cut.a)), dict(enumerate(cut.b))
    return rows


def _scale(population: Population) -> float:
    return population.config.lora.alpha / population.config.lora.rank
