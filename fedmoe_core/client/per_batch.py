"""Experts chosen again for every batch: a scoring pass, then a step in which only the chosen ones learn."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from fedmoe_core.budget.cost_model import CostModel
from fedmoe_core.budget.peak_memory import resident_bytes, tensor_bytes, trace_memory
from fedmoe_core.client.profiling import ProfileSums, validate
from fedmoe_core.config.run_config import TrainConfig
from fedmoe_core.data.batches import Batch
from fedmoe_core.messages.plan import BatchRule, ProbeContext
from fedmoe_core.model.adapter import ModelAdapter


class PerBatchSteps:
    """Steps in which every batch has its own experts, chosen by a scoring pass over it; the model holds every expert.

    Attributes:
        optimizer: of experts that come and go.
        chosen_LE: experts that learn from the current batch.
        trained_LE: those that learnt from some batch of the round.
    """

    def __init__(self, context: ProbeContext, costs: CostModel, sums: ProfileSums, rule: BatchRule) -> None:
        self.optimizer = SlotAdamW(context.adapter, context.train)
        self._adapter, self._plan, self._costs, self._sums = context.adapter, context.plan, costs, sums
        self._rule, self._flops = rule, 0.0
        self._rows_LE = np.zeros(context.plan.trainable_LE.shape)
        self.chosen_LE = self.trained_LE = np.zeros(self._rows_LE.shape, dtype=bool)

    def before(self, batch: Batch) -> int:
        """Score ``batch`` without gradients and let only the chosen experts learn; return the peak bytes of both."""
        adapter = self._adapter
        resident = resident_bytes(adapter.model, self.optimizer)
        found, trace = trace_memory(partial(validate, adapter, [batch]), batch.tokens_SN.device)
        self.chosen_LE = self._rule(found.profile)
        self.trained_LE = self.trained_LE | self.chosen_LE
        self._select(self.chosen_LE)
        served_LE, tokens = np.ones_like(self.chosen_LE), batch.tokens_SN.numel()
        self._flops += self._costs.forward_flops(served_LE, tokens=tokens, top_k=self._plan.top_k)
        # A layer's weights exist twice while its slots are laid out again.
        largest = max(tensor_bytes(layer.own_tensors()) for layer in adapter.moe)
        return max(resident + trace.peak, resident_bytes(adapter.model, self.optimizer) + largest)

    def after(self, tokens: int) -> None:
        """Bill the step, and take the importance sums before the layers change their experts and lose them."""
        rows_LE = self._sums.rows_LE() - self._rows_LE
        self._flops += self._costs.real_flops(rows_LE, self.chosen_LE, tokens=tokens)
        self._sums.harvest()
        self._rows_LE = self._sums.rows_LE()

    def spent(self) -> float:
        """Return the operations of scoring and of steps."""
        return self._flops

    def finish(self) -> np.ndarray:
        """Select all that the plan trains, so that every delta can be read, mostly zeros; return those that learnt."""
        self._select(self._plan.trainable_LE)
        return self.trained_LE

    def _select(self, trainable_LE: np.ndarray) -> None:
        for layer, trainable_E in zip(self._adapter.moe, trainable_LE, strict=True):
            layer.set_experts(None, trainable_E)


class SlotAdamW:
    """AdamW over experts that come and go: every expert and router row has its own moments and step count.

    A step moves only those that learn now. What is masked keeps its weights and its state bit for bit, weight decay
    included, and goes on from there when it is chosen again.
    """

    def __init__(self, adapter: ModelAdapter, train: TrainConfig) -> None:
        self.adapter, self.train = adapter, train
        of_experts = {id(p) for layer in adapter.moe for p in layer.own_parameters()}
        self._dense = [p for p in adapter.model.parameters() if p.requires_grad and id(p) not in of_experts]
        self._states: dict[object, dict[str, Any]] = {}

    @property
    def state(self) -> dict[object, dict[str, Any]]:
        """Moments and step of every expert's matrix and router row, and of dense tensors, that ever moved."""
        return self._states

    @property
    def param_groups(self) -> list[dict[str, list[nn.Parameter]]]:
        """The parameters that learn now."""
        experts = [p for layer in self.adapter.moe for p in layer.own_parameters() if p.requires_grad and p.numel()]
        return [{"params": [*experts, *self._dense]}]

    def step(self) -> None:
        """Take one AdamW step of every slot that has a gradient."""
        places: dict[object, nn.Parameter] = {("dense", place): p for place, p in enumerate(self._dense)}
        for number, layer in enumerate(self.adapter.moe):
            for name in layer.names:
                whole: nn.Parameter = getattr(layer, name)
                if whole.grad is None:
                    continue
                for slot, expert in enumerate(layer.trainable_experts):
                    row = nn.Parameter(whole.detach()[slot])  # shares the layer's storage
                    row.grad = whole.grad[slot]
                    places[number, name, expert] = row
        if not any(p.grad is not None for p in places.values()):
            return
        rows, train = list(places.values()), self.train
        optimizer = torch.optim.AdamW(rows, lr=train.lr, weight_decay=train.weight_decay, fused=True)
        for key, parameter in places.items():
            if key in self._states:
                optimizer.state[parameter] = self._states[key]
        optimizer.step()
        self._states |= {key: optimizer.state[p] for key, p in places.items() if p in optimizer.state}

    def zero_grad(self, *, set_to_none: bool = True) -> None:
        """Drop the gradients."""
        for parameter in self.param_groups[0]["params"]:
            parameter.grad = None
