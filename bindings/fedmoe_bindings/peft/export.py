"""What a finished run has trained, as a directory that peft loads: adapters of experts, and what routers changed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from torch import Tensor
from transformers import PreTrainedModel

from fedmoe_bindings.peft.stacks import stacks_of
from fedmoe_bindings.peft.state import lora_of_state, save_adapter
from fedmoe_core.algorithms.base import algorithm_class
from fedmoe_core.base.tensor_key import of_layer
from fedmoe_core.config.run_config import Config
from fedmoe_core.layer.lora import LayerLora
from fedmoe_core.server.state import unpack_state
from fedmoe_core.simulation.directory.checkpoint import load_checkpoint


class Trained(NamedTuple):
    """The global model of a run, as far as an adapter can hold it.

    Attributes:
        layers: the adapters of every MoE layer.
        routers: the trained router of every MoE layer, (E, H).
    """

    layers: tuple[LayerLora, ...]
    routers: tuple[Tensor, ...]


def read_run(run: Path | str) -> Trained:
    """Read the adapters and routers of a run from its last checkpoint.

    Raises:
        ValueError: the run's system has no adapters in its global model, or the trunk was trained too, which no
            adapter holds; or its checkpoint is damaged.
        OSError: the directory cannot be read.
    """
    config = Config.load(Path(run) / "config.toml")
    form = algorithm_class(config.algorithm)
    declared = form.lora(config)
    if declared is None or not declared.in_state:
        raise ValueError(
            f"{config.algorithm} of {run} has no adapters in its global model; run it with train.experts=lora"
        )
    if config.train.trunk != "frozen" and form.trains_trunk:
        raise ValueError(f"{run} has trained its trunk too, which no adapter holds; run it with train.trunk=frozen")
    state = unpack_state(load_checkpoint(Path(run) / "checkpoint").tensors, round=0).params
    return trained_in(state, declared.scale)


def trained_in(state: Mapping[str, Tensor], scale: float) -> Trained:
    """Return the adapters and routers of a state in global coordinates; ``scale`` is that of its adapters."""
    layers = lora_of_state(state, scale)
    return Trained(layers, tuple(of_layer(number, state)["router"] for number in range(len(layers))))


def export_run(run: Path | str, model: PreTrainedModel, directory: Path | str, *, base: str = "") -> None:
    """Write a run's global model as a peft adapter of the model that it started from.

    ``PeftModel.from_pretrained(model, directory)`` then computes what the run's global model does. Under
    ``lora.frozen_format`` clients ran experts in few bits: on the plain experts of ``model`` the adapters meet weights
    that differ by what was rounded, as with any QLoRA.

    Args:
        run: its directory.
        model: the stock model that ``model=`` named, with its weights: routers are written as what they changed.
        directory: made if it does not exist.
        base: the name or path under which others find the model.

    Raises:
        ValueError: as ``read_run`` and ``save_adapter``; or the model's router is not found.
        OSError: the run cannot be read.
    """
    write_trained(read_run(run), model, directory, base=base)


def write_trained(trained: Trained, model: PreTrainedModel, directory: Path | str, *, base: str = "") -> None:
    """Write what a run has trained as a peft adapter of the model that it started from, as ``export_run``.

    Raises:
        ValueError: the model is not the run's, or its router is not found.
    """
    names = [_router_of(model, path) for path, _ in stacks_of(model)]
    if len(names) != len(trained.routers):
        raise ValueError(
            f"the run has {len(trained.routers)} MoE layers, the model {len(names)}; give the run's own model"
        )
    changes = {}
    for name, router in zip(names, trained.routers, strict=True):
        start = model.get_parameter(name).detach().cpu()
        if start.shape != router.shape:
            raise ValueError(
                f"{name} is {tuple(start.shape)}, the run's {tuple(router.shape)}; give the run's own model"
            )
        changes[name] = router - start
    save_adapter(model, trained.layers, directory, routers=changes, base=base)


def _router_of(model: PreTrainedModel, experts: str) -> str:
    """Return the name of the weight of the router beside stacked experts."""
    beside = experts.rpartition(".")[0]
    known = dict(model.named_parameters())
    found = [name for name in (f"{beside}.gate.weight", f"{beside}.router.weight") if name in known]
    if not found:
        raise ValueError(f"{beside} has neither gate.weight nor router.weight; its router cannot be written")
    return found[0]
