"""No call of the layer does what a CUDA graph cannot hold: by the stand-in driver, and on tensors without memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from capture_layers import LAYERS, H, T, layer_of, leaves_of, step_of, without_memory
from processes import of_a_child
from torch import Tensor

pytest.importorskip("triton")
from bench.common.capture import Watch, findings_of
from bench.stand_in import driver as stand_in

ON = "meta"  # stands for the device: it has no memory, and nothing of the CPU mixes with it unseen


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the script of capture_layers.py found, each layer through Triton's runtime and the stand-in driver."""
    if stand_in.missing() is not None or "TRITON_INTERPRET" in os.environ:
        pytest.skip(stand_in.missing() or "where Triton interprets, it launches nothing")
    command = [sys.executable, "-m", "capture_layers", str(tmp_path_factory.mktemp("driver"))]
    done = subprocess.run(command, env=of_a_child(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", LAYERS)
def test_a_step_that_has_run_before_can_be_captured(said: dict[str, Any], name: str) -> None:
    assert said[name]["findings"] == []
    assert said[name]["launches"] >= 13


@pytest.mark.timeout(600)
def test_a_step_that_never_ran_would_load_code_in_the_capture(said: dict[str, Any]) -> None:
    (line,) = said["not warmed up"]["findings"]
    assert "loading code is not permitted while a stream is captured" in line


def test_the_driver_has_no_way_to_wait_copy_or_allocate(tmp_path: Path) -> None:
    """So none of the above did: a runtime that asks for what is missing cannot be loaded."""
    import ctypes

    if stand_in.missing() is not None:
        pytest.skip(str(stand_in.missing()))
    library = ctypes.CDLL(str(stand_in.build(tmp_path)))
    assert hasattr(library, "cuLaunchKernelEx")
    for name in ("cuStreamSynchronize", "cuCtxSynchronize", "cuEventSynchronize", "cuMemAlloc_v2", "cuMemAllocAsync"):
        assert not hasattr(library, name)
    for name in ("cuMemcpy", "cuMemcpyDtoH_v2", "cuMemcpyHtoD_v2", "cuMemcpyDtoHAsync_v2", "cuMemcpyHtoDAsync_v2"):
        assert not hasattr(library, name)


@pytest.fixture
def x() -> Tensor:
    return torch.empty(4, T // 4, H, dtype=torch.float16, device=ON, requires_grad=True)


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_leaves_nothing_on_the_host(name: str, x: Tensor) -> None:
    layer = without_memory(layer_of(name))
    for mask_T in (None, torch.empty(T, dtype=torch.bool, device=ON)):
        if mask_T is not None and name == "logits":
            continue  # below
        step = step_of(layer, x, mask_T)
        step()  # where the order of the router's rows goes to the device
        with Watch() as watch:
            step()
        assert watch.findings == []
        assert watch.seen > 5


def test_an_index_that_stays_on_the_host_is_found(x: Tensor) -> None:
    """As the order of the router's rows did until it was kept on the device: it waited at every call."""
    layer = without_memory(layer_of("plain"))
    step = step_of(layer, x)
    step()
    layer._row_of_expert = torch.arange(layer.num_experts)
    with Watch() as watch:
        step()
    assert watch.findings == ["aten::_to_copy is between cpu and meta, and waits for the device"]


def test_logits_of_real_tokens_alone_cannot_be_captured(x: Tensor) -> None:
    """A recording with padding: how many tokens are real is a number that the host reads. The guide says so."""
    layer = without_memory(layer_of("logits"))
    mask_T = torch.empty(T, dtype=torch.bool, device=ON)
    with Watch() as watch, pytest.raises(RuntimeError):
        layer(x, mask_T)
    assert watch.findings[-1] == "aten::index by a mask counts what is true, and the host reads it"


@pytest.mark.parametrize(
    ("what", "line"),
    [
        (lambda v: v.sum().item(), "aten::_local_scalar_dense makes the host read"),
        (lambda v: v.nonzero(), "aten::nonzero makes the host read"),
        (lambda v: v[v > 0], "aten::index by a mask"),
        (lambda v: v.masked_select(v > 0), "aten::masked_select makes the host read"),
        (lambda v: torch.equal(v, v), "aten::equal makes the host read"),
        (lambda v: v.to("meta"), "aten::_to_copy is between cpu and meta"),
    ],
)
def test_what_a_graph_cannot_hold_is_named(what: Callable[[Tensor], Any], line: str) -> None:
    value = torch.ones(3)
    (found,) = findings_of(lambda: what(value))
    assert found.startswith(line)


def test_what_a_graph_can_hold_is_not() -> None:
    value, at = torch.ones(3), torch.tensor([2, 0])
    assert findings_of(lambda: (value[at] + torch.full((2,), 0.5)).where(at > 0, 1.0).sum()) == []


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("name", [name for name in LAYERS if name != "logits"])
def test_a_compiled_layer_is_one_graph_whose_tensors_all_lie_on_the_device(name: str, x: Tensor) -> None:
    """One tensor of the CPU in it, and mode="reduce-overhead" makes no CUDA graph."""
    layer, graphs = without_memory(layer_of(name)), list[Any]()
    layer(x)

    def backend(graph: Any, inputs: Any) -> Callable[..., Any]:
        graphs.append([graph, *inputs])
        return graph.forward

    y = torch.compile(layer, fullgraph=True, backend=backend)(x)
    torch.autograd.grad(y, [x, *leaves_of(layer)], torch.empty_like(y))
    ((graph, *inputs),) = graphs
    assert {str(value.device) for value in inputs if isinstance(value, Tensor)} == {ON}
    made = [node.meta["example_value"] for node in graph.graph.nodes if "example_value" in node.meta]
    assert {str(value.device) for value in made if isinstance(value, Tensor)} == {ON}
