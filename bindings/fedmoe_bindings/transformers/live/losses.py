"""Losses of a transformers model with fedmoe layers: what a local step descends on, and what is judged."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear, pad

from fedmoe_bindings.transformers.live.load import SequenceClassifier, is_encoder
from fedmoe_bindings.transformers.live.token_mask import TOKEN_MASK
from fedmoe_core.data.batches import Batch
from fedmoe_core.layer.moe import MoE
from fedmoe_core.model.adapter import Evaluation
from fedmoe_core.model.spec import ModelSpec


class TaskLosses:
    """The part of ``TransformersAdapter`` that runs the model."""

    spec: ModelSpec
    model: nn.Module
    moe: tuple[MoE, ...]
    frozen_moe: tuple[MoE, ...]

    def loss(
        self,
        batch: Batch,
        *,
        training: bool = True,
        token_dropout: float = 0.0,
        generator: torch.Generator | None = None,
        log_prior_C: Tensor | None = None,
        label_smoothing: float = 0.0,
    ) -> Tensor:
        """Return the batch's mean loss in nats per predicted token or sample; padding is neither routed nor counted.

        Args:
            batch: as ``Batch``; a token is predicted where it and its predecessor are real, and, in a conversation,
                where it is of an answer.
            training: the mode of dropout layers and of activation checkpointing.
            token_dropout: classification only; each real token is treated as padding with this probability (a
                sequence never loses all its tokens).
            generator: a CPU generator for token dropout.
            log_prior_C: classification only; added to the logits, so that a client does not learn its own class
                shares (logit adjustment, arXiv 2007.07314 [E]).
            label_smoothing: share of the target that all classes, or all tokens of the vocabulary, have alike.

        Raises:
            ValueError: labels are missing, or token dropout is asked of a language model.
        """
        self.model.train(training)
        if token_dropout:
            if self.spec.task == "causal_lm":
                raise ValueError("token_dropout is for classification; set it to 0 for a language model")
            batch = drop_tokens(batch, token_dropout, generator)
        loss_sum, count, _ = self._sums(batch, log_prior_C, label_smoothing)
        return loss_sum / count

    def text_loss(self, batch: Batch) -> Tensor:
        """Return the mean next-token loss in nats; a classifier's trunk uses its own embedding as output layer.

        Raises:
            ValueError: the trunk is an encoder, which sees the token that it would have to predict.
        """
        self.model.train()
        if self.spec.task == "causal_lm":
            loss_sum, count, _ = self._sums(batch)
            return loss_sum / count
        trunk = cast(SequenceClassifier, self.model).model
        if is_encoder(trunk):
            raise ValueError(
                f"{type(trunk).__name__} sees the tokens that it would have to predict; set warmup.steps=0"
            )
        hidden_SNH = trunk(
            input_ids=batch.tokens_SN,
            attention_mask=batch.mask_SN.long(),
            use_cache=False,
            **{TOKEN_MASK: batch.mask_SN.reshape(-1)},
        ).last_hidden_state
        embedding = cast(nn.Embedding, trunk.get_input_embeddings())
        loss_sum, count = _next_token_loss(linear(hidden_SNH, embedding.weight), batch)
        return loss_sum / count

    @torch.no_grad()
    def evaluate(self, batch: Batch, *, with_stats: bool = False, log_prior_C: Tensor | None = None) -> Evaluation:
        """Return loss sum, count, and for classes the correct predictions, with ``log_prior_C`` added to the logits.

        ``last_stats`` stays as it was, unless ``with_stats`` leaves those of this batch there.
        """
        self.model.eval()
        with nullcontext() if with_stats else _without_stats(self.moe):
            loss_sum, count, correct = self._sums(batch, log_prior_C)
        return Evaluation(float(loss_sum), int(count), int(correct))

    @torch.no_grad()
    def evaluate_parts(self, batch: Batch, sizes: Sequence[int]) -> list[Evaluation]:
        """Return what ``evaluate`` gives for each stretch of sequences of a batch, up to rounding; nothing measures.

        Args:
            batch: of several owners, end to end.
            sizes: sequences of each; their sum is the batch's.
        """
        self.model.eval()
        with _without_stats(self.moe):
            if self.spec.task == "classification":
                logits_SC, labels_S = self._class_logits(batch, None)
                loss_S = cross_entropy(logits_SC, labels_S, reduction="none")
                count_S, correct_S = torch.ones_like(labels_S), logits_SC.argmax(dim=-1) == labels_S
            else:
                targets_SN, predicted_SN = next_tokens(batch)
                logits_TV = self._token_logits(batch).flatten(0, 1).float()
                loss_T = cross_entropy(logits_TV, targets_SN.flatten(), reduction="none")
                loss_S, count_S = loss_T.view_as(targets_SN).sum(1), predicted_SN.sum(1)
                correct_S = torch.zeros_like(count_S)
        each = zip(*(rows.split(list(sizes)) for rows in (loss_S, count_S, correct_S)), strict=True)
        return [
            Evaluation(float(loss.sum()), max(int(count.sum()), 1), int(right.sum())) for loss, count, right in each
        ]

    def _sums(
        self, batch: Batch, log_prior_C: Tensor | None = None, label_smoothing: float = 0.0
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Loss sum, number of predictions (at least 1) and correct ones (0 in causal LM)."""
        if self.spec.task == "classification":
            logits_SC, labels_S = self._class_logits(batch, log_prior_C)
            correct = (logits_SC.argmax(dim=-1) == labels_S).sum()
            loss_sum = cross_entropy(logits_SC, labels_S, reduction="sum", label_smoothing=label_smoothing)
            return loss_sum, torch.tensor(max(len(batch), 1), device=loss_sum.device), correct
        loss_sum, count = _next_token_loss(self._token_logits(batch), batch, label_smoothing)
        return loss_sum, count, loss_sum.new_zeros((), dtype=torch.int64)

    def _class_logits(self, batch: Batch, log_prior_C: Tensor | None) -> tuple[Tensor, Tensor]:
        """A classifier's logits (S, C) in float32, with the prior added, and the labels (S,)."""
        return class_logits(self.model, batch, batch.mask_SN, log_prior=log_prior_C)

    def _token_logits(self, batch: Batch) -> Tensor:
        """A language model's logits, (S, N, V)."""
        return token_logits(self.model, batch, batch.mask_SN)


