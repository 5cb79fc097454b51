"""An algorithm of your own, written out by hand: clients take turns with the experts, and each expert is averaged.

python examples/custom_algorithm.py [OUT]
fedmoe simulate algorithm=custom_algorithm:TakeTurns          # in the folder of this file
"""

import sys
from dataclasses import dataclass

import numpy as np

from fedmoe_core import Algorithm, Config, Weights, make_plan, simulate


@dataclass(frozen=True)
class TakeTurns(Algorithm):
    """In round r, client c prefers the experts that follow number r + c; every client's experts weigh the same."""

    def plan(self, state, clients):
        """Server, before the round: a score for every expert; make_plan spends the client's budget on the highest."""
        spec, plans = self.population.spec, []
        for client in clients:
            turn_E = (np.arange(spec.num_experts) - state.round - client) % spec.num_experts
            scores_LE = np.tile(spec.num_experts - turn_E, (spec.num_layers, 1)).astype(float)
            plans.append(make_plan(self.population, state, client, scores_LE, explore_absent=False))
        return plans

    def client(self, plan, result):
        """Client, after local training: how much what it sends back counts."""
        once_LE = plan.trainable_LE.astype(float)  # 1 for every expert that it trained, 0 elsewhere
        return Weights(experts_LE=once_LE, routers_LE=once_LE, gate=1.0)

    def apply(self, state, sums, updates):
        """Server, after the round: each tensor moves by the mean delta of those who trained it."""
        params = {}
        for spec in sums.specs:
            weight = {"expert": sums.expert_den_LE, "router": sums.router_den_LE}.get(spec.kind)
            divisor = sums.dense_den if weight is None else weight[spec.layer]  # 0 keeps the old tensor, bit for bit
            params[spec.key] = sums.mean(spec.key, state.params[spec.key], divisor)
        return params, None


if __name__ == "__main__":
    words = ["clients=4", "rounds=2", "warmup.steps=20", "budgets=experts=25%", "algorithm=__main__:TakeTurns"]
    words.append(f"out={sys.argv[1] if len(sys.argv) > 1 else 'runs/custom-algorithm'}")
    summary = simulate.run(Config.load(overrides=words), force=True)
    print(f"held-out loss {summary['loss_before']:.4f} -> {summary['loss_after']:.4f}")
