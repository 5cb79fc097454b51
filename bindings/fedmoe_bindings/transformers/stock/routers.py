"""A stock router among some experts only: the family's own code, as it is in a model that has no others."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from fedmoe_bindings.transformers.stock.blocks import StockBlock
from fedmoe_bindings.transformers.stock.cut import cut_rows, named_tensors
from fedmoe_bindings.transformers.stock.outside import NONE, Outside


class CutRouter:
    """What a router's forward is replaced by while a mask is on.

    It runs the router of the cut model, whose numbers of experts and of choices are the smaller ones, on those rows of
    the whole router's tensors that stay, and gives the ids of the whole model back. So the rule, whatever it is, acts
    as in the sub-model; rows of experts that are not permitted get no gradient.

    Its router logits are those of the sub-model, too: one column for each permitted expert. With ``widen`` they have a
    column for every expert, -inf for those that are not permitted.
    """

    def __init__(self, whole: StockBlock, cut: StockBlock, kept: np.ndarray, *, widen: bool) -> None:
        """Prepare the router of ``whole`` for the experts ``kept``; ``cut`` is the same block of the cut model.

        Raises:
            ValueError: the router has tensors whose rows cannot be told apart.
        """
        self.router, self.num_experts, self.widen = whole.router, whole.num_experts, widen
        self.widths = () if whole.outside is None else whole.outside.widths
        self.kept = torch.from_numpy(kept.astype(np.int64))
        # Without hooks and outside the model, which must not save it or move it.
        self.shadow = copy.copy(cut.router)
        self.rows = cut_rows(named_tensors(whole.router), named_tensors(cut.router), kept, whole.num_experts)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Route as the sub-model does; the outputs are the router's own."""
        self.shadow.training = self.router.training
        tensors = {
            name: self._part(name, value) if name in self.rows else value
            for name, value in named_tensors(self.router).items()
        }
        args = tuple(self._argument(value) for value in args)
        kwargs = {name: self._argument(value) for name, value in kwargs.items()}
        outputs = functional_call(self.shadow, tensors, args, kwargs)
        if self.widths:
            return self._filled(outputs)
        logits, weights, ids, *more = outputs
        kept = self._at(ids.device)
        # An id past the experts means "none", as it does in the whole model.
        here = (ids >= 0) & (ids < len(kept))
        ids = kept[ids.where(here, 0)].where(here, self.num_experts).to(ids.dtype)
        return (self._widened(logits, kept) if self.widen else logits, weights, ids, *more)

    def _at(self, device: torch.device) -> Tensor:
        if self.kept.device != device:
            self.kept = self.kept.to(device)
            self.rows = {name: (d, rows.to(device)) for name, (d, rows) in self.rows.items()}
        return self.kept

    def _part(self, name: str, value: Tensor) -> Tensor:
        self._at(value.device)
        dim, rows = self.rows[name]
        return value.index_select(dim, rows)

    def _argument(self, value: Any) -> Any:
        """Some blocks hand their router a bias of the experts; it loses the same rows."""
        if isinstance(value, Tensor) and value.shape == (self.num_experts,):
            return value[self._at(value.device)]
        return value

    def _filled(self, outputs: Any) -> Any:
        """The outputs of a router outside the interface, those that have a place for each expert filled up."""
        alone = isinstance(outputs, Tensor)
        found = []
        for value, fill in zip((outputs,) if alone else outputs, self.widths, strict=True):
            if fill is None or (fill is ... and not self.widen):
                found.append(value)
            else:
                kept = self._at(value.device)
                wide = value.new_full((*value.shape[:-1], self.num_experts), NONE if fill is ... else fill)
                found.append(wide.index_copy(-1, kept, value))
        return found[0] if alone else tuple(found)

    def _widened(self, logits: Tensor, kept: Tensor) -> Tensor:
        if logits.shape[-1] != len(kept):
            return logits
        wide = logits.new_full((*logits.shape[:-1], self.num_experts), NONE)
        return wide.index_copy(-1, kept, logits)


def set_forward(module: nn.Module, forward: CutRouter | Outside | None) -> None:
    """Let a module run ``forward``, or its own again with None; accelerate's hooks stay around it."""
    hooked = "_hf_hook" in vars(module)
    name = "_old_forward" if hooked else "forward"
    if forward is not None:
        object.__setattr__(module, name, forward)
    elif isinstance(vars(module).get(name), CutRouter):
        if hooked:
            object.__setattr__(module, name, type(module).forward.__get__(module))
        else:
            delattr(module, name)


def cut_router_of(module: nn.Module) -> CutRouter | None:
    """Return the mask that is on a router; None if there is none."""
    return next(
        (f for f in (vars(module).get(n) for n in ("forward", "_old_forward")) if isinstance(f, CutRouter)), None
    )


@torch.no_grad()
def check_router(cut: CutRouter, block: StockBlock) -> None:
    """Route a few random tokens, so that a router that cannot do with so few experts says so now.

    Raises:
        ValueError: it fails, chooses an expert that is not permitted, or gives weights that are not numbers.
    """
    if block.outside is not None:  # softmax or sigmoid of one linear map, which can do with one expert
        return
    value = next(iter(named_tensors(block.router).values()))
    hidden = getattr(block.router, "hidden_size", None) or getattr(block.router, "hidden_dim", None)
    width = hidden if isinstance(hidden, int) else cut_width(block)
    if value.device.type == "meta" or width is None:
        return
    fails = f"the router of {block.name} cannot route among {len(cut.kept)} of {cut.num_experts} experts"
    bias_E = torch.zeros(cut.num_experts, device=value.device)  # some blocks hand one to their router
    generator = torch.Generator().manual_seed(0)
    x_1TH = torch.randn(1, 4, width, generator=generator).to(value.device, value.dtype)
    reasons = []
    for told in ((x_1TH[0],), (x_1TH,), (x_1TH[0], bias_E), (x_1TH, bias_E)):
        try:
            _, weights, ids, *_ = cut(*told)
            break
        except (RuntimeError, IndexError, TypeError, ValueError) as error:
            reasons.append(str(error).strip().partition("\n")[0].rstrip("."))
    else:
        raise ValueError(f"{fails} ({reasons[0]}); permit more, or all")
    allowed = torch.cat([cut.kept.to(ids.device), torch.tensor([cut.num_experts], device=ids.device)])
    if not bool(torch.isfinite(weights).all()) or not bool(torch.isin(ids, allowed).all()):
        raise ValueError(f"{fails}; permit more")


def cut_width(block: StockBlock) -> int | None:
    """The width of a token as the router reads it, from a matrix with a row for each expert."""
    for value in named_tensors(block.router).values():
        if value.dim() == 2 and value.shape[0] == block.num_experts:
            return value.shape[1]
    return None
