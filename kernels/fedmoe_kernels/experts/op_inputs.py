"""The inputs of the operator by name, and which of them have gradients."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class OpInputs(NamedTuple):
    """The tensors of both operators, in the order of their schemas.

    x_TH (T, H) and the fields of `Routing`; tokens_R and places_R None = made again from rows_TK. w_in (Bt, F, H),
    w_out (Bt, H, I) with the frozen slots' (B - Bt, ...) next to them, biases alike; where a scale is given, the frozen
    matrices are the codes of `Quantized`, in the operator's `frozen_format`, and `whole` its scale of each matrix.
    Adapters: a_in (Bl, r, H), b_in (Bl, F, r), a_out (Bl, r, I), b_out (Bl, H, r), scale_B (Bl,) float64 and
    base_of_slot_B (B,) int64, the row of the weights that a slot runs. trainable_B (B,) bool: slots that get a
    gradient, None = all that can.
    """

    x_TH: Tensor
    weights_TK: Tensor
    rows_TK: Tensor
    tokens_R: Tensor | None
    places_R: Tensor | None
    offsets_B1: Tensor
    w_in: Tensor
    w_out: Tensor
    bias_in: Tensor | None
    bias_out: Tensor | None
    w_in_frozen: Tensor | None
    w_out_frozen: Tensor | None
    bias_in_frozen: Tensor | None
    bias_out_frozen: Tensor | None
    w_in_scale: Tensor | None
    w_out_scale: Tensor | None
    w_in_whole: Tensor | None
    w_out_whole: Tensor | None
    a_in: Tensor | None
    b_in: Tensor | None
    a_out: Tensor | None
    b_out: Tensor | None
    scale_B: Tensor | None
    base_of_slot_B: Tensor | None
    trainable_B: Tensor | None

    @property
    def kept(self) -> OpInputs:
        """Keep what lies between the passes: 16 bytes a row less, as the inverse of rows_TK is cheap to make again."""
        return self._replace(tokens_R=None, places_R=None)

    def rows_per_slot(self, given: int) -> int:
        """Return the number that tiles are chosen by: the one given, or T * K / B where that is 0."""
        return given or max(1, self.rows_TK.numel() // (self.offsets_B1.shape[0] - 1))


# Stored, not computed: what is copied of these at one call is copied at every one.
WEIGHTS = OpInputs._fields[6:22]


# What the backward can differentiate by, in the order of its outputs and of `needs`; the rest are constants.
DIFFERENTIABLE = ("x_TH", "weights_TK", "w_in", "w_out", "bias_in", "bias_out", "a_in", "b_in", "a_out", "b_out")
