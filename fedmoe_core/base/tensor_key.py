"""What a tensor of the global model is called: ``moe.{layer}.{name}`` in a MoE layer, ``dense.{name}`` elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

Value = TypeVar("Value")
DENSE = -1


@dataclass(frozen=True)
class TensorKey:
    """The two parts of a key; ``str`` joins them.

    Attributes:
        layer: index of the MoE layer; ``DENSE`` for a tensor of the trunk or head.
        name: ``router``, ``w_in``, ``w_out``, a factor of adapters or ``out_scale``; of a dense tensor the model's own.

    Example:
        >>> str(TensorKey(3, "w_in")), TensorKey.parse("moe.3.w_in")
        ('moe.3.w_in', TensorKey(layer=3, name='w_in'))
        >>> TensorKey.parse("dense.score.weight")
        TensorKey(layer=-1, name='score.weight')
    """

    layer: int
    name: str

    def __str__(self) -> str:
        return f"dense.{self.name}" if self.layer == DENSE else f"moe.{self.layer}.{self.name}"

    @classmethod
    def parse(cls, key: str) -> TensorKey:
        """Take a key apart.

        Raises:
            ValueError: not a key of either form.
        """
        home, _, name = key.partition(".")
        number, _, inner = name.partition(".")
        if home == "moe" and number.isdecimal() and inner:
            return cls(int(number), inner)
        if home == "dense" and name:
            return cls(DENSE, name)
        raise ValueError(f"{key!r} is not a tensor's key; write moe.LAYER.NAME or dense.NAME")


def to_keys(layer: int, named: Mapping[str, Value]) -> dict[str, Value]:
    """Put what a layer calls by its own names under the keys of the global model."""
    return {str(TensorKey(layer, name)): value for name, value in named.items()}


def of_layer(layer: int, keyed: Mapping[str, Value]) -> dict[str, Value]:
    """Return what stands under the keys of one layer, by the layer's own names; ``to_keys`` the other way round."""
    prefix = str(TensorKey(layer, ""))
    return {key.removeprefix(prefix): value for key, value in keyed.items() if key.startswith(prefix)}
