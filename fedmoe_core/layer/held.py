"""How a layer keeps its tensors: what trains as Parameters that have rows, the rest as values or codes in buffers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from fedmoe_core.layer.lora import FACTORS
from fedmoe_core.layer.saved import Described
from fedmoe_core.layer.state import BIASES, INIT_STD, MATRICES
from fedmoe_kernels.quantized import Quantized

STORED = tuple(f"{name}_{part}" for name in MATRICES for part in ("frozen", "scale", "whole"))
FROZEN_BIASES = tuple(f"{name}_frozen" for name in BIASES)
FROZEN_OTHERS = (*FROZEN_BIASES, *(f"{name}_frozen" for name in FACTORS))

# Whatever was stored last: a gradient norm is a sum over them, whose bits depend on the order.
_ORDER = (*BIASES, "router_bias", *FACTORS, "out_scale", *MATRICES, "router")


def hold(layer: nn.Module, name: str, rows: Tensor | None, *, same: bool) -> None:
    """Store rows that train, under a name that may hold others.

    With no rows it is a buffer: gradient norms, DDP and FSDP fail on Parameters without rows. None stores nothing.

    Args:
        layer: where to.
        name: of the tensor.
        rows: (n, ...), owned by the layer from now on.
        same: they are of the same experts as those that are there. Then the Parameter stays, so that an optimizer goes
            on with it, and loses its gradient.
    """
    old = layer._parameters.get(name)
    if same and old is not None and rows is not None and _alike(old, rows):
        old.copy_(rows)
        old.grad = None
        return
    layer._parameters.pop(name, None)
    layer._buffers.pop(name, None)
    if rows is not None and not len(rows):
        layer.register_buffer(name, rows)
    else:
        layer.register_parameter(name, None if rows is None else nn.Parameter(rows))


def put_in_order(layer: nn.Module) -> None:
    """Bring a layer's own Parameters into their order, and its buffers that hold nothing behind the others.

    torch.export (2.13) counts those that hold nothing when it looks up the others by their place.
    """
    for name in [name for name in _ORDER if name in layer._parameters]:
        layer._parameters[name] = layer._parameters.pop(name)
    for name in [name for name, buffer in layer._buffers.items() if buffer is None]:
        layer._buffers[name] = layer._buffers.pop(name)


def _alike(one: Tensor, other: Tensor) -> bool:
    return (one.shape, one.dtype, one.device) == (other.shape, other.dtype, other.device)


class Held(Described):
    """A module with the tensors of a layer, those that train under their names, those that do not as ``NAME_frozen``.

    Attributes:
        frozen_format: what frozen matrices are stored in, None = values.
    """

    frozen_format: str | None

    @property
    def learning(self) -> dict[str, nn.Parameter]:
        """What trains of router and experts, by name."""
        return dict(self.named_parameters(recurse=False))

    def own_parameters(self) -> list[nn.Parameter]:
        """Return the parameters of router and experts, without those of a shared expert."""
        return list(self.parameters(recurse=False))

    def own_tensors(self) -> list[Tensor]:
        """Return parameters and buffers of router and experts, without those of a shared expert."""
        return [*self.parameters(recurse=False), *self.buffers(recurse=False)]

    def frozen_tensors(self) -> list[Tensor]:
        """Return what the frozen slots are stored in: values, or codes and their scales, and biases."""
        return [tensor for name in (*STORED, *FROZEN_BIASES) if (tensor := getattr(self, name)) is not None]

    def stored(self, name: str) -> tuple[Tensor, Tensor | Quantized]:
        """Return a matrix or bias as it is stored: the rows that train, detached, and those of the frozen slots."""
        return getattr(self, name).detach(), self._frozen(name)

    def _rows(self, name: str) -> list[Tensor]:
        """Every slot's weight, in slot order; views, but for those that are held in few bits."""
        trainable, frozen = getattr(self, name).detach(), self._frozen(name)
        if isinstance(frozen, Quantized):
            frozen = frozen.dequantize(trainable.dtype)
        return [*trainable, *(frozen.to(trainable.dtype) if len(trainable) else frozen)]

    def _frozen(self, name: str) -> Tensor | Quantized:
        """The frozen slots of a matrix or bias as they are stored."""
        if name in BIASES:
            return cast(Tensor, getattr(self, f"{name}_frozen"))
        values, scale, whole = (getattr(self, f"{name}_{part}") for part in ("frozen", "scale", "whole"))
        return values if scale is None else Quantized(values, scale, cast(str, self.frozen_format), whole)

    def _keep(self, name: str, held_as: Tensor | Quantized) -> None:
        """Store the frozen slots of a matrix or bias."""
        parts: dict[str, Tensor | None] = {"frozen": held_as} if isinstance(held_as, Tensor) else {}
        if isinstance(held_as, Quantized):
            parts = {"frozen": held_as.codes, "scale": held_as.scale, "whole": held_as.whole}
        elif name in MATRICES:
            parts |= {"scale": None, "whole": None}
        for part, value in parts.items():
            setattr(self, f"{name}_{part}", value)

    @torch.no_grad()
    def draw(self, names: Sequence[str]) -> None:
        """Give tensors fresh weights where they are: normal ones, and 0 for biases; adapters that change nothing."""
        for name in names:
            zero = name.endswith("bias") or name in BIASES
            for part in (name, f"{name}_frozen", f"{name}_rest"):
                tensor = getattr(self, part, None)
                if part.endswith("_frozen") and self.frozen_format is not None and not zero and tensor is not None:
                    stored = cast(Quantized, self._frozen(name))
                    drawn = torch.empty(stored.shape, dtype=torch.float32, device=tensor.device)
                    drawn.normal_(std=INIT_STD)
                    self._keep(name, Quantized.of(drawn, self.frozen_format))
                elif tensor is not None:
                    tensor.zero_() if zero else tensor.normal_(std=INIT_STD)
        for name in FACTORS:
            for factor in (getattr(self, name), getattr(self, f"{name}_frozen")):
                if factor is not None:
                    bound = factor.shape[-1] ** -0.5
                    factor.uniform_(-bound, bound) if name.startswith("a_") else factor.zero_()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Held:
        """Cast the layer, but not what quantised experts are stored in: codes may be numbers of 8 bits, too.

        Nor is the correction bias rounded to 16 bits: its steps of 1e-3 decide between scores near 1.
        """
        stored = {name: getattr(self, name) for name in (*STORED * bool(self.frozen_format), "correction_bias")}
        super()._apply(fn, recurse)
        for name, value in stored.items():
            now = getattr(self, name)
            if value is not None and now.dtype != value.dtype and not (name == "correction_bias" and now.itemsize > 2):
                setattr(self, name, value.to(now.device))
        return self
