"""What guards the sums beyond the checks of each update: a quorum, and a rule that bears hostile clients."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

Rule = Literal["none", "norm", "trimmed_mean", "median", "krum"]
Few = Literal["bounded", "keep"]

# Voters below which a rule says nothing: a trimmed mean and a median of two are the mean of both, and Krum with one
# hostile voter needs 2 * 1 + 3 (Blanchard et al. 2017, proposition 1).
FEWEST = {"none": 1, "norm": 1, "trimmed_mean": 3, "median": 3, "krum": 5}


@dataclass(frozen=True)
class Guard:
    """A guard; the default one lets every accepted update count as it is.

    A voter of an expert is an accepted client that gives it a positive weight. An expert's tensors are judged
    together, so are its router row, and so are all dense tensors: each of these is a part.

    Attributes:
        quorum: fewest voters that change a part of an expert; with fewer it keeps its bits.
        rule: "none" sums all; the others first scale down every change of a part whose L2 norm is above ``factor``
            times the usual one (``bounds``). Then "norm" sums; "trimmed_mean" and "median" take those of each number
            over the voters, all alike; "krum" sums the voters whose changes lie closest to others (multi-Krum).
        hostile: share of a part's voters that may be hostile: so many, at least one, are trimmed at either end or left
            out by krum.
        few: what becomes of a part with fewer voters than ``FEWEST``: "bounded" sums what the norm bound leaves,
            "keep" keeps its bits.
        factor: see ``rule``.

    Raises:
        ValueError: a value is unknown or out of range.
    """

    quorum: int = 1
    rule: Rule = "none"
    hostile: float = 0.2
    few: Few = "bounded"
    factor: float = 3.0

    def __post_init__(self) -> None:
        for name, value, known in (("rule", self.rule, get_args(Rule)), ("few", self.few, get_args(Few))):
            if value not in known:
                raise ValueError(f"{name} {value!r} is unknown; use one of {', '.join(known)}")
        if self.quorum < 1:
            raise ValueError(f"quorum = {self.quorum} is below 1; give 1 for no quorum")
        if not 0 < self.hostile < 0.5:
            raise ValueError(f"hostile = {self.hostile:g} is not above 0 and below 0.5: no rule bears half; lower it")
        if not (math.isfinite(self.factor) and self.factor >= 1):
            raise ValueError(f"factor = {self.factor:g} is below 1, which would shrink what is usual; raise it")

    @property
    def needs_all(self) -> bool:
        """Whether the rule looks at all updates of a round together."""
        return self.rule != "none"

    def hostile_of(self, voters: int) -> int:
        """Return how many of so many voters the rule bears: the share, at least 1, at most what it can."""
        most = (voters - 3) // 2 if self.rule == "krum" else (voters - 1) // 2
        return max(0, min(max(1, math.floor(self.hostile * voters)), most))
