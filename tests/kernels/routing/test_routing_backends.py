"""Who serves a routing call: asked for, found out, refused with a reason, and said once."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from fedmoe_kernels import Routing, SlotMap, route
from fedmoe_kernels.backends import can_run_triton, use_triton, warn_once

CPU, GPU = torch.device("cpu"), torch.device("cuda")
WHOLE = SlotMap.build(torch.ones(3, dtype=torch.bool))


def test_the_kernels_refuse_cpu_tensors_by_name_and_with_a_remedy():
    with pytest.raises(ValueError, match=r"backend='triton' .*cpu tensors.*TRITON_INTERPRET=1"):
        route(torch.zeros(2, 3), 1, backend="triton")
    with pytest.raises(ValueError, match=r"backend='triton' .*cpu tensors"):
        Routing.from_topk(torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, 1), WHOLE, backend="triton")


def test_an_unknown_backend_is_refused():
    with pytest.raises(ValueError, match="backend='cudnn' is unknown; choose one of auto, torch, triton"):
        route(torch.zeros(2, 3), 1, backend="cudnn")
    with pytest.raises(ValueError, match="backend='reference' is unknown"):
        Routing.from_topk(torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, 1), WHOLE, backend="reference")


def test_auto_on_a_cpu_is_torch_without_a_word(recwarn):
    assert torch.equal(route(torch.zeros(2, 3), 2).experts_TK, route(torch.zeros(2, 3), 2, backend="torch").experts_TK)
    assert not recwarn.list


def test_auto_on_a_gpu_says_once_for_each_reason_what_it_chose(recwarn):
    warn_once.cache_clear()
    for reason in ("k=17 is too many", "k=17 is too many", "logits_TE is float64", "k=17 is too many"):
        assert not use_triton("auto", GPU, reason, verb="route")
    warn_once.cache_clear()
    said = [str(warning.message) for warning in recwarn.list]
    assert said == [
        "route runs in plain torch, not in Triton kernels: k=17 is too many",
        "route runs in plain torch, not in Triton kernels: logits_TE is float64",
    ]


def test_torch_is_taken_at_its_word_and_triton_too():
    assert not use_triton("torch", GPU, None, verb="route")
    with pytest.raises(ValueError, match=r"cannot serve route: k=17 is too many; or use backend='auto'"):
        use_triton("triton", GPU, "k=17 is too many", verb="route")


@pytest.mark.skipif(torch.cuda.is_available(), reason="says why there is no GPU, but there is one")
def test_a_missing_gpu_is_a_reason():
    assert can_run_triton(GPU)
    assert can_run_triton(CPU)


def test_importing_the_package_does_not_import_triton():
    code = "import sys, fedmoe_kernels; sys.exit('triton' in sys.modules or 'fedmoe_kernels.gpu' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=120).returncode == 0


def test_arguments_on_another_device_are_refused_by_name():
    meta_2 = torch.zeros(2, dtype=torch.bool, device="meta")
    with pytest.raises(ValueError, match=r"valid_T is torch.bool \(2,\) on meta"):
        route(torch.zeros(2, 3), 1, valid_T=meta_2)
    with pytest.raises(ValueError, match=r"bias_E is \(3,\) on meta"):
        route(torch.zeros(2, 3), 1, scoring="sigmoid", bias_E=torch.zeros(3, device="meta"))
    with pytest.raises(ValueError, match="weights_TK is on meta"):
        Routing.from_topk(torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, 1, device="meta"), WHOLE)
