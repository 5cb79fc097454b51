"""Every verb of this package as plain PyTorch loops: slow, differentiable, float64-capable, and the truth of all tests.

Nothing here is shared with the fast paths. Shapes: T tokens, K top-k, E experts, B slots, C clients, R = T * K rows,
H hidden, I intermediate, F = 2 * I for gated activations and I for the others, r LoRA rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class RoutingTruth(NamedTuple):
    """What `route` below returns; the same fields as `fedmoe_kernels.Routing`, with the statistics as a plain dict."""

    weights_TK: Tensor
    experts_TK: Tensor
    slots_TK: Tensor
    rows_TK: Tensor
    tokens_R: Tensor
    places_R: Tensor
    offsets_B1: Tensor
    stats: dict[str, Tensor]


def route(
    logits_TE: Tensor,
    k: int,
    *,
    slot_of_expert: Tensor | None = None,
    scoring: str = "softmax",
    renormalize: bool | str = True,
    of: int | None = None,
    temperature: float = 1.0,
    bias_E: Tensor | None = None,
    groups: tuple[int, int] | None = None,
    scale: float = 1.0,
    client_T: Tensor | None = None,
    valid_T: Tensor | None = None,
) -> RoutingTruth:
    """Route by masked top-k, token by token; the rules are those in the docstring of `fedmoe_kernels.route`.

    Args:
        logits_TE: router logits; the arithmetic runs in their own dtype.
        k: choices per token.
        slot_of_expert: (E,), or (C, E) with `client_T`: the slot of each expert, -1 where absent; None = all present.
        scoring, renormalize, of, temperature, bias_E, groups, scale, client_T, valid_T: as in `fedmoe_kernels.route`.

    Returns:
        RoutingTruth; `stats` has a leading C dimension when `slot_of_expert` is (C, E).
    """
    T, E = logits_TE.shape
    table_CE = torch.arange(E)[None] if slot_of_expert is None else slot_of_expert.reshape(-1, E)
    C, num_slots = table_CE.shape[0], int((table_CE >= 0).sum())
    top = torch.finfo(logits_TE.dtype).max
    weights = [[logits_TE.new_zeros(()) for _ in range(k)] for _ in range(T)]
    experts = [[-1] * k for _ in range(T)]
    slots = [[-1] * k for _ in range(T)]
    stats = _no_stats(C, E)
    for t in range(T):
        if valid_T is not None and not valid_T[t]:
            continue
        c = 0 if client_T is None else int(client_T[t])
        # NaN fails the comparison, so a NaN logit is an expert that this token cannot choose, exactly like -inf.
        finite = {e: logits_TE[t, e].clamp(max=top) for e in range(E) if logits_TE[t, e] > -math.inf}
        held = {e: logit for e, logit in finite.items() if table_CE[c, e] >= 0}
        chosen = _choose(held, k, scoring, bias_E, groups, E)
        if renormalize == "share":
            best = held[chosen[0]].detach() if chosen else 0.0
            picked = _softmax({e: (held[e] - best) / temperature for e in chosen}).values()
            found = [weight * len(chosen) / (k if of is None else of) for weight in picked]
        else:
            found = _weights(held, chosen, scoring, renormalize is True)
        for j, (e, weight) in enumerate(zip(chosen, found, strict=True)):
            weights[t][j], experts[t][j], slots[t][j] = weight * scale, e, int(table_CE[c, e])
        if finite:
            _count(stats, c, finite, held, _choose(finite, k, scoring, bias_E, groups, E))
    weights_TK = torch.stack([w for row in weights for w in row]).view(T, k) if T else logits_TE.new_zeros(0, k)
    if slot_of_expert is None or slot_of_expert.dim() == 1:
        stats = {name: value[0] for name, value in stats.items()}
    slots_TK = torch.tensor(slots, dtype=torch.int64).view(T, k)
    experts_TK = torch.tensor(experts, dtype=torch.int64).view(T, k)
    return RoutingTruth(weights_TK, experts_TK, slots_TK, *_place(slots_TK, num_slots), stats)


def _choose(
    logits: dict[int, Tensor],
    k: int,
    scoring: str,
    bias_E: Tensor | None,
    groups: tuple[int, int] | None,
    E: int,
) -> list[int]:
    """The experts one token takes, best first, ties by lowest index."""
    detached = {e: logit.detach() for e, logit in logits.items()}
    choice = {e: float(logit.sigmoid() if scoring == "sigmoid" else logit) for e, logit in detached.items()}
    if bias_E is not None:
        choice = {e: score + float(bias_E[e]) for e, score in choice.items()}
    choice = {e: score for e, score in choice.items() if score > -math.inf}
    preferred = set(choice)
    if groups is not None:
        n_group, topk_group = groups
        members = [[score for e, score in choice.items() if e * n_group // E == g] for g in range(n_group)]
        score_of_group = {g: sum(sorted(m, reverse=True)[:2]) for g, m in enumerate(members) if m}
        best = sorted(score_of_group, key=lambda g: (-score_of_group[g], g))[:topk_group]
        preferred = {e for e in choice if e * n_group // E in best}
    return sorted(choice, key=lambda e: (e not in preferred, -choice[e], e))[:k]


def _weights(logits: dict[int, Tensor], chosen: list[int], scoring: str, renormalize: bool) -> list[Tensor]:
    """The routing weights of the chosen experts before the scale; `logits` are those of all permitted experts."""
    if scoring == "sigmoid":
        picked = [logits[e].sigmoid() for e in chosen]
        return [s / (torch.stack(picked).sum() + 1e-20) for s in picked] if renormalize else picked
    if scoring == "topk_softmax":
        return list(_softmax({e: logits[e] for e in chosen}).values())
    prob = _softmax(logits)
    picked = [prob[e] for e in chosen]
    return [p / torch.stack(picked).sum() for p in picked] if renormalize else picked


def _softmax(logits: dict[int, Tensor]) -> dict[int, Tensor]:
    if not logits:
        return {}
    best = max(logit.detach() for logit in logits.values())
    powers = {e: (logit - best).exp() for e, logit in logits.items()}
    total = torch.stack(list(powers.values())).sum()
    return {e: power / total for e, power in powers.items()}


def _no_stats(C: int, E: int) -> dict[str, Tensor]:
    per_expert = ("hits_E", "prob_sum_E", "prob_max_E", "plogp_sum_E")
    zero = {name: torch.zeros(C, E, dtype=torch.float64) for name in per_expert}
    return zero | {name: torch.zeros(C, dtype=torch.float64) for name in ("tokens", "lost_mass")}


def _count(
    stats: dict[str, Tensor], c: int, finite: dict[int, Tensor], held: dict[int, Tensor], hit: list[int]
) -> None:
    """Add one token to the statistics of client c: the softmax is over all experts, whatever mask or scoring."""
    stats["tokens"][c] += 1
    for e in hit:
        stats["hits_E"][c, e] += 1
    for e, prob in _softmax(finite).items():
        p = float(prob.detach())
        stats["prob_sum_E"][c, e] += p
        stats["prob_max_E"][c, e] = max(float(stats["prob_max_E"][c, e]), p)
        stats["plogp_sum_E"][c, e] += p * math.log(p) if p > 0 else 0.0
        stats["lost_mass"][c] += 0.0 if e in held else p


def _place(slots_TK: Tensor, num_slots: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sort the real rows by slot, then token, then place: (rows_TK, tokens_R, places_R, offsets_B1)."""
    T, K = slots_TK.shape
    rows_TK = torch.full((T, K), -1, dtype=torch.int64)
    tokens_R = torch.full((T * K,), -1, dtype=torch.int64)
    places_R = torch.full((T * K,), -1, dtype=torch.int64)
    offsets_B1 = torch.zeros(num_slots + 1, dtype=torch.int64)
    row = 0
    for b in range(num_slots):
        for t in range(T):
            for j in range(K):
                if slots_TK[t, j] == b:
                    rows_TK[t, j], tokens_R[row], places_R[row] = row, t, t * K + j
                    row += 1
        offsets_B1[b + 1] = row
    return rows_TK, tokens_R, places_R, offsets_B1


