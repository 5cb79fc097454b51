"""The driver of the experts without a GPU: launches from shapes alone, no wait for a device, the bytes promised."""

from __future__ import annotations

import ast
import itertools
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fedmoe_kernels
from fedmoe_kernels import ExpertLora, ExpertScores, ExpertWeights, Quantized, moe_mlp, route
from fedmoe_kernels.activations import ACTIVATIONS
from fedmoe_kernels.experts.op_inputs import DIFFERENTIABLE, OpInputs
from fedmoe_kernels.formats import FORMATS
from fedmoe_kernels.gpu.experts.memory import CallSizes, backward_bytes, forward_bytes
from fedmoe_kernels.tiles.lookup import tiles_for

pytest.importorskip("triton", reason="triton is not installed on this platform")

from fedmoe_kernels.gpu.experts import driver as experts
from fedmoe_kernels.gpu.launch import Launch, TensorDescriptor
from fedmoe_kernels.gpu.routing import driver as routing
from fedmoe_kernels.gpu.routing.choose import Rule

ARCHS = ("sm_80", "sm_90", "sm_100")
FORMS = {
    "all trainable": {},
    "some frozen, with biases": {"trainable": 3, "biases": True},
    "all frozen": {"trainable": 0},
    "int8": {"trainable": 3, "form": "int8"},
    "nvfp4, all frozen": {"trainable": 0, "form": "nvfp4"},
    "top-1": {"K": 1},
    "adapters": {"rank": 8, "trainable": 8},
    "a mask": {"mask": True},
    "no token": {"T": 0},
    "rows that no descriptor can have": {"H": 97, "I": 33},
}


def meta_inputs(
    T: int = 64, K: int = 2, H: int = 128, I: int = 64, B: int = 8, *, trainable: int | None = None,  # noqa: E741
    biases: bool = False, form: str = "", rank: int = 0, mask: bool = False, activation: str = "swiglu",
    dtype: torch.dtype = torch.bfloat16,
) -> OpInputs:  # fmt: skip
    """The operator's inputs on the meta device: shapes without a value."""

    def new(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    trainable = B if trainable is None else trainable
    F, frozen, long = ACTIVATIONS[activation].width(I), B - trainable, torch.int64
    shapes = {"w_in": (F, H), "w_out": (H, I), "bias_in": (F,), "bias_out": (H,)}
    given: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        if biases or name[0] == "w":
            given[name] = new(trainable, *shape)
            if frozen:
                given[f"{name}_frozen"] = new(frozen, *shape)
                if form and name[0] == "w":
                    q = Quantized.of(given[f"{name}_frozen"], form)
                    given |= {f"{name}_frozen": q.codes, f"{name}_scale": q.scale, f"{name}_whole": q.whole}
    if rank:
        given |= {"a_in": new(B, rank, H), "b_in": new(B, F, rank), "a_out": new(B, rank, I), "b_out": new(B, H, rank)}
        given |= {"scale_B": new(B, dtype=torch.float64), "base_of_slot_B": new(B, dtype=long)}
    if mask:
        given["trainable_B"] = new(B, dtype=torch.bool)
    index = {"rows_TK": new(T, K, dtype=long), "tokens_R": new(T * K, dtype=long), "places_R": new(T * K, dtype=long)}
    given |= index | {"x_TH": new(T, H), "weights_TK": new(T, K, dtype=torch.float32)}
    given["offsets_B1"] = new(B + 1, dtype=long)
    return OpInputs(**{name: given.get(name) for name in OpInputs._fields})


def needs_of(inputs: OpInputs) -> list[bool]:
    """Everything that can be asked for, and the scores."""
    frozen = ("w_in", "w_out", "bias_in", "bias_out") if inputs.a_in is not None else ()
    return [*(getattr(inputs, name) is not None and name not in frozen for name in DIFFERENTIABLE), True]


def format_of(inputs: OpInputs) -> str:
    """How the frozen weights of `meta_inputs` are stored."""
    if inputs.w_in_scale is None or inputs.w_in_frozen is None:
        return ""
    kinds = inputs.w_in_frozen.dtype, inputs.w_in_scale.dtype
    return next(form.name for form in FORMATS.values() if (form.codes, form.scale) == kinds)


def call(
    inputs: OpInputs,
    execute: Callable[[Launch], Any],
    *,
    arch: str = "sm_90",
    activation: str = "swiglu",
    recompute: bool = False,
    rows_per_slot: int = 2048,
) -> tuple[Tensor, ...]:
    """Both directions."""
    how = {"activation": activation, "rows_per_slot": rows_per_slot, "arch": arch, "execute": execute}
    how["frozen_format"] = format_of(inputs)
    y_TH, z_RF, _ = experts.forward(inputs, keep_z=not recompute, want_reap=True, **how)
    dy_TH = torch.empty_like(inputs.x_TH)
    return y_TH, *experts.backward(dy_TH, z_RF, inputs.kept, needs=needs_of(inputs), **how)


@pytest.fixture
def no_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever would bring a value from the device to the host raises."""

    def refused(self: Tensor, *_: object, **__: object) -> None:
        raise AssertionError("a value was read from the device")

    names = ("item", "cpu", "tolist", "numpy", "__bool__", "__int__", "__float__", "__index__", "__len__", "nonzero")
    for name in (*names, "is_nonzero", "masked_select", "unique", "data_ptr_of_values"):
        monkeypatch.setattr(Tensor, name, refused, raising=False)
    for name in ("nonzero", "equal", "masked_select", "unique", "allclose"):
        monkeypatch.setattr(torch, name, refused)


READS = {"item", "cpu", "tolist", "numpy", "nonzero", "is_nonzero", "unique", "masked_select", "synchronize"}
PACKAGE = Path(fedmoe_kernels.__file__).parent
# Not the loops' bodies, which wait for the device once a call, nor the map of a plan, which is made once.
ELSEWHERE = {
    *("cpu/loops.py", "cpu/gemm.py", "experts/ops.py", "experts/grouped_ops.py", "reference.py", "slot_map.py")
}
SOURCES = [path for path in sorted(PACKAGE.rglob("*.py")) if str(path.relative_to(PACKAGE)) not in ELSEWHERE]


def reads_in(source: str) -> set[str]:
    """What a source names of `READS`, and Triton's tuner, which would measure on the hot path."""
    names = {node.attr for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Attribute)}
    return names & (READS | {"autotune"})


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_source_of_the_gpu_path_reads_from_the_device(path: Path) -> None:
    assert not reads_in(path.read_text())


