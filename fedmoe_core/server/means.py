"""From exact sums to the next global model: one mean, divided as each rule says.

An update carries weights; the sums keep numerators (weight times delta) and denominators (weights) apart. What fills
the weights and what divides is the whole difference between the rules:

| rule | the client's weight | numerator | divided by |
|---|---|---|---|
| experts, participation (17) | expert_weight[l, e]: sample weight if e qualifies, else 0 | expert | expert_den[l, e] |
| experts, damped [E] | the same | expert | round_den: all accepted clients |
| gate, row-wise [E] | router_weight[l, e]: p_c(e) of (19) | router | router_den[l, e] |
| gate, normalised [E] | router_weight = gate_weight on trained rows: (20) without 1/S | router | gate_den |
| gate, literal (21) | as normalised | router | S; and the old router is scaled by gate_den / S |
| gate, fedavg | router_weight = sample weight on trained rows | router | round_den |
| dense, fedavg | sample weight | dense | dense_den |

S is |S_global| of eq. 18. A row that no weight reached stays bit for bit; only the literal gate, which scales the whole
router, touches such rows. Numbers are equations of HFedMoE (arXiv 2601.00583) [N]; [E] marks engineering readings.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fedmoe_core.model.spec import ParamSpec
from fedmoe_core.server.blocks import row_blocks
from fedmoe_core.server.fixed_point import SumSettings

ExpertRule = Literal["participation", "damped"]
GateRule = Literal["row-wise", "normalized", "literal", "fedavg"]


@dataclass(frozen=True)
class Sums:
    """The sums of one round, read-only. Weights are integers in units of 1 / ``settings.top_weight``.

    Attributes:
        settings: the number format.
        specs: the tensors that were summed; tensors that do not train in this run have no sum.
        numerators: sum of weight x delta by key, int64 in the tensor's full shape.
        expert_den_LE, router_den_LE: sums of expert_weight and router_weight, int64.
        expert_voters_LE, router_voters_LE: accepted clients whose weight there is above 0, int64.
        gate_den: sum of gate_weight.
        dense_den: sum of sample_weight over the clients that sent dense deltas.
        round_den: sum of sample_weight over all accepted clients.
        accepted: number of accepted clients.
        agreement: by accepted client <delta, numerator> of every expert, float64 (L, E), see ``agreements``; empty
            without a second visit.
    """

    settings: SumSettings
    specs: tuple[ParamSpec, ...]
    numerators: Mapping[str, Tensor]
    expert_den_LE: Tensor
    router_den_LE: Tensor
    expert_voters_LE: Tensor
    router_voters_LE: Tensor
    gate_den: int
    dense_den: int
    round_den: int
    accepted: int
    agreement: Mapping[int, np.ndarray] = field(default_factory=dict)

    def mean(self, key: str, old: Tensor, den: Tensor | int) -> Tensor:
        """Return old + numerator / den, in float64, then in ``old``'s dtype; a row with den 0 keeps its bits.

        Args:
            key: a key of ``numerators``.
            old: (E, ...) or any shape, floating; never changed.
            den: one integer, or (E,), one number for each row of ``old``.
        """
        new = old.clone()
        # A scalar is one row of one number.
        old_rows, new_rows, sum_rows = (t.view(-1, *t.shape[1:]) for t in (old, new, self.numerators[key]))
        den_E = torch.as_tensor(den, dtype=torch.float64, device=sum_rows.device).expand(old_rows.shape[0])
        # A power of two times an integer below 2^53 is exact, so one division is the only rounding before the cast.
        den_E = den_E * 2.0**self.settings.scale_bits
        for rows_B in row_blocks(torch.nonzero(den_E).view(-1), sum_rows):
            step = sum_rows[rows_B].to(torch.float64) / den_E[rows_B].view(-1, *[1] * (old_rows.dim() - 1))
            rows_B = rows_B.to(old.device)
            new_rows[rows_B] = step.to(old.device).add_(old_rows[rows_B]).to(old.dtype)
        return new


def expert_mean(sums: Sums, old_state: Mapping[str, Tensor], rule: ExpertRule = "participation") -> dict[str, Tensor]:
    """Return the new expert tensors: HFedMoE eq. 17 [N] on deltas, or damped [E].

    "participation" divides by the weight of the clients that qualified, so one contributor of a rare expert moves it
    by its whole delta. "damped" divides by the weight of every accepted client: the others vote "no change", which
    is what full-model FedAvg would have given.

    Args:
        sums: the round's sums.
        old_state: the global model; never changed.
        rule: how to divide.

    Returns:
        New tensors of the expert keys; an expert without weight keeps its bits.
    """
    _check_rule(rule, ("participation", "damped"))
    new = {}
    for spec in sums.specs:
        if spec.kind == "expert":
            den_E = sums.expert_den_LE[spec.layer]
            if rule == "damped":
                den_E = torch.where(den_E > 0, sums.round_den, 0)
            new[spec.key] = sums.mean(spec.key, old_state[spec.key], den_E)
    return new


def gate_mean(
    sums: Sums, old_state: Mapping[str, Tensor], rule: GateRule = "row-wise", *, s_global_size: float | None = None
) -> dict[str, Tensor]:
    """Return the new routers: HFedMoE eqs. 18-21 [N], repaired readings [E]; see the table at the top of the file.

    The literal rule is eq. 21 as printed, G' = sum_c alpha(c) G_c with alpha(c) = gate_weight(c) / S, S = |S_global|.
    With G_c = G + delta_c and A = sum_c gate_weight(c) that is (A / S) G + (sum_c gate_weight(c) delta_c) / S. Both
    sums use the quantised weights, which are integers over top_weight, so the result is exactly eq. 21 with those
    alphas. Each weight is off by at most half of 1 / top_weight, or by less than 1 / top_weight where a tiny weight was
    kept above 0. The alphas do not sum to 1, so the router's scale drifts. That is the paper's form, off by default.

    Args:
        sums: the round's sums.
        old_state: the global model; never changed.
        rule: how to divide.
        s_global_size: |S_global|, for "literal" only, in units of gate_weight: a caller that divided sum_e p_c(e) by
            some n to fit gate_weight into [0, 1] passes |S_global| / n. May be 0 where no client has a gate weight.

    Returns:
        New tensors of the router keys; a zero sum keeps the router's bits.

    Raises:
        ValueError: unknown rule, or "literal" without a positive ``s_global_size``.
    """
    _check_rule(rule, ("row-wise", "normalized", "literal", "fedavg"))
    empty = s_global_size == 0 and sums.gate_den == 0  # no expert passed tau: eq. 20 has no terms, the gate stays
    if rule == "literal" and not empty and not (s_global_size is not None and s_global_size > 0):
        raise ValueError(
            f"the literal gate needs s_global_size > 0, not {s_global_size}; count the experts of S_global"
        )
    new = {}
    for spec in sums.specs:
        if spec.kind != "router":
            continue
        old_EH, den_E = old_state[spec.key], sums.router_den_LE[spec.layer]
        if rule == "literal":
            new[spec.key] = _literal(sums, spec.key, old_EH, float(s_global_size or 0))
            continue
        if rule != "row-wise":
            # One denominator for all rows, yet a row that no client trained is not even rounded.
            den_E = torch.where(den_E > 0, sums.gate_den if rule == "normalized" else sums.round_den, 0)
        new[spec.key] = sums.mean(spec.key, old_EH, den_E)
    return new


def _literal(sums: Sums, key: str, old_EH: Tensor, s_global_size: float) -> Tensor:
    if sums.gate_den == 0:
        return old_EH.clone()
    unit = sums.settings.top_weight * s_global_size
    step_EH = sums.numerators[key].to(old_EH.device, torch.float64) / (2.0**sums.settings.scale_bits * unit)
    return step_EH.add_(old_EH.to(torch.float64), alpha=sums.gate_den / unit).to(old_EH.dtype)


def dense_mean(sums: Sums, old_state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the new trunk and head: FedAvg by sample weight. Empty where dense tensors do not train.

    Args:
        sums: the round's sums.
        old_state: the global model; never changed.
    """
    dense = [spec.key for spec in sums.specs if spec.kind == "dense"]
    return {key: sums.mean(key, old_state[key], sums.dense_den) for key in dense}


def modular_mean(sums: Sums, old_state: Mapping[str, Tensor], gate: GateRule = "row-wise") -> dict[str, Tensor]:
    """Return the new experts, routers and trunk, each averaged over the clients that trained it.

    Args:
        sums, old_state: as ``expert_mean``.
        gate: as the ``rule`` of ``gate_mean``.
    """
    gates = gate_mean(sums, old_state, gate)
    return {**expert_mean(sums, old_state), **gates, **dense_mean(sums, old_state)}


def _check_rule(rule: str, known: tuple[str, ...]) -> None:
    if rule not in known:
        raise ValueError(f"rule {rule!r} is unknown; use one of {', '.join(known)}")