class Lora(Protocol):
    """Adapters per slot: W_in + scale * b_in @ a_in, and the same for W_out.

    Fields: a_in (B, r, H), b_in (B, F, r), a_out (B, r, I), b_out (B, H, r); scale a number or (B,);
    base_of_slot_B (B,) int64 the expert of `w_in`, `w_out` and the biases that each slot sits on, None = its own index.
    """

    @property
    def a_in(self) -> Tensor: ...
    @property
    def b_in(self) -> Tensor: ...
    @property
    def a_out(self) -> Tensor: ...
    @property
    def b_out(self) -> Tensor: ...
    @property
    def scale(self) -> float | Tensor: ...
    @property
    def base_of_slot_B(self) -> Tensor | None: ...


class _Adapters(NamedTuple):
    a_in: Tensor
    b_in: Tensor
    a_out: Tensor
    b_out: Tensor
    scale: float | Tensor
    base_of_slot_B: Tensor | None


def _gated(act: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def apply(z_F: Tensor) -> Tensor:
        gate, up = z_F.chunk(2, dim=-1)
        return act(gate) * up

    return apply


def _silu(z: Tensor) -> Tensor:
    return z * z.sigmoid()


def _gelu(z: Tensor) -> Tensor:
    return 0.5 * z * (1 + torch.erf(z / math.sqrt(2)))


def _gelu_tanh(z: Tensor) -> Tensor:
    return 0.5 * z * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))


