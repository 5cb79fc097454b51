"""The facts of a model: its tensors by name, shape and kind, its layers, and what an evaluation of it yields."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from fedmoe_core.base.tensor_key import TensorKey
from fedmoe_core.data.batches import Task
from fedmoe_core.layer.state import MATRICES

# Kinds of tensors in global coordinates. "expert" and "router" tensors have experts on dimension 0; "frozen" ones (base
# experts under adapters, the blocks that adapters are grafted on) never train in this run.
Kind = Literal["expert", "router", "dense", "frozen"]


@dataclass(frozen=True)
class ParamSpec:
    """One tensor of the global model.

    ``moe.{l}.w_in`` (E, 2I, H), ``moe.{l}.w_out`` (E, H, I) and, where there are biases, ``bias_in`` (E, 2I) and
    ``bias_out`` (E, H) are "expert"; ``router`` (E, H) and ``router_bias`` (E,) are "router", ``correction_bias`` (E,)
    is "frozen". ``dense.{name}`` is everything else (trunk and head), under the model's own parameter names.
    """

    key: str
    kind: Kind
    shape: tuple[int, ...]
    dtype: torch.dtype
    layer: int = -1  # index of the MoE layer, -1 for dense tensors

    @property
    def name(self) -> str:
        """The last part of the key: ``w_in`` of ``moe.3.w_in``."""
        return TensorKey.parse(self.key).name


@dataclass(frozen=True)
class Evaluation:
    """Sums over evaluated batches; divide by ``count``."""

    loss_sum: float  # nats
    count: int  # predicted tokens, or samples
    correct: int = 0

    def __add__(self, other: Evaluation) -> Evaluation:
        return Evaluation(self.loss_sum + other.loss_sum, self.count + other.count, self.correct + other.correct)


@dataclass(frozen=True)
class ModelSpec:
    """The facts that budgets and plans need of a model; every MoE layer has the same sizes.

    ``head`` names the dense tensors that train even where the trunk is frozen: a classification head, which is fresh.
    ``heads`` is the number of attention heads; 0 = attention cannot be watched.
    """

    family: str
    task: Task
    num_layers: int  # MoE layers only
    num_experts: int
    top_k: int
    hidden_size: int
    intermediate_size: int
    activation: str
    params: tuple[ParamSpec, ...]
    head: frozenset[str] = frozenset()
    heads: int = 0

    @property
    def keys(self) -> frozenset[str]:
        """Keys of every tensor of the state."""
        return frozenset(spec.key for spec in self.params)

    def keys_of(self, name: str) -> list[str]:
        """Return the keys of the tensors called ``name``, one for each MoE layer."""
        return [str(TensorKey(layer, name)) for layer in range(self.num_layers)]

    def trained(self, *, train_dense: bool) -> tuple[ParamSpec, ...]:
        """Return the tensors that may train: experts and routers, and of the dense ones all or the head."""
        moving = [spec for spec in self.params if spec.kind != "frozen"]
        return tuple(spec for spec in moving if spec.kind != "dense" or train_dense or spec.key in self.head)


@dataclass(frozen=True)
class PlaceLosses:
    """Losses of one batch by place, (S, N).

    Attributes:
        loss_SN: in nats; of the next token (language modelling), or of the sequence, repeated at each of its places.
        correct_SN: whether that prediction is right.
        counted_SN: places that predict something; the others mean nothing.
        total: what ``evaluate`` gives for the batch.
    """

    loss_SN: Tensor
    correct_SN: Tensor
    counted_SN: Tensor
    total: Evaluation


def lora_specs(specs: Sequence[ParamSpec], rank: int) -> tuple[ParamSpec, ...]:
    """List the tensors of a model with adapters of ``rank`` on its experts' matrices: factors train, experts do not."""
    found: list[ParamSpec] = []
    for spec in specs:
        found.append(replace(spec, kind="frozen") if spec.kind == "expert" else spec)
        if spec.kind == "expert" and spec.name in MATRICES:
            side = spec.name.removeprefix("w_")
            experts, rows, columns = spec.shape
            shapes = {f"a_{side}": (experts, rank, columns), f"b_{side}": (experts, rows, rank)}
            found += [replace(spec, key=str(TensorKey(spec.layer, n)), shape=shape) for n, shape in shapes.items()]
    return tuple(found)


def model_hash(state: Mapping[str, Tensor]) -> str:
    """Return the hex sha256 of a model: keys in sorted order, each with its dtype, shape and little-endian bytes."""
    digest = hashlib.sha256()
    for key in sorted(state):
        tensor = state[key].detach().cpu().contiguous()
        digest.update(json.dumps([key, str(tensor.dtype), list(tensor.shape)]).encode() + b"\n")
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
