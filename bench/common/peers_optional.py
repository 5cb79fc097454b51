"""Peers from other packages: each is imported only when asked for, and left out where it cannot be.

Those that have a forward pass only are in peers_forward.py.

None of them is a requirement. What they are given is what their documentation asks for: the routing that all
contenders get, weights in their own layout (made once, outside every measurement), and a current stream.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as tnf
from torch import Tensor

from bench.common.cases import Problem
from bench.common.peers import (
    Bound,
    Contender,
    Outcome,
    activate,
    halves,
    in_turn,
    leaf,
    shared,
    total_bytes,
    trained_only,
)
from bench.common.peers_forward import triton_kernels


def version(distribution: str, module: Any = None) -> str:
    """Return the version of the distribution; a package on the path without one names itself or nothing."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return str(getattr(module, "__version__", "of unknown version"))


def liger() -> Contender:
    """Run Liger's fused_moe: swiglu without biases."""
    ops = importlib.import_module("liger_kernel.ops.fused_moe")

    def bind(task: Problem) -> Bound:
        leaves = shared(task)

        def forward(task: Problem, x_TH: Tensor, s_TK: Tensor) -> Tensor:
            chosen_TK = task.experts_TK.to(torch.int32)
            return ops.LigerFusedMoEFunction.apply(x_TH, leaves["w_in"], leaves["w_out"], chosen_TK, s_TK)

        return Bound(forward, leaves, trained_only(task), total_bytes(leaves))

    detail = f"liger_kernel {version('liger_kernel')} LigerFusedMoEFunction"
    return Contender("liger", detail, bind, _only("swiglu"), risky=True, waits=True)


def scattermoe() -> Contender:
    """Run ScatterMoE's parallel_linear twice, with torch's activation between, as in its own MLP and GLUMLP."""
    module = importlib.import_module("scattermoe.parallel_experts")

    def bind(task: Problem) -> Bound:
        leaves = shared(task)
        w_in, w_out = leaves["w_in"].transpose(-2, -1), leaves["w_out"].transpose(-2, -1)

        def forward(task: Problem, x_TH: Tensor, s_TK: Tensor) -> Tensor:
            shape = task.shape
            record = module.flatten_sort_count(task.experts_TK, num_experts=shape.E)
            z_RF = module.parallel_linear(
                x_TH, w_in, shape.K, *record, expert_biases=leaves.get("bias_in"), grouped_out=True
            )
            h_RI = activate(z_RF, shape.activation)
            return module.parallel_linear(
                h_RI,
                w_out,
                1,
                *record,
                expert_biases=leaves.get("bias_out"),
                gates=s_TK.to(h_RI.dtype),
                grouped_in=True,
            )

        return Bound(forward, leaves, trained_only(task), total_bytes(leaves))

    detail = f"scattermoe {version('scattermoe', module)} parallel_linear"
    return Contender("scattermoe", detail, bind, risky=True)


def sonicmoe() -> Contender:
    """Run SonicMoE on routing made elsewhere; gate and up in turn along the rows of its first matrix."""
    sonic = importlib.import_module("sonicmoe.functional")
    kinds = importlib.import_module("sonicmoe.enums").ActivationType

    def bind(task: Problem) -> Bound:
        gated = task.shape.F == 2 * task.shape.I
        trains = bool(task.trainable_E.any())
        turned = {"w_in": in_turn(task.stacks["w_in"])} if gated else {}
        leaves = {n: (turned.get(n, full)).detach().requires_grad_(trains) for n, full in task.stacks.items()}
        w_in, w_out = leaves["w_in"].permute(1, 2, 0), leaves["w_out"].permute(1, 2, 0)
        kind = kinds.SWIGLU if gated else kinds.RELU
        stream = torch.cuda.current_stream().cuda_stream

        def forward(task: Problem, x_TH: Tensor, s_TK: Tensor) -> Tensor:
            shape = task.shape
            token_R = torch.arange(shape.T * shape.K, dtype=torch.int32, device=x_TH.device) // shape.K
            chosen_R = task.experts_TK.flatten().to(torch.int32)
            how = {"E": shape.E, "stream_id": stream, "activation_type": kind}
            args = (x_TH, s_TK.flatten(), token_R, chosen_R, w_in, None, w_out, None)
            return sonic.moe_general_routing_inputs(*args, **how)[0]

        def in_order(grads: Outcome) -> Outcome:
            unturned = {n: halves(g) if n in turned else g for n, g in grads.items()}
            return trained_only(task)(unturned)

        return Bound(forward, leaves, in_order, total_bytes(leaves))

    detail = f"sonicmoe {version('sonicmoe')} moe_general_routing_inputs"
    return Contender("sonicmoe", detail, bind, _only("swiglu", "relu"), risky=True)


