"""An optimizer that does not move experts which a mask leaves out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fedmoe_bindings.transformers.stock.blocks import stock_blocks
from fedmoe_bindings.transformers.stock.routers import cut_router_of
from fedmoe_bindings.transformers.stock.use import stock_model_in


class Held:
    """Puts the rows of absent experts back after every step of an optimizer; ``remove`` ends that."""

    def __init__(self, optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
        self._model = stock_model_in(model)
        self._rows: list[tuple[Tensor, Tensor, Tensor]] = []
        optimizer = _inside(optimizer)
        self._hooks = [optimizer.register_step_pre_hook(self._keep), optimizer.register_step_post_hook(self._restore)]

    def remove(self) -> None:
        """Let the optimizer move everything again."""
        for hook in self._hooks:
            hook.remove()

    @torch.no_grad()
    def _keep(self, *_: Any) -> None:
        self._rows = []
        for block in stock_blocks(self._model):
            cut = cut_router_of(block.router)
            if cut is None:
                continue
            absent = torch.ones(block.num_experts, dtype=torch.bool)
            absent[cut.kept.cpu()] = False
            gone = absent.nonzero().flatten()
            own = [p for p in block.experts.parameters(recurse=False) if p.shape[:1] == (block.num_experts,)]
            steering = dict(block.router.named_parameters())
            own += [steering[name] for name, (dim, _) in cut.rows.items() if name in steering and dim == 0]
            for parameter in own:
                if parameter.grad is not None and gone.numel():
                    at = gone.to(parameter.device)
                    self._rows.append((parameter, at, parameter.index_select(0, at)))

    @torch.no_grad()
    def _restore(self, *_: Any) -> None:
        for parameter, at, rows in self._rows:
            parameter.index_copy_(0, at, rows)
        self._rows = []


def _inside(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer that steps: accelerate's wrapper, which Trainer hands to callbacks, has no hooks of its own."""
    while isinstance(inner := vars(optimizer).get("optimizer"), torch.optim.Optimizer):
        optimizer = inner
    return optimizer


def hold_still(optimizer: torch.optim.Optimizer, model: nn.Module) -> Held:
    """Keep experts that a mask leaves out, and their router rows, bit for bit through an optimizer's steps.

    Their gradients are zero under ``use_fedmoe(model, permitted=...)``, but weight decay and the momentum of earlier
    steps would move them all the same. Their rows are copied before a step and put back after it, so that any
    optimizer will do; ``extract_submodel`` and ``fedmoe_core.MoE`` need neither the copy nor the memory.

    Args:
        optimizer: over the model's parameters; accelerate's wrapper around one will do.
        model: a model on which ``use_fedmoe`` put a mask, then or later.

    Returns:
        What ends it, by ``remove()``.

    Example:
        >>> import torch
        >>> from transformers import MixtralConfig, MixtralForCausalLM
        >>> from fedmoe_bindings.transformers import use_fedmoe
        >>> sizes = dict(vocab_size=64, hidden_size=32, num_hidden_layers=1, intermediate_size=48, num_local_experts=4)
        >>> model = MixtralForCausalLM(MixtralConfig(**sizes, num_attention_heads=2, num_key_value_heads=1))
        >>> use_fedmoe(model, permitted=torch.tensor([True, True, False, False]))  # doctest: +ELLIPSIS
        MixtralForCausalLM(...)
        >>> optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
        >>> held, experts = hold_still(optimizer, model), model.model.layers[0].mlp.experts.down_proj
        >>> before = experts.detach().clone()
        >>> tokens = torch.arange(16)[None]
        >>> model(tokens, labels=tokens).loss.backward(); optimizer.step()
        >>> [torch.equal(experts[e], before[e]) for e in range(4)]
        [False, False, True, True]
    """
    return Held(optimizer, model)