def test_the_search_finds_a_read() -> None:
    assert {(PACKAGE / name).is_file() for name in ELSEWHERE} == {True}
    assert PACKAGE / "gpu" / "experts" / "driver.py" in SOURCES
    assert reads_in("def rows(n_B):\n    return [n for n in n_B.cpu().tolist()]") == {"cpu", "tolist"}
    assert reads_in("@triton.autotune(configs)\ndef kernel(x): ...") == {"autotune"}


@pytest.mark.usefixtures("no_reads")
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
def test_nothing_is_read_from_the_device(form: dict, recompute: bool) -> None:
    """On the meta device there are no values: each read fails by itself, and by the patches where it would not."""
    inputs = meta_inputs(**form)
    launches: list[Launch] = []
    outputs = call(inputs, launches.append, recompute=recompute)
    wanted = [
        inputs.x_TH,
        *(getattr(inputs, n) for n, need in zip(DIFFERENTIABLE, needs_of(inputs), strict=False) if need),
    ]
    got = [t for t in outputs if t.shape != (0,)]
    shapes = [t.shape for t in wanted] + [torch.Size((inputs.offsets_B1.shape[0] - 1, 6))]
    assert [t.shape for t in got] == [s for s in shapes if s != (0,)]
    assert len(launches) >= 2


RULES = {
    "softmax": Rule(2, "softmax", True),
    "softmax, not renormalised": Rule(2, "softmax", False),
    "top-k first": Rule(2, "topk_softmax", True),
    "sigmoid with groups": Rule(2, "sigmoid", True, n_group=4, topk_group=2),
}


@pytest.mark.usefixtures("no_reads")
@pytest.mark.parametrize("tokens", [0, 64, 2**20])
@pytest.mark.parametrize("cohort", [False, True])
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
def test_routing_reads_nothing_from_the_device(rule: Rule, cohort: bool, tokens: int) -> None:
    with torch.device("meta"):
        logits_TE, bias_E = torch.empty(tokens, 16), torch.empty(16) if rule.scoring == "sigmoid" else None
        table_CE = torch.empty(3 if cohort else 1, 16, dtype=torch.int64)
        client_T = torch.empty(tokens, dtype=torch.int64) if cohort else None
        valid_T = torch.empty(tokens, dtype=torch.bool)
        launches: list[Launch] = []
        how = {"execute": launches.append}
        who = routing.Holders(table_CE, client_T, valid_T)
        weights_TK, experts_TK, *_ = routing.route(logits_TE, who, bias_E, rule, num_slots=12, with_stats=True, **how)
        routing.route_backward(weights_TK, logits_TE, experts_TK, who, rule, **how)
        routing.place(experts_TK, who, num_slots=12, **how)
    assert len(launches) > 5


