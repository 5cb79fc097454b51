"""Weights of experts whose outputs add up: a choice that cannot be made leaves its share out."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from fedmoe_kernels.routing.rules import compute_dtype

Renormalize = bool | Literal["share"]


def share_weights(logits_TE: Tensor, experts_TK: Tensor, *, factor: float, temperature: float) -> Tensor:
    """Return the weights (T, K) of the choices: n times ``factor`` times the softmax of the n chosen logits.

    Plain torch operators on T * K numbers, about six launches on a GPU beside those of the choice itself.

    Args:
        logits_TE: the router's, as ``route`` takes them.
        experts_TK: the choices, -1 = none.
        factor: scale / of.
        temperature: what the logits are divided by.
    """
    none_TK = experts_TK < 0
    dtype = compute_dtype(logits_TE.dtype)
    least, most = torch.finfo(dtype).min, torch.finfo(dtype).max
    # Not -inf: the softmax of a token without a choice would be NaN, and so would its gradient.
    chosen_TK = logits_TE.gather(1, experts_TK.clamp(min=0)).to(dtype).clamp(max=most).masked_fill(none_TK, least)
    # The best is taken off first: the largest finite number over a temperature below 1 would be infinite.
    over_TK = (chosen_TK - chosen_TK.detach().amax(-1, keepdim=True)) / temperature
    weights_TK = over_TK.softmax(-1).masked_fill(none_TK, 0.0)
    return weights_TK * (~none_TK).sum(-1, keepdim=True).to(dtype) * factor


def check_share(renormalize: object, k: int, *, of: int | None, temperature: float, scoring: str) -> None:
    """Refuse a way to normalise that does not exist, or numbers that do not go with it.

    Raises:
        ValueError: one of them.
    """
    if renormalize not in (True, False, "share"):
        raise ValueError(f"renormalize={renormalize!r} is unknown; use True, False or 'share'")
    if renormalize != "share":
        if of is not None or temperature != 1.0:
            raise ValueError(f"of and temperature belong to renormalize='share', not to {renormalize}; leave them out")
        return
    if scoring == "sigmoid":
        raise ValueError("renormalize='share' weighs by a softmax; use scoring='softmax' or 'topk_softmax' with it")
    if of is not None and of < k:
        raise ValueError(f"of={of} is below k={k}; {k} choices cannot sum to more than 1, so give at least {k}")
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature={temperature} is out of range; give a positive number")
