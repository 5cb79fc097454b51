"""The tape of a recording: what is on it, when it is blank, and that the layer runs as without it."""

from __future__ import annotations

import copy
import multiprocessing.reduction as reduction
import pickle

import numpy as np
import pytest
import torch
from one_layer import E, H, made
from torch import nn
from torch.utils.checkpoint import checkpoint

from fedmoe_core import recording
from fedmoe_core.layer.router_loss import balance_loss


def test_the_tape_has_the_last_forward_and_is_blank_after_the_block() -> None:
    layer = made(0, 2, 3)
    x, y = torch.randn(2, 9, H, dtype=torch.float64)
    real_T = torch.arange(9) < 7
    with recording(layer) as tape:
        layer(x)
        layer(y, real_T)
        want = (y @ layer.router_EH().T)[real_T]
        chosen_TK, rows_E = tape.choices(0), tape.rows_E(0)
        logits_TE = tape.take_logits(0)
        assert torch.equal(logits_TE, want)
        assert logits_TE.requires_grad
        assert (chosen_TK[~real_T] == -1).all()
        np.testing.assert_array_equal(rows_E, np.bincount(chosen_TK[real_T].flatten(), minlength=E))
        assert rows_E.sum() == 14
        with pytest.raises(ValueError, match="layer 0 has no logits on the tape"):
            tape.take_logits(0)
    with pytest.raises(ValueError, match="layer 0 has no choices on the tape"):
        tape.choices(0)


def test_a_model_is_recorded_in_its_order_and_an_error_ends_the_recording() -> None:
    model = nn.Sequential(made(), nn.Linear(H, H), made(1))
    with pytest.raises(ValueError, match="wide"), recording(model) as tape:
        model(torch.randn(3, H + 1, dtype=torch.float64))
    assert tape.layers == (model[0], model[2])
    assert model[0].recorder is None
    assert model[2].recorder is None


def test_the_inner_of_two_recordings_hears_and_the_outer_goes_on_after_it() -> None:
    layer = made()
    x, y = torch.randn(2, 4, H, dtype=torch.float64)
    with recording(layer) as outer:
        layer(x)
        with recording([layer]) as inner:
            layer(y)
            assert torch.equal(inner.take_logits(0), y @ layer.router.T)
        assert torch.equal(outer.take_logits(0), x @ layer.router.T)
        layer(y)
        assert torch.equal(outer.take_logits(0), y @ layer.router.T)


def test_a_compiled_layer_is_recorded_in_one_graph() -> None:
    torch._dynamo.reset()
    layer = made(0, 1, 4).float()
    x = torch.randn(8, H)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with recording(layer) as tape:
        y = compiled(x)
        choices, logits = tape.choices(0), tape.take_logits(0)
        layer(x)
        assert torch.equal(choices, tape.choices(0))
        torch.testing.assert_close(logits, tape.take_logits(0))
    torch.testing.assert_close(compiled(x), y)


def test_a_reentrant_checkpoint_keeps_no_graph_and_it_is_said() -> None:
    """Its losses had a value and a gradient of exactly zero."""
    layer = made()
    x = torch.randn(8, H, dtype=torch.float64, requires_grad=True)
    with recording(layer) as tape:
        checkpoint(layer, x, use_reentrant=True)
        with pytest.raises(ValueError, match=r"layer 0 have no graph.*give use_reentrant=False"):
            balance_loss(tape)
        checkpoint(layer, x, use_reentrant=True)
        with torch.no_grad():
            assert tape.take_logits(0).shape == (8, E)
        checkpoint(layer, x, use_reentrant=False)
        balance_loss(tape).backward()
    want = layer.router.grad.clone()
    layer.zero_grad()
    with recording(layer) as tape:
        layer(x)
        balance_loss(tape).backward()
    assert want.any()
    assert torch.equal(layer.router.grad, want)


def test_frozen_routers_are_read_without_a_graph() -> None:
    layer = made()
    layer.set_experts(None, [False] * E)
    with recording(layer) as tape:
        layer(torch.randn(8, H, dtype=torch.float64))
        assert tape.take_logits(0).shape == (8, E)


@pytest.mark.parametrize("how", ["deepcopy", "average", "pickle", "to a process"])
def test_a_layer_can_be_copied_while_it_is_recorded(how: str) -> None:
    """What was heard has a graph, which neither copy nor pickle takes."""
    layer = made()
    layer.with_stats = layer.with_scores = True
    x = torch.randn(8, H, dtype=torch.float64)
    with recording(layer) as tape:
        y = layer(x)
        y.sum().backward()
        if how == "deepcopy":
            twin = copy.deepcopy(layer)
        elif how == "average":
            twin = torch.optim.swa_utils.AveragedModel(layer).module
        elif how == "pickle":
            twin = pickle.loads(pickle.dumps(layer))
        else:
            twin = pickle.loads(bytes(reduction.ForkingPickler.dumps(layer)))
        assert twin.recorder is None
        assert torch.equal(twin(x), y)
        layer(2 * x)
        assert torch.equal(tape.take_logits(0), 2 * x @ layer.router.T)
    assert layer.recorder is None
