"""What is compiled ahead of time is what a call finds in Triton's cache: equal keys, whatever a process did before."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys

import pytest
from processes import of_a_child

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
    pytest.mark.skipif("TRITON_INTERPRET" in os.environ, reason="where Triton interprets, it has no keys"),
]
# Every launch of a case, up to the compiler: the key that Triton's own call would look for, and the job's.
EQUAL = """
import hashlib, json, sys, types
import triton.compiler
from triton._C.libtriton import get_cache_invalidating_env_vars
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.cache import get_cache_key
from triton.runtime.driver import driver
from bench.aot.cases import CASES, launches
from bench.aot.sass import job_of

target, keys = GPUTarget("cuda", 90, 32), []

def seen(src, target=None, options=None, _env_vars=None):
    backend = make_backend(target)
    whole = src, backend, backend.parse_options(dict(options)), get_cache_invalidating_env_vars()
    keys.append(hashlib.sha256(get_cache_key(*whole).encode()).hexdigest())
    return types.SimpleNamespace(result=lambda: None)

triton.compiler.compile = seen
driver.set_active(types.SimpleNamespace(
    get_current_device=lambda: 0, get_current_stream=lambda device: 0, get_current_target=lambda: target))
unlike, count = [], 0
for case in CASES:
    if case.name in sys.argv[1:]:
        for launch in (launch for started in launches(case, "sm_90").values() for launch in started):
            keys.clear()
            launch.kernel.warmup(**launch.args, **launch.options, grid=launch.grid)
            count += 1
            if keys and keys != [job_of(launch, "sm_90").key()]:
                unlike.append(launch.kernel.fn.__qualname__)
print(json.dumps([count, unlike]))
"""
HASHED = """
import importlib, json, sys
for name in sys.argv[1:]:
    module = importlib.import_module(f"fedmoe_kernels.gpu.{name}")
    [getattr(value, "cache_key", None) for value in vars(module).values()]
from fedmoe_kernels.gpu.experts import data_gradient, up
print(json.dumps([up._up_kernel.cache_key, data_gradient._data_gradient_kernel.cache_key]))
"""


def said(code: str, *words: str) -> list[object]:
    done = subprocess.run([sys.executable, "-c", code, *words], env=of_a_child(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_a_job_has_the_key_of_the_call_it_stands_for() -> None:
    """All launches of a case with biases and one with adapters: the tuner and the carried cache count on it."""
    count, unlike = said(EQUAL, "gpt-oss-20b", "qwen3, adapters of 4 clients", "qwen3, int8")
    assert isinstance(count, int)
    assert count > 30
    assert unlike == []


def test_keys_do_not_depend_on_what_was_hashed_before() -> None:
    first = said(HASHED, "experts.up")
    assert first == said(HASHED, "experts.data_gradient", "experts.up") == said(HASHED)
