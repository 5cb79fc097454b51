"""The rule by which a layer sends tokens to experts, as model families differ in it."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

from fedmoe_kernels.routing.route import SCORINGS
from fedmoe_kernels.routing.share import Renormalize, check_share

_OF_SHARE = ("of", "temperature")


@dataclass(frozen=True)
class RoutingRule:
    """How router logits become choices and weights; the terms are those of ``fedmoe_kernels.route``.

    Attributes:
        scoring: "softmax" over all permitted experts, then top-k (Mixtral, OLMoE, Qwen); "topk_softmax": top-k, then
            softmax over the chosen (gpt-oss); "sigmoid" of each logit (DeepSeek-V3).
        renormalize: divide the weights by their sum over the chosen. "share": so that the choices of a token sum to 1
            only where it makes ``of`` of them. It is for models whose experts' outputs add up, such as a dense model
            that was split: there, the weight of an expert that is not held must not go to the others.
        groups: (n_group, topk_group), for "sigmoid": choose within the best groups of experts only.
        scale: factor on every weight, after renormalisation (DeepSeek's ``routed_scaling_factor``).
        of: k of the whole model, under "share"; None = that of the layer.
        temperature: under "share", of the weights alone, see ``fedmoe_kernels.route``.

    Raises:
        ValueError: an unknown scoring, groups without "sigmoid", a scale that is not a positive number, or "share" with
            what does not go with it.

    Example:
        >>> RoutingRule("sigmoid", groups=(8, 4), scale=2.5).renormalize  # DeepSeek-V3
        True
    """

    scoring: str = "softmax"
    renormalize: Renormalize = True
    groups: tuple[int, int] | None = None
    scale: float = 1.0
    of: int | None = None
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.scoring not in SCORINGS:
            raise ValueError(f"scoring={self.scoring!r} is unknown; choose one of {', '.join(SCORINGS)}")
        if self.groups is not None and self.scoring != "sigmoid":
            raise ValueError(f"groups belong to scoring='sigmoid', not to {self.scoring!r}; leave them out")
        if not 0 < self.scale < math.inf:
            raise ValueError(f"scale={self.scale} is out of range; give a positive number")
        check_share(self.renormalize, 1, of=self.of, temperature=self.temperature, scoring=self.scoring)

    def keywords(self) -> dict[str, Any]:
        """Return the rule as ``fedmoe_kernels.route`` takes it."""
        return {
            "scoring": self.scoring,
            "renormalize": self.renormalize,
            "of": self.of,
            "temperature": self.temperature,
            "groups": self.groups,
            "scale": self.scale,
        }

    def facts(self) -> dict[str, Any]:
        """Return the fields for a state dict; what belongs to "share" only with it, for older dicts do not have it."""
        found = asdict(self)
        return found if self.renormalize == "share" else {n: v for n, v in found.items() if n not in _OF_SHARE}

    def of_layer(self, top_k: int) -> RoutingRule:
        """Return the rule of a layer with so many choices a token: under "share" these are what sums to 1."""
        return replace(self, of=top_k) if self.renormalize == "share" and self.of is None else self

    def check(self, num_experts: int) -> None:
        """Refuse groups that do not divide a layer of so many experts.

        Raises:
            ValueError: n_group does not divide them, or topk_group is outside 1..n_group.
        """
        if self.groups is None:
            return
        count, best = self.groups
        if not (count >= 1 and num_experts % count == 0 and 1 <= best <= count):
            raise ValueError(
                f"groups={self.groups} do not fit {num_experts} experts; n_group must divide {num_experts} and "
                "topk_group lie in 1..n_group"
            )
