"""The checks of `bash bench/gpu.sh correct` as tests, on any machine with a CUDA device: `make test-gpu`."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import pytest
import torch

from bench.gpu.measure import behave

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
    pytest.mark.timeout(600),
]


@functools.cache
def checks() -> Mapping[str, Any]:
    """All checks by name, bound to the GPU; none of them touches it before it is called."""
    where = ("cuda", "triton")
    return {**behave.every(*where, tiny=False), **behave.large_checks(*where, tiny=False)}


@pytest.mark.parametrize("name", list(checks()))
def test_on_the_gpu(name: str) -> None:
    try:
        assert checks()[name]()
    except behave.Skipped as reason:
        pytest.skip(str(reason))
