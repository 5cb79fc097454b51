"""FFT-MoE (arXiv 2508.18663): a frozen model, a small mixture grafted onto every block, k by each client's resources.

The paper's formulas are not known to us beyond its FedAvg; what the mixture, k_n and the loss are is our reading [E].
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from fedmoe_core.algorithms.base import EachAlone, NextModel, heard
from fedmoe_core.algorithms.largest_fit import resident_plan
from fedmoe_core.algorithms.lora.factors import flame_share
from fedmoe_core.config.run_config import Config
from fedmoe_core.config.systems import Equation, System
from fedmoe_core.layer.graft import GraftSpec
from fedmoe_core.layer.recording import Tape
from fedmoe_core.messages.plan import ExpertPlan, Extras
from fedmoe_core.messages.result import LocalResult
from fedmoe_core.messages.update import ClientUpdate, Weights
from fedmoe_core.server.means import Sums, modular_mean
from fedmoe_core.server.state import Population, ServerState

TARGET_FLOOR = 1e-6  # least share of an expert in a target, so that the divergence from it stays finite


@dataclass(frozen=True, eq=False)
class HeterogeneityLoss:
    """Mean over layers of lambda_n M sum_m f_m P_m / k_n + mu KL(P_n || Pi_n): FFT-MoE's auxiliary loss [E].

    f_m is the share of tokens that chose m (a constant, summing to k_n), P_m the mean softmax probability of m.

    Attributes:
        balance: lambda_n.
        pull: mu.
        target_LE: Pi_n, positive, each layer summing to 1.
        tables: as ``AuxLoss``.
    """

    balance: float
    pull: float
    target_LE: np.ndarray
    tables: int = 4

    def __call__(self, tape: Tape) -> Tensor:
        losses = []
        for number, (layer, target_E) in enumerate(zip(tape.layers, self.target_LE, strict=True)):
            logits_TE = tape.take_logits(number)
            prob_E = logits_TE.float().softmax(dim=-1).mean(dim=0)
            chosen = logits_TE.detach().topk(layer.top_k, dim=-1).indices.flatten()
            share_E = torch.bincount(chosen, minlength=layer.num_experts) / max(1, len(logits_TE))
            even = layer.num_experts * (share_E * prob_E).sum() / layer.top_k
            log_target_E = torch.as_tensor(np.log(target_E), dtype=prob_E.dtype, device=prob_E.device)
            divergence = (prob_E * (prob_E.clamp_min(1e-30).log() - log_target_E)).sum()
            losses.append(self.balance * even + self.pull * divergence)
        return torch.stack(losses).mean()


@dataclass(frozen=True)
class FftMoE(EachAlone):
    """Every client holds the whole frozen model and trains the whole grafted mixture; clients differ in k and loss."""

    card: ClassVar[System] = System(
        name="fft_moe",
        title="FFT-MoE",
        paper="Hu et al., FFT-MoE, arXiv 2508.18663",
        equations=(
            Equation("aggregation", "N", "W_E = sum_n |D_n| / |D| W_E^n; the foundation model never moves"),
            Equation("adapter", "E", "h' = FFN(h) + sum over the top k_n of g_m U_m relu(V_m h), U_m = 0 at first"),
            Equation("k_n", "E", "the largest k up to k_max whose local steps the client's budget pays"),
            Equation("balance", "E", "lambda_n M sum_m f_m P_m / k_n, lambda_n = lambda0 (1 - h_n) k_n / k_max"),
            Equation("target", "E", "mu KL(P_n || Pi_n), Pi_n = (1 - h_n) uniform + h_n (running P_n)"),
            Equation(
                "h_n", "E", "Jensen-Shannon divergence (bits) of the client's class or domain shares from uniform"
            ),
            Equation("usage", "E", "FLAME's weights |D_n| (a_n^m / S_n)^t on experts instead of |D_n|"),
        ),
        approximated=(
            "a budget in experts cannot be kept, since the whole model is resident and its experts are counted with "
            "the grafted ones; such a client gets its share of k_max and the run is shown as not inside the budgets",
            "a classification head trains and is averaged, because it is fresh; the rest of the trunk is frozen "
            "whatever train.trunk says",
        ),
        missing=("the paper's own loss formula, M, k_n and hyper-parameters are not known",),
    )
    trains_trunk = False
    wishes: ClassVar[tuple[type, ...]] = (HeterogeneityLoss,)

    @classmethod
    def graft(cls, config: Config) -> GraftSpec | None:
        """Return the mixture to graft: M experts of bottleneck r next to every block."""
        chosen = config.fft_moe
        return GraftSpec(num_experts=chosen.experts, width=chosen.width, top_k=chosen.top_k)

    def plan_client(self, state: ServerState, client: int) -> ExpertPlan:
        """Plan the whole mixture, k_n experts per token: clip(floor((F_n - F_FM) / F_expert), 1, k_max) [E]."""
        chosen, skew = self.population.config.fft_moe, label_skew(self.population, client)
        seen = state.memory.get(f"routing/{client}")
        shape = self.population.every_LE.shape
        target_LE = routing_target(None if seen is None else seen.numpy(), skew, shape=shape)

        def asked(_: Population, k: int) -> Extras:
            weight = chosen.balance * (1 - skew) * k / chosen.top_k  # lambda_n
            return Extras(aux=HeterogeneityLoss(balance=weight, pull=chosen.pull, target_LE=target_LE))

        return resident_plan(self.population, state, client, chosen.top_k, asked, by_k=True)

    def client(self, plan: ExpertPlan, result: LocalResult) -> Weights:
        """Weigh every tensor by |D_n|, or experts by FLAME's weights; report where this client's tokens went."""
        config, samples = self.population.config, self.population.sample_weight(plan.client)
        everywhere_LE = samples * plan.trainable_LE
        used_LE = everywhere_LE
        if config.fft_moe.aggregation == "usage":
            used_LE = plan.trainable_LE * flame_share(
                result.profile.rows_LE,
                steps=len(result.losses),
                tokens=self.population.costs.tokens,
                samples=samples,
                temperature=config.lora.temperature,
            )
        return Weights(
            experts_LE=used_LE,
            routers_LE=everywhere_LE,
            gate=samples,
            metrics={"k": plan.top_k, "skew": label_skew(self.population, plan.client)},
        )

    def apply(self, state: ServerState, sums: Sums, updates: Sequence[ClientUpdate]) -> NextModel:
        """Compute W_E = sum_n |D_n| / |D| W_E^n [N], and each heard client's running routing distribution [E]."""
        rate = self.population.config.fft_moe.smoothing
        memory = dict(state.memory)
        for client, profile in heard(updates).items():
            prob_LE = torch.from_numpy(profile.prob_sum_LE / np.maximum(profile.tokens_L, 1.0)[:, None])
            before_LE = memory.get(f"routing/{client}", prob_LE)
            memory[f"routing/{client}"] = (1 - rate) * before_LE + rate * prob_LE
        params = modular_mean(sums, state.params, "fedavg")
        return params, memory


