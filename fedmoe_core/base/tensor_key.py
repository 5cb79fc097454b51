"""What a tensor of the global model is called: ``moe.{layer}.{name}`` in a MoE layer, ``dense.{name}`` elsewhere."""

from __future__ import annotations

from dataclasses import dataclass

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
