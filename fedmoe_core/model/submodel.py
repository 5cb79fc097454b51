"""A sub-model as it is asked of a live model: which experts it has, in which rows and forms, and what of it trains."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from fedmoe_core.layer.slots import OwnRows


@dataclass(frozen=True)
class SubModel:
    """What ``ModelAdapter.configure`` makes of the live model; the default is the whole model, its experts trainable.

    Shapes: L MoE layers, E experts per layer; masks are boolean, in global coordinates.

    Attributes:
        permitted_LE: experts that are stored and run; None = all.
        trainable_LE: the permitted experts that are Parameters; None = all permitted ones.
        rows: by key (``moe.{l}.router``) and expert id, rows that stand in for the state's own.
        alias_LE: int (L, E); an absent expert with an alias is served by the slot of that held expert; -1 = none.
        top_k: experts per token, at most the model's own, which is the default.
        train_dense: whether dense tensors train.
        train_router: whether the router rows of trainable experts train.
        train_head: whether a classification head trains; None = always, whatever ``train_dense`` says.
        lora_rank: after ``add_lora``: the first ranks of the factors to use; where the state has no factors they exist
            only with a rank, fresh from ``lora_seed``. None = all ranks of the state's factors, or no factors.
        lora_seed: seed of factors that the state does not have.
        out_scale_L: start of a trainable factor on each layer's output; None = no such factor.
        frozen_format: few bits to store the experts in that do not train ("int8", "int4", ...); None = as they are.

    Example:
        >>> SubModel(permitted_LE=np.array([[True, False]]), top_k=1).train_router
        True
    """

    permitted_LE: np.ndarray | None = None
    trainable_LE: np.ndarray | None = None
    rows: OwnRows = field(default_factory=dict)
    alias_LE: np.ndarray | None = None
    top_k: int | None = None
    train_dense: bool = False
    train_router: bool = True
    train_head: bool | None = None
    lora_rank: int | None = None
    lora_seed: int = 0
    out_scale_L: Sequence[float] | None = None
    frozen_format: str | None = None


WHOLE = SubModel()
