"""The weights of an MoE layer in global coordinates: what they are called and how they are shaped."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from fedmoe_core.layer.lora import LayerLora

INIT_STD = 0.02  # of fresh weights, as transformers' initializer_range
MATRICES = ("w_in", "w_out")
BIASES = ("bias_in", "bias_out")
STEERING = ("router", "router_bias")  # they have a row for absent experts, too
NAMES = (*STEERING, *MATRICES, *BIASES, "correction_bias")


@dataclass(frozen=True)
class LayerState:
    """The weights of some experts of one MoE layer, in global coordinates.

    Shapes: n experts here, E of the whole layer, F = 2I for gated activations [gate; up] and I else.

    Attributes:
        experts: expert ids, ascending; place i of the experts' tensors is expert ``experts[i]``.
        router: (E, H), always of all experts.
        w_in: (n, F, H).
        w_out: (n, H, I).
        bias_in, bias_out: (n, F) and (n, H), added after each matrix; None = none.
        router_bias: (E,), added to the logits, trains like router rows; None = none.
        correction_bias: (E,), added to sigmoid scores for the choice only, never trains; None = none.
        lora: adapters over the experts, rows in the same order; None = none.
    """

    experts: tuple[int, ...]
    router: Tensor
    w_in: Tensor
    w_out: Tensor
    bias_in: Tensor | None = None
    bias_out: Tensor | None = None
    router_bias: Tensor | None = None
    correction_bias: Tensor | None = None
    lora: LayerLora | None = None

    @classmethod
    def whole(
        cls, router: Tensor, w_in: Tensor, w_out: Tensor, *, lora: LayerLora | None = None, **biases: Tensor
    ) -> LayerState:
        """Take a whole layer's tensors (E, ...); ``biases`` by their names."""
        return cls.of({"router": router, "w_in": w_in, "w_out": w_out, **biases}, lora=lora)

    @classmethod
    def of(
        cls, tensors: Mapping[str, Tensor], *, experts: tuple[int, ...] | None = None, lora: LayerLora | None = None
    ) -> LayerState:
        """Take tensors by their names; ``experts``: ids of those that are here, None = all of the layer.

        Raises:
            ValueError: a name that is not one of a layer's tensors.
        """
        if strange := sorted(set(tensors) - set(NAMES)):
            raise ValueError(f"{strange[0]!r} is not a tensor of a layer; its tensors are {', '.join(NAMES)}")
        if experts is None:
            experts = tuple(range(tensors["router"].shape[0]))
        return cls(
            experts,
            router=tensors["router"],
            w_in=tensors["w_in"],
            w_out=tensors["w_out"],
            bias_in=tensors.get("bias_in"),
            bias_out=tensors.get("bias_out"),
            router_bias=tensors.get("router_bias"),
            correction_bias=tensors.get("correction_bias"),
            lora=lora,
        )

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """All that are there by name, without the adapters' factors."""
        return {name: tensor for name in NAMES if (tensor := getattr(self, name)) is not None}

    def check(self, want: Mapping[str, tuple[int, ...]]) -> None:
        """Refuse other tensors or shapes than a layer needs, before anything of the layer changes.

        Raises:
            ValueError: a tensor too many or too few, or one of another shape.
        """
        found = self.tensors
        if strange := [name for name in found if name not in want]:
            raise ValueError(f"{strange[0]} is given; this layer has none, so leave it out or make the layer with it")
        for name, shape in want.items():
            if name not in found:
                raise ValueError(f"{name} is missing; this layer needs it with shape {shape}")
            if tuple(found[name].shape) != shape:
                raise ValueError(f"{name} has shape {tuple(found[name].shape)}; this layer needs {shape}")
