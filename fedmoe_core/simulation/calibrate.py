"""One recorded dry step: what the closed forms of the cost model cannot know about a trunk."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fedmoe_core.base.tensor_key import DENSE, TensorKey
from fedmoe_core.budget.calibration import calibrated
from fedmoe_core.budget.cost_model import CostModel
from fedmoe_core.budget.from_spec import cost_model_of
from fedmoe_core.budget.peak_memory import mark, resident_bytes, tensor_bytes, trace_memory
from fedmoe_core.client.step import Stepper, local_optimizer, log_prior
from fedmoe_core.config.run_config import TrainConfig
from fedmoe_core.data.batches import Batch
from fedmoe_core.layer.moe import MoE
from fedmoe_core.model.adapter import ModelAdapter
from fedmoe_core.model.submodel import SubModel

NEVER = 1e-9  # a chance of token dropout at which the draw takes its memory and no token


def calibrate(
    adapter: ModelAdapter,
    params: dict[str, Tensor],
    train: TrainConfig,
    batch: Batch,
    *,
    padding: bool,
    lora_rank: int | None = None,
    frozen_format: str | None = None,
) -> CostModel:
    """Make the cost model of ``adapter`` for local steps on batches shaped like ``batch``, with measured trunk terms.

    With ``lora_rank`` experts carry adapters of that rank, which then train instead of them; ``frozen_format`` is what
    the adapters' ``LoraSpec`` says.

    Each k' from 1 to the model's k is traced once, holding the k' experts of lowest id in every layer. Few experts are
    the worst case for the temporaries of the expert stage. With k' held, each serves every token, and no token can give
    one expert more than one row, so no other choice of experts makes a slot larger. (With k held at a smaller k' the
    products of adapters came out up to 5 kB short.)

    All tokens are taken as real, since padding and token dropout only take rows away. Where tokens are dropped, the
    draw is made, and drops none. A model may build an attention mask only if a batch has padding (half a megabyte of
    the demo's 20). So where clients' batches may have some, a batch with one padded place is traced as well, and the
    larger peak of each stage is kept.
    """
    train = replace(train, token_dropout=min(train.token_dropout, NEVER))
    whole_SN = torch.ones_like(batch.mask_SN)
    padded_SN = whole_SN.clone()
    padded_SN[0, -1] = False
    batches = [replace(batch, mask_SN=mask_SN) for mask_SN in (whole_SN, padded_SN)[: 1 + padding]]
    spec = adapter.spec
    train_dense = train.trunk == "fedavg"
    model = cost_model_of(
        spec,
        tokens=batch.tokens_SN.numel(),
        train_dense=train_dense,
        lora_rank=lora_rank,
        frozen_format=frozen_format,
    )
    adapter.configure(params, SubModel(train_dense=train_dense))
    dense = sum(tensor.numel() for key, tensor in adapter.trained().items() if TensorKey.parse(key).layer == DENSE)
    model = replace(
        model,
        trunk_trainable=dense,  # a classification head trains also where the trunk does not
        anchored=train.prox > 0,
        base_experts=sum(layer.num_experts for layer in adapter.frozen_moe),
    )
    traced, buffers, flops = {}, 0, 0.0
    for top_k in range(1, spec.top_k + 1):
        few_LE = first_experts(adapter, top_k)
        adapter.configure(
            params,
            SubModel(
                permitted_LE=few_LE, trainable_LE=few_LE, top_k=top_k, train_dense=train_dense, lora_rank=lora_rank
            ),
        )
        optimizer = local_optimizer(adapter, train)
        found = [_stage_peaks(adapter, each, optimizer, train) for each in batches]
        traced[top_k] = few_LE, tuple(max(stage) for stage in zip(*found, strict=True))
        buffers = _trunk_buffers(adapter)
        with FlopCounterMode(display=False) as counted:
            adapter.loss(batches[0]).backward()
        adapter.model.zero_grad(set_to_none=True)
        flops = max(flops, _trunk_flops(counted) / model.tokens - model.router_flops_per_token)
    with FlopCounterMode(display=False) as counted:
        adapter.evaluate(batches[0])
    forward = _trunk_flops(counted) / model.tokens - 2 * model.total_experts * model.hidden_size
    # Without the experts' products: of frozen blocks the forward and, at most, the gradient of their input.
    frozen = 2.0 * sum(layer.top_k * _expert_params(layer) for layer in adapter.frozen_moe)
    measured = replace(
        model.trunk,
        buffer_bytes=buffers,
        flops_per_token=max(flops, 0.0) + 2 * frozen,
        forward_flops_per_token=max(forward, 0.0) + frozen,
    )
    model = replace(model, trunk=measured)
    transients = {
        k: calibrated(model, {k: peaks}, few_LE, few_LE).trunk.transients[k] for k, (few_LE, peaks) in traced.items()
    }
    return replace(model, trunk=replace(measured, transients=transients))


def _trunk_flops(counted: FlopCounterMode) -> int:
    """What was counted without the experts' operators, whose products the cost model has in closed form."""
    by_operator = counted.get_flop_counts()["Global"]
    return sum(count for operator, count in by_operator.items() if not str(operator).startswith("fedmoe."))


def first_experts(adapter: ModelAdapter, count: int) -> np.ndarray:
    """Return the ``count`` experts of lowest id in every layer, bool (L, E)."""
    few_LE = np.zeros((adapter.spec.num_layers, adapter.spec.num_experts), dtype=bool)
    few_LE[:, :count] = True
    return few_LE


def even_prior(adapter: ModelAdapter, train: TrainConfig, device: torch.device) -> Tensor | None:
    """Return what logit adjustment adds to the logits of a client with as many rows of every class."""
    classes = [param.shape[0] for param in adapter.spec.params if param.key in adapter.spec.head]
    return log_prior(np.full(classes[0], 1 / classes[0]), train, device) if classes else None


def _expert_params(layer: MoE) -> int:
    """Weights of one expert of a layer that holds all of them."""
    return (layer.w_in.numel() + layer.w_out.numel()) // layer.num_experts


def _stage_peaks(
    adapter: ModelAdapter, batch: Batch, optimizer: torch.optim.Optimizer, train: TrainConfig
) -> tuple[int, ...]:
    """Peak live bytes of each stage of a step with optimizer state; see ``TrunkCost`` for the stages."""
    layers = adapter.moe
    device = batch.tokens_SN.device
    stepper = Stepper(adapter, optimizer, train, log_prior_C=even_prior(adapter, train, device))
    stepper.step(batch)  # optimizer state exists from here on
    resident = resident_bytes(adapter.model, optimizer) + tensor_bytes(stepper.anchors)
    with ExitStack() as hooks:
        for depth, layer in enumerate(layers):
            stage = f"stage{len(layers) - depth}"
            # A stage begins where the backward of its layer begins: the gradients are made inside it.
            hooks.callback(layer.register_forward_hook(stage_marker(stage, device)).remove)
        _, trace = trace_memory(lambda: stepper.step(batch), device)
    if len(trace.phases) == 1:
        return (resident + trace.peak,)
    stages = ["start", *(f"stage{done}" for done in range(1, len(layers) + 1))]
    return tuple(resident + trace.phases[stage] for stage in stages)


def stage_marker(stage: str, device: torch.device) -> Callable[[nn.Module, object, Tensor], None]:
    """Return a forward hook that marks ``stage`` when the gradient of the layer's output arrives."""

    def hook(module: nn.Module, inputs: object, output: Tensor) -> None:
        output.register_hook(lambda gradient: mark(stage, device))

    return hook


def _trunk_buffers(adapter: ModelAdapter) -> int:
    """Bytes of buffers that no plan counts (rotary tables)."""
    of_experts = {id(tensor) for layer in adapter.moe for tensor in layer.own_tensors()}
    return tensor_bytes(buffer for buffer in adapter.model.buffers() if id(buffer) not in of_experts)
