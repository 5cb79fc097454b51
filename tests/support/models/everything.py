"""A made-up family whose blocks have all that a layer can have: biases, correction, groups, a scale, shared experts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fedmoe_bindings.transformers import TransformersAdapter
from fedmoe_bindings.transformers.live.families import STOCK, Family
from fedmoe_bindings.transformers.live.load import small_model
from fedmoe_core.config.run_config import ModelConfig
from fedmoe_core.layer.routing_rule import RoutingRule

TENSORS = {
    **STOCK,
    "bias_in": "experts.bias_in",
    "bias_out": "experts.bias_out",
    "router_bias": "gate.bias",
    "correction_bias": "gate.correction_bias",
}
EVERYTHING = Family(
    RoutingRule("sigmoid", groups=(4, 3), scale=1.5),
    tensors=TENSORS,
    shared=("shared_expert", "shared_expert_gate"),
)


class Mlp(nn.Module):
    """A shared expert of the stock kind."""

    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(hidden, width, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(width, hidden, bias=False)

    def forward(self, x_TH: Tensor) -> Tensor:
        y_TH: Tensor = self.down_proj(nn.functional.silu(self.gate_proj(x_TH)) * self.up_proj(x_TH))
        return y_TH


def load_everything(
    name: str,
    *,
    task: str = "causal_lm",
    model_config: ModelConfig | None = None,
    vocab_size: int = 64,
    num_classes: int = 0,
    seed: int = 0,
) -> TransformersAdapter:
    """As ``load_adapter("tiny")``, of the family above; no bias is 0."""
    sizes = model_config or ModelConfig()
    model = small_model(sizes, vocab_size=vocab_size, task=task, seed=seed)  # type: ignore[arg-type]
    hidden, width, experts = sizes.hidden_size, sizes.expert_width, sizes.experts
    blocks: list[Any] = [m for m in model.modules() if hasattr(m, "gate") and hasattr(m, "experts")]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for block in blocks:
            block.experts.bias_in = nn.Parameter(0.05 * torch.randn(experts, 2 * width))
            block.experts.bias_out = nn.Parameter(0.05 * torch.randn(experts, hidden))
            block.gate.bias = nn.Parameter(0.05 * torch.randn(experts))
            block.gate.register_buffer("correction_bias", 0.05 * torch.randn(experts))
            block.shared_expert, block.shared_expert_gate = Mlp(hidden, 12), nn.Linear(hidden, 1, bias=False)
    return TransformersAdapter(model, task=task, num_classes=num_classes, seed=seed, family=EVERYTHING)  # type: ignore[arg-type]
