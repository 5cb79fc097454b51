"""Adapters of a run as a directory that peft reads, and such a directory as the start of a run; safetensors only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from math import sqrt
from pathlib import Path
from types import MappingProxyType

import torch
from peft import LoraConfig, PeftConfig
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from fedmoe_bindings.peft.factors import Factors, layer_lora, of_layer_lora, paired
from fedmoe_bindings.peft.stacks import interleaved, matrices_of, matrix_shapes, stacks_of
from fedmoe_core.base.tensor_key import of_layer
from fedmoe_core.layer.lora import LayerLora

TENSORS = "adapter_model.safetensors"
_ROOT = "base_model.model."  # what peft puts before the names of the model


@dataclass(frozen=True)
class Place:
    """Where one matrix of a layer's experts is in a stock model, and its factors in peft's file.

    Attributes:
        name: of the parameter, as ``model.layers.0.mlp.experts.down_proj``.
        prefix: of its two tensors in the file.
        interleaved: rows of gate and up in turn.
    """

    name: str
    prefix: str
    interleaved: bool

    @property
    def keys(self) -> tuple[str, str]:
        """Names of ``lora_A`` and ``lora_B``."""
        return f"{self.prefix}lora_A.weight", f"{self.prefix}lora_B.weight"


def save_adapter(
    model: PreTrainedModel,
    layers: Sequence[LayerLora],
    directory: Path | str,
    *,
    routers: Mapping[str, Tensor] = MappingProxyType({}),
    base: str = "",
) -> None:
    """Write the adapters of all MoE layers as peft does: ``adapter_config.json`` and ``adapter_model.safetensors``.

    ``PeftModel.from_pretrained(model, directory)`` then has them on the stock model, on any machine with peft alone.

    Args:
        model: the stock model, only asked for names and shapes; it may be on the meta device.
        layers: of one rank and one scale, in depth order.
        directory: made if it does not exist.
        routers: changes of routers (E, H) by the names of their parameters, written as adapters of full rank: the
            change itself times the identity.
        base: the name or path under which others find the model; peft's ``base_model_name_or_path``.

    Raises:
        ValueError: the adapters are not of this model, or the layers differ in rank or scale.
    """
    found = stacks_of(model)
    forms = {(lora.rank, lora.scale) for lora in layers}
    if len(layers) != len(found) or len(forms) != 1:
        raise ValueError(
            f"{len(layers)} layers of adapters in {len(forms)} forms do not fit {len(found)} MoE layers; "
            "give one of equal rank and scale for each"
        )
    tensors: dict[str, Tensor] = {}
    for (path, experts), lora in zip(found, layers, strict=True):
        pair = paired(*of_layer_lora(lora), *matrix_shapes(experts))
        names = matrices_of(experts)
        for place, factors in zip(places(path, experts, names), pair, strict=True):
            both = factors.to_peft(interleaved=place.interleaved)
            tensors |= {key: t.detach().cpu().contiguous() for key, t in zip(place.keys, both, strict=True)}
    targets = {_short(place.name) for place in _every_place(model)} | {_short(name) for name in routers}
    own_rank = {_short(name): len(change) for name, change in routers.items()}
    for name, change in routers.items():
        path = f"{_ROOT}{name.rpartition('.')[0]}"
        tensors[f"{path}.lora_A.weight"] = change.detach().cpu().contiguous()
        tensors[f"{path}.lora_B.weight"] = torch.eye(len(change), dtype=change.dtype)
    ((rank, scale),) = forms
    alpha = round(scale * rank, 9)
    config = LoraConfig(
        r=rank,
        lora_alpha=int(alpha) if alpha == int(alpha) else alpha,  # type: ignore[arg-type] # peft only divides it
        target_modules=[],
        target_parameters=sorted(targets),
        rank_pattern=own_rank,
        alpha_pattern=own_rank,  # alpha / rank is 1
        base_model_name_or_path=base or None,
        inference_mode=True,
    )
    Path(directory).mkdir(parents=True, exist_ok=True)
    named = {"base_model_class": type(model).__name__, "parent_library": type(model).__module__}
    config.save_pretrained(str(directory), auto_mapping_dict=named)
    save_file(tensors, str(Path(directory) / TENSORS), metadata={"format": "pt"})


def read_adapter(model: PreTrainedModel, directory: Path | str) -> tuple[LayerLora, ...]:
    """Read a directory that peft saved, as the adapters of every MoE layer.

    A layer or matrix that the directory leaves out has adapters of zero. Layers and matrices of different ranks, alphas
    or rslora come out with one rank and one scale: the change of every weight stays the same.

    Args:
        model: the stock model, only asked for names and shapes; it may be on the meta device.
        directory: on this machine.

    Raises:
        ValueError: not LoRA of this model's experts and nothing else; or DoRA, biases or a pickle, by name.
        OSError: the directory cannot be read.
    """
    config = _config_of(Path(directory))
    tensors = _tensors_of(Path(directory))
    found = stacks_of(model)
    pairs: list[tuple[Factors, Factors] | None] = []
    for path, experts in found:
        first, *_ = getattr(experts, matrices_of(experts)[0]).shape
        held: dict[str, Factors] = {}
        targeted = tuple(name for name in matrices_of(experts) if _targets(config, f"{path}.{name}"))
        for name, place in zip(targeted, places(path, experts, targeted), strict=True):
            lora_A, lora_B = (tensors.pop(key, None) for key in place.keys)
            if lora_A is None or lora_B is None:
                raise ValueError(f"{directory} targets {place.name}, but holds no {place.keys[lora_A is not None]}")
            scale = _scale(config, place.name, lora_A.shape[0] // first)
            held[name] = Factors.from_peft(lora_A, lora_B, first, scale=scale, interleaved=place.interleaved)
        w_in, w_out = (held.get(name) for name in matrices_of(experts))
        pairs.append(paired(w_in, w_out, *matrix_shapes(experts)) if held else None)
    if tensors:
        raise ValueError(
            f"{directory} also holds {min(tensors)}; only LoRA on the experts of this model can be a run's adapters"
        )
    return _alike(pairs, [matrix_shapes(experts) for _, experts in found], directory)


def lora_of_state(state: Mapping[str, Tensor], scale: float) -> tuple[LayerLora, ...]:
    """Return the adapters among the tensors of a global model, in depth order; ``to_keys`` undoes it."""
    layers = 0
    while of_layer(layers, state):
        layers += 1
    return tuple(LayerLora.of(of_layer(layer, state), scale) for layer in range(layers))


def places(path: str, experts: nn.Module, targeted: Sequence[str]) -> list[Place]:
    """Return where peft keeps the factors of each of the matrices ``targeted``, in their order.

    peft wraps one parameter after another in the order in which the module declares them: the last is outermost, and
    every wrapper further in adds a ``base_layer`` to the names.
    """
    declared = [name for name, _ in experts.named_parameters(recurse=False) if name in targeted]
    inside = {name: "base_layer." * (len(declared) - 1 - depth) for depth, name in enumerate(declared)}
    return [Place(f"{path}.{name}", f"{_ROOT}{path}.{inside[name]}", interleaved(experts, name)) for name in targeted]


def _every_place(model: nn.Module) -> list[Place]:
    return list(chain.from_iterable(places(path, e, matrices_of(e)) for path, e in stacks_of(model)))


def _short(name: str) -> str:
    """The end of a name that all layers share, as people write it: mlp.experts.down_proj."""
    return ".".join(name.split(".")[-3:])


def _targets(config: LoraConfig, name: str) -> bool:
    return any(name == target or name.endswith(f".{target}") for target in config.target_parameters or ())


def _scale(config: LoraConfig, name: str, rank: int) -> float:
    """What peft multiplies the product of factors by."""
    pattern = config.alpha_pattern or {}
    alpha = pattern.get(get_pattern_key(list(pattern), name), config.lora_alpha)
    return alpha / sqrt(rank) if config.use_rslora else alpha / rank


def _config_of(directory: Path) -> LoraConfig:
    if not (directory / "adapter_config.json").is_file():  # peft would look for the name on a hub
        raise OSError(f"{directory} has no adapter_config.json; give a directory that peft saved")
    config = PeftConfig.from_pretrained(str(directory))
    if not isinstance(config, LoraConfig):
        raise ValueError(f"{directory} holds {config.peft_type} adapters; only LoRA can be a run's adapters")
    unknown = {"use_dora": config.use_dora, "lora_bias": config.lora_bias, "bias": config.bias != "none"}
    if asked := [name for name, on in unknown.items() if on]:
        raise ValueError(f"{directory} uses {asked[0]}={getattr(config, asked[0])}; train LoRA without it")
    return config


def _tensors_of(directory: Path) -> dict[str, Tensor]:
    path = directory / TENSORS
    if not path.is_file():
        raise OSError(f"{directory} has no {TENSORS}; save it with safe_serialization, a pickle is never read")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file ({error}); save the adapter again") from error


def _alike(
    pairs: Sequence[tuple[Factors, Factors] | None], shapes: Sequence[Sequence[Sequence[int]]], directory: Path | str
) -> tuple[LayerLora, ...]:
    """Give all layers one rank and one scale; a layer without adapters gets some of zero."""
    held = [pair for pair in pairs if pair is not None]
    if not held:
        raise ValueError(f"{directory} has no adapters on this model's experts; it belongs to another model")
    rank, scale = max(w_in.rank for w_in, _ in held), held[0][0].scale
    layers = []
    for pair, (shape_in, shape_out) in zip(pairs, shapes, strict=True):
        if pair is None:
            (experts, _, columns), a = shape_in, held[0][0].a
            zero = Factors(a.new_zeros(experts, rank, columns), a.new_zeros(experts, shape_in[1], rank), scale)
            pair = paired(zero, None, shape_in, shape_out)
        layers.append(layer_lora(*(factors.widened(rank).rescaled(scale) for factors in pair)))
    return tuple(layers)
