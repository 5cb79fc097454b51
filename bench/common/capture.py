"""What a CUDA graph cannot hold, seen without a GPU: reads by the host, copies to and from it, code loaded late.

    with Watch() as watch:                # torch's own operations, forward and backward
        step()
    watch.findings

Two eyes see a step. `Watch` sees every operation of torch: one whose result the host must read, and one that takes
tensors of two devices, which is a copy that waits. On tensors without memory ("meta") whatever was left on the CPU
shows as a second device. Triton's launches are seen by the stand-in driver (stand_in): it has no entry that waits,
copies or allocates, and refuses to load code while it plays a capture.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fedmoe_kernels import operator
from fedmoe_kernels.routing import ops as routing_ops

_READS = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)
_BY_INDEX = ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_")
_BOOLEAN = (torch.bool, torch.uint8)


class Watch(TorchDispatchMode):
    """Keeps a line for each operation within it that no capture can hold.

    Attributes:
        findings: the lines; empty = a graph can hold what was run.
        seen: how many operations were looked at.
    """

    def __init__(self) -> None:
        super().__init__()
        self.findings: list[str] = []
        self.seen = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen += 1
        name = func.name().split(".")[0]
        reason = _reason_of(name, func.tags, args)
        if reason:  # before it runs: what reads a tensor without memory raises
            self.findings.append(reason)
        out = func(*args, **(kwargs or {}))
        devices = sorted({str(t.device) for t in tree_leaves((args, kwargs, out)) if _counts(t)})
        if len(devices) > 1:
            self.findings.append(f"{name} is between {' and '.join(devices)}, and waits for the device")
        return out


def _reason_of(name: str, tags: Sequence[torch.Tag], args: Any) -> str:
    """Say why the host would read the device for this operation; "" = it need not."""
    if name in _BY_INDEX:  # tagged for its masks; with numbers it reads nothing
        masked = any(isinstance(t, Tensor) and t.dtype in _BOOLEAN for t in tree_leaves(args[1]))
        return f"{name} by a mask counts what is true, and the host reads it" if masked else ""
    return f"{name} makes the host read the device" if any(tag in tags for tag in _READS) else ""


def _counts(value: Any) -> bool:
    """Tell whether a value lies on a device; a number of the host, () on the CPU, travels with its launch."""
    return isinstance(value, Tensor) and not (value.device.type == "cpu" and value.dim() == 0)


def findings_of(step: Callable[[], Any]) -> list[str]:
    """Run a step that has run before, past torch's dispatcher as an eager layer does, and say what no graph can hold.

    The checks of values that the operators make on CPU tensors alone are left out.
    """
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(operator, "_watched", return_value=False))
        stack.enter_context(mock.patch.object(routing_ops, "_check_clients"))
        watch = stack.enter_context(Watch())
        step()
    return watch.findings