def label_skew(population: Population, client: int) -> float:
    """Return h_n in [0, 1]: how far the client's class or domain shares are from uniform; 0 where unknown [E]."""
    if population.counts_CD is None or not population.counts_CD[client].sum() > 0:
        return 0.0
    counts_D = np.asarray(population.counts_CD[client], dtype=np.float64)
    return jensen_shannon(counts_D / counts_D.sum(), np.full(len(counts_D), 1 / len(counts_D)))


def jensen_shannon(p_D: np.ndarray, q_D: np.ndarray) -> float:
    """Return (KL(p || m) + KL(q || m)) / 2 in bits, m = (p + q) / 2: 0 for equal distributions, 1 for disjoint ones."""
    m_D = (p_D + q_D) / 2
    terms = [part[part > 0] * np.log2(part[part > 0] / m_D[part > 0]) for part in (p_D, q_D)]
    return min(1.0, max(0.0, math.fsum(np.concatenate(terms)) / 2))


def routing_target(seen_LE: np.ndarray | None, skew: float, *, shape: tuple[int, ...]) -> np.ndarray:
    """Return Pi_n = (1 - h_n) uniform + h_n (running P_n), uniform until heard [E]; at least a floor, sum 1."""
    uniform_LE = np.full(shape, 1 / shape[-1])
    target_LE = uniform_LE if seen_LE is None else (1 - skew) * uniform_LE + skew * seen_LE
    floored_LE = np.maximum(target_LE, TARGET_FLOOR)
    return np.asarray(floored_LE / floored_LE.sum(axis=1, keepdims=True))
