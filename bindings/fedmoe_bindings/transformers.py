"""The transformers binding: Qwen3-MoE, OLMoE and Mixtral as fedmoe models, for causal LM and classification."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear, pad
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from fedmoe_bindings.transformers_experts import use_fedmoe
from fedmoe_bindings.transformers_families import family_of, sparse_blocks
from fedmoe_bindings.transformers_load import Pool, SequenceClassifier, load_model, small_model
from fedmoe_bindings.transformers_mask import TOKEN_MASK, carry_token_mask
from fedmoe_bindings.transformers_submodel import extract_submodel, merge_submodel, stock_model
from fedmoe_core.adapter import Batch, Evaluation, ModelSpec, Task
from fedmoe_core.config import ModelConfig
from fedmoe_core.layer import MoE
from fedmoe_core.slots import Rows, rows_of_layer
from fedmoe_core.update import Kind, ParamSpec

__all__ = ["TransformersAdapter", "extract_submodel", "load_adapter", "merge_submodel", "use_fedmoe"]


def load_adapter(
    name: str,
    *,
    task: Task = "causal_lm",
    model_config: ModelConfig | None = None,
    vocab_size: int | None = None,
    num_classes: int = 0,
    seed: int = 0,
    pool: Pool | None = None,
    dtype: torch.dtype | None = torch.float32,
    device: torch.device | str = "cpu",
    backend: str = "auto",
) -> TransformersAdapter:
    """A live model by name.

    Args:
        name: "tiny" (the small Qwen3-MoE of ``model_config``), a directory, or a hub id of the form owner/name.
        task: what it is trained for.
        model_config: sizes of "tiny"; not read otherwise.
        vocab_size: of the tokenizer; None = as ``model_config`` or the checkpoint says.
        num_classes: for classification.
        seed: of the fresh weights ("tiny", and a fresh classification head); the global random state is not touched.
        pool: "mean" over real tokens or the "last" one; None = mean for "tiny", last (transformers' own) otherwise.
        dtype: of the weights; None = as stored.
        device: of the weights.
        backend: of the MoE layers, as ``fedmoe_kernels.moe_mlp``.

    Raises:
        ValueError: an unknown name, a family that is not served, a model without MoE layers, a vocabulary that is
            smaller than the tokenizer's, or too few classes.
        OSError: a checkpoint that cannot be read or is incomplete.
    """
    if name == "tiny":
        sizes = model_config or ModelConfig()
        model = small_model(sizes, vocab_size=vocab_size or sizes.vocab_size, task=task, seed=seed)
        model = cast(PreTrainedModel, cast(nn.Module, model).to(dtype=dtype or torch.float32))
    else:
        model = load_model(name, task=task, num_classes=num_classes, dtype=dtype)
    if vocab_size is not None and model.config.vocab_size < vocab_size:
        raise ValueError(
            f"model {name!r} has {model.config.vocab_size} token ids, the tokenizer {vocab_size}; use its own tokenizer"
        )
    return TransformersAdapter(
        cast(PreTrainedModel, cast(nn.Module, model).to(device=device)),
        task=task,
        num_classes=num_classes,
        pool=pool or ("mean" if name == "tiny" else "last"),
        seed=seed,
        backend=backend,
    )


class TransformersAdapter:
    """A transformers model whose MoE blocks are ``fedmoe_core.MoE`` layers; implements ``ModelAdapter``.

    Attributes:
        spec: the model's facts and the ParamSpec of every tensor.
        model: the causal LM, or a ``SequenceClassifier``.
        moe: its MoE layers in depth order, with statistics and importance sums on.
    """

    spec: ModelSpec
    model: nn.Module
    moe: tuple[MoE, ...]

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        task: Task = "causal_lm",
        num_classes: int = 0,
        pool: Pool = "mean",
        seed: int = 0,
        backend: str = "auto",
    ) -> None:
        """Take over a stock model: every MoE block in it is replaced and its weights are freed.

        Args:
            model: a causal LM; for classification transformers' own classifier, or a bare trunk (a head is added).
            task, num_classes, pool, seed, backend: as ``load_adapter``.

        Raises:
            ValueError: as ``load_adapter``.
        """
        config = model.config
        family, blocks = family_of(config), sparse_blocks(model, config)
        if task == "causal_lm" and model.get_output_embeddings() is None:
            raise ValueError(f"{type(model).__name__} has no language-model head; load it as a causal LM")
        root = (
            SequenceClassifier.over(model, num_classes=num_classes, pool=pool, seed=seed)
            if (task == "classification")
            else model
        )
        layers = []
        for block in blocks:
            layer = MoE.from_dense(
                *block.weights,
                config.num_experts_per_tok,
                renormalize=family.renormalize(config),
                with_stats=True,
                with_scores=True,
                backend=backend,
            ).train(model.training)
            model.set_submodule(block.name, layer)
            layers.append(layer)
        del blocks, block
        carry_token_mask(root)
        self.model, self.moe = root, tuple(layers)
        self._config = config
        self._dense = self._dense_parameters()
        self.spec = self._describe(task)

    def state(self) -> dict[str, Tensor]:
        """The whole model in global coordinates, cloned.

        Raises:
            ValueError: a layer does not hold every expert.
        """
        state: dict[str, Tensor] = {}
        for number, layer in enumerate(self.moe):
            if len(layer.experts) < layer.num_experts:
                raise ValueError(
                    f"MoE layer {number} holds {len(layer.experts)} of {layer.num_experts} experts; "
                    "configure the adapter with a whole state first"
                )
            held = layer.global_state()
            state |= {f"moe.{number}.{name}": getattr(held, name) for name in ("router", "w_in", "w_out")}
        return state | {key: parameter.detach().clone() for key, parameter in self._dense.items()}

    def export(self) -> PreTrainedModel:
        """A stock transformers model with these weights, to save, share or serve without fedmoe.

        (The live ``model`` has fedmoe layers, under names that ``from_pretrained`` does not know.)

        Raises:
            ValueError: a layer does not hold every expert, or transformers has no model with this head.
        """
        state = self.state()
        places = [name for name, module in self.model.named_modules() if isinstance(module, MoE)]
        if not isinstance(self.model, SequenceClassifier):
            return stock_model(type(self.model), self._config, state, places)
        if self.model.pool != "last":
            raise ValueError("transformers' classifiers pool the last token; train with pool='last' to export")
        return stock_model(AutoModelForSequenceClassification, self._config, state, places)

    def configure(
        self,
        state: Mapping[str, Tensor],
        *,
        permitted_LE: np.ndarray | None = None,
        trainable_LE: np.ndarray | None = None,
        rows: Rows | None = None,
        alias_LE: np.ndarray | None = None,
        top_k: int | None = None,
        train_dense: bool = False,
        train_router: bool = True,
        train_head: bool | None = None,
    ) -> None:
        """Become a sub-model of ``state``, as ``ModelAdapter.configure``.

        Args:
            state, permitted_LE, trainable_LE, rows, alias_LE, top_k, train_dense, train_router: as the protocol.
            train_head: whether the classification head trains; None = always in classification, whatever
                ``train_dense`` says. A language-model head counts as trunk: it may be the embedding itself.

        Raises:
            ValueError: a missing, foreign or misshapen tensor, a bad mask, or a top_k that is impossible (nothing of
                the adapter has changed then); rows or an alias that do not fit.
        """
        self._check(state)
        self._check_rows(rows or {})
        k = self.spec.top_k if top_k is None else top_k
        if not 1 <= k <= self.spec.top_k:
            raise ValueError(f"top_k={k} is outside 1 to {self.spec.top_k}, the model's own")
        permitted = [None] * len(self.moe) if permitted_LE is None else list(permitted_LE)
        trainable = [None] * len(self.moe) if trainable_LE is None else list(trainable_LE)
        if not len(permitted) == len(trainable) == len(self.moe):
            raise ValueError(
                f"the masks have {len(permitted)} and {len(trainable)} rows; this model has {len(self.moe)} MoE layers"
            )
        for layer, held_E, trains_E in zip(self.moe, permitted, trainable, strict=True):
            layer.check_masks(held_E, trains_E)
        for number, layer in enumerate(self.moe):
            layer.top_k, layer.train_router = k, train_router
            layer.load_global(
                *(state[f"moe.{number}.{name}"].to(layer.w_in.device) for name in ("router", "w_in", "w_out")),
                permitted=permitted[number],
                trainable=trainable[number],
                rows=rows_of_layer(rows or {}, number),
                alias=None if alias_LE is None else alias_LE[number],
            )
        head = self.spec.task == "classification" if train_head is None else train_head
        with torch.no_grad():
            for key, parameter in self._dense.items():
                parameter.copy_(state[key])
                parameter.requires_grad_(head if key in self.spec.head else train_dense)
                parameter.grad = None

    def trained(self) -> dict[str, Tensor]:
        """Detached views of what this configuration trains; the keys and shapes of ``ClientUpdate.deltas``."""
        views = {
            f"moe.{number}.{name}": value
            for number, layer in enumerate(self.moe)
            for name, value in layer.trained_state().items()
        }
        return views | {key: p.detach() for key, p in self._dense.items() if p.requires_grad}

    def loss(
        self,
        batch: Batch,
        *,
        training: bool = True,
        token_dropout: float = 0.0,
        generator: torch.Generator | None = None,
        log_prior_C: Tensor | None = None,
    ) -> Tensor:
        """Mean loss of the batch, in nats per predicted token or per sample; padding neither routed nor counted.

        Args:
            batch: as ``Batch``; a token is predicted where it and its predecessor are real.
            training: the mode of dropout layers and of activation checkpointing.
            token_dropout: classification only; each real token is treated as padding with this probability (a
                sequence never loses all its tokens).
            generator: a CPU generator for token dropout.
            log_prior_C: classification only; added to the logits, so that what a client learns is not its own class
                shares (logit adjustment, arXiv 2007.07314 [E]).

        Raises:
            ValueError: labels are missing, or token dropout is asked of a language model.
        """
        self.model.train(training)
        if token_dropout:
            if self.spec.task == "causal_lm":
                raise ValueError("token_dropout is for classification; set it to 0 for a language model")
            batch = _drop_tokens(batch, token_dropout, generator)
        loss_sum, count, _ = self._sums(batch, log_prior_C)
        return loss_sum / count

    def text_loss(self, batch: Batch) -> Tensor:
        """Mean next-token loss in nats; a classifier's trunk predicts with its own embedding as output layer."""
        self.model.train()
        if self.spec.task == "causal_lm":
            loss_sum, count, _ = self._sums(batch)
            return loss_sum / count
        trunk = cast(SequenceClassifier, self.model).model
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
    def evaluate(self, batch: Batch, *, with_stats: bool = False) -> Evaluation:
        """Loss sum, count, and in classification the correct predictions.

        ``last_stats`` stays as it was, unless ``with_stats`` leaves those of this batch there.
        """
        self.model.eval()
        with nullcontext() if with_stats else _without_stats(self.moe):
            loss_sum, count, correct = self._sums(batch)
        return Evaluation(float(loss_sum), int(count), int(correct))

    def _sums(self, batch: Batch, log_prior_C: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Loss sum, number of predictions (at least 1) and correct ones (0 in causal LM)."""
        mask_SN = batch.mask_SN
        options: dict[str, Any] = {TOKEN_MASK: mask_SN.reshape(-1)}
        if self.spec.task == "classification":
            if batch.labels_S is None:
                raise ValueError("the batch has no labels; classification needs labels_S")
            logits_SC = self.model(batch.tokens_SN, mask_SN, **options).float()
            correct = (logits_SC.argmax(dim=-1) == batch.labels_S).sum()
            adjusted_SC = logits_SC if log_prior_C is None else logits_SC + log_prior_C
            loss_sum = cross_entropy(adjusted_SC, batch.labels_S, reduction="sum")
            return loss_sum, torch.tensor(max(len(batch), 1), device=loss_sum.device), correct
        logits_SNV = self.model(
            input_ids=batch.tokens_SN,
            attention_mask=mask_SN.long(),
            use_cache=False,
            output_router_logits=False,
            **options,
        ).logits
        loss_sum, count = _next_token_loss(logits_SNV, batch)
        return loss_sum, count, loss_sum.new_zeros((), dtype=torch.int64)

    def _dense_parameters(self) -> dict[str, nn.Parameter]:
        """Every parameter outside the MoE layers; ``named_parameters`` yields tied ones once."""
        inside = {id(parameter) for layer in self.moe for parameter in layer.parameters()}
        return {f"dense.{name}": p for name, p in self.model.named_parameters() if id(p) not in inside}

    def _describe(self, task: Task) -> ModelSpec:
        first = self.moe[0]
        params = []
        for number, layer in enumerate(self.moe):
            held = {"router": layer.router_EH(), "w_in": layer.w_in, "w_out": layer.w_out}
            for name, tensor in held.items():
                kind: Kind = "router" if name == "router" else "expert"
                params.append(ParamSpec(f"moe.{number}.{name}", kind, tuple(tensor.shape), tensor.dtype, number))
        params += [ParamSpec(key, "dense", tuple(p.shape), p.dtype) for key, p in self._dense.items()]
        return ModelSpec(
            family=self._config.model_type,
            task=task,
            num_layers=len(self.moe),
            num_experts=first.num_experts,
            top_k=first.top_k,
            hidden_size=first.hidden_size,
            intermediate_size=first.intermediate_size,
            activation=first.activation,
            params=tuple(params),
            head=frozenset({"dense.score.weight"} if task == "classification" else ()),
        )

    def _check_rows(self, rows: Rows) -> None:
        known = {spec.key for spec in self.spec.params if spec.layer >= 0}
        if strange := sorted(set(rows) - known):
            raise ValueError(f"rows are given for {strange[0]}; only tensors of MoE layers have rows")

    def _check(self, state: Mapping[str, Tensor]) -> None:
        for spec in self.spec.params:
            if spec.key not in state:
                raise ValueError(f"the state has no {spec.key}; it is not a state of this model")
            if tuple(state[spec.key].shape) != spec.shape:
                found = tuple(state[spec.key].shape)
                raise ValueError(f"the state's {spec.key} has shape {found}; this model needs {spec.shape}")


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


def _next_token_loss(logits_SNV: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Loss sum in nats and number of predictions (at least 1): a token is predicted where it and the last are real."""
    mask_SN = batch.mask_SN
    # The targets are shifted, not the logits: slicing (S, N, V) would copy the largest tensor of the step.
    predicted_SN = pad(mask_SN[:, 1:] & mask_SN[:, :-1], (0, 1))
    targets_SN = pad(batch.tokens_SN[:, 1:], (0, 1)).masked_fill(~predicted_SN, -100)
    loss_sum = cross_entropy(logits_SNV.flatten(0, 1).float(), targets_SN.flatten(), reduction="sum")
    return loss_sum, predicted_SN.sum().clamp(min=1)


def _drop_tokens(batch: Batch, probability: float, generator: torch.Generator | None) -> Batch:
    """The batch with each real token made padding with ``probability``; a sequence that would lose all keeps all."""
    mask_SN = batch.mask_SN
    kept_SN = mask_SN & (torch.rand(mask_SN.shape, generator=generator) >= probability).to(mask_SN.device)
    return Batch(batch.tokens_SN, torch.where(kept_SN.any(dim=1, keepdim=True), kept_SN, mask_SN), batch.labels_S)
