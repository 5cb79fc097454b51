"""The transformers binding: Qwen3-MoE, OLMoE and Mixtral as fedmoe models, for causal LM and classification."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fedmoe_bindings.transformers.live.attention import attention_received
from fedmoe_bindings.transformers.live.checks import check_form, check_rows, check_state, warn_of_factor
from fedmoe_bindings.transformers.live.cohort import TransformersCohort
from fedmoe_bindings.transformers.live.export import cast_parameters, stock_of
from fedmoe_bindings.transformers.live.families import Absent, Family, check_layer, family_of, inflates, of_split
from fedmoe_bindings.transformers.live.load import Pool, SequenceClassifier, is_encoder, load_model, small_model
from fedmoe_bindings.transformers.live.places import PlaceMeasures
from fedmoe_bindings.transformers.live.shared import shared_of
from fedmoe_bindings.transformers.live.token_mask import carry_token_mask
from fedmoe_bindings.transformers.live.writing import own_model, require_same, write_files, write_peft
from fedmoe_bindings.transformers.stock.blocks import stock_blocks
from fedmoe_core.base.rng import counter_seed
from fedmoe_core.base.tensor_key import TensorKey, of_layer, to_keys
from fedmoe_core.config.run_config import ModelConfig
from fedmoe_core.data.batches import Batch, Task
from fedmoe_core.layer.cohort.layer import CohortMoE
from fedmoe_core.layer.cohort.parts import ClientLayer
from fedmoe_core.layer.graft import GraftSpec, fresh_graft
from fedmoe_core.layer.lora import LayerLora, LoraSpec, lora_of_layer
from fedmoe_core.layer.moe import MoE
from fedmoe_core.layer.state import STEERING, LayerState
from fedmoe_core.model.spec import Kind, ModelSpec, ParamSpec, lora_specs
from fedmoe_core.model.submodel import WHOLE, SubModel
from fedmoe_core.model.writer import Wording


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
    absent: Absent = "auto",
) -> TransformersAdapter:
    """Load a live model by name.

    Args:
        name: "tiny" (the small Qwen3-MoE of ``model_config``), a directory, or a hub id of the form owner/name.
        task: what it is trained for.
        model_config: sizes of "tiny"; not read otherwise.
        vocab_size: of the tokenizer; None = as ``model_config`` or the checkpoint says.
        num_classes: for classification.
        seed: of the fresh weights ("tiny", and a fresh classification head); the global random state is not touched.
        pool: "mean" over real tokens or the "last" one; None = mean for "tiny" and encoders, last (transformers'
            own) otherwise.
        dtype: of the weights; None = as stored.
        device: of the weights.
        backend: of the MoE layers, as ``fedmoe_kernels.moe_mlp``.
        absent: what becomes of weight on experts that a sub-model lacks, see ``of_split``.

    Raises:
        ValueError: an unknown name, a family that is not served, a model without MoE layers, a vocabulary that is
            smaller than the tokenizer's, or too few classes.
        OSError: a checkpoint that cannot be read or is incomplete.
    """
    if name == "tiny":
        sizes = model_config or ModelConfig()
        model = small_model(sizes, vocab_size=vocab_size or sizes.vocab_size, task=task, seed=seed)
        model = cast_parameters(model, dtype or torch.float32)
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
        pool=pool or ("mean" if name == "tiny" or is_encoder(model) else "last"),
        seed=seed,
        backend=backend,
        absent=absent,
    )


def _with_nothing(_: nn.Module, __: object, hidden: Tensor) -> tuple[Tensor, None]:
    """The answer of a block that its model expects to return two values."""
    return hidden, None


class TransformersAdapter(PlaceMeasures):
    """A transformers model whose MoE blocks are ``fedmoe_core.MoE`` layers; implements ``ModelAdapter``.

    Attributes:
        spec: the model's facts and the ParamSpec of every tensor.
        model: the causal LM, or a ``SequenceClassifier``.
        moe: its MoE layers in depth order, with statistics and importance sums on.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        task: Task = "causal_lm",
        num_classes: int = 0,
        pool: Pool = "mean",
        seed: int = 0,
        backend: str = "auto",
        absent: Absent = "auto",
        family: Family | None = None,
    ) -> None:
        """Take over a stock model: every MoE block in it is replaced and its weights are freed.

        Args:
            model: a causal LM; for classification transformers' own classifier, or a bare trunk (a head is added).
            task, num_classes, pool, seed, backend, absent: as ``load_adapter``.
            family: how its MoE blocks are made, taken on trust; None = found out from the blocks, and every layer is
                compared with the block that it stands for.

        Raises:
            ValueError: as ``load_adapter``.
        """
        config, blocks = model.config, stock_blocks(model)
        if config.is_encoder_decoder and not is_encoder(model):
            raise ValueError(
                f"{type(model).__name__} has an encoder and a decoder; give fedmoe the encoder alone, as a classifier"
            )
        if len(sizes := {block.num_experts for block in blocks}) > 1:
            raise ValueError(
                f"the MoE layers have {min(sizes)} to {max(sizes)} experts; fedmoe serves one number for all"
            )
        told, family = family is not None, family or family_of(blocks[0])
        family = of_split(family, config, absent=absent)
        if task == "causal_lm" and model.get_output_embeddings() is None:
            raise ValueError(f"{type(model).__name__} has no language-model head; load it as a causal LM")
        root = (
            SequenceClassifier.over(model, num_classes=num_classes, pool=pool, seed=seed)
            if (task == "classification")
            else model
        )
        layers = []
        for block in blocks:
            layer = MoE.of(
                family.state(block),
                family.top_k or config.num_experts_per_tok,
                rule=family.rule,
                activation=family.activation,
                shared=shared_of(block, family),
                with_stats=True,
                with_scores=True,
                backend=backend,
            ).train(model.training)
            if not told:
                check_layer(block, layer)
            model.set_submodule(block.name, layer)
            if family.pair:
                layer.register_forward_hook(_with_nothing)
            layers.append(layer)
        del blocks, block
        trunk = root.model if isinstance(root, SequenceClassifier) else root
        self._carriers = carry_token_mask(root, trunk)
        self._cohort: TransformersCohort | None = None
        self.model, self.moe, self.frozen_moe = root, tuple(layers), ()
        self._lora: LoraSpec | None = None
        self._config, self._family = config, family
        self._dense = self._dense_parameters()
        self.spec = self._describe(task)

    def state(self) -> dict[str, Tensor]:
        """Return the whole model in global coordinates, cloned.

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
            state |= to_keys(number, held.tensors)
            if held.lora is not None and self._lora is not None and self._lora.in_state:
                state |= to_keys(number, held.lora.factors)
        return state | {key: parameter.detach().clone() for key, parameter in self._dense.items()}

    def export(self, *, head: bool = True) -> PreTrainedModel:
        """Return a stock transformers model with these weights, to save, share or serve without fedmoe.

        (The live ``model`` has fedmoe layers, under names that ``from_pretrained`` does not know.)

        Args:
            head: of a classifier; without it its trunk comes back, whatever it pools.

        Raises:
            ValueError: a layer does not hold every expert, or transformers has no model with this head or grafts.
        """
        return stock_of(self.model, self.state(), self._family, self.moe, head=head)

    def write_model(
        self, state: Mapping[str, Tensor], submodel: SubModel, folder: Path, *, wording: Wording, batch: Batch
    ) -> None:
        """Write a sub-model as a model of transformers, as ``ModelWriter``; the adapter is configured so afterwards."""
        self.configure(state, submodel)
        model = own_model(self.model, state, self._family, self.moe, submodel)
        require_same(model, self.model, batch)
        write_files(model, folder, wording, text=batch)

    def write_adapter(
        self, state: Mapping[str, Tensor], start: Mapping[str, Tensor], folder: Path, *, wording: Wording, base: str
    ) -> None:
        """Write the adapters and routers of a state as peft does, as ``ModelWriter``."""
        assert self._lora is not None
        model = stock_of(self.model, start, self._family, self.moe)
        write_peft(model, state, self._lora.scale, folder, wording, base=base)

    def configure(self, state: Mapping[str, Tensor], submodel: SubModel = WHOLE) -> None:
        """Become ``submodel`` of ``state``, as ``ModelAdapter.configure``.

        A language-model head counts as trunk: it may be the embedding itself.

        Raises:
            ValueError: a missing, foreign or misshapen tensor, a bad mask, or a top_k that is impossible (nothing of
                the adapter has changed then); rows or an alias that do not fit.
        """
        check_state(state, self.spec)
        self._check(submodel)
        if self._cohort is not None:
            self._cohort.leave()
            self._cohort = None
        self._configure_layers(state, submodel)
        head = self.spec.task == "classification" if submodel.train_head is None else submodel.train_head
        learning = {spec.key for spec in self.spec.params if spec.kind == "dense"}
        with torch.no_grad():
            for key, parameter in self._dense.items():
                parameter.copy_(state[key])
                trains = head if key in self.spec.head else submodel.train_dense
                parameter.requires_grad_(key in learning and trains)
                parameter.grad = None

    def _check(self, submodel: SubModel) -> None:
        check_rows(submodel.rows, self.spec, adapters=self._lora is not None)
        check_form(submodel, self.spec, self.moe, adapters=self._lora is not None)
        warn_of_factor(submodel, self.spec, renormalizes=inflates(self._family, self._config))

    def _configure_layers(self, state: Mapping[str, Tensor], submodel: SubModel) -> None:
        for number, layer in enumerate(self.moe):
            self._configure_layer(layer, number, state, submodel)

    def _configure_layer(self, layer: MoE, number: int, state: Mapping[str, Tensor], sub: SubModel) -> None:
        device, own = layer.w_in.device, of_layer(number, state)
        layer.top_k = self.spec.top_k if sub.top_k is None else sub.top_k
        of_adapters = None if self._lora is None else self._lora.frozen_format
        layer.train_router, layer.frozen_format = sub.train_router, sub.frozen_format or of_adapters
        layer.start_out_scale(None if sub.out_scale_L is None else float(sub.out_scale_L[number]))
        lora = None
        if self._lora is not None and (self._lora.in_state or sub.lora_rank is not None):
            lora = lora_of_layer(state, number, self._lora, rank=sub.lora_rank, seed=sub.lora_seed).to(device)
        layer.load_global(
            LayerState.of({name: own[name].to(device) for name in layer.names}, lora=lora),
            permitted=None if sub.permitted_LE is None else sub.permitted_LE[number],
            trainable=None if sub.trainable_LE is None else sub.trainable_LE[number],
            rows=of_layer(number, sub.rows),
            alias=None if sub.alias_LE is None else sub.alias_LE[number],
        )

    def add_lora(self, lora: LoraSpec, *, seed: int) -> dict[str, Tensor]:
        """Let experts carry adapters from now on, as the protocol."""
        self._lora = lora
        fresh: dict[str, Tensor] = {}
        if lora.in_state:
            for number, layer in enumerate(self.moe):
                held = layer.global_state()
                drawn = LayerLora.fresh(
                    held.w_in, held.w_out, rank=lora.rank, scale=lora.scale, seed=counter_seed(seed, "adapters", number)
                )
                fresh |= to_keys(number, drawn.factors)
            self.spec = replace(self.spec, params=lora_specs(self.spec.params, lora.rank))
        return fresh

    def graft(self, graft: GraftSpec, *, seed: int) -> dict[str, Tensor]:
        """Put a fresh mixture next to every MoE block, as the protocol."""
        if self.frozen_moe or self._lora is not None:
            raise ValueError("the model was grafted or given adapters before; load it again")
        places = {module: name for name, module in self.model.named_modules() if isinstance(module, MoE)}
        grown = []
        for number, base in enumerate(self.moe):
            grafted = fresh_graft(base, graft, seed=counter_seed(seed, "graft", number))
            self.model.set_submodule(places[base], grafted)
            self._carriers[base].serve(grafted.experts)
            self._carriers[grafted.experts] = self._carriers[base]
            grown.append(grafted)
        self.moe, self.frozen_moe = tuple(g.experts for g in grown), self.moe
        self._dense = self._dense_parameters()
        self.spec = self._describe(self.spec.task)
        return self.state()

    def become_cohort(
        self,
        state: Mapping[str, Tensor],
        submodels: Sequence[SubModel],
        *,
        tokens: int,
        joined: Callable[[int], None],
    ) -> TransformersCohort:
        """Become several sub-models at once, as ``CohortAdapter.become_cohort``."""
        if any(submodel.train_dense for submodel in submodels):
            raise ValueError("a client of the cohort trains the trunk, which all share; train it alone")
        for submodel in submodels:
            self._check(submodel)
        parts: list[list[ClientLayer]] = [[] for _ in self.moe]
        for client, submodel in enumerate(submodels):
            if client == 0:
                self.configure(state, submodel)
            for number, layer in enumerate(self.moe):
                if client:
                    self._configure_layer(layer, number, state, submodel)
                parts[number].append(ClientLayer.of(layer, shares=not of_layer(number, submodel.rows)))
            joined(client)
        together = []
        for number, layer in enumerate(self.moe):
            slots = sum(len(part.trainable + part.frozen) for part in parts[number])
            rows = max(1, tokens * layer.top_k * len(submodels) // slots)
            together.append((layer, CohortMoE(layer, parts[number], rows_per_slot=rows)))
            parts[number].clear()
            self._carriers[layer].serve(together[-1][1])
            if self._family.pair and not self.frozen_moe:
                together[-1][1].register_forward_hook(_with_nothing)
        # The layers of one client wait outside with as little as a layer can have.
        one_LE = np.arange(self.spec.num_experts)[None] == np.zeros((len(self.moe), 1))
        self._configure_layers(state, SubModel(one_LE, np.zeros_like(one_LE)))

        def start(client: int) -> dict[str, Tensor]:
            self._configure_layers(state, submodels[client])
            return self.trained()

        self._cohort = TransformersCohort(self.model, together, start=start)
        return self._cohort

    def trained(self) -> dict[str, Tensor]:
        """Return detached views of what this configuration trains, keyed and shaped as ``ClientUpdate.deltas``."""
        views: dict[str, Tensor] = {}
        for number, layer in enumerate(self.moe):
            views |= to_keys(number, layer.trained_state())
        return views | {key: p.detach() for key, p in self._dense.items() if p.requires_grad}

    def watch_attention(self) -> AbstractContextManager[list[Tensor | None]]:
        """Record what attention the tokens receive in the block of each MoE layer, as the protocol."""
        return attention_received(self.model, self.moe)

    def _dense_parameters(self) -> dict[str, nn.Parameter]:
        """Every parameter outside the MoE layers by its stock name, shared experts included; tied ones come once."""
        inside = {id(parameter) for layer in self.moe for parameter in layer.own_parameters()}
        places = {name: module for name, module in self.model.named_modules() if isinstance(module, MoE)}
        stock = {
            id(p): f"{place}.{name}"
            for place, layer in places.items()
            if layer.shared is not None
            for name, p in layer.shared.named_parameters()
        }
        found = {stock.get(id(p), name): p for name, p in self.model.named_parameters() if id(p) not in inside}
        return {f"dense.{name}": p for name, p in found.items()}

    def _describe(self, task: Task) -> ModelSpec:
        first = self.moe[0]
        params = []
        for number, layer in enumerate(self.moe):
            for name, shape in layer.shapes(layer.num_experts).items():
                kind: Kind = "router" if name in STEERING else "frozen" if name == "correction_bias" else "expert"
                dtype = getattr(layer, name).dtype
                params.append(ParamSpec(str(TensorKey(number, name)), kind, shape, dtype, number))
        frozen = {id(parameter) for layer in self.frozen_moe for parameter in layer.parameters()}
        for key, p in self._dense.items():
            params.append(ParamSpec(key, "frozen" if id(p) in frozen else "dense", tuple(p.shape), p.dtype))
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
            heads=getattr(self._config, "num_attention_heads", 0),
        )
