"""What tests share: a model is calibrated once a process in whole runs; a simulator that plays what a test says."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest
from torch import Tensor

import fedmoe_core
from fedmoe_core import simulation
from fedmoe_core.data.batches import Batch
from fedmoe_core.model.adapter import ModelAdapter
from fedmoe_core.simulation import launch, prepare

KNOWN: dict[str, Any] = {}
calibrate = prepare.calibrate


def remembered(adapter: ModelAdapter, params: dict[str, Tensor], train: Any, batch: Batch, **how: Any) -> Any:
    """``calibrate``, whose answer depends on shapes and settings alone: the values of weights and tokens do not enter.

    The model is named by its modules, sizes and the shapes of its state; what differs in any of it is measured.
    """
    shapes = {name: (tuple(t.shape), t.dtype) for name, t in params.items()}
    parts = {name: (tuple(t.shape), t.dtype) for name, t in vars(batch).items() if isinstance(t, Tensor)}
    key = repr((type(adapter), adapter.spec, adapter.model, shapes, train, parts, sorted(how.items())))
    if key not in KNOWN:
        KNOWN[key] = calibrate(adapter, params, train, batch, **how)
    return KNOWN[key]


@pytest.fixture(autouse=True)
def calibrated_once(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Spare whole runs a third of their time; what is about the prediction itself (invariant 2) measures as ever."""
    if "inv2" not in request.node.name:
        monkeypatch.setattr(prepare, "calibrate", remembered)


@pytest.fixture
def simulator(monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    """Stands in for fedmoe_core.simulation.run; a test sets what its verbs do."""
    stub = types.SimpleNamespace()
    # Both: once a test before has imported it, the package holds the real one as an attribute.
    monkeypatch.setitem(sys.modules, "fedmoe_core.simulation.run", stub)
    monkeypatch.setattr(simulation, "run", stub, raising=False)
    monkeypatch.setattr(fedmoe_core, "simulate", stub, raising=False)
    for name in ("RANK", "WORLD_SIZE", launch.LAUNCHED):
        monkeypatch.delenv(name, raising=False)
    return stub