def _relu(z: Tensor) -> Tensor:
    return z.clamp(min=0)


def _relu2(z: Tensor) -> Tensor:
    return z.clamp(min=0) ** 2


def _clamped(z_F: Tensor, limit: float) -> tuple[Tensor, Tensor]:
    gate, up = z_F.chunk(2, dim=-1)
    return gate.clamp(max=limit), up.clamp(-limit, limit)


def _swiglu_oai(z_F: Tensor, limit: float) -> Tensor:
    gate, up = _clamped(z_F, limit)
    return (up + 1) * gate * torch.sigmoid(1.702 * gate)


def _swiglu_clamped(z_F: Tensor, limit: float) -> Tensor:
    gate, up = _clamped(z_F, limit)
    return _silu(gate) * up


def activate(z_F: Tensor, activation: str) -> Tensor:
    """Apply the expert's activation, z (..., F) -> h (..., I).

    Gated forms read z as [gate; up], halves of the last axis: "swiglu" silu(gate) * up; "geglu" gelu(gate) * up;
    "swiglu_oai" (up' + 1) * gate' * sigmoid(1.702 * gate') with gate' = min(gate, 7), up' = clamp(up, -7, 7), as in
    gpt-oss; "swiglu_clamped" silu(gate') * up' with both clamped at 10, as in DeepSeek-V4. Another limit follows the
    name: "swiglu_clamped:12". Plain forms: "relu", "relu2" (relu(z)^2, Nemotron), "gelu", "silu". gelu is the exact one
    (erf); "gelu_tanh" and "geglu_tanh" have its tanh approximation, which differs by up to 5e-4.
    """
    plain = {"relu": _relu, "relu2": _relu2, "gelu": _gelu, "gelu_tanh": _gelu_tanh, "silu": _silu}
    gated = {"swiglu": _gated(_silu), "geglu": _gated(_gelu), "geglu_tanh": _gated(_gelu_tanh)}
    name, _, limit = activation.partition(":")
    if name == "swiglu_oai":
        return _swiglu_oai(z_F, float(limit or 7))
    if name == "swiglu_clamped":
        return _swiglu_clamped(z_F, float(limit or 10))
    return (plain | gated)[activation](z_F)


class _Row(NamedTuple):
    token: int
    place: int
    slot: int
    z_F: Tensor  # pre-activation, w_in @ x + bias_in
    out_H: Tensor  # the expert's output, not weighted


def moe_mlp(
    x_TH: Tensor,
    slots_TK: Tensor,
    weights_TK: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    *,
    activation: str = "swiglu",
    bias_in: Tensor | None = None,
    bias_out: Tensor | None = None,
    lora: Lora | None = None,
) -> Tensor:
    """Return y[t] = sum over places j with slots_TK[t, j] >= 0 of weights_TK[t, j] * MLP_slot(x[t]); shape (T, H).

    Args:
        x_TH: tokens.
        slots_TK: slot of each choice, -1 = no row.
        weights_TK: routing weights.
        w_in, w_out: (B, F, H) and (B, H, I).
        activation: see `activate`.
        bias_in, bias_out: (B, F) and (B, H).
        lora: adapters per slot; the first axis of the weights and biases is then the base expert.
    """
    biases = (bias_in, bias_out)
    return _forward(x_TH, slots_TK, weights_TK, (w_in, w_out), biases, activation, lora)[0]


