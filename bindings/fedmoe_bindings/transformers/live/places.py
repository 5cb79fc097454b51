"""What single places of a batch show: their loss, and how much attention they get."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from fedmoe_bindings.transformers.live.attention import attention_beside, eager_attention
from fedmoe_bindings.transformers.live.load import SequenceClassifier, is_encoder
from fedmoe_bindings.transformers.live.losses import TaskLosses, next_tokens
from fedmoe_bindings.transformers.live.token_mask import TOKEN_MASK
from fedmoe_core.data.batches import Batch
from fedmoe_core.model.spec import Evaluation, PlaceLosses


class PlaceMeasures(TaskLosses):
    """The part of ``TransformersAdapter`` that looks at single places."""

    @torch.no_grad()
    def place_losses(self, batch: Batch, *, log_prior_C: Tensor | None = None) -> PlaceLosses:
        """Return losses by place, as the protocol; the layers measure as in training."""
        self.model.eval()
        if self.spec.task == "classification":
            return places_of_classes(self._class_logits(batch, log_prior_C)[0], batch)
        return places_of_tokens(self._token_logits(batch), batch)

    @torch.no_grad()
    def attention_received(self, batch: Batch) -> Tensor:
        """Return the attention that each place gets, (L, S, N), as the protocol; one layer's maps at once in memory."""
        self.model.eval()
        found: dict[int, Tensor] = {}
        mask_SN = batch.mask_SN
        trunk = cast(PreTrainedModel, self.model.model if isinstance(self.model, SequenceClassifier) else self.model)
        # A place is seen by itself and the real places after it, so that early ones are not favoured for being early;
        # in an encoder by all real places.
        seers_SN = mask_SN.flip(1).cumsum(1).flip(1).clamp(min=1)
        if is_encoder(trunk):
            seers_SN = mask_SN.sum(dim=1, keepdim=True)

        def keep(number: int, maps: Tensor | None) -> None:
            if maps is None:
                raise ValueError(f"the attention beside MoE layer {number} has no maps that could be measured")
            got_SN = (maps.mean(dim=1) * mask_SN[:, :, None]).sum(dim=1)
            found[number] = (got_SN / seers_SN).masked_fill(~mask_SN, 0.0)

        with eager_attention(trunk), ExitStack() as hooks:
            for number, attention in enumerate(attention_beside(self.model, self.moe)):
                if attention is None:
                    raise ValueError(f"MoE layer {number} has no attention beside it that could be measured")
                hooks.callback(attention.watch(partial(keep, number)).remove)
            cast(nn.Module, trunk)(
                input_ids=batch.tokens_SN,
                attention_mask=mask_SN.long(),
                use_cache=False,
                **{TOKEN_MASK: mask_SN.reshape(-1)},
            )
        return torch.stack([found[number] for number in range(len(self.moe))])


def places_of_classes(logits_SC: Tensor, batch: Batch) -> PlaceLosses:
    """Return a classifier's losses by place from its logits."""
    labels_S, mask_SN = cast(Tensor, batch.labels_S), batch.mask_SN
    loss_S = cross_entropy(logits_SC, labels_S, reduction="none")
    correct_S = logits_SC.argmax(dim=-1) == labels_S
    total = Evaluation(float(loss_S.sum()), max(len(batch), 1), int(correct_S.sum()))
    shape = mask_SN.shape
    return PlaceLosses(loss_S[:, None].expand(shape), correct_S[:, None].expand(shape), mask_SN, total)


def places_of_tokens(logits_SNV: Tensor, batch: Batch) -> PlaceLosses:
    """Return a language model's losses by place from its logits."""
    targets_SN, counted_SN = next_tokens(batch)
    loss_N = cross_entropy(logits_SNV.flatten(0, 1).float(), targets_SN.flatten(), reduction="none")
    loss_SN = loss_N.view_as(targets_SN)
    total = Evaluation(float(loss_SN.sum()), max(int(counted_SN.sum()), 1))
    return PlaceLosses(loss_SN, logits_SNV.argmax(dim=-1) == targets_SN, counted_SN, total)