def class_logits(model: nn.Module, batch: Batch, runs_SN: Tensor, *, log_prior: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return a classifier's logits (S, C) in float32 and the labels (S,).

    Args:
        model: the classifier.
        batch: what it reads.
        runs_SN: the places whose tokens its experts serve, bool.
        log_prior: what is added to the logits, (C,), or (S, C) with a prior for each sequence; None = nothing.

    Raises:
        ValueError: the batch has no labels.
    """
    if batch.labels_S is None:
        raise ValueError("the batch has no labels; classification needs labels_S")
    options: dict[str, Any] = {TOKEN_MASK: runs_SN.reshape(-1)}
    logits_SC: Tensor = model(batch.tokens_SN, batch.mask_SN, **options).float()
    return logits_SC if log_prior is None else logits_SC + log_prior, batch.labels_S


def token_logits(model: nn.Module, batch: Batch, runs_SN: Tensor) -> Tensor:
    """Return a language model's logits, (S, N, V); ``runs_SN``: the places whose tokens its experts serve, bool."""
    options: dict[str, Any] = {TOKEN_MASK: runs_SN.reshape(-1)}
    logits_SNV: Tensor = model(
        input_ids=batch.tokens_SN,
        attention_mask=batch.mask_SN.long(),
        use_cache=False,
        output_router_logits=False,
        **options,
    ).logits
    return logits_SNV


@contextmanager
def _without_stats(layers: tuple[MoE, ...]) -> Iterator[None]:
    """Within the block no layer measures; afterwards the last measurement is still there."""
    before = [(layer.with_stats, layer.last_stats) for layer in layers]
    for layer in layers:
        layer.with_stats = False
    try:
        yield
    finally:
        for layer, (with_stats, last_stats) in zip(layers, before, strict=True):
            layer.with_stats, layer.last_stats = with_stats, last_stats


def _next_token_loss(logits_SNV: Tensor, batch: Batch, label_smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
    """Loss sum in nats and number of predictions (at least 1): a token is predicted where it and the last are real."""
    targets_SN, predicted_SN = next_tokens(batch)
    logits_TV, targets_T = logits_SNV.flatten(0, 1).float(), targets_SN.flatten()
    loss_sum = cross_entropy(logits_TV, targets_T, reduction="sum", label_smoothing=label_smoothing)
    return loss_sum, predicted_SN.sum().clamp(min=1)


def next_tokens(batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the token that each place predicts, -100 where none, and the places that predict one, both (S, N).

    Of a conversation only the tokens of answers are predicted, and the end token after each.
    """
    mask_SN = batch.mask_SN
    # The targets are shifted, not the logits: slicing (S, N, V) would copy the largest tensor of the step.
    predicted_SN = mask_SN[:, 1:] & mask_SN[:, :-1]
    if batch.answers_SN is not None:
        predicted_SN = predicted_SN & batch.answers_SN[:, 1:]
    predicted_SN = pad(predicted_SN, (0, 1))
    return pad(batch.tokens_SN[:, 1:], (0, 1)).masked_fill(~predicted_SN, -100), predicted_SN


def drop_tokens(batch: Batch, probability: float, generator: torch.Generator | None) -> Batch:
    """The batch with each real token made padding with ``probability``; a sequence that would lose all keeps all."""
    mask_SN = batch.mask_SN
    kept_SN = mask_SN & (torch.rand(mask_SN.shape, generator=generator) >= probability).to(mask_SN.device)
    return replace(batch, mask_SN=torch.where(kept_SN.any(dim=1, keepdim=True), kept_SN, mask_SN))
