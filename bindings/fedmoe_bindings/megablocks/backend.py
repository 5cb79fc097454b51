"""`install_backend`: the published megablocks package on fedmoe's products, without its compiled extensions.

megablocks 0.10.0 imports two extensions that need a CUDA compiler and an old torch, `megablocks_ops` and
`grouped_gemm`, and Triton kernels of its own that only copy rows. Stand-ins for all three go into `sys.modules` before
it is imported.
"""

from __future__ import annotations

import importlib.machinery
import importlib.metadata
import importlib.util
import sys
import types
import warnings
from collections.abc import Callable, Iterable

from fedmoe_bindings.megablocks import copies, stages

PACKAGE, VERSION = "megablocks", "0.10.0"
INSTALL = f"pip install --no-deps --no-build-isolation stanford-stk==0.7.1 {PACKAGE}=={VERSION}"
_STAGES = (
    *(stages.sort, stages.histogram, stages.inclusive_cumsum, stages.exclusive_cumsum, stages.indices),
    *(stages.replicate_forward, stages.replicate_backward),
)
_COPIES = (
    *(copies.gather, copies.scatter, copies.scatter_wgrad),
    *(copies.padded_gather, copies.padded_scatter, copies.padded_scatter_wgrad),
    *(copies.binned_gather, copies.binned_scatter, copies.binned_scatter_wgrad),
)


class StandIn(types.ModuleType):
    """A module made here; by its class it is told from a real one."""

    def __init__(self, name: str, functions: Iterable[Callable[..., object]]) -> None:
        super().__init__(name, "Stands in for a compiled extension; made by fedmoe's install_backend.")
        self.__spec__ = importlib.machinery.ModuleSpec(name, None)
        vars(self).update({function.__name__: function for function in functions})


def install_backend() -> None:
    """Let `import megablocks` find fedmoe's products, sort, counts and copies; a second call does nothing.

    Then `megablocks.dMoE` with `mlp_impl="grouped"` runs on any device and in any floating dtype that `grouped_mm`
    serves, and so does the dropping `megablocks.MoE`. Under expert parallelism each process calls this for itself.
    `mlp_impl="sparse"` stays out of reach: megablocks refuses it with Triton 3.2 and later.

    Raises:
        ModuleNotFoundError: megablocks or stanford-stk is not installed; says how to.
        RuntimeError: megablocks or one of its extensions has been imported already, so a stand-in would come too late.
    """
    if installed():
        return
    if (name := missing()) is not None:
        raise ModuleNotFoundError(f"{name} is not installed; install it with: {INSTALL}", name=name)
    if found := next((name for name in (PACKAGE, "grouped_gemm", "megablocks_ops") if name in sys.modules), None):
        raise RuntimeError(f"{found} is imported already; call install_backend() before the first import of it")
    if (version := importlib.metadata.version(PACKAGE)) != VERSION:
        warnings.warn(f"megablocks is {version}, and only {VERSION} was tested; install that", stacklevel=2)
    forget(PACKAGE)  # what an import that failed for want of the extensions has left
    gg, backend = StandIn("grouped_gemm", ()), StandIn("grouped_gemm.backend", [stages.gmm])
    ops = StandIn("grouped_gemm.ops", ())
    vars(ops)["gmm"] = stages.gmm_op
    vars(gg).update(ops=ops, backend=backend)
    made = [gg, ops, backend, StandIn("megablocks_ops", _STAGES), StandIn(f"{PACKAGE}.backend.kernels", _COPIES)]
    sys.modules.update({module.__name__: module for module in made})


def uninstall_backend() -> None:
    """Take the stand-ins out of `sys.modules`, and megablocks with them; layers that exist keep working."""
    if not installed():
        return
    for name in [name for name, module in sys.modules.items() if isinstance(module, StandIn)]:
        del sys.modules[name]
    forget(PACKAGE)


def missing() -> str | None:
    """Return which of megablocks and stanford-stk is not installed; None = both are."""
    for name in (PACKAGE, "stk"):
        if name not in sys.modules:
            spec = importlib.util.find_spec(name)
            if spec is None or spec.origin is None:  # a folder of that name, which is not a package, has no origin
                return name
    return None


def installed() -> bool:
    """Tell whether the stand-ins are in place."""
    return isinstance(sys.modules.get("grouped_gemm"), StandIn)


def forget(package: str) -> None:
    """Drop a package and all that is below it from `sys.modules`."""
    for name in [name for name in sys.modules if name == package or name.startswith(f"{package}.")]:
        del sys.modules[name]
