"""From router logits to routing: which experts serve each token, with what weight, in which rows."""

from __future__ import annotations

import torch
from torch import Tensor

from fedmoe_kernels.routing import ops
from fedmoe_kernels.routing.record import Routing, check_backend, table_of
from fedmoe_kernels.routing.share import Renormalize, check_share, share_weights
from fedmoe_kernels.routing.stats import RouterStats
from fedmoe_kernels.slot_map import SlotMap

SCORINGS = ("softmax", "topk_softmax", "sigmoid")


def route(
    logits_TE: Tensor,
    k: int,
    *,
    permitted_E: Tensor | SlotMap | None = None,
    scoring: str = "softmax",
    renormalize: Renormalize = True,
    of: int | None = None,
    temperature: float = 1.0,
    bias_E: Tensor | None = None,
    groups: tuple[int, int] | None = None,
    scale: float = 1.0,
    client_T: Tensor | None = None,
    valid_T: Tensor | None = None,
    with_stats: bool = False,
    backend: str = "auto",
) -> Routing:
    """Choose up to k permitted experts for each token and say which row each choice becomes.

    The mask acts before anything is chosen or normalised, so the result is the dense routing of the sub-model that has
    only the permitted experts. A token makes min(k, permitted) choices; the other places hold weight 0 and index -1.
    Ties go to the lowest expert id. A logit of NaN counts as -inf, and an expert at -inf is not chosen, so a token
    with nothing above -inf gets no row; +inf counts as the largest finite number. Gradients at all three are 0.

    Args:
        logits_TE: (T, E) router logits over all experts, any float dtype; computed in float32, float64 for float64.
            In a cohort row t already holds the logits of the router of client `client_T[t]`.
        k: choices per token, 1..E.
        permitted_E: a SlotMap; or a bool mask (E,), numbered by ascending id (a convenience for eager code, as it asks
            the device for the number of slots); None = all experts.
        scoring: "softmax": softmax over all permitted, then top-k. "topk_softmax": top-k, then softmax over the chosen.
            "sigmoid": sigmoid of each logit (the DeepSeek-V3 kind).
        renormalize: divide the weights by their sum over the chosen ("topk_softmax" sums to 1 as it is; "sigmoid" adds
            1e-20 to the sum). "share", not for "sigmoid": a token's n choices sum to n / `of`, so that where fewer than
            `of` can be chosen the others are missing, and their weight is not given to those that are there.
        of: the choices that sum to 1 under "share", at least k; None = k.
        temperature: under "share" the weights are the softmax of the chosen logits over this; above 1 they are more
            equal. Choice and statistics do not change.
        bias_E: (E,) added to the sigmoid for the choice only, never to the weight; only for "sigmoid".
        groups: (n_group, topk_group), only for "sigmoid": experts lie in n_group equal runs of ids; a group's score is
            the sum of its two best permitted choice scores (of one, if it has only one); choices are made in the
            topk_group best groups, and only places that these cannot fill are filled from the others.
        scale: factor on every weight, after renormalisation.
        client_T: (T,) int64 in [0, C), for a cohort SlotMap (C, E). Out of range is an error on the CPU; elsewhere the
            range is the caller's promise, because a check would wait for the device.
        valid_T: (T,) bool; False = padding: no row, no statistic, no gradient.
        with_stats: also fill `Routing.stats`.
        backend: "auto": on a GPU the Triton kernels, or plain torch, with one warning per reason, where they cannot
            serve; elsewhere plain torch. "torch" or "triton": this one or an error. The kernels serve k <= 16 and
            logits other than float64.

    Returns:
        Routing, differentiable once from weights_TK to the logits; a second derivative does not exist.

    Raises:
        ValueError: for an argument that does not fit; the sentence names it and the remedy.

    Example:
        >>> import torch
        >>> logits = torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 2.0]])  # two tokens, three experts
        >>> routing = route(logits, 1, permitted_E=torch.tensor([True, True, False]))
        >>> routing.experts_TK  # the second token would have taken expert 2, which is absent
        tensor([[0],
                [1]])
    """
    _check_rule(logits_TE, k, scoring, bias_E, groups)
    check_share(renormalize, k, of=of, temperature=temperature, scoring=scoring)
    check_backend(backend)
    slot_map = _slot_map(permitted_E)
    E = logits_TE.shape[1]
    if slot_map is not None and slot_map.num_experts != E:
        raise ValueError(f"permitted_E covers {slot_map.num_experts} experts, logits_TE {E}; they must agree")
    table_CE = table_of(slot_map, logits_TE, client_T, valid_T)
    num_slots = E if slot_map is None else slot_map.num_slots
    shares = renormalize == "share"
    rule = (num_slots, k, scoring, renormalize is True, *(groups or (1, 1)), float(scale), with_stats, backend)
    outputs = ops.route(logits_TE.detach() if shares else logits_TE, table_CE, client_T, valid_T, bias_E, *rule)
    weights_TK, experts_TK, slots_TK, rows_TK, tokens_R, places_R, offsets_B1, stats_C4E, tokens_C = outputs
    if shares:
        weights_TK = share_weights(logits_TE, experts_TK, factor=scale / (of or k), temperature=temperature)
    stats = None
    if with_stats:
        cohort = slot_map is not None and slot_map.num_clients is not None
        stats = _stats(stats_C4E.detach(), tokens_C.detach(), table_CE, cohort=cohort)
    index = (experts_TK, slots_TK, rows_TK, tokens_R, places_R, offsets_B1)
    return Routing(weights_TK, *index, num_slots, stats, None if slot_map is None else slot_map.tile_rows)


