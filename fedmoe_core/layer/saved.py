"""What a state dict says of a layer beside its tensors: which experts they are, and how it computes with them."""

from __future__ import annotations

import json
from collections.abc import Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn

from fedmoe_kernels.slot_map import has_no_values

EXTRA = "_extra_state"
Facts = Mapping[str, Any]  # names and JSON values
_PADDED = 256  # bytes; a loader that reads into a tensor that is there needs the size that was written
_TAKEN_OVER = ("lora_scale",)  # what a load changes in the layer, as it changes weights; of the rest both must agree


class Described(nn.Module):
    """A module whose state dict says what it is, and which takes no state dict of another, nor a part of one."""

    def facts(self) -> dict[str, Any]:
        """Return what a state dict says beside its tensors: JSON values by name; here nothing."""
        return {}

    def take_over(self, facts: Facts) -> None:
        """Change what a load changes beside tensors; here nothing."""

    def get_extra_state(self) -> Tensor:
        """Save ``facts``."""
        return to_tensor(self.facts())

    def set_extra_state(self, state: Tensor) -> None:
        """Take over what a load changes; whether all else agrees was checked before anything was copied."""
        if not has_no_values(state):
            self.take_over(from_tensor(state))

    def _load_from_state_dict(
        self,
        state_dict: MutableMapping[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Copy this module's tensors, or none where one does not fit: torch then raises with all reasons at the end.

        Names that are missing or too many are torch's own affair: this method is not told whether ``strict`` was asked.
        """
        given = {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}
        own = {name: t for name, t in (self._parameters | self._buffers).items() if t is not None}
        errors = _refusals(given, own, self.facts(), here=prefix.removesuffix(".") or "the layer")
        if errors:
            error_msgs.extend(errors)
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


def to_tensor(facts: Facts) -> Tensor:
    """Write facts as JSON into a uint8 tensor on the CPU, padded to a multiple of 256 bytes."""
    text = json.dumps(facts, sort_keys=True).encode()
    text += b" " * (-len(text) % _PADDED)
    return torch.tensor(list(text), dtype=torch.uint8, device="cpu")


def from_tensor(saved: Tensor) -> Facts:
    """Read facts back; a list of integers, as versions before the facts wrote, says the experts alone.

    Raises:
        ValueError: neither of the two.
    """
    if saved.dtype == torch.int64 and saved.dim() == 1 and saved.numel():
        count, *experts = saved.tolist()
        return {"trainable": experts[:count], "frozen": experts[count:]}
    try:
        found = json.loads(bytes(saved.tolist()))
    except (ValueError, TypeError):
        found = None
    if saved.dtype != torch.uint8 or not isinstance(found, dict):
        raise ValueError(f"its _extra_state is {saved.dtype} {tuple(saved.shape)} and was not written by a MoE layer")
    return found


def _difference(saved: object, own: Facts) -> str | None:
    """Say in one sentence why a layer with the facts ``own`` cannot take a state dict with ``saved``; None = it can.

    Facts that one of the two does not know are not compared.
    """
    if not isinstance(saved, Tensor):
        return f"its _extra_state is a {type(saved).__name__} and was not written by a MoE layer"
    if has_no_values(saved):
        return None
    try:
        facts = from_tensor(saved)
    except ValueError as error:
        return str(error)
    own = json.loads(json.dumps(own))  # lists for tuples, as a reader of JSON finds them
    theirs, ours = ([*f.get("trainable", ()), *f.get("frozen", ())] for f in (facts, own))
    if any(facts.get(part) != own[part] for part in ("trainable", "frozen")):
        trains = "" if theirs != ours else f", of which {len(facts['trainable'])} train, not {len(own['trainable'])}"
        return (
            f"the state dict holds experts {theirs}, this layer {ours}{trains}; "
            "call set_experts with its permitted and trainable experts first"
        )
    for name, value in own.items():
        if name in facts and name not in _TAKEN_OVER and facts[name] != value:
            return (
                f"the state dict is of a layer with {name}={facts[name]!r}, this one has {value!r}; "
                f"make this layer with {name}={facts[name]!r}"
            )
    if "lora_scale" in facts and (facts["lora_scale"] is None) != (own["lora_scale"] is None):
        have, lack = ("the state dict", "this layer") if own["lora_scale"] is None else ("this layer", "the state dict")
        return f"{have} has adapters and {lack} has none; give or leave out `lora` in load_global first"
    return None


def _refusals(given: Mapping[str, Any], own: Mapping[str, Tensor], facts: Facts, *, here: str) -> list[str]:
    """Say why a layer does not take a state dict; empty where it does.

    Args:
        given: the state dict's values by their names in the layer.
        own: the tensors of the layer.
        facts: what the layer is.
        here: what the layer is called.
    """
    said = _difference(given[EXTRA], facts) if EXTRA in given else None
    if said is not None:
        return [f"{here}: {said}"]
    return [
        f"{here}: {name} of the state dict is {found.dtype} {tuple(found.shape)}, this layer's {tensor.dtype} "
        f"{tuple(tensor.shape)}"
        for name, tensor in own.items()
        if isinstance(found := given.get(name), Tensor) and not _fits(found, tensor)
    ]


def _fits(found: Tensor, tensor: Tensor) -> bool:
    """Whether it can be copied: numbers into codes cannot, nor codes into numbers."""
    coded = 1 in (found.itemsize, tensor.itemsize)
    return found.shape == tensor.shape and (not coded or found.dtype == tensor.dtype)
