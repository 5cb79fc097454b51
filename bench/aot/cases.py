"""The calls whose kernels are compiled ahead of time: tensors without memory, handed to the operators' own drivers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fedmoe_kernels.activations import width
from fedmoe_kernels.experts.op_inputs import DIFFERENTIABLE, OpInputs
from fedmoe_kernels.formats import FORMATS
from fedmoe_kernels.gpu.experts import driver as experts
from fedmoe_kernels.gpu.launch import Execute, Launch
from fedmoe_kernels.gpu.routing import driver as routing
from fedmoe_kernels.gpu.routing.choose import Holders, Rule


@dataclass(frozen=True)
class Case:
    """One layer as one client or cohort runs it.

    Attributes:
        T, H, I, B, K: tokens, hidden and intermediate size, slots and choices of all clients together.
        Bt: trainable slots.
        format: of the frozen slots, a name of `formats.FORMATS`; "" = as the trainable ones.
        rank: of the adapters on every slot; the weights are then frozen, shared by the clients and half as many.
        clients: that share the launch.
        scoring, groups: how the router chooses among E experts.
    """

    name: str
    T: int
    H: int
    I: int  # noqa: E741 - the house's letter for the intermediate size
    B: int
    K: int
    Bt: int
    activation: str = "swiglu"
    bias: bool = False
    dtype: torch.dtype = torch.bfloat16
    format: str = ""
    rank: int = 0
    clients: int = 1
    keep_z: bool = True
    scoring: str = "softmax"
    groups: tuple[int, int] = (1, 1)
    E: int = 128

    @property
    def rows_per_slot(self) -> int:
        """What the tiles are chosen by."""
        return max(1, self.T * self.K // self.B)

    def varied(self) -> Case:
        """Return the same model with other numbers of tokens and slots, for which no kernel may need new code."""
        slots = self.B - 3 * self.clients
        trainable = slots if self.Bt == self.B else min(self.Bt, max(1, self.Bt - 1))
        return replace(self, T=self.T * slots // self.B - 5, B=slots, Bt=trainable)


PASSES = ("routing", "more", "forward", "backward")
QWEN = Case("qwen3-30b-a3b", 32768, 2048, 768, 128, 8, 32)
OSS = Case("gpt-oss-20b", 16384, 2880, 2880, 32, 4, 32, "swiglu_oai", bias=True, scoring="topk_softmax", E=32)
SWITCH = Case("switch-base-8", 16384, 768, 3072, 8, 1, 8, "relu", E=8)

CASES = (
    QWEN,
    OSS,
    SWITCH,
    replace(QWEN, name="qwen3, 64 rows a slot", T=1024),
    replace(QWEN, name="qwen3, 32 rows a slot", T=512),
    replace(QWEN, name="qwen3, 12 rows a slot", T=192),
    replace(QWEN, name="qwen3, adapters of 4 clients", rank=16, clients=4, Bt=0, scoring="sigmoid", groups=(8, 4)),
    replace(QWEN, name="qwen3, adapters of rank 64", rank=64, Bt=0),
    replace(QWEN, name="qwen3, adapters of rank 128", rank=128, Bt=0),
    replace(QWEN, name="qwen3, int8", format="int8"),
    replace(QWEN, name="qwen3, int4, 128 rows a slot", T=2048, format="int4"),
    replace(OSS, name="gpt-oss, mxfp4", format="mxfp4", Bt=0),
    replace(QWEN, name="qwen3, fp8, 64 rows a slot", T=1024, format="fp8_e4m3"),
    replace(QWEN, name="qwen3, z recomputed", keep_z=False),
    replace(OSS, name="edge, float32", T=512, H=512, I=256, B=16, K=2, Bt=4, dtype=torch.float32, E=16),
)
MORE = (
    replace(OSS, name="gpt-oss, 64 rows a slot", T=512),
    replace(OSS, name="gpt-oss, 12 rows a slot", T=96),
    replace(SWITCH, name="switch, 64 rows a slot", T=512),
    replace(SWITCH, name="switch, 12 rows a slot", T=96),
    replace(QWEN, name="qwen3, adapters, 64 rows a slot", T=1024, rank=16, clients=4, Bt=0),
    replace(QWEN, name="qwen3, adapters, 12 rows a slot", T=192, rank=16, clients=4, Bt=0),
    replace(QWEN, name="qwen3, adapters of rank 64, 64 rows a slot", T=1024, rank=64, Bt=0),
    replace(QWEN, name="qwen3, adapters of rank 128, 12 rows a slot", T=192, rank=128, Bt=0),
    replace(OSS, name="gpt-oss, adapters of rank 128", rank=128, bias=False, Bt=0),
    replace(QWEN, name="qwen3, int8, 64 rows a slot", T=1024, format="int8"),
    replace(QWEN, name="qwen3, int4, 12 rows a slot", T=192, format="int4"),
    *(replace(QWEN, name=f"qwen3, {form}", format=form) for form in ("fp8_e4m3", "nf4")),
    replace(QWEN, name="qwen3, mxfp4, 12 rows a slot", T=192, format="mxfp4"),
    replace(QWEN, name="qwen3, nvfp4, 128 rows a slot", T=2048, format="nvfp4"),
    replace(QWEN, name="qwen3, nf4, 12 rows a slot", T=192, format="nf4"),
    replace(QWEN, name="qwen3, float16", dtype=torch.float16),
    replace(QWEN, name="qwen3, geglu", activation="geglu", bias=True),
    replace(QWEN, name="qwen3, geglu_tanh", activation="geglu_tanh"),
    replace(SWITCH, name="switch, gelu_tanh", activation="gelu_tanh"),
    replace(SWITCH, name="switch, gelu", activation="gelu", bias=True),
    replace(SWITCH, name="switch, silu", activation="silu"),
    replace(SWITCH, name="switch, relu2", activation="relu2"),
    Case("mixtral-8x7b", 8192, 4096, 14336, 8, 2, 2, E=8),
    Case("odd", 1000, 200, 120, 5, 3, 2, bias=True, E=5),
    Case("unaligned", 1000, 100, 52, 5, 3, 2, bias=True, E=5),
    replace(OSS, name="edge, float32, 8 rows a slot", T=64, H=512, I=256, B=16, K=2, Bt=4, dtype=torch.float32, E=16),
)


def launches(case: Case, arch: str) -> dict[str, list[Launch]]:
    """Collect all that one step of the case starts on `arch`, by pass: routing, forward, backward with all gradients.

    "routing" has what a step of the layer starts; "more" has the statistics, the placing of a
    given choice, and the norms that REAP sums.
    """
    found: dict[str, list[Launch]] = {name: [] for name in PASSES}
    step(case, arch, {name: kept.append for name, kept in found.items()})
    return found


def step(
    case: Case, arch: str, execute: Mapping[str, Execute], *, inputs: OpInputs | None = None, device: str = "meta"
) -> None:
    """Run one step of the case on tensors without values; `execute` says by pass what becomes of its launches.

    `inputs` are those of the experts, None = `inputs_of` the case on `device`.
    """
    grad_TK = _route(case, execute, device)
    inputs = inputs_of(case, device) if inputs is None else inputs
    how: dict[str, Any] = {"activation": case.activation, "rows_per_slot": case.rows_per_slot, "arch": arch}
    how["frozen_format"] = case.format
    y_TH, z_RF, _ = experts.forward(inputs, keep_z=case.keep_z, execute=execute["forward"], **how)
    experts.forward(inputs, keep_z=case.keep_z, want_reap=True, execute=_of_row_sums(execute["more"]), **how)
    experts.backward(y_TH, z_RF, inputs.kept, needs=needs_of(case), execute=execute["backward"], **how)
    grad_TK(execute["backward"])


def _of_row_sums(execute: Execute) -> Execute:
    """Execute only what a forward starts for the importance sums, which the timed forward does not measure."""
    return lambda launch: execute(launch) if "row_sums" in launch.name else None


def needs_of(case: Case) -> list[bool]:
    """List all gradients that the case has, and the importance sums."""
    adapters = ("a_in", "b_in", "a_out", "b_out")
    has = {"x_TH", "weights_TK", *(adapters if case.rank else ("w_in", "w_out"))}
    has |= {"bias_in", "bias_out"} if case.bias and not case.rank else set()
    return [*(name in has for name in DIFFERENTIABLE), True]


def _route(case: Case, execute: Mapping[str, Execute], device: str) -> Callable[[Execute], object]:
    """Run everything of the router but its backward, which is returned."""
    client_T = _ids(case.T, device=device) if case.clients > 1 else None
    who = Holders(_ids(case.clients, case.E, device=device), client_T, None)
    rule = Rule(case.K, case.scoring, True, *case.groups)
    logits_TE = torch.empty(case.T, case.E, dtype=torch.float32, device=device)
    bias_E = torch.empty(case.E, dtype=torch.float32, device=device) if case.scoring == "sigmoid" else None

    def route(execute: Execute, *, with_stats: bool) -> tuple[Tensor, ...]:
        how = {"num_slots": case.B, "with_stats": with_stats, "execute": execute}
        return routing.route(logits_TE, who, bias_E, rule, **how)

    weights_TK, experts_TK = route(execute["routing"], with_stats=False)[:2]
    route(execute["more"], with_stats=True)
    routing.place(experts_TK, who, num_slots=case.B, execute=execute["more"])
    return lambda execute: routing.route_backward(weights_TK, logits_TE, experts_TK, who, rule, execute=execute)


def inputs_of(case: Case, device: str = "meta") -> OpInputs:
    """Make the operator's tensors, without values; on the CPU their memory is never touched."""
    T, H, I, K = case.T, case.H, case.I, case.K  # noqa: E741
    F, R = width(case.activation, I), case.T * case.K
    real = lambda *size: torch.empty(*size, dtype=case.dtype, device=device)  # noqa: E731
    held = case.B // case.clients if case.rank else case.B
    trainable, frozen = (held, 0) if case.rank else (case.Bt, case.B - case.Bt)
    w_in_frozen, w_in_scale, w_in_whole = _frozen(case, (frozen, F, H), device)
    w_out_frozen, w_out_scale, w_out_whole = _frozen(case, (frozen, H, I), device)
    rank = case.rank
    return OpInputs(
        x_TH=real(T, H),
        weights_TK=torch.empty(T, K, dtype=torch.float32, device=device),
        rows_TK=_ids(T, K, device=device),
        tokens_R=_ids(R, device=device),
        places_R=_ids(R, device=device),
        offsets_B1=_ids(case.B + 1, device=device),
        w_in=real(trainable, F, H),
        w_out=real(trainable, H, I),
        bias_in=real(trainable, F) if case.bias else None,
        bias_out=real(trainable, H) if case.bias else None,
        w_in_frozen=w_in_frozen,
        w_out_frozen=w_out_frozen,
        bias_in_frozen=real(frozen, F) if case.bias and frozen else None,
        bias_out_frozen=real(frozen, H) if case.bias and frozen else None,
        w_in_scale=w_in_scale,
        w_out_scale=w_out_scale,
        w_in_whole=w_in_whole,
        w_out_whole=w_out_whole,
        a_in=real(case.B, rank, H) if rank else None,
        b_in=real(case.B, F, rank) if rank else None,
        a_out=real(case.B, rank, I) if rank else None,
        b_out=real(case.B, H, rank) if rank else None,
        scale_B=torch.empty(case.B, dtype=torch.float64, device=device) if rank else None,
        base_of_slot_B=_ids(case.B, device=device) if rank else None,
        trainable_B=None,
    )


def _ids(*size: int, device: str) -> Tensor:
    return torch.empty(*size, dtype=torch.int64, device=device)


def _frozen(case: Case, shape: tuple[int, int, int], device: str) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Make the frozen matrices as they are stored, their scales, and those of whole matrices."""
    slots, rows, columns = shape
    if not slots:
        return None, None, None
    if not case.format:
        return torch.empty(shape, dtype=case.dtype, device=device), None, None
    form = FORMATS[case.format]
    tall, wide = form.block_of(rows, columns)
    codes = torch.empty(slots, rows, columns * form.bits // 8, dtype=form.codes, device=device)
    scale = torch.empty(slots, rows // tall, columns // wide, dtype=form.scale, device=device)
    return codes, scale, torch.empty(slots, dtype=torch.float32, device=device) if form.whole else None
