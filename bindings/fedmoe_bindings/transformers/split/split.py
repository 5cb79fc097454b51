"""A dense model split into experts, as a stock MoE model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from fedmoe_bindings.transformers.split.clusters import balanced_clusters, neurons_of, random_clusters
from fedmoe_bindings.transformers.split.families import moe_config
from fedmoe_bindings.transformers.split.router import RouterFit

# What the router's logits are divided by before they become weights. A power of two, so that folding it into the
# router's rows and taking it out again changes no bit.
TEMPERATURE = 2.0**10


@dataclass(frozen=True, eq=False)
class Split:
    """How the MLPs of a dense model are parted: for each split layer its neurons by expert, and its router.

    Attributes:
        neurons: by layer, int64 (E, I / E).
        routers: by layer, (E, H): the logits are logs of the norms of the experts' outputs.
        top_k: k.
    """

    neurons: Mapping[int, Tensor]
    routers: Mapping[int, Tensor]
    top_k: int

    @property
    def experts(self) -> int:
        """E."""
        return len(next(iter(self.neurons.values())))


def split_layers(layers: str, count: int) -> tuple[int, ...]:
    """Return the numbers of the layers that ``all`` or ``last:N`` names in a model of ``count`` layers.

    Raises:
        ValueError: it asks for more layers than there are.

    Example:
        >>> split_layers("last:2", 6)
        (4, 5)
    """
    kind, _, number = layers.partition(":")
    asked = count if kind == "all" else int(number)
    if asked > count:
        raise ValueError(f"layers={layers!r} asks for {asked} of {count} layers; give last:{count} or all")
    return tuple(range(count - asked, count))


def part(
    dense: PreTrainedModel,
    tokens_SN: Tensor,
    *,
    experts: int,
    top_k: int,
    layers: Sequence[int],
    at_random: bool = False,
) -> Split:
    """Find the parts of a dense model's MLPs and fit a router to each.

    Args:
        dense: a causal LM of a family that ``check_dense`` admits.
        tokens_SN: text that the routers are fitted on, 8,192 tokens of it or so.
        experts, top_k, layers: E, k and the layers to split.
        at_random: deal the neurons at random; the yardstick.

    Raises:
        ValueError: E does not divide the width, or k is not in 1..E.
    """
    width = cast(int, dense.config.intermediate_size)
    if width % experts:
        fit = max(n for n in range(1, experts) if width % n == 0)
        raise ValueError(f"{experts} experts do not divide the width {width} of the MLPs; give for example {fit}")
    if not 1 <= top_k <= experts:
        raise ValueError(f"top_k={top_k} of {experts} experts is impossible; choose 1 to {experts}")
    neurons, fits = {}, {}
    for layer in layers:
        gate_IH, up_IH, down_HI = matrices(dense, layer)
        if at_random:
            expert_I = random_clusters(width, experts, seed=layer)
        else:
            expert_I = balanced_clusters(gate_IH, up_IH, experts, seed=layer)
        neurons[layer] = neurons_of(expert_I, experts).to(gate_IH.device)
        fits[layer] = RouterFit(gate_IH, up_IH, down_HI, neurons[layer])
    with _hearing({mlp_of(dense, layer): fit.add for layer, fit in fits.items()}), torch.no_grad():
        for batch_SN in tokens_SN.split(8):
            dense.base_model(input_ids=batch_SN, use_cache=False)
    return Split(neurons, {layer: fit.solve() for layer, fit in fits.items()}, top_k)


@torch.no_grad()
def moe_of(dense: PreTrainedModel, split: Split, *, told: Mapping[str, Any]) -> PreTrainedModel:
    """Make the stock MoE model of a split; its tensors are copies.

    An expert's down projection is multiplied by k, for the weights of the k choices sum to 1 and outputs must add up.
    The router's rows are divided by ``TEMPERATURE``, which leaves every choice as it is and makes weights nearly equal.

    Args:
        dense: the model that was parted.
        split: its parts.
        told: more of how the model was made, for the configuration.
    """
    layers = sorted(split.neurons)
    made = {"experts": split.experts, "top_k": split.top_k, "layers": layers, "temperature": TEMPERATURE, **told}
    config = moe_config(dense.config, experts=split.experts, top_k=split.top_k, layers=layers, told=made)
    with torch.random.fork_rng(devices=[]):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dense.dtype)
    weights = dict(dense.state_dict())
    for layer in layers:
        gate_IH, up_IH, down_HI = matrices(dense, layer)
        block, own = f"model.layers.{layer}.mlp", split.neurons[layer]
        weights[f"{block}.experts.gate_up_proj"] = torch.cat([gate_IH[own], up_IH[own]], dim=1)
        weights[f"{block}.experts.down_proj"] = down_HI[:, own].transpose(0, 1) * split.top_k
        weights[f"{block}.gate.weight"] = split.routers[layer] / TEMPERATURE
    for name, value in model.state_dict().items():
        if "shared_expert" in name:  # of width 1, for Qwen2-MoE cannot be without; 0 also has a gradient of 0
            weights[name] = torch.zeros_like(value)
    wanted = model.state_dict()
    model.load_state_dict({name: weights[name] for name in wanted})
    model.tie_weights()
    model.generation_config = dense.generation_config
    return model.eval()


def matrices(dense: PreTrainedModel, layer: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the MLP of a layer: gate and up (I, H), down (H, I)."""
    mlp: Any = mlp_of(dense, layer)
    return mlp.gate_proj.weight.detach(), mlp.up_proj.weight.detach(), mlp.down_proj.weight.detach()


def mlp_of(model: PreTrainedModel, layer: int) -> nn.Module:
    """Return the MLP of a layer."""
    return model.get_submodule(f"model.layers.{layer}.mlp")


@contextmanager
def _hearing(heard: Mapping[nn.Module, Callable[[Tensor], None]]) -> Iterator[None]:
    """Within the block, hand what goes into each of these modules to its listener, as (T, H)."""
    with ExitStack() as hooks:
        for module, listener in heard.items():

            def hook(_: nn.Module, given: tuple[Any, ...], listener: Callable[[Tensor], None] = listener) -> None:
                listener(given[0].flatten(0, -2))

            hooks.callback(module.register_forward_pre_hook(hook).remove)
        yield
