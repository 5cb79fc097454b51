"""How a layer keeps the rows that train: as Parameters that have rows, in one order, and the same ones where it can."""

from __future__ import annotations

from torch import Tensor, nn

from fedmoe_core.layer.lora import FACTORS
from fedmoe_core.layer.state import BIASES, MATRICES

# Whatever was stored last: a gradient norm is a sum over them, whose bits depend on the order.
_ORDER = (*BIASES, "router_bias", *FACTORS, "out_scale", *MATRICES, "router")


def hold(layer: nn.Module, name: str, rows: Tensor | None, *, same: bool) -> None:
    """Store rows that train, under a name that may hold others.

    With no rows it is a buffer: gradient norms, DDP and FSDP fail on Parameters without rows. None is no tensor.

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