@pytest.mark.usefixtures("no_reads")
def test_the_launchers_read_nothing_from_the_device() -> None:
    """From logits to gradients through what users call, on tensors without values."""
    with torch.device("meta"):
        routed = route(torch.empty(16, 8, requires_grad=True), 2, with_stats=True)
        x_TH = torch.empty(16, 32, requires_grad=True)
        w_in, w_out = torch.empty(8, 64, 32, requires_grad=True), torch.empty(8, 32, 32, requires_grad=True)
        scores = ExpertScores(8, device="meta")
        moe_mlp(x_TH, routed, w_in, w_out, scores=scores).backward(torch.empty(16, 32), retain_graph=True)
        factors = [torch.empty(s, requires_grad=True) for s in ((8, 2, 32), (8, 64, 2), (8, 2, 32), (8, 32, 2))]
        frozen = [ExpertWeights(w.detach()[:2], Quantized(torch.empty(6, w.shape[1], 32, dtype=torch.int8),
                  torch.empty(6, w.shape[1], 1), "int8")) for w in (w_in, w_out)]  # fmt: skip
        moe_mlp(x_TH, routed, *frozen, lora=ExpertLora(*factors), recompute=True).backward(torch.empty(16, 32))
    assert all(t.grad is not None for t in (x_TH, w_in, w_out, scores.leaf_B7, *factors))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("arch", ARCHS)
def test_launches_follow_from_shapes_alone(arch: str, activation: str) -> None:
    """The same launches whatever the values: so a CUDA graph can hold a call, and a rerun gives the same bits."""
    inputs = meta_inputs(activation=activation)
    runs = []
    for _ in range(2):
        launches: list[Launch] = []
        call(inputs, launches.append, arch=arch, activation=activation)
        runs.append([(launch.kernel, launch.grid, constants(launch)) for launch in launches])
    assert runs[0] == runs[1]


def constants(launch: Launch) -> dict[str, Any]:
    return {k: v for k, v in launch.args.items() if not isinstance(v, Tensor | TensorDescriptor)}


def test_tiles_come_from_the_plan() -> None:
    """The rows of a cohort change no constant of any kernel: only the grids, the number of tiles and of tokens."""
    found = []
    for T in (64, 640):
        launches: list[Launch] = []
        call(meta_inputs(T=T), launches.append, rows_per_slot=16)
        found.append([{k: v for k, v in constants(one).items() if k.isupper()} for one in launches])
    assert found[0] == found[1]
    launches = []
    call(meta_inputs(), launches.append, rows_per_slot=2048)
    assert found[0] != [{k: v for k, v in constants(one).items() if k.isupper()} for one in launches]


HUGE = {
    "T * K * 2I beyond 2^31": {"T": 2**17, "K": 8, "H": 256, "I": 2048, "B": 64},
    "T * K * H beyond 2^31": {"T": 2**18, "K": 8, "H": 2048, "I": 256, "B": 64},
    "E * 2I * H beyond 2^31": {"T": 128, "K": 8, "H": 4096, "I": 1024, "B": 512},
    "frozen E * 2I * H beyond 2^31": {"T": 128, "K": 8, "H": 4096, "I": 1024, "B": 512, "trainable": 8},
    "adapters of many clients": {"T": 2**18, "K": 8, "H": 2048, "I": 256, "B": 4096, "rank": 512},
}


@pytest.mark.parametrize("shape", HUGE.values(), ids=HUGE.keys())
def test_no_launch_argument_overflows(shape: dict) -> None:
    """Every whole number that a kernel gets fits 32 signed bits, and every grid: larger offsets are made inside."""
    inputs = meta_inputs(**shape)
    sizes = [t.numel() for t in inputs if t is not None]
    assert max(*sizes, inputs.rows_TK.numel() * max(inputs.w_in.shape[1], inputs.x_TH.shape[1])) > 2**31
    launches: list[Launch] = []
    call(inputs, launches.append)
    for launch in launches:
        assert all(0 <= n < 2**31 for n in launch.grid), launch.kernel
        assert all(n < 2**16 for n in launch.grid[1:]), launch.kernel
        for name, value in constants(launch).items():
            assert not isinstance(value, int) or abs(value) < 2**31, (launch.kernel, name)


class _Peak(TorchDispatchMode):
    """Counts the bytes of what is alive of all that is allocated while it is on."""

    def __init__(self) -> None:
        super().__init__()
        self.alive, self.most = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__.startswith(("empty", "new_empty", "zeros")):
            self.alive += made.nbytes
            self.most = max(self.most, self.alive)
            weakref.finalize(made, self._gone, made.nbytes)
        return made

    def _gone(self, size: int) -> None:
        self.alive -= size


