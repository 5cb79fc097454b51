"""A transformers model as a cohort: every MoE layer is that of several clients, over one frozen trunk.

Shapes: C clients, S sequences of each, N places, V token ids, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fedmoe_bindings.transformers.live.load import SequenceClassifier
from fedmoe_bindings.transformers.live.losses import class_logits, drop_tokens, next_tokens, token_logits
from fedmoe_bindings.transformers.live.places import places_of_classes, places_of_tokens
from fedmoe_core.base.tensor_key import TensorKey
from fedmoe_core.data.batches import Batch
from fedmoe_core.layer.cohort.layer import CohortMoE
from fedmoe_core.layer.moe import MoE
from fedmoe_core.model.cohort import LossTerms, Stacked
from fedmoe_core.model.spec import PlaceLosses

HEAD = "dense.score.weight"


class CohortHead(nn.Module):
    """The classification heads of C clients: the first rows of x (C * S, H) meet the first client's, and so on."""

    def __init__(self, weight_KH: Tensor, clients: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight_KH.detach().expand(clients, *weight_KH.shape).clone())

    def forward(self, x: Tensor) -> Tensor:
        return (x.unflatten(0, (len(self.weight), -1)) @ self.weight.mT).flatten(0, 1)


class TransformersCohort:
    """A live model whose MoE layers, and whose head where there is one that trains, are those of several clients.

    Attributes:
        layers: the MoE layers in depth order.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[tuple[MoE, CohortMoE]],
        *,
        start: Callable[[int], Mapping[str, Tensor]],
    ) -> None:
        """Put the cohort's layers in the places of those that one client has.

        Args:
            model: a causal LM, or a ``SequenceClassifier``.
            layers: each layer of the model, in depth order, and the cohort's for its place.
            start: makes the layers of one client those that a client began with; returns views of what it trains.
        """
        self._start = start
        self.model, self.layers = model, tuple(cohort for _, cohort in layers)
        places = {module: name for name, module in model.named_modules() if isinstance(module, MoE)}
        self._seats: dict[str, nn.Module] = {places[alone]: alone for alone, _ in layers}
        self._own: list[nn.Module] = list(self.layers)
        for alone, cohort in layers:
            model.set_submodule(places[alone], cohort)
        head = model.get_parameter("score.weight") if isinstance(model, SequenceClassifier) else None
        if head is not None and head.requires_grad:
            self._seats["score"] = model.get_submodule("score")
            self._own.append(CohortHead(head, self.layers[0].clients))
            model.set_submodule("score", self._own[-1])

    def leave(self) -> None:
        """Put the layers of one client back."""
        for name, module in self._seats.items():
            self.model.set_submodule(name, module)

    @torch.no_grad()
    def become_alone(self, client: int) -> None:
        """As the protocol."""
        self.leave()
        for layer in self.layers:
            layer.keep_only_learning()
        begun = self._start(client)
        for each in self.learning:
            if (trained := each.of(client)) is not None:
                begun[each.key].copy_(trained)

    @property
    def learning(self) -> tuple[Stacked, ...]:
        """As the protocol."""
        found = [
            Stacked(str(TensorKey(number, name)), parameter, layer.bounds(name), single=name == "out_scale")
            for number, layer in enumerate(self.layers)
            for name, parameter in layer.learning.items()
        ]
        head = self._own[-1]
        if isinstance(head, CohortHead):
            found.append(Stacked(HEAD, head.weight, tuple(range(len(head.weight) + 1)), single=True))
        return tuple(found)

    def resident(self) -> list[Tensor]:
        """As the protocol: with what waits outside for the cohort's end."""
        modules = (self.model, *self._seats.values(), *self._own)
        return [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]

    def losses(self, batches: Sequence[Batch], terms: LossTerms) -> Tensor:
        """As the protocol.

        Raises:
            ValueError: labels are missing, or token dropout is asked of a language model.
        """
        self.model.train()
        classifier = isinstance(self.model, SequenceClassifier)
        if terms.token_dropout:
            if not classifier:
                raise ValueError("token_dropout is for classification; set it to 0 for a language model")
            drawn = zip(batches, terms.generators, strict=True)
            batches = [drop_tokens(batch, terms.token_dropout, generator) for batch, generator in drawn]
        together = Batch.end_to_end(batches)
        runs_SN = together.mask_SN
        if not all(terms.alive):  # else nothing is copied to the device, which would wait for it
            alive_C = torch.tensor(terms.alive, device=runs_SN.device)
            runs_SN = runs_SN & alive_C.repeat_interleave(len(batches[0]))[:, None]
        if classifier:
            return self._class_losses(together, runs_SN, terms)
        logits_SNV = token_logits(self.model, together, runs_SN)
        targets_SN, counted_SN = next_tokens(together)
        loss_T = cross_entropy(
            logits_SNV.flatten(0, 1).float(),
            targets_SN.flatten(),
            reduction="none",
            label_smoothing=terms.label_smoothing,
        )
        count_C = counted_SN.unflatten(0, (len(batches), -1)).sum((1, 2)).clamp(min=1)
        return loss_T.unflatten(0, (len(batches), -1)).sum(1) / count_C

    def _class_losses(self, batch: Batch, runs_SN: Tensor, terms: LossTerms) -> Tensor:
        prior_SK = _of_each(terms.log_priors, len(batch))
        logits_SK, labels_S = class_logits(self.model, batch, runs_SN, log_prior=prior_SK)
        loss_S = cross_entropy(logits_SK, labels_S, reduction="none", label_smoothing=terms.label_smoothing)
        return loss_S.unflatten(0, (len(terms.alive), -1)).mean(1)

    @torch.no_grad()
    def place_losses(
        self, batches: Sequence[Batch], *, log_priors: Sequence[Tensor] | None = None
    ) -> list[PlaceLosses]:
        """As the protocol."""
        self.model.eval()
        height = max(map(len, batches))
        together = Batch.end_to_end([_filled(batch, height, batches) for batch in batches])
        place_S = torch.arange(len(together), device=together.tokens_SN.device) % height
        count_C = torch.tensor([len(batch) for batch in batches], device=place_S.device)
        runs_SN = together.mask_SN & (place_S < count_C.repeat_interleave(height))[:, None]
        classifier = isinstance(self.model, SequenceClassifier)
        if classifier:
            prior_SK = _of_each(log_priors, len(together))
            logits, _ = class_logits(self.model, together, runs_SN, log_prior=prior_SK)
        else:
            logits = token_logits(self.model, together, runs_SN)
        each = zip(logits.split(height), batches, strict=True)
        read = places_of_classes if classifier else places_of_tokens
        return [read(mine[: len(batch)], batch) for mine, batch in each]


def _of_each(priors: Sequence[Tensor] | None, sequences: int) -> Tensor | None:
    """The clients' priors, a row for each of all sequences, (S, K)."""
    return None if priors is None else torch.stack(list(priors)).repeat_interleave(sequences // len(priors), dim=0)


def _filled(batch: Batch, height: int, batches: Sequence[Batch]) -> Batch:
    """The batch with a sequence of another one repeated behind its own, for attention wants a real token in each."""
    one = next(each for each in batches if len(each))
    return Batch.end_to_end([batch, *[one.first(1)] * (height - len(batch))])
