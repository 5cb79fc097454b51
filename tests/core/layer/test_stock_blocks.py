"""The layer against the MoE blocks of transformers that route otherwise: gpt-oss, DeepSeek-V3, Qwen2-MoE."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import DeepseekV3Config, GptOssConfig, Qwen2MoeConfig
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssMLP
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock

from fedmoe_core import LayerState, MoE, RoutingRule, SharedExpert

H, INNER, E, K = 16, 12, 8, 3


def randomized(block: nn.Module, std: float = 1.0) -> nn.Module:
    """O(1) weights, biases and buffers, float64."""
    generator = torch.Generator().manual_seed(0)
    block.double()
    with torch.no_grad():
        for tensor in (*block.parameters(), *block.buffers()):
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * std)
    return block


def split(interleaved: Tensor) -> Tensor:
    """[gate; up] on dimension 1 from gate and up in turns, as gpt-oss stores them."""
    return torch.cat([interleaved[:, ::2], interleaved[:, 1::2]], dim=1)


def both(block: nn.Module, layer: MoE) -> tuple[Tensor, Tensor, Tensor]:
    """Run both on the same tokens and the same upstream gradient; return their outputs, and ours' input gradient."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 9, H, generator=generator, dtype=torch.float64)
    dy = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, stock = layer(ours), block(theirs)
    stock = stock[0] if isinstance(stock, tuple) else stock
    y.backward(dy)
    stock.backward(dy)
    near(ours.grad, theirs.grad)
    return y, stock, dy


def near(found: Tensor, want: Tensor) -> None:
    assert float(((found - want).norm() / want.norm()).detach()) < 1e-10


def test_gpt_oss_with_biases_everywhere_and_clamped_swiglu() -> None:
    config = GptOssConfig(hidden_size=H, intermediate_size=INNER, num_local_experts=E, num_experts_per_tok=K)
    block = randomized(GptOssMLP(config), std=2.0)  # so that the clamp at 7 bites
    experts, router = block.experts, block.router
    state = LayerState.whole(
        router.weight,
        split(experts.gate_up_proj.mT),
        experts.down_proj.mT,
        bias_in=split(experts.gate_up_proj_bias),
        bias_out=experts.down_proj_bias,
        router_bias=router.bias,
    )
    layer = MoE.of(state, K, rule=RoutingRule("topk_softmax"), activation="swiglu_oai")
    y, stock, _ = both(block, layer)
    near(y, stock)
    near(layer.router.grad, router.weight.grad)
    near(layer.router_bias.grad, router.bias.grad)
    near(layer.w_in.grad, split(experts.gate_up_proj.grad.mT))
    near(layer.w_out.grad, experts.down_proj.grad.mT)
    near(layer.bias_in.grad, split(experts.gate_up_proj_bias.grad))
    near(layer.bias_out.grad, experts.down_proj_bias.grad)


@pytest.mark.parametrize("groups", [(1, 1), (4, 2)])
def test_deepseek_v3_with_correction_groups_scale_and_shared_experts(
    groups: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = DeepseekV3Config(
        hidden_size=H,
        moe_intermediate_size=INNER,
        n_routed_experts=E,
        num_experts_per_tok=K,
        n_group=groups[0],
        topk_group=groups[1],
        n_shared_experts=2,
        routed_scaling_factor=2.5,
        norm_topk_prob=True,
    )
    block = randomized(DeepseekV3MoE(config))
    # Their router computes in float32 whatever the model's dtype; here it is to compute in float64 as all else does.
    monkeypatch.setattr(torch, "float32", torch.float64)
    experts, router, theirs = block.experts, block.gate, block.shared_experts
    shared = SharedExpert(H, 2 * INNER, dtype=torch.float64)
    with torch.no_grad():
        shared.w_in.copy_(torch.cat([theirs.gate_proj.weight, theirs.up_proj.weight]))
        shared.w_out.copy_(theirs.down_proj.weight)
    state = LayerState.whole(
        router.weight, experts.gate_up_proj, experts.down_proj, correction_bias=router.e_score_correction_bias
    )
    layer = MoE.of(state, K, rule=RoutingRule("sigmoid", groups=groups, scale=2.5), shared=shared)
    y, stock, _ = both(block, layer)
    near(y, stock)
    near(layer.router.grad, router.weight.grad)
    near(layer.w_in.grad, experts.gate_up_proj.grad)
    near(layer.w_out.grad, experts.down_proj.grad)
    near(shared.w_in.grad, torch.cat([theirs.gate_proj.weight.grad, theirs.up_proj.weight.grad]))
    near(shared.w_out.grad, theirs.down_proj.weight.grad)


@pytest.mark.parametrize("renormalize", [False, True])
def test_qwen2_moe_with_its_gated_shared_expert(renormalize: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    config = Qwen2MoeConfig(
        hidden_size=H,
        moe_intermediate_size=INNER,
        shared_expert_intermediate_size=20,
        num_experts=E,
        num_experts_per_tok=K,
        norm_topk_prob=renormalize,
    )
    block = randomized(Qwen2MoeSparseMoeBlock(config))
    monkeypatch.setattr(torch, "float", torch.float64)  # the softmax of their router, as above
    experts, router, theirs = block.experts, block.gate, block.shared_expert
    shared = SharedExpert(H, 20, gated=True, dtype=torch.float64)
    with torch.no_grad():
        shared.w_in.copy_(torch.cat([theirs.gate_proj.weight, theirs.up_proj.weight]))
        shared.w_out.copy_(theirs.down_proj.weight)
        shared.gate.copy_(block.shared_expert_gate.weight)
    state = LayerState.whole(router.weight, experts.gate_up_proj, experts.down_proj)
    layer = MoE.of(state, K, rule=RoutingRule(renormalize=renormalize), shared=shared)
    y, stock, _ = both(block, layer)
    near(y, stock)
    near(layer.router.grad, router.weight.grad)
    near(layer.w_in.grad, experts.gate_up_proj.grad)
    near(shared.gate.grad, block.shared_expert_gate.weight.grad)
