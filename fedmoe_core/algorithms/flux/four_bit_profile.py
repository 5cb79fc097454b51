"""Profiling the whole model in 4 bits: which experts tokens use, and how much attention those tokens get (Flux)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from fedmoe_core.budget.limits import Cost
from fedmoe_core.layer.recording import recording
from fedmoe_core.messages.measure import Measure
from fedmoe_core.messages.plan import ProbeContext, Reads
from fedmoe_core.model.spec import ParamSpec
from fedmoe_core.model.submodel import SubModel
from fedmoe_core.server.state import Population
from fedmoe_kernels.quantized import Quantized


def quantized_bytes(specs: Sequence[ParamSpec], *, form: str = "int4", group: int = 128) -> int:
    """Count what a client stores to profile: codes and scales of matrices, all else as it is; for the ledger."""
    total = 0
    for spec in specs:
        empty = torch.empty(spec.shape, dtype=spec.dtype, device="meta")
        if _is_rounded(spec):
            total += Quantized.of(_padded(empty), form, (1, _group(spec.shape[-1], group))).bytes
        else:
            total += empty.numel() * empty.itemsize
    return total


def _is_rounded(spec: ParamSpec) -> bool:
    return spec.kind != "router" and len(spec.shape) >= 2 and spec.dtype.is_floating_point


def _padded(tensor: Tensor) -> Tensor:
    """A stack of matrices whose columns are a multiple of 32; zeros added at the end change no scale."""
    stack = tensor.reshape(-1, *tensor.shape[-2:])
    return pad(stack, (0, -tensor.shape[-1] % 32))


def _group(columns: int, most: int) -> int:
    """The largest multiple of 32 up to ``most`` that divides the padded columns."""
    whole = columns + -columns % 32
    return max(size for size in range(32, max(most, 32) + 1, 32) if whole % size == 0)


FORMAT = "int4"
GROUP = 32  # columns that must divide a matrix for its rows to be stored in 4 bits


@dataclass(frozen=True)
class QuantizedProfile:
    """f_e = tokens to e / tokens, and abar_e = mean attention score of those tokens: Flux's local profile [N], (L, E).

    Experts are really held in 4 bits; router and trunk stay as they are [E]. The data are the round's local batches,
    and a token's attention score is what it receives in its block [E]; 1 for all where attention cannot be watched.
    """

    measures: ClassVar[Mapping[str, Measure]] = MappingProxyType(
        {"freq": Measure("LE", most=1.0), "attention": Measure("LE")}
    )
    reads: ClassVar[Reads] = "int4"

    def __call__(self, context: ProbeContext) -> dict[str, Tensor]:
        adapter = context.adapter
        shape = (len(adapter.moe), adapter.spec.num_experts)
        count_LE, attention_LE = torch.zeros(2, *shape, dtype=torch.float64)
        tokens = 0
        try:
            nothing_LE = np.zeros(shape, dtype=bool)
            # `configure` sets the bits of every layer; the client's own plan sets them back.
            adapter.configure(
                context.params,
                SubModel(trainable_LE=nothing_LE, train_router=False, train_head=False, frozen_format=FORMAT),
            )
            with recording(adapter.moe) as tape, adapter.watch_attention() as received:
                for batch in context.batches():
                    adapter.evaluate(batch)
                    tokens += int(batch.mask_SN.sum())
                    for number in range(shape[0]):
                        score_SN = received[number]
                        score_T = torch.ones(batch.tokens_SN.numel()) if score_SN is None else score_SN.flatten().cpu()
                        experts_TK = tape.choices(number).cpu()
                        row_T, place_K = torch.nonzero(experts_TK >= 0, as_tuple=True)
                        chosen_R = experts_TK[row_T, place_K]
                        count_LE[number] += torch.bincount(chosen_R, minlength=shape[1])
                        attention_LE[number] += torch.bincount(chosen_R, score_T[row_T].double(), minlength=shape[1])
        finally:
            for layer in adapter.moe:
                layer.frozen_format = None
        return {"freq": count_LE / max(tokens, 1), "attention": attention_LE / count_LE.clamp(min=1)}


def profile_cost(population: Population) -> Cost | None:
    """Return what the profile costs a client; None where the experts' matrices cannot be stored in 4 bits.

    Codes of all experts travel and are held (twice while they are laid out); they count as experts. Attention weights
    are tables of (S, heads, N, N) floats, a few of which live at once.
    """
    costs, spec, train = population.costs, population.spec, population.config.train
    if spec.hidden_size % GROUP or spec.intermediate_size % GROUP:
        return None
    codes = quantized_bytes([param for param in spec.params if param.kind == "expert"], form=FORMAT)
    nobody_LE = np.zeros((spec.num_layers, spec.num_experts), dtype=bool)
    all_LE = ~nobody_LE
    routers = costs.router_bytes
    attention = 4 * costs.tokens * train.seq_len * spec.heads * 4
    working = 4 * costs.expert_params * 4  # an expert as floats, its matrices dequantised, its codes as floats
    return Cost(
        memory_bytes=costs.forward_memory(nobody_LE) + 2 * (codes + routers) + attention + working,
        flops=costs.forward_flops(all_LE, tokens=train.local_steps * costs.tokens),
        bytes_down=codes,
        bytes_up=2 * 8 * costs.total_experts,
        experts=costs.total_experts,
    )
