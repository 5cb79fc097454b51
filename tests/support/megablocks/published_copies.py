"""megablocks' own Triton kernels in the interpreter against our copies, on the same inputs; prints the largest error.

Its file is loaded alone, without the package around it. An autotuner would look for a GPU, so each keeps one choice.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
import triton
from dmoe_truth import relative
from torch import Tensor

from fedmoe_bindings.megablocks import copies, stages

T, K, E, H, CAPACITY = 9, 2, 4, 70, 3


def published() -> Any:
    """Load backend/kernels.py of the installed package."""
    found = importlib.util.find_spec("megablocks")
    assert found is not None
    assert found.submodule_search_locations is not None
    path = Path(found.submodule_search_locations[0]) / "backend" / "kernels.py"
    spec = importlib.util.spec_from_file_location("published_kernels", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for value in vars(module).values():
        if isinstance(value, triton.runtime.autotuner.Autotuner):
            value.configs = value.configs[:1]
    return module


def main() -> None:
    """Compare all nine verbs, with and without weights, float32."""
    torch.manual_seed(0)
    experts = torch.randint(0, E, (T * K,)).int()
    bin_ids, indices = torch.empty_like(experts), torch.empty_like(experts)
    stages.sort(experts, 2, bin_ids, indices)
    counts = stages.histogram(experts, E)
    bins, padded = counts.cumsum(0).int(), ((counts + 7) // 8 * 8).cumsum(0).int()
    assert int(counts.max()) > CAPACITY, "the binned verbs drop something"
    x, grad, rows, weights = torch.randn(T, H), torch.randn(T, H), torch.randn(T * K, H), torch.randn(T * K)
    wide, boxes = torch.randn(int(padded[-1]), H), torch.randn(E, CAPACITY, H)
    calls: dict[str, tuple[Any, ...]] = {
        "scatter_wgrad": (rows, grad, indices, bin_ids, bins, K),
        "padded_scatter_wgrad": (wide, grad, indices, bin_ids, bins, padded, K),
        "binned_scatter_wgrad": (boxes, grad, indices, bins, K),
    }
    for w in (None, weights):
        calls |= {
            f"gather {w is None}": (x, indices, bin_ids, w, bins, K),
            f"scatter {w is None}": (rows, indices, bin_ids, w, bins, K),
            f"padded_gather {w is None}": (x, indices, bin_ids, w, bins, padded, K),
            f"padded_scatter {w is None}": (wide, indices, bin_ids, w, bins, padded, K),
            f"binned_gather {w is None}": (x, indices, w, bins, CAPACITY, K),
            f"binned_scatter {w is None}": (boxes, indices, w, bins, K),
        }
    module, errors = published(), []
    for call, arguments in calls.items():
        verb = call.split()[0]
        want: Tensor = getattr(module, verb)(*arguments)
        errors.append(relative(getattr(copies, verb)(*arguments), want))
    print(len(calls), max(errors))


if __name__ == "__main__":
    main()