@pytest.mark.parametrize("scores", [True, False])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(
    "form", [{}, {"K": 1}, {"rank": 8}, {"H": 512}, {"I": 1024, "K": 1}, {"T": 4096, "activation": "relu"},
     {"trainable": 3}, {"trainable": 0}, {"trainable": 0, "K": 1},
     {"trainable": 3, "form": "mxfp4", "T": 64}, {"trainable": 0, "form": "int8", "H": 1024, "T": 64},
     {"trainable": 0, "form": "int8", "T": 64, "K": 1}],
)  # fmt: skip
def test_peak_bytes_are_those_promised(form: dict, recompute: bool, scores: bool) -> None:
    form = {"T": 1024, "B": 8} | form
    activation = form.get("activation", "swiglu")
    inputs = meta_inputs(**form)
    gated, (T, K), H, inner = (
        ACTIVATIONS[activation].gated,
        inputs.rows_TK.shape,
        inputs.x_TH.shape[1],
        inputs.w_out.shape[2],
    )
    tiles = tiles_for("sm_90", torch.bfloat16, 2048, hidden=H, inner=inner, gated=gated)
    learning = form.get("trainable", 8)
    decoded = 8 - learning if "form" in form else 0
    sizes = CallSizes(T, K, H, inner, 8, gated, tiles, learning=learning, rank=form.get("rank", 0), decoded=decoded)
    how = {"activation": activation, "rows_per_slot": 2048, "arch": "sm_90", "execute": lambda launch: None}
    how["frozen_format"] = format_of(inputs)
    with _Peak() as forward:
        y_TH, z_RF, reap_B = experts.forward(inputs, keep_z=not recompute, want_reap=scores, **how)
    assert forward.most == forward_bytes(sizes, keep_z=not recompute, scores=scores)
    assert forward.alive == y_TH.nbytes + z_RF.nbytes + reap_B.nbytes
    assert reap_B.shape == ((8,) if scores else (0,))
    dy_TH, needs = torch.empty_like(y_TH), [*needs_of(inputs)[:-1], scores]
    with _Peak() as backward:
        outputs = experts.backward(dy_TH, z_RF, inputs.kept, needs=needs, **how)
    assert backward.most == backward_bytes(sizes, recompute=recompute, scores=scores)
    assert backward.alive == sum(t.nbytes for t in outputs)


def test_only_what_is_needed_is_computed() -> None:
    """Which kernels run for each single gradient."""
    inputs = meta_inputs(biases=True)
    z_RF, how = torch.empty(128, 128, dtype=torch.bfloat16, device="meta"), {"rows_per_slot": 16, "arch": "sm_90"}
    names = (*DIFFERENTIABLE, "scores_B6")
    ran: dict[str, set[str]] = {}
    for wanted in ("x_TH", "weights_TK", "w_in", "w_out", "bias_in", "bias_out", "scores_B6", "nothing"):
        launches: list[Launch] = []
        needs = [name == wanted for name in names]
        experts.backward(
            *(torch.empty_like(inputs.x_TH), z_RF, inputs.kept),
            activation="swiglu",
            needs=needs,
            execute=launches.append,
            **how,
        )
        ran[wanted] = {launch.kernel.__name__.strip("_").removesuffix("_kernel") for launch in launches}
        assert ran[wanted] >= {"schedule", "inverse"}  # what the other launches go by
        ran[wanted] -= {"schedule", "inverse"}
    assert ran["nothing"] == set()
    assert ran["bias_out"] == {"bias_gradient"}
    assert ran["bias_in"] == {"data_gradient", "bias_gradient"}
    assert ran["w_in"] == ran["w_out"] == {"data_gradient", "weight_gradient"}
    assert ran["x_TH"] == {"data_gradient", "rows", "combine"}
    assert ran["weights_TK"] == {"data_gradient", "routing_gradient"}
    assert ran["scores_B6"] == {"data_gradient", "routing_gradient", "score"}


def test_frozen_slots_cost_no_weight_gradient() -> None:
    """The grid of the weight gradient covers the trainable slots alone."""
    grids = []
    for trainable in (8, 2):
        launches: list[Launch] = []
        call(meta_inputs(trainable=trainable), launches.append)
        grids.append([one.grid[0] for one in launches if one.kernel.__name__ == "_weight_gradient_kernel"])
    assert [4 * n for n in grids[1]] == grids[0]


def test_every_pair_of_directions_agrees_on_the_schedule() -> None:
    """Forward and backward cut the rows into the same tiles, or recomputed activations would have other bits."""
    for T, rows_per_slot in itertools.product((1, 64), (1, 16, 64, 2048)):
        launches: list[Launch] = []
        call(meta_inputs(T=T), launches.append, rows_per_slot=rows_per_slot)
        heights = {one.args["HEIGHT"] for one in launches if "HEIGHT" in one.args}
        assert len(heights) == 1
