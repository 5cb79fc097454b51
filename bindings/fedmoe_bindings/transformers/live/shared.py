"""The shared expert of a stock MoE block, as a fedmoe layer carries it."""

from __future__ import annotations

from torch import Tensor, nn

from fedmoe_bindings.transformers.live.families import Family
from fedmoe_bindings.transformers.stock.blocks import StockBlock


class Shared(nn.Module):
    """A stock block's own children under their own names: a module, and a sigmoid gate on its output if there is one.

    Its place in the model is ``{block}.shared.{child}``; the stock name is the same without ``.shared``.
    """

    def __init__(self, block: nn.Module, children: tuple[str, ...]) -> None:
        super().__init__()
        for name in children:
            self.add_module(name, block.get_submodule(name))
        self._inside, *self._gates = children

    def forward(self, x_TH: Tensor) -> Tensor:
        """Return (T, H)."""
        y_TH: Tensor = self.get_submodule(self._inside)(x_TH)
        for gate in self._gates:
            y_TH = self.get_submodule(gate)(x_TH).sigmoid() * y_TH
        return y_TH


def shared_of(block: StockBlock, family: Family) -> Shared | None:
    """Return a block's shared expert; None in a family that has none."""
    return Shared(block.module, family.shared) if family.shared else None