def _slot_map(permitted_E: Tensor | SlotMap | None) -> SlotMap | None:
    if not isinstance(permitted_E, Tensor):
        return permitted_E
    if torch.compiler.is_compiling():
        raise ValueError("permitted_E is a bool mask in compiled code; make SlotMap.build(permitted_E) outside it")
    return SlotMap.build(permitted_E)


def _check_rule(logits_TE: Tensor, k: int, scoring: str, bias_E: Tensor | None, groups: tuple[int, int] | None) -> None:
    if logits_TE.dim() != 2 or not logits_TE.is_floating_point():
        raise ValueError(f"logits_TE is {logits_TE.dtype} {tuple(logits_TE.shape)}; it must be floating point (T, E)")
    E = logits_TE.shape[1]
    if not 1 <= k <= E:
        raise ValueError(f"k={k} does not fit {E} experts; choose k between 1 and {E}")
    if scoring not in SCORINGS:
        raise ValueError(f"scoring={scoring!r} is unknown; choose one of {', '.join(SCORINGS)}")
    if scoring != "sigmoid" and (bias_E is not None or groups is not None):
        raise ValueError(f"bias_E and groups belong to scoring='sigmoid', not to {scoring!r}; leave them out")
    if bias_E is not None and (bias_E.shape != (E,) or bias_E.device != logits_TE.device):
        raise ValueError(
            f"bias_E is {tuple(bias_E.shape)} on {bias_E.device}; it must be ({E},), one number per expert, "
            f"on {logits_TE.device}"
        )
    if groups is not None and not (groups[0] >= 1 and E % groups[0] == 0 and 1 <= groups[1] <= groups[0]):
        raise ValueError(
            f"groups={groups} does not fit {E} experts; n_group must divide {E} and topk_group lie in 1..n_group"
        )


def _stats(stats_C4E: Tensor, tokens_C: Tensor, table_CE: Tensor, *, cohort: bool) -> RouterStats:
    lost_C = stats_C4E[:, 1].masked_fill(table_CE >= 0, 0.0).sum(-1)
    if not cohort:
        stats_C4E, tokens_C, lost_C = stats_C4E[0], tokens_C[0], lost_C[0]
    hits, prob_sum, prob_max, plogp_sum = stats_C4E.unbind(-2)
    return RouterStats(tokens_C, hits, prob_sum, prob_max, plogp_sum, lost_C)
