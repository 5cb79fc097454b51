"""What a call copies or casts besides its work: nothing of frozen experts in autocast's dtype, and else it says so."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fedmoe_kernels import ExpertLora, ExpertWeights, Quantized, Routing, SlotMap, backends, moe_mlp
from fedmoe_kernels.experts import moe_mlp as experts

T, H, I, B, K = 24, 16, 8, 4, 2  # noqa: E741


class Casts(TorchDispatchMode):
    """Collects the shapes of what is converted or copied."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[torch.Size] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten._to_copy.default, torch.ops.aten.clone.default):
            self.shapes.append(args[0].shape)
        return func(*args, **(kwargs or {}))


def randn(*size: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed)).to(dtype)


def routing() -> Routing:
    chosen_TK = torch.arange(T * K).reshape(T, K) % B
    return Routing.from_topk(chosen_TK, torch.full((T, K), 0.5), SlotMap(torch.arange(B), B))


def weights(frozen: torch.dtype) -> tuple[ExpertWeights, ExpertWeights]:
    """One trainable slot in float32, three frozen ones; values that bfloat16 holds."""
    w_in, w_out = randn(B, 2 * I, H, dtype=torch.bfloat16, seed=1), randn(B, H, I, dtype=torch.bfloat16, seed=2)
    return tuple(ExpertWeights(w[:1].float().requires_grad_(), w[1:].to(frozen)) for w in (w_in, w_out))


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str]]:
    """What this test warned of, with the limit low enough for its sizes and nothing said before."""
    monkeypatch.setattr(experts, "WORTH_SAYING", 1)
    backends.warn_once.cache_clear()
    caught = warnings.catch_warnings(record=True)
    log = caught.__enter__()
    warnings.simplefilter("always")
    yield lambda: [str(warning.message) for warning in log]
    caught.__exit__(None, None, None)
    backends.warn_once.cache_clear()


def test_frozen_experts_in_autocasts_dtype_are_not_cast(said: Callable[[], list[str]]) -> None:
    """Beside float32 masters; the same bits as from float32, which is converted at every call and says so once."""
    found = {}
    for dtype in (torch.bfloat16, torch.float32):
        w_in, w_out = weights(dtype)
        x_TH = randn(T, H).requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16), Casts() as casts:
            y_TH = moe_mlp(x_TH, routing(), w_in, w_out)
            moe_mlp(x_TH, routing(), w_in, w_out)
        y_TH.float().sum().backward()
        found[dtype] = (y_TH.detach(), x_TH.grad, w_in.trainable.grad, w_out.trainable.grad)
        assert (w_in.frozen.shape in casts.shapes) == (dtype == torch.float32)
        assert w_in.trainable.shape in casts.shapes, "masters change at every step, so they are converted"
        assert len(said()) == (0 if dtype == torch.bfloat16 else 2), "once for w_in and once for w_out"
    assert all(torch.equal(a, b) for a, b in zip(*found.values(), strict=True))
    assert said()[0] == (
        "the frozen part of w_in is torch.float32, and autocast converts its 3072 bytes at every call; "
        "keep it in torch.bfloat16"
    )


def test_a_frozen_part_of_another_dtype_needs_autocast() -> None:
    with pytest.raises(ValueError, match=r"w_in's frozen part is torch\.bfloat16 .* x_TH torch\.float32"):
        moe_mlp(randn(T, H), routing(), *weights(torch.bfloat16))


def test_codes_say_nothing(said: Callable[[], list[str]]) -> None:
    w_in, w_out = (ExpertWeights(randn(1, *s), Quantized.of(randn(3, *s), "int8")) for s in ((64, 32), (32, 32)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        moe_mlp(randn(T, 32), routing(), w_in, w_out)
    assert said() == []


def test_weights_that_are_not_contiguous_run_and_say_so_once(said: Callable[[], list[str]]) -> None:
    w_in, w_out = randn(B, H, 2 * I, seed=1).transpose(1, 2), randn(B, H, I, seed=2)
    want = moe_mlp(randn(T, H), routing(), w_in.contiguous(), w_out)
    assert said() == []
    for _ in range(2):
        assert torch.equal(moe_mlp(randn(T, H), routing(), w_in, w_out), want)
    assert said() == ["w_in is not contiguous, and its 4096 bytes are copied at every call; store it so"]


def test_weights_off_16_bytes_run_on_a_gpu_and_say_so_once(
    said: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    from fedmoe_kernels.gpu.experts import call

    monkeypatch.setattr(call, "WORTH_SAYING", 1)
    flat = randn(B * H * I + 1)
    off, on = flat[1:].view(B, H, I), flat[:-1].view(B, H, I)
    assert off.data_ptr() % 16 == 4
    assert call.aligned(on, "w_out") is on
    for _ in range(2):
        copied = call.aligned(off, "w_out")
        assert copied.data_ptr() % 16 == 0
        assert torch.equal(copied, off)
        assert call.aligned(off, "x_TH").data_ptr() % 16 == 0, "of x a copy is one call's, and nothing is said"
    assert said() == [
        "w_out starts 4 bytes past a multiple of 16, and its 2048 bytes are copied at every call; let it start at one"
    ]


@pytest.mark.parametrize("scale", [0.5, torch.tensor(0.5), torch.tensor(0.5, dtype=torch.float64)], ids=repr)
def test_a_scale_on_the_host_is_filled_in_on_the_device(scale: float | Tensor) -> None:
    """No copy from the host, which a CUDA graph could not hold; the meta device stands for one."""
    factors = [torch.empty(2, *s, device="meta") for s in ((4, H), (2 * I, 4), (4, I), (H, 4))]
    with Casts() as casts:
        scale_B = experts._scales(ExpertLora(*factors, scale=scale), torch.device("meta"))
    assert (scale_B.shape, scale_B.dtype, scale_B.device.type) == ((2,), torch.float64, "meta")
    assert casts.shapes == []


PRECISIONS = {
    "nothing set": ("pass", "ieee"),
    "the older switch": ("torch.backends.cuda.matmul.allow_tf32 = True", "tf32"),
    "the oldest": ("torch.set_float32_matmul_precision('high')", "tf32"),
    "the newer setting": ("torch.backends.cuda.matmul.fp32_precision = 'tf32'", "tf32"),
    "of all backends": ("torch.backends.fp32_precision = 'tf32'", "tf32"),
    "of all but this": (
        "torch.backends.fp32_precision = 'tf32'; torch.backends.cuda.matmul.fp32_precision = 'ieee'",
        "ieee",
    ),
}


@pytest.mark.parametrize(("setting", "float32"), PRECISIONS.values(), ids=PRECISIONS.keys())
def test_tf32_is_for_float32_alone_and_however_it_was_allowed(setting: str, float32: str) -> None:
    """In a process of its own: the older switch cannot be read once the newer one was set, and both are global."""
    pytest.importorskip("triton")
    script = (
        "import torch\n"
        "from fedmoe_kernels.gpu.launch import dot_precision\n"
        f"{setting}\n"
        "print(*map(dot_precision, (torch.float32, torch.bfloat16, torch.float16)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.split() == [float32, "ieee", "ieee"], done.stderr
