"""`Arguments`: the settings of a layer under the names of megablocks 0.10.0; what is not served is refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu

InitFn = Callable[[Tensor], object]
DEFAULT_ACTIVATION_FN: Callable[[Tensor], Tensor] = partial(gelu, approximate="tanh")
_NORMAL: InitFn = partial(nn.init.normal_, mean=0.0, std=0.02)
# What has one value here: the published default, and why no other is served.
_ONLY: Mapping[str, tuple[tuple[object, ...], str]] = {
    "moe_expert_model_parallelism": ((False,), "expert parallelism is not served: every client holds whole experts"),
    "expert_parallel_group": ((None,), "expert parallelism is not served: every client holds whole experts"),
    "moe_capacity_factor": ((1, 0), "it belongs to the MoE that drops tokens, and a dMoE drops none"),
}
_CHOICES = {"mlp_type": ("mlp", "glu"), "mlp_impl": ("grouped", "sparse")}


@dataclass(frozen=True)
class Arguments:
    """The settings of a `dMoE`; names, meanings and defaults as in megablocks, but for `device` and `mlp_impl`.

    Attributes:
        hidden_size, ffn_hidden_size: H, and I of one expert.
        num_layers: MoE layers of the model; the batched losses count them.
        bias: add one bias (H,) to the layer's output, and give the shared expert's matrices biases.
        return_bias: return (output, bias) and leave the addition to the caller, where there is a bias.
        activation_fn: any differentiable function of a tensor to one of its shape; of the gate alone for "glu". With
            `memory_optimized_mlp` it must draw no random numbers.
        moe_num_experts, moe_top_k: E, and k.
        moe_capacity_factor: 1 or 0; nothing is dropped either way.
        moe_normalize_expert_weights: divide a token's weights by their p-norm; this is p; None or 0 = leave them.
        moe_loss_weight: of `batched_load_balancing_loss`; 0 = keep nothing for it.
        moe_jitter_eps: in training the router sees x times uniform numbers of 1 - eps to 1 + eps; None = x.
        moe_lbl_in_fp32: compute the load-balancing loss in float32.
        moe_expert_model_parallelism, expert_parallel_group: False and None; others are refused.
        pipeline_model_parallel_size, num_layers_per_virtual_pipeline_stage: how many of `num_layers` are in this
            process; read by `batched_load_balancing_loss` alone.
        memory_optimized_mlp: keep what goes into the activation, not what comes out, and compute it again.
        mlp_type: "mlp", act(x w1') w2, or "glu", (act(x w1') * x v1') w2.
        mlp_impl: "grouped" or "sparse"; both are the same products here, without padding. Published default: "sparse".
        fp16, bf16: the parameters' dtype; fp16 goes first, and is the published default, so set it to False for
            bfloat16 or, with both False, for torch's default dtype.
        device: of the parameters; None = torch's default device. Published default: the current CUDA device.
        init_method, output_layer_init_method: fill router, w1 and v1, and fill w2.
        uniform_expert_assignment: send tokens to experts in turn whatever the router says, for measurements.
        shared_expert: add a dense expert that every token goes through.
        fc_cls, fc_kwargs: class of the shared expert's matrices, and what it is called with besides sizes, `bias`,
            `device` and, for `torch.nn.Linear`, `dtype`.
        remat_act_fn: not read, as in megablocks.
        shared_expert_hidden_size: None = `ffn_hidden_size`.
        shared_expert_weighted_sum: average the k experts and the shared one, instead of adding.
        moe_zloss_weight: of `batched_router_zloss`; 0 = keep nothing for it.
        moe_zloss_in_fp32: compute the z-loss in float32.

    Raises:
        ValueError: names the setting that is not served, with the reason, or that is out of range.

    Example:
        >>> Arguments(moe_num_experts=8, moe_top_k=9)
        Traceback (most recent call last):
        ValueError: moe_top_k=9; choose 1 to moe_num_experts=8
    """

    hidden_size: int = 1024
    ffn_hidden_size: int = 4096
    num_layers: int = 1
    bias: bool = True
    return_bias: bool = True
    activation_fn: Callable[[Tensor], Tensor] = DEFAULT_ACTIVATION_FN
    moe_num_experts: int = 1
    moe_top_k: int = 1
    moe_capacity_factor: int = 1
    moe_normalize_expert_weights: int | float | None = None
    moe_loss_weight: float = 0.1
    moe_jitter_eps: float | None = None
    moe_lbl_in_fp32: bool = False
    moe_expert_model_parallelism: bool = False
    expert_parallel_group: object | None = None
    pipeline_model_parallel_size: int = 1
    num_layers_per_virtual_pipeline_stage: int | None = None
    memory_optimized_mlp: bool = False
    mlp_type: str = "mlp"
    mlp_impl: str = "grouped"
    fp16: bool = True
    bf16: bool = False
    device: int | str | torch.device | None = None
    init_method: InitFn = _NORMAL
    output_layer_init_method: InitFn = _NORMAL
    uniform_expert_assignment: bool = False
    shared_expert: bool = False
    fc_cls: Any = nn.Linear
    fc_kwargs: Mapping[str, Any] = field(default_factory=dict)
    remat_act_fn: bool = True
    shared_expert_hidden_size: int | None = None
    shared_expert_weighted_sum: bool = False
    moe_zloss_weight: float = 0
    moe_zloss_in_fp32: bool = False

    def __post_init__(self) -> None:
        for name, (served, reason) in _ONLY.items():
            if getattr(self, name) not in served:
                raise ValueError(f"{name}={getattr(self, name)!r}: {reason}; set it to {served[0]!r}")
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown; choose one of {', '.join(choices)}")
        for name in ("hidden_size", "ffn_hidden_size", "num_layers", "moe_num_experts", "pipeline_model_parallel_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}; give at least 1")
        if not 1 <= self.moe_top_k <= self.moe_num_experts:
            raise ValueError(f"moe_top_k={self.moe_top_k}; choose 1 to moe_num_experts={self.moe_num_experts}")
        if not callable(self.activation_fn):
            raise ValueError(f"activation_fn={self.activation_fn!r} cannot be called; give a function of a tensor")
        if self.shared_expert and self.bias and self.return_bias:
            raise ValueError(
                "shared_expert with bias and return_bias would add a tensor to a pair, in megablocks too; "
                "set return_bias=False"
            )

    @property
    def dtype(self) -> torch.dtype:
        """Of the parameters."""
        return torch.float16 if self.fp16 else torch.bfloat16 if self.bf16 else torch.get_default_dtype()

    @property
    def shared_width(self) -> int:
        """The width inside the shared expert."""
        return self.shared_expert_hidden_size or self.ffn_hidden_size

    @property
    def layers_here(self) -> int:
        """MoE layers that one forward of this process runs."""
        virtual = self.num_layers_per_virtual_pipeline_stage
        return self.num_layers // self.pipeline_model_parallel_size if virtual is None else virtual
