"""What solvers see of a cost model: resources that add up over the chosen experts."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class AdditiveCosts:
    """Additive resources: a plan is inside its budget where ``base_D + sum of the chosen experts' costs`` is.

    Attributes:
        names: resource of each row (memory has one row per stage).
        base_D: int64, cost of a client without any chosen expert.
        costs_DLE: int64, cost of each expert that trains.
        frozen_D: int64, cost of any further expert that is held and only runs.
    """

    names: tuple[str, ...]
    base_D: np.ndarray
    costs_DLE: np.ndarray
    frozen_D: np.ndarray
