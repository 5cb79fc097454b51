"""Experts chosen again for every batch: a scoring pass, then a step in which only the chosen ones learn."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from fedmoe_core.budget.cost_model import CostModel
from fedmoe_core.budget.peak_memory import HasState, resident_bytes, tensor_bytes, trace_memory
from fedmoe_core.client.profiling import ProfileSums, validate
from fedmoe_core.config.run_config import TrainConfig
from fedmoe_core.data.batches import Batch
from fedmoe_core.messages.plan import BatchRule, ProbeContext
from fedmoe_core.model.adapter import ModelAdapter


@dataclass
class BatchChooser:
    """Puts a rule into effect on the live model, batch by batch.

    Attributes:
        adapter, rule, costs, top_k: the model with every expert held, the rule of choice, what operations cost, and k'.
        chosen_LE: experts that learn from the current batch.
        trained_LE: those that learnt from some batch of the round.
        flops: operations so far, scoring passes included.
    """

    adapter: ModelAdapter
    rule: BatchRule
    costs: CostModel
    top_k: int
    chosen_LE: np.ndarray = field(init=False)
    trained_LE: np.ndarray = field(init=False)
    flops: float = 0.0

    def __post_init__(self) -> None:
        spec = self.adapter.spec
        self.trained_LE = np.zeros((spec.num_layers, spec.num_experts), dtype=bool)
        self.chosen_LE = self.trained_LE

    def choose(self, batch: Batch, optimizer: HasState) -> int:
        """Score ``batch`` without gradients and let only the chosen experts learn; return the peak bytes of both."""
        resident = resident_bytes(self.adapter.model, optimizer)
        found, trace = trace_memory(partial(validate, self.adapter, [batch]), batch.tokens_SN.device)
        self.chosen_LE = self.rule(found.profile)
        self.trained_LE = self.trained_LE | self.chosen_LE
        for layer, chosen_E in zip(self.adapter.moe, self.chosen_LE, strict=True):
            layer.set_experts(None, chosen_E)
        served_LE = np.ones_like(self.chosen_LE)
        self.flops += self.costs.forward_flops(served_LE, tokens=batch.tokens_SN.numel(), top_k=self.top_k)
        # A layer's weights exist twice while its slots are laid out again.
        largest = max(tensor_bytes(layer.own_tensors()) for layer in self.adapter.moe)
        return max(resident + trace.peak, resident_bytes(self.adapter.model, optimizer) + largest)

    def bill(self, rows_LE: np.ndarray, tokens: int) -> None:
        """Add the operations of the step that just ran."""
        self.flops += self.costs.real_flops(rows_LE, self.chosen_LE, tokens=tokens)

    def settle(self, trainable_LE: np.ndarray) -> None:
        """End the round: select all that the plan trains, so that every delta can be read, mostly zeros."""
        for layer, trainable_E in zip(self.adapter.moe, trainable_LE, strict=True):
            layer.set_experts(None, trainable_E)


class PerBatchSteps:
    """Steps in which every batch has its own experts, chosen by a scoring pass over it."""

    def __init__(self, context: ProbeContext, costs: CostModel, sums: ProfileSums, rule: BatchRule) -> None:
        self.optimizer = SlotAdamW(context.adapter, context.train)
        self.chooser = BatchChooser(context.adapter, rule, costs, context.plan.top_k)
        self._trainable_LE, self._sums = context.plan.trainable_LE, sums
        self._rows_LE = np.zeros(self._trainable_LE.shape)

    def before(self, batch: Batch) -> int:
        """Choose the experts of ``batch``; return the peak bytes of that."""
        return self.chooser.choose(batch, self.optimizer)

    def after(self, tokens: int) -> None:
        """Bill the step, and take the importance sums before the layers change their experts and lose them."""
        self.chooser.bill(self._sums.rows_LE() - self._rows_LE, tokens)
        self._sums.harvest()
        self._rows_LE = self._sums.rows_LE()

    def spent(self) -> float:
        """Return the operations of scoring and of steps."""
        return self.chooser.flops

    def finish(self) -> np.ndarray:
        """Select all that the plan trains, so that every delta can be read; return those that learnt."""
        self.chooser.settle(self._trainable_LE)
        return self.chooser.trained_LE


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
