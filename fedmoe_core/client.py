"""Local training of one client: a compact sub-model, a few optimizer steps, and what they cost."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Literal, cast

import numpy as np
import torch
from torch import Tensor

from fedmoe_core.adapter import Batch, ModelAdapter
from fedmoe_core.budget import Cost
from fedmoe_core.config import TrainConfig
from fedmoe_core.costs import CostModel
from fedmoe_core.memory import resident_bytes, tensor_bytes, trace_memory
from fedmoe_core.plan import ExpertPlan
from fedmoe_core.update import ClientProfile, profile_arrays
from fedmoe_kernels import RouterStats


@dataclass(frozen=True)
class LocalResult:
    """What local training gave, before the algorithm turns it into a ``ClientUpdate``.

    Attributes:
        deltas: new minus old, keyed and shaped as ``ClientUpdate.deltas``.
        profile: router and importance sums over the round's batches; None when training failed.
        cost: measured.
        losses: mean loss of each local step, in nats.
        status, error: "failed" and why, when a loss was not finite or the step raised.
        extract_seconds: time spent cutting the sub-model out of the global one, not training it.
    """

    deltas: dict[str, Tensor]
    profile: ClientProfile | None
    cost: Cost
    losses: tuple[float, ...]
    status: Literal["ok", "failed"] = "ok"
    error: str = ""
    extract_seconds: float = 0.0


class ProfileSums:
    """Router statistics and importance sums of a round, added up over micro-batches in global coordinates."""

    def __init__(self, adapter: ModelAdapter) -> None:
        self._adapter = adapter
        self._stats: list[RouterStats] = []

    def add_batch(self) -> None:
        """Take each layer's statistics of the forward that just ran; call once per micro-batch."""
        last = [cast(RouterStats, layer.last_stats) for layer in self._adapter.moe]
        self._stats = [total + new for total, new in zip(self._stats, last, strict=True)] if self._stats else last

    def rows_LE(self) -> np.ndarray:
        """Rows that each held expert has processed so far. One host sync a layer."""
        return self._scores("rows_B")

    def _scores(self, name: str) -> np.ndarray:
        """One importance sum of every layer, scattered to global coordinates."""
        sums_LE = np.zeros((len(self._adapter.moe), self._adapter.spec.num_experts))
        for sums_E, layer in zip(sums_LE, self._adapter.moe, strict=True):
            if layer.scores is not None:
                sums_E[list(layer.experts)] = getattr(layer.scores, name).double().cpu().numpy()
        return sums_LE

    def finish(self) -> ClientProfile:
        """The profile in global coordinates, float64."""
        layers = self._adapter.moe
        experts = self._adapter.spec.num_experts

        def router(name: str) -> np.ndarray:
            return np.stack([np.asarray(getattr(stats, name), dtype=np.float64) for stats in self._stats])

        held_LE = np.zeros((len(layers), experts), dtype=bool)
        for held_E, layer in zip(held_LE, layers, strict=True):
            held_E[list(layer.experts)] = True
        return ClientProfile(
            tokens_L=router("tokens"),
            hits_LE=router("hits_E"),
            prob_sum_LE=router("prob_sum_E"),
            prob_max_LE=router("prob_max_E"),
            plogp_sum_LE=router("plogp_sum_E"),
            lost_mass_L=router("lost_mass"),
            rows_LE=self._scores("rows_B"),
            taylor_LE=self._scores("taylor_B"),
            taylor_abs_LE=self._scores("taylor_abs_B"),
            fisher_LE=self._scores("fisher_B"),
            grad_sq_LE=self._scores("grad_sq_B"),
            held_LE=held_LE,
        )


def train_client(
    adapter: ModelAdapter,
    params: dict[str, Tensor],
    plan: ExpertPlan,
    batches: Iterable[Batch],
    *,
    train: TrainConfig,
    costs: CostModel,
    class_shares_C: np.ndarray | None = None,
) -> LocalResult:
    """Run one client's round inside its plan.

    Args:
        adapter: the live model; re-configured here, so nothing of an earlier client stays.
        params: the global model, read only.
        plan: the experts, the steps and the FLOP bound.
        batches: at least ``plan.local_steps`` batches.
        train: optimizer settings; ``lr`` is this round's.
        class_shares_C: the client's class shares, for logit adjustment; None in language modelling.
        costs: counts the FLOPs of the rows that really ran.

    Returns:
        The result. A loss that is not finite, or an error raised by the step, gives status "failed":
        one client's trouble never ends the run.
    """
    began = time.perf_counter()
    try:
        return _train(adapter, params, plan, batches, train=train, costs=costs, class_shares_C=class_shares_C)
    except (ArithmeticError, RuntimeError, ValueError) as error:
        seconds = time.perf_counter() - began
        reason = f"{type(error).__name__}: {error}" if not isinstance(error, ArithmeticError) else str(error)
        return LocalResult({}, None, Cost(seconds=seconds), (), status="failed", error=reason)


