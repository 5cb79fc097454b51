"""The scores that rank experts, by the name that a user writes, and the one that is used where none is named."""

from __future__ import annotations

from collections.abc import Mapping

# Light on purpose: the help of the command reads it.
RANKINGS: Mapping[str, str] = {
    "taylor": "mean over tokens of |g dL/dg|, g the router's weight: how far the loss leans on the expert",
    "taylor_signed": "mean over tokens of -g dL/dg: the first-order rise of the loss without the expert",
    "s": "mean and largest router probability, HFedMoE eqs. 3 to 5",
    "ib": "I = s less beta times the information that the router spends, HFedMoE eqs. 11 and 14",
    "reap": "mean over the expert's tokens of g ||f(x)||, REAP (arXiv 2510.13999)",
    "reap_sum": "g ||f(x)|| over all tokens: REAP without the division by the expert's own tokens",
    "frequency": "share of the tokens that choose the expert",
}
# It agrees best with exact leave-one-expert-out losses: `python -m bench.study.ranking`, docs/benchmarks.md.
BEST, AGREEMENT = "reap_sum", 0.92  # Spearman within layers, median of three seeds
