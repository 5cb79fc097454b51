"""What clients of a plain model cost, alone and at once: dry steps, for the engine knows nothing of the module."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fedmoe_core.budget.cost_model import CostModel
from fedmoe_core.budget.peak_memory import tensor_bytes, trace_memory
from fedmoe_core.budget.trunk_cost import TrunkCost
from fedmoe_core.client.plain.trainer import PlainTrainer
from fedmoe_core.config.run_config import TrainConfig
from fedmoe_core.data.rows import RowData, Rows
from fedmoe_core.messages.plan import ExpertPlan

STEPS = 2  # of a dry round: the optimizer has state from the second on


def dense_costs(
    trainer: PlainTrainer, params: Mapping[str, Tensor], train: TrainConfig, batch: Rows, moving: frozenset[str]
) -> CostModel:
    """Make the cost model of a model that is all trunk, from one dry round on ``batch``.

    Args:
        trainer: the live module.
        params: the model's whole state.
        train: settings.
        batch: of the largest size that clients use.
        moving: keys of what training moves, and of what returns.
    """
    device = batch[0].device
    _try(trainer, params, batch)
    _, trace = trace_memory(partial(trainer.train, params, iter([batch] * STEPS), train), device)
    weights = sum(tensor.nbytes for tensor in params.values())
    width = max(params[key].itemsize for key in moving)  # not of a count of batches, twice as wide as all that moves
    count = -(-weights // width)  # numbers of that width
    learning = -(-sum(params[key].nbytes for key in moving) // width)
    trainer.become(params)
    with FlopCounterMode(display=False) as both:
        trainer.plain.loss_fn(trainer.model, batch).backward()
    trainer.model.zero_grad(set_to_none=True)
    with FlopCounterMode(display=False) as forward, trainer.judging():
        trainer.plain.loss_fn(trainer.model, batch)
    rows = len(batch[0])
    return CostModel(
        num_layers=0,
        num_experts=0,
        top_k=0,
        hidden_size=0,
        intermediate_size=0,
        tokens=rows,
        trunk_params=count,
        trunk_trainable=learning,
        weight_bytes=width,
        grad_bytes=0,  # gradients and optimizer state are in what the dry round measured
        optimizer_bytes=0,
        trunk=TrunkCost(
            transients={0: (trace.peak + weights - count * width,)},
            flops_per_token=both.get_total_flops() / rows,
            forward_flops_per_token=forward.get_total_flops() / rows,
        ),
    )


def _try(trainer: PlainTrainer, params: Mapping[str, Tensor], batch: Rows) -> None:
    """Call what the user wrote once, for its faults are told best before a run begins.

    Raises:
        ValueError: it raised, or returned what the engine cannot use.
    """
    plain, rows = trainer.plain, [tuple(tensor.shape) for tensor in batch]
    trainer.become(params)
    for name, function in (("loss_fn", plain.loss_fn), ("correct_fn", plain.correct_fn)):
        if function is None:
            continue
        try:
            with trainer.judging():
                found = torch.as_tensor(function(trainer.model, batch))
        except Exception as error:
            first = (str(error).splitlines() or [""])[0]
            raise ValueError(
                f"{name} raised {type(error).__name__}: {first}, on a batch of shapes {rows}; mend it (--debug: where)"
            ) from error
        if found.numel() != 1:
            raise ValueError(f"{name} returned a tensor of shape {tuple(found.shape)}; return one number for the batch")


@dataclass(frozen=True)
class PlainMeter:
    """Measures the peak of each size of cohort once, when it is first asked for.

    Attributes:
        trainer, params, train: the live module, the first model, and settings.
        data: rows, of which the first serve as the dry step's batch.
    """

    trainer: PlainTrainer
    params: Mapping[str, Tensor]
    train: TrainConfig
    data: RowData
    _measured: dict[int, int] = field(default_factory=dict, repr=False, compare=False)

    def memory(self, plans: Sequence[ExpertPlan]) -> int:
        """Return the peak bytes of so many clients at once."""
        return self._peak(len(plans))

    def bound(self, plans: Sequence[ExpertPlan]) -> int:
        """Bound it from a cohort of two: what a client needs does not grow with the cohort."""
        return math.ceil(self._peak(2) * len(plans) / 2)

    def trouble(self) -> str:
        """Say why clients cannot train at once, by trying two; empty where they can."""
        if why := self.trainer.alone_because(self.train):
            return why
        try:
            self._peak(2)
        except (RuntimeError, ValueError, TypeError) as error:
            return f"its step cannot run for many at once ({type(error).__name__}: {str(error).splitlines()[0]})"
        return ""

    def _peak(self, clients: int) -> int:
        if clients not in self._measured:
            batch = first_batch(self.data, self.train.batch_size)
            many = tuple(tensor.expand(clients, *tensor.shape) for tensor in batch)

            def batches() -> Iterator[Rows]:
                for _ in range(STEPS):
                    yield tuple(tensor.contiguous() for tensor in many)

            run = partial(self.trainer.train_many, self.params, batches(), self.train, clients=clients)
            _, trace = trace_memory(run, batch[0].device)
            self._measured[clients] = trace.peak + tensor_bytes(self.params.values())
        return self._measured[clients]


def first_batch(data: RowData, batch_size: int) -> Rows:
    """Return the first training rows, from the start again where they do not fill a batch."""
    height = len(data.tensors[0])
    times = -(-batch_size // height)
    return tuple(tensor.repeat(times, *[1] * (tensor.dim() - 1))[:batch_size] for tensor in data.tensors)