def megablocks() -> Contender:
    """Run megablocks' own layer of dropless experts, mlp_impl "grouped"; w_out transposed, gate and up apart."""
    dmoe = importlib.import_module("megablocks.layers.dmoe")
    arguments = importlib.import_module("megablocks.layers.arguments")

    def bind(task: Problem) -> Bound:
        shape, like = task.shape, task.x_TH
        gated = shape.F == 2 * shape.I
        layer = dmoe.ParallelDroplessMLP(
            arguments.Arguments(
                hidden_size=shape.H,
                ffn_hidden_size=shape.I,
                moe_num_experts=shape.E,
                moe_top_k=shape.K,
                mlp_type="glu" if gated else "mlp",
                mlp_impl="grouped",
                activation_fn=tnf.silu if gated else tnf.relu,
                bias=False,
                return_bias=False,
                fp16=like.dtype == torch.float16,
                bf16=like.dtype == torch.bfloat16,
                device=like.device,
                moe_loss_weight=0.0,
            )
        )
        w_in, w_out = task.stacks["w_in"], task.stacks["w_out"]
        stacks = {"w1": w_in[:, : shape.I], "w2": w_out.transpose(1, 2)} | ({"v1": w_in[:, shape.I :]} if gated else {})
        leaves = {name: leaf(full.reshape(shape.E * shape.I, shape.H)) for name, full in stacks.items()}
        for name in leaves:
            leaves[name] = torch.nn.Parameter(leaves[name].detach(), requires_grad=bool(task.trainable_E.any()))
            setattr(layer.mlp, name, leaves[name])

        def forward(task: Problem, x_TH: Tensor, s_TK: Tensor) -> Tensor:
            return layer(x_TH, None, s_TK.to(x_TH.dtype), task.experts_TK)

        def in_order(grads: Outcome) -> Outcome:
            parts = {name: grad.view(shape.E, shape.I, shape.H) for name, grad in grads.items()}
            if not parts:
                return {}
            w_in = torch.cat([parts["w1"], parts["v1"]], dim=1) if gated else parts["w1"]
            return trained_only(task)({"w_in": w_in, "w_out": parts["w2"].transpose(1, 2)})

        return Bound(forward, leaves, in_order, total_bytes(leaves))

    detail = f"megablocks {version('megablocks')} ParallelDroplessMLP, mlp_impl 'grouped'"
    return Contender("megablocks", detail, bind, _only("swiglu", "relu"), risky=True)


OPTIONAL: Mapping[str, Callable[[], Contender]] = MappingProxyType(
    {
        "liger": liger,
        "scattermoe": scattermoe,
        "sonicmoe": sonicmoe,
        "megablocks": megablocks,
        "triton_kernels": triton_kernels,
    }
)


def _only(*activations: str) -> Callable[[Problem], str | None]:
    def refuses(task: Problem) -> str | None:
        if task.shape.activation not in activations:
            return f"has no {task.shape.activation}"
        return "takes no biases here" if task.shape.bias else None

    return refuses
