"""Local optimisation: one step after another on the live model as it is configured."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from fedmoe_core.budget.cost_model import CostModel
from fedmoe_core.client.profiling import ProfileSums
from fedmoe_core.config.run_config import TrainConfig
from fedmoe_core.data.batches import Batch
from fedmoe_core.layer.recording import recording
from fedmoe_core.layer.router_loss import AuxLoss
from fedmoe_core.messages.plan import ProbeContext
from fedmoe_core.model.adapter import ModelAdapter


class LocalOptimizer(Protocol):
    """What a local step needs of an optimizer; its parameters may change between steps."""

    @property
    def param_groups(self) -> list[Any]: ...
    @property
    def state(self) -> Any: ...
    def step(self) -> Any: ...
    def zero_grad(self, *, set_to_none: bool = True) -> None: ...


class LocalSteps(Protocol):
    """What surrounds the steps of a round: which optimizer, what precedes and follows each, and what all have cost."""

    @property
    def optimizer(self) -> LocalOptimizer: ...

    def before(self, batch: Batch) -> int:
        """Prepare the model for ``batch``; return the peak bytes of that, 0 where there is nothing to do."""
        ...

    def after(self, tokens: int) -> None:
        """Take note of a step over so many tokens."""
        ...

    def spent(self) -> float:
        """Count the operations so far; this may wait for the device."""
        ...

    def finish(self) -> np.ndarray:
        """End the round; return the experts that learnt in it, bool (L, E)."""
        ...


class PlainSteps:
    """Steps in which all that the plan trains learns from every batch."""

    def __init__(self, context: ProbeContext, costs: CostModel, sums: ProfileSums) -> None:
        self.optimizer: LocalOptimizer = local_optimizer(context.adapter, context.train)
        self._trainable_LE, self._costs, self._sums, self._tokens = context.plan.trainable_LE, costs, sums, 0

    def before(self, batch: Batch) -> int:
        """Do nothing: the model is ready."""
        return 0

    def after(self, tokens: int) -> None:
        """Count the tokens."""
        self._tokens += tokens

    def spent(self) -> float:
        """Count the operations of the rows that really ran."""
        return self._costs.real_flops(self._sums.rows_LE(), self._trainable_LE, tokens=self._tokens)

    def finish(self) -> np.ndarray:
        """Return the experts that the plan trains."""
        return self._trainable_LE


def local_optimizer(adapter: ModelAdapter, train: TrainConfig) -> torch.optim.Optimizer:
    """Make AdamW for what this configuration trains; fused, as the foreach form holds copies of every gradient."""
    trainable = [p for p in adapter.model.parameters() if p.requires_grad and p.numel()]
    return torch.optim.AdamW(trainable, lr=train.lr, weight_decay=train.weight_decay, fused=True)


class Stepper:
    """One optimizer step after another on the live model as it is configured.

    With ``train.prox`` = mu > 0 each step descends on the loss plus mu/2 ||w - w0||^2 over all trainable parameters
    (FedProx, arXiv 1812.06127 eq. 2 [E]), w0 being their values now; ``anchors`` holds the copies.
    """

    def __init__(
        self,
        adapter: ModelAdapter,
        optimizer: LocalOptimizer,
        train: TrainConfig,
        *,
        seed: int = 0,
        log_prior_C: Tensor | None = None,
        aux: AuxLoss | None = None,
    ) -> None:
        self.adapter, self.optimizer, self.train = adapter, optimizer, train
        self.log_prior_C, self.aux = log_prior_C, aux
        self.dropping = torch.Generator().manual_seed(seed)
        self.anchors = [p.detach().clone() for p in self.parameters] if train.prox > 0 else []

    @property
    def parameters(self) -> list[Tensor]:
        """What learns now."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def step(self, batch: Batch) -> float:
        """Run forward, backward, clip, update; return the mean loss in nats, without auxiliary and proximal terms."""
        loss, auxiliary = self._forward(batch)
        (loss if auxiliary is None else loss + auxiliary).backward()
        for parameter, anchor in zip(self.parameters, self.anchors, strict=bool(self.anchors)):
            if parameter.grad is not None:  # in place, so that no copy but the anchor is ever made
                parameter.grad.add_(parameter.detach(), alpha=self.train.prox).add_(anchor, alpha=-self.train.prox)
        if self.train.clip:
            torch.nn.utils.clip_grad_norm_(self.parameters, self.train.clip, foreach=False)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    def _forward(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """The task's loss, and the auxiliary one where the plan asks for it; no logits are kept behind."""
        if self.aux is None:
            return self._task_loss(batch), None
        with recording(self.adapter.moe) as tape:
            return self._task_loss(batch), self.aux(tape)

    def _task_loss(self, batch: Batch) -> Tensor:
        return self.adapter.loss(
            batch,
            token_dropout=self.train.token_dropout,
            generator=self.dropping,
            log_prior_C=self.log_prior_C,
            label_smoothing=self.train.label_smoothing,
        )


def log_prior(class_shares_C: np.ndarray | None, train: TrainConfig, device: torch.device) -> Tensor | None:
    """Return what logit adjustment adds to the logits; None where it is off."""
    if class_shares_C is None or train.logit_adjustment == 0:
        return None
    return torch.as_tensor(train.logit_adjustment * np.log(class_shares_C), dtype=torch.float32, device=device)
