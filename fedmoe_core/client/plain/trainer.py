"""Local training of one client, or of many at once, on the live module of a plain model."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from fedmoe_core.config.run_config import TrainConfig
from fedmoe_core.data.rows import Rows
from fedmoe_core.model.plain import LossFn, PlainModel, plain_tensors

# Optimizers whose step moves each number by itself, so that the weights of many clients may stand in one tensor.
ELEMENTWISE = (
    torch.optim.SGD,
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.Adamax,
    torch.optim.Adagrad,
    torch.optim.Adadelta,
    torch.optim.RMSprop,
    torch.optim.ASGD,
    torch.optim.Rprop,
)


@dataclass(frozen=True)
class Trained:
    """What local training left.

    Attributes:
        deltas: new minus old of every tensor that moves, by key.
        losses: of each step.
    """

    deltas: dict[str, Tensor]
    losses: tuple[float, ...]

    @property
    def trouble(self) -> str:
        """Why nothing of this may count; empty where all losses are numbers."""
        bad = next((step for step, loss in enumerate(self.losses, 1) if not math.isfinite(loss)), None)
        return "" if bad is None else f"the loss became {self.losses[bad - 1]} at local step {bad}"


class PlainTrainer:
    """The live module of one process, which is every client in turn, and the stacked weights of many clients.

    Args:
        plain: what the run was given.
        model: the live module, on its device.
        moving: keys of the state's tensors that training changes: parameters that train, and buffers of floats.
    """

    def __init__(self, plain: PlainModel, model: nn.Module, moving: frozenset[str]) -> None:
        self.plain, self.model = plain, model
        self._loss = _WithLoss(model, plain.loss_fn)
        self._live = plain_tensors(model)
        self._keys = [key for key in self._live if key in moving]
        self._learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]

    def become(self, params: Mapping[str, Tensor]) -> None:
        """Copy a global model into the live module."""
        torch._foreach_copy_(list(self._live.values()), [params[key] for key in self._live])

    @contextmanager
    def judging(self) -> Iterator[None]:
        """Let the live module judge within the block: no gradient, no dropout, running means as they are."""
        self.model.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.model.train()

    def optimizer(self, learning: Sequence[Tensor], train: TrainConfig) -> torch.optim.Optimizer:
        """Make a fresh optimizer for ``learning``: the user's, or AdamW."""
        if self.plain.optimizer_fn is not None:
            return self.plain.optimizer_fn(learning, train.lr)
        return torch.optim.AdamW(learning, lr=train.lr, weight_decay=train.weight_decay, fused=True)

    def train(
        self, params: Mapping[str, Tensor], batches: Iterator[Rows], train: TrainConfig, *, seed: int = 0
    ) -> Trained:
        """Train one client from ``params`` over its batches.

        Args:
            params: the global model; never changed.
            batches: one for each local step.
            train: settings at this round's learning rate.
            seed: of what the module draws (dropout).
        """
        self.become(params)
        with _drawing(seed, self._learning[0].device):
            losses = self.steps(self._learning, batches, train)
        kept, olds = ([source[key] for key in self._keys] for source in (self._live, params))
        (own,) = _end_to_end([delta.unsqueeze(0) for delta in torch._foreach_sub(kept, olds)])
        return Trained(dict(zip(self._keys, own, strict=True)), tuple(losses.tolist()))

    def steps(self, learning: Sequence[Tensor], batches: Iterator[Rows], train: TrainConfig) -> Tensor:
        """Run the steps of the live module as it is; return the loss of each, (steps,)."""
        optimizer, losses = self.optimizer(learning, train), []
        anchors = [tensor.detach().clone() for tensor in learning] if train.prox > 0 else []
        for batch in batches:
            loss = self.plain.loss_fn(self.model, batch)
            loss.backward()
            _pull(learning, anchors, train.prox)
            if train.clip:
                nn.utils.clip_grad_norm_(learning, train.clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss.detach())
        return torch.stack(losses)

    def train_many(
        self, params: Mapping[str, Tensor], batches: Iterator[Rows], train: TrainConfig, *, clients: int
    ) -> list[Trained]:
        """Train many clients at once, each from ``params`` over its own batches; equal to ``train`` up to rounding.

        Args:
            params: the global model; never changed.
            batches: one for each local step, all clients' in tensors (clients, rows, ...).
            train: as above.
            clients: C.

        Raises:
            RuntimeError: the module does what cannot be done for many at once (it draws, or branches on values).
        """
        self.become(params)  # what does not train is read from the live module
        olds = [params[key] for key in self._keys]
        stacks = [old.expand(clients, *old.shape).clone().requires_grad_() for old in olds]
        named = {f"model.{name}": stack for name, stack in zip(self._names, stacks, strict=True)}
        losses_TC = self.steps_of_many(named, batches, train)
        moved = _end_to_end(torch._foreach_sub([stack.detach() for stack in stacks], olds))
        return [
            Trained(dict(zip(self._keys, own, strict=True)), tuple(losses))
            for own, losses in zip(moved, losses_TC.T.tolist(), strict=True)
        ]

    def steps_of_many(self, named: Mapping[str, Tensor], batches: Iterator[Rows], train: TrainConfig) -> Tensor:
        """Run steps over stacked weights; return the losses, (steps, clients)."""
        stacks = list(named.values())
        optimizer, losses = self.optimizer(stacks, train), []
        anchors = [stack.detach().clone() for stack in stacks] if train.prox > 0 else []

        def loss_of(weights: dict[str, Tensor], batch: Rows) -> Tensor:
            found: Tensor = functional_call(self._loss, weights, (batch,))
            return found

        every_client = vmap(loss_of)
        for batch in batches:
            losses_C = every_client(dict(named), batch)
            losses_C.sum().backward()  # no client's loss depends on the weights of another
            _pull(stacks, anchors, train.prox)
            if train.clip:
                _clip_each([stack.grad for stack in stacks if stack.grad is not None], train.clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(losses_C.detach())
        return torch.stack(losses)

    def alone_because(self, train: TrainConfig) -> str:
        """Say why clients of this model cannot train at once; empty where nothing is known against it."""
        if any(True for _ in self.model.buffers()):
            return "its model has buffers"
        if type(self.optimizer(self._learning, train)) not in ELEMENTWISE:
            return "its optimizer does not move each weight by itself"
        return ""


class _WithLoss(nn.Module):
    """A module and its loss as one, so that a call may stand in other weights."""

    def __init__(self, model: nn.Module, loss_fn: LossFn) -> None:
        super().__init__()
        self.model, self.loss_fn = model, loss_fn

    def forward(self, batch: Rows) -> Tensor:
        """Return the mean loss of a batch."""
        return self.loss_fn(self.model, batch)


def _end_to_end(stacks_C: Sequence[Tensor]) -> list[list[Tensor]]:
    """Lay the tensors of each client end to end and view them there, so that the sums may read them as one.

    Args:
        stacks_C: (C, ...) each.

    Returns:
        Views of each client's tensors, in the same order.
    """
    if len({stack.dtype for stack in stacks_C}) > 1:
        return [list(own) for own in zip(*stacks_C, strict=True)]
    rows_CP = torch.cat([stack.flatten(1) if stack.dim() > 1 else stack.unsqueeze(1) for stack in stacks_C], dim=1)
    sizes = [stack[0].numel() for stack in stacks_C]
    return [
        [part.view(stack.shape[1:]) for part, stack in zip(row.split(sizes), stacks_C, strict=True)] for row in rows_CP
    ]


def _pull(learning: Sequence[Tensor], anchors: Sequence[Tensor], prox: float) -> None:
    """Add the gradient of prox/2 ||w - anchor||^2 (FedProx, arXiv 1812.06127 eq. 2), in place."""
    for tensor, anchor in zip(learning, anchors, strict=bool(anchors)):
        if tensor.grad is not None:
            tensor.grad.add_(tensor.detach(), alpha=prox).add_(anchor, alpha=-prox)


def _clip_each(grads: Sequence[Tensor], most: float) -> None:
    """Scale each client's gradient down to an L2 norm of ``most``, as ``clip_grad_norm_`` does for one model."""
    squares = [grad.square().flatten(1).sum(1) if grad.dim() > 1 else grad.square() for grad in grads]
    factor_C = (most / (torch.stack(squares).sum(0).sqrt() + 1e-6)).clamp(max=1.0)
    for grad in grads:
        grad.mul_(factor_C.view(-1, *[1] * (grad.dim() - 1)))


@contextmanager
def _drawing(seed: int, device: torch.device) -> Iterator[None]:
    """Let what is drawn within the block come from ``seed``, and leave the generators outside as they were."""
    # Not torch.manual_seed: it formats the caller's stack for CUDA, which takes longer than to seed.
    sources = [torch.default_generator]
    if device.type == "cuda":
        sources.append(torch.cuda.default_generators[device.index or 0])
    states = [source.get_state() for source in sources]
    try:
        for source in sources:
            source.manual_seed(seed)
        yield
    finally:
        for source, state in zip(sources, states, strict=True):
            source.set_state(state)