def _train(
    adapter: ModelAdapter,
    params: dict[str, Tensor],
    plan: ExpertPlan,
    batches: Iterable[Batch],
    *,
    train: TrainConfig,
    costs: CostModel,
    class_shares_C: np.ndarray | None,
) -> LocalResult:
    began = time.perf_counter()
    train_dense = train.trunk == "fedavg"
    adapter.configure(
        params,
        permitted_LE=plan.permitted_LE,
        trainable_LE=plan.trainable_LE,
        top_k=plan.top_k,
        train_dense=train_dense,
    )
    extracted = time.perf_counter()
    device = next(adapter.model.parameters()).device
    optimizer = local_optimizer(adapter, train)
    stepper = Stepper(adapter, optimizer, train, seed=plan.seed, log_prior_C=_log_prior(class_shares_C, train, device))
    sums = ProfileSums(adapter)
    losses: list[float] = []
    tokens, memory = 0, resident_bytes(adapter.model)
    bound = plan.budget.flops
    worst = costs.step_flops(plan.permitted_LE, plan.trainable_LE, top_k=plan.top_k)

    def spent() -> float:
        return costs.real_flops(sums.rows_LE(), plan.trainable_LE, tokens=tokens)

    for step, batch in zip(range(plan.local_steps), batches, strict=False):
        # Counting rows waits for the device, so it is done at every step only where a bound may be met.
        if bound is not None and spent() + worst > bound:
            break
        if step == min(1, plan.local_steps - 1):
            # The second step is the first with optimizer state in place; shapes repeat, so one step tells.
            resident = resident_bytes(adapter.model, optimizer)
            loss, trace = trace_memory(partial(stepper.step, batch), device)
            losses.append(loss)
            memory = max(memory, resident + trace.peak)
        else:
            losses.append(stepper.step(batch))
        sums.add_batch()
        if not np.isfinite(losses[-1]):
            raise ArithmeticError(f"the loss became {losses[-1]} at local step {step + 1}")
        tokens += batch.tokens_SN.numel()

    deltas = {key: new - _old_rows(params[key], key, plan) for key, new in adapter.trained().items()}
    profile = sums.finish()
    cost = Cost(
        memory_bytes=memory,
        flops=spent(),
        bytes_down=received_bytes(adapter, whole_trunk=plan.first_participation, train_dense=train_dense),
        bytes_up=tensor_bytes(deltas.values()) + statistics_bytes(profile),
        experts=plan.counted_experts,
        seconds=time.perf_counter() - began,
    )
    return LocalResult(deltas, profile, cost, tuple(losses), extract_seconds=extracted - began)


def received_bytes(adapter: ModelAdapter, *, whole_trunk: bool, train_dense: bool) -> int:
    """Bytes of the tensors that a client of this configuration is sent: experts, whole routers, and trunk where due."""
    experts = tensor_bytes(t for layer in adapter.moe for t in (*layer.parameters(), *layer.buffers()))
    of_experts = {id(t) for layer in adapter.moe for t in layer.parameters()}
    trunk = [p for p in adapter.model.parameters() if id(p) not in of_experts and (whole_trunk or p.requires_grad)]
    return experts + tensor_bytes(trunk)


def statistics_bytes(profile: ClientProfile) -> int:
    """Bytes of a profile and of the two weights per expert that travel with it."""
    return sum(array.nbytes for array in profile_arrays(profile).values()) + 2 * profile.hits_LE.nbytes


def local_optimizer(adapter: ModelAdapter, train: TrainConfig) -> torch.optim.Optimizer:
    """AdamW over what this configuration trains; fused, because the foreach form holds copies of every gradient."""
    trainable = [p for p in adapter.model.parameters() if p.requires_grad and p.numel()]
    return torch.optim.AdamW(trainable, lr=train.lr, weight_decay=train.weight_decay, fused=True)


class Stepper:
    """One optimizer step after another on the live model as it is configured."""

    def __init__(
        self,
        adapter: ModelAdapter,
        optimizer: torch.optim.Optimizer,
        train: TrainConfig,
        *,
        seed: int = 0,
        log_prior_C: Tensor | None = None,
    ) -> None:
        self.adapter, self.optimizer, self.train = adapter, optimizer, train
        self.log_prior_C = log_prior_C
        self.dropping = torch.Generator().manual_seed(seed)
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def step(self, batch: Batch) -> float:
        """Forward, backward, clip, update; the batch's mean loss in nats."""
        loss = self.adapter.loss(
            batch,
            token_dropout=self.train.token_dropout,
            generator=self.dropping,
            log_prior_C=self.log_prior_C,
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, self.train.clip, foreach=False)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())


def _log_prior(class_shares_C: np.ndarray | None, train: TrainConfig, device: torch.device) -> Tensor | None:
    """What logit adjustment adds to the logits; None where it is off."""
    if class_shares_C is None or train.logit_adjustment == 0:
        return None
    return torch.as_tensor(train.logit_adjustment * np.log(class_shares_C), dtype=torch.float32, device=device)


def _old_rows(old: Tensor, key: str, plan: ExpertPlan) -> Tensor:
    """The rows of a global tensor that this plan trains, ascending expert id; dense tensors whole."""
    if not key.startswith("moe."):
        return old
    layer = int(key.split(".")[1])
    return old[torch.from_numpy(np.flatnonzero(plan.trainable_LE[layer]))]
