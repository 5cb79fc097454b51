"""A small MoE layer, dense arithmetic to compare it with, and masks of its experts."""

import numpy as np
import torch

from fedmoe_kernels import reference

H, I, E, K = 12, 20, 6, 2  # noqa: E741  # odd against every block size; I > H catches swapped axes


def dense(seed=0, dtype=torch.float64):
    """Router, w_in and w_out of a whole layer, O(1) entries."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (E, H), (E, 2 * I, H), (E, H, I)
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]


def mask(*ids):
    array = np.zeros(E, dtype=bool)
    array[list(ids)] = True
    return array


def relative(value, truth):
    return float(((value - truth).norm() / truth.norm().clamp(min=1e-300)).detach())


def truth(x_TH, weights, ids, k=K, renormalize=True):
    """The dense layer that has only the experts ``ids``, by plain loops."""
    router, w_in, w_out = (weight[list(ids)] for weight in weights)
    routing = reference.route(x_TH @ router.T, min(k, len(ids)), renormalize=renormalize)
    return reference.moe_mlp(x_TH, routing.slots_TK, routing.weights_TK, w_in, w_out)
