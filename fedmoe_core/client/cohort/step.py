"""One optimizer step of a whole cohort: a loss, a clip norm and a verdict for each client, one AdamW call for all."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from fedmoe_core.budget.peak_memory import tensor_bytes
from fedmoe_core.config.run_config import TrainConfig
from fedmoe_core.data.batches import Batch
from fedmoe_core.layer.cohort.tape import CohortTape, recording_cohort
from fedmoe_core.layer.router_loss import AuxLoss
from fedmoe_core.model.cohort import LiveCohort, LossTerms, Stacked


class CohortStepper:
    """Steps of C clients on a live cohort; each client moves as ``Stepper`` would move it alone, up to rounding.

    A client whose loss or gradient is not finite is out before anything moves: the step is repeated without its rows,
    because a backward with a NaN in it adds no importance for any of the others.

    Attributes:
        optimizer: AdamW over all clients' tensors.
        failures: why a client is out, by its place.
        anchors: what every client began with, for the proximal term; empty without one.

    Args:
        cohort: the live model.
        train: optimizer settings.
        seeds: of each client's token dropout.
        log_priors: what is added to each client's logits; None = nothing.
        aux: each client's auxiliary loss; None = no client has one.
    """

    def __init__(
        self,
        cohort: LiveCohort,
        train: TrainConfig,
        *,
        seeds: Sequence[int],
        log_priors: Sequence[Tensor] | None = None,
        aux: Sequence[AuxLoss | None] | None = None,
    ) -> None:
        self._cohort, self._train, self._log_priors = cohort, train, log_priors
        self._aux = aux if aux is not None and any(loss is not None for loss in aux) else None
        self._learning = cohort.learning
        parameters = [each.parameter for each in self._learning]
        self.optimizer = torch.optim.AdamW(parameters, lr=train.lr, weight_decay=train.weight_decay, fused=True)
        self.anchors = [p.detach().clone() for p in parameters] if train.prox > 0 else []
        self.failures: dict[int, str] = {}
        self._dropping = [torch.Generator().manual_seed(seed) for seed in seeds]
        self._lengths = {each.key: _lengths(each) for each in self._learning}
        self._steps = 0

    @property
    def alive(self) -> tuple[bool, ...]:
        """Whether each client still trains."""
        return tuple(client not in self.failures for client in range(len(self._dropping)))

    def resident_bytes(self) -> int:
        """Count the bytes that are held between two steps, gradients aside."""
        state = [v for kept in self.optimizer.state.values() for v in kept.values() if isinstance(v, Tensor)]
        return tensor_bytes([*self._cohort.resident(), *state, *self.anchors])

    def release(self) -> None:
        """Let go of optimizer state and anchors, once no step follows."""
        self.optimizer.state.clear()
        self.anchors.clear()

    def step(self, batches: Sequence[Batch]) -> list[float]:
        """Run forward, backward, clip, update; return each client's mean loss in nats, NaN for those that are out."""
        self._steps += 1
        while any(self.alive):
            drawn = [generator.get_state() for generator in self._dropping]
            # The sums may share their storage with nothing that a backward writes to.
            before = [None if (sums := leaf.grad) is None else sums.clone() for leaf in self._leaves()]
            loss_C, norm_C = self._backward(batches)
            found = torch.stack([loss_C.detach().double(), norm_C.double()]).tolist()
            if not self._judge(*found):
                self._move(norm_C)
                return [loss if alive else math.nan for loss, alive in zip(found[0], self.alive, strict=True)]
            self.optimizer.zero_grad(set_to_none=True)
            for leaf, sums in zip(self._leaves(), before, strict=True):
                leaf.grad = sums
            for generator, state in zip(self._dropping, drawn, strict=True):
                generator.set_state(state)
        return [math.nan] * len(self._dropping)

    def _backward(self, batches: Sequence[Batch]) -> tuple[Tensor, Tensor]:
        """Losses (C,) with their gradients in place, and the L2 norm of each client's gradient (C,)."""
        train, alive = self._train, self.alive
        terms = LossTerms(alive, train.token_dropout, train.label_smoothing, self._dropping, self._log_priors)
        with nullcontext() if self._aux is None else recording_cohort(self._cohort.layers) as tape:
            loss_C = self._cohort.losses(batches, terms)
            auxiliary = [] if tape is None else self._auxiliary(tape)
        of_living = loss_C if all(alive) else loss_C[[client for client, runs in enumerate(alive) if runs]]
        sum(auxiliary, of_living.sum()).backward()
        squares_C = loss_C.new_zeros(len(alive))
        for place, each in enumerate(self._learning):
            gradient = each.parameter.grad
            if gradient is None:
                continue
            if self.anchors:
                gradient.add_(each.parameter.detach(), alpha=train.prox).add_(self.anchors[place], alpha=-train.prox)
            for client in self.failures:
                gradient[each.bounds[client] : each.bounds[client + 1]] = 0
            norm_B = torch.linalg.vector_norm(gradient.reshape(len(gradient), -1), dim=1)
            squares_C += torch.segment_reduce(
                norm_B.to(squares_C.dtype).square(), "sum", lengths=self._lengths[each.key], axis=0, initial=0
            )
        return loss_C, squares_C.sqrt()

    def _auxiliary(self, tape: CohortTape) -> list[Tensor]:
        """The auxiliary losses of the clients that still train and have one.

        Raises:
            ValueError: a loss reads what a client of a cohort does not have.
        """
        asked = [(client, loss) for client, loss in enumerate(self._aux or ()) if loss is not None]
        try:
            return [loss(tape.of(client)) for client, loss in asked if self.alive[client]]
        except AttributeError as error:
            raise ValueError(
                f"an auxiliary loss reads what a client of a cohort has not ({error}); read what `RecordedLayer` lists"
            ) from error

    def _judge(self, losses: list[float], norms: list[float]) -> bool:
        """Put out the clients whose loss or gradient is not finite; say whether there were any."""
        bad = [c for c, runs in enumerate(self.alive) if runs and not math.isfinite(losses[c] + norms[c])]
        for client in bad:
            lost = not math.isfinite(losses[client])
            what = f"loss became {losses[client]}" if lost else f"gradient's norm became {norms[client]}"
            self.failures[client] = f"the {what} at local step {self._steps}"
        return bool(bad)

    def _move(self, norm_C: Tensor) -> None:
        """Scale each client's gradient down to the clip norm, as ``torch.nn.utils.clip_grad_norm_``, and step."""
        factor_C = (self._train.clip / (norm_C + 1e-6)).clamp(max=1.0)
        for each in self._learning if self._train.clip else ():
            if (gradient := each.parameter.grad) is not None:
                factor_B = factor_C.repeat_interleave(self._lengths[each.key], output_size=len(gradient))
                gradient.mul_(factor_B.to(gradient.dtype).view(-1, *[1] * (gradient.dim() - 1)))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def _leaves(self) -> list[Tensor]:
        return [layer.scores.leaf_B7 for layer in self._cohort.layers]


def _lengths(each: Stacked) -> Tensor:
    """Rows of each client, (C,) int64, where the Parameter is."""
    rows = [end - begin for begin, end in zip(each.bounds, each.bounds[1:], strict=False)]
    return torch.tensor(rows, device=each.parameter.device)