def _forward(
    x_TH: Tensor,
    slots_TK: Tensor,
    weights_TK: Tensor,
    weights: tuple[Tensor, Tensor],
    biases: tuple[Tensor | None, Tensor | None],
    activation: str,
    lora: Lora | None,
) -> tuple[Tensor, list[_Row]]:
    w_in, w_out = weights
    bias_in, bias_out = biases
    rows: list[_Row] = []
    y_T = [torch.zeros_like(x_TH[t]) for t in range(x_TH.shape[0])]
    for t in range(x_TH.shape[0]):
        for j in range(slots_TK.shape[1]):
            b = int(slots_TK[t, j])
            if b < 0:
                continue
            base = b if lora is None or lora.base_of_slot_B is None else int(lora.base_of_slot_B[b])
            w_up, w_down = w_in[base], w_out[base]
            if lora is not None:
                scale = lora.scale.expand(lora.a_in.shape[0])[b] if isinstance(lora.scale, Tensor) else lora.scale
                w_up = w_up + scale * lora.b_in[b] @ lora.a_in[b]
                w_down = w_down + scale * lora.b_out[b] @ lora.a_out[b]
            z_F = w_up @ x_TH[t] if bias_in is None else w_up @ x_TH[t] + bias_in[base]
            out_H = w_down @ activate(z_F, activation)
            out_H = out_H if bias_out is None else out_H + bias_out[base]
            y_T[t] = y_T[t] + weights_TK[t, j] * out_H
            rows.append(_Row(t, j, b, z_F, out_H))
    return (torch.stack(y_T) if y_T else x_TH.clone()), rows


def importance(
    dy_TH: Tensor,
    x_TH: Tensor,
    slots_TK: Tensor,
    weights_TK: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    *,
    activation: str = "swiglu",
    bias_in: Tensor | None = None,
    bias_out: Tensor | None = None,
    lora: Lora | None = None,
    trainable_B: Tensor | None = None,
) -> dict[str, Tensor]:
    """Return the per-slot importance sums of `ExpertScores`, each (B,), from autograd alone.

    With s the routing weight of a row, dS its gradient and z the pre-activation of the row:
    rows_B their number; taylor_B sum of s * dS, signed; taylor_abs_B sum of |s * dS|; fisher_B sum of (s * dS)^2;
    taylor_in_B sum of <z, dz>; grad_sq_B ||dW_in||^2 + ||dW_out||^2 (biases not counted), 0 for slots outside
    `trainable_B`; with `lora` the gradients of the slot's four factors are counted instead of the shared base's;
    reap_B sum of |s| * ||f(x)||, f(x) the expert's output (arXiv 2510.13999 after division by the rows) [N]. The others
    are first-order Taylor importance, our reading [E].
    """

    def leaf(value: Tensor) -> Tensor:
        return value.detach().clone().requires_grad_()

    w_in, w_out, s_TK = leaf(w_in), leaf(w_out), leaf(weights_TK)
    factors = [w_in, w_out]
    if lora is not None:
        adapters = _Adapters(
            leaf(lora.a_in), leaf(lora.b_in), leaf(lora.a_out), leaf(lora.b_out), lora.scale, lora.base_of_slot_B
        )
        factors, lora = [*adapters[:4]], adapters
    y_TH, rows = _forward(x_TH.detach(), slots_TK, s_TK, (w_in, w_out), (bias_in, bias_out), activation, lora)
    B = factors[0].shape[0]
    names = ("rows_B", "taylor_B", "taylor_abs_B", "fisher_B", "taylor_in_B", "grad_sq_B", "reap_B")
    sums = {name: x_TH.new_zeros(B) for name in names}
    if not rows:
        return sums
    wanted = [s_TK, *(row.z_F for row in rows), *factors]
    grads = torch.autograd.grad((y_TH * dy_TH).sum(), wanted)
    ds_TK, dz, dw = grads[0], grads[1 : 1 + len(rows)], grads[1 + len(rows) :]
    for row, dz_F in zip(rows, dz, strict=True):
        s_ds = (weights_TK[row.token, row.place] * ds_TK[row.token, row.place]).detach()
        sums["rows_B"][row.slot] += 1
        sums["reap_B"][row.slot] += weights_TK[row.token, row.place].abs() * row.out_H.detach().norm()
        sums["taylor_B"][row.slot] += s_ds
        sums["taylor_abs_B"][row.slot] += s_ds.abs()
        sums["fisher_B"][row.slot] += s_ds**2
        sums["taylor_in_B"][row.slot] += (row.z_F.detach() * dz_F).sum()
    for b in range(B):
        if trainable_B is None or trainable_B[b]:
            sums["grad_sq_B"][b] = sum((dw_B[b] ** 2).sum() for dw_B in dw)
    return sums
