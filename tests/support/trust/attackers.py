"""Systems in which some clients lie within the bounds that every update is checked for; commands name them."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from fedmoe_core.algorithms.fc_moe import FcMoE
from fedmoe_core.algorithms.hfedmoe import HFedMoE
from fedmoe_core.algorithms.plain_fedavg import PlainFedAvg
from fedmoe_core.messages.plan import ExpertPlan
from fedmoe_core.messages.result import LocalResult
from fedmoe_core.messages.update import Weights

LIARS = (0, 3)  # clients


def reversed_and_large(deltas: dict[str, Tensor]) -> dict[str, Tensor]:
    """The change in the other direction and 20 times as large, within the bound of a number."""
    return {key: delta.mul(-20).clamp(-1, 1) for key, delta in deltas.items()}


class AttackedFedAvg(PlainFedAvg):
    """FedAvg of a plain model with two liars."""

    def client(self, plan: ExpertPlan, result: LocalResult) -> Weights:
        weights = super().client(plan, result)
        return replace(weights, deltas=reversed_and_large(result.deltas)) if plan.client in LIARS else weights


class AttackedHFedMoE(HFedMoE):
    """HFedMoE with two liars, who also claim the largest weights."""

    def client(self, plan: ExpertPlan, result: LocalResult) -> Weights:
        weights = super().client(plan, result)
        if plan.client not in LIARS:
            return weights
        full_LE = plan.trainable_LE * 1.0
        return replace(weights, experts_LE=full_LE, routers_LE=full_LE, deltas=reversed_and_large(result.deltas))


class OpposedFcMoE(FcMoE):
    """FC-MoE in which two clients want the reverse of what their data says, with little weight.

    With all of it they would not be in conflict: changes of few steps are nearly at right angles to each other, so that
    what a client adds to the consensus itself outweighs what the others say.
    """

    def client(self, plan: ExpertPlan, result: LocalResult) -> Weights:
        weights = super().client(plan, result)
        if plan.client not in LIARS:
            return weights
        reverse = {key: -delta for key, delta in result.deltas.items()}
        return replace(weights, experts_LE=weights.experts_LE / 100, deltas=reverse)
