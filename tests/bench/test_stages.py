"""The stages that are timed one by one make, run in order, what the operator makes."""

from __future__ import annotations

import subprocess
import sys

import pytest
from processes import of_a_child

INTERPRETED = "import patched_once; patched_once.install()\n"  # as tests/interpret has it


@pytest.mark.parametrize("case", ["all", "quarter", "eighth-quarter", "empty"])
def test_stages_add_up_to_the_operator(case: str) -> None:
    from bench.common.cases import CLIENT_CASES, TINY, problem
    from bench.common.peers import errors, fedmoe, step
    from bench.common.stages import STAGES, cut

    for shape in TINY:
        task = problem(shape, next(c for c in CLIENT_CASES if c.name == case))
        made = cut(task)
        assert tuple(made.stages) == STAGES
        for name in STAGES:
            made.stages[name]()
        want = step(fedmoe(), task)()
        got = {"y": made.y_TH, "dw_in": made.dw_in, "dw_out": made.dw_out}
        found = errors(got, {name: want[name] for name in got})
        assert max(found.values()) < 1e-6, (shape.name, found)


@pytest.mark.parametrize("triton", [False, True])
def test_every_form_runs_in_both_directions(triton: bool) -> None:
    """By the slot loops, and by the kernels in Triton's interpreter."""
    if triton:
        pytest.importorskip("triton")
    code = (
        "from bench.common.cases import CLIENT_CASES, Shape, problem\n"
        "from bench.common.stages import FORMS, whole\n"
        "task = problem(Shape('small', 12, 32, 32, 4, 2, bias=True), CLIENT_CASES[4])\n"
        "for form in FORMS:\n"
        "    for run in whole(task, form).values(): run()\n"
    )
    environment = of_a_child()
    if triton:
        code, environment = INTERPRETED + code, of_a_child(TRITON_INTERPRET="1")
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_stages_of_the_kernels_add_up_to_the_operator() -> None:
    """The same of the launches that a GPU would get, in Triton's interpreter."""
    pytest.importorskip("triton")
    code = INTERPRETED + (
        "from bench.common.cases import CLIENT_CASES, Shape, problem\n"
        "from bench.common.peers import errors, fedmoe, step\n"
        "from bench.common.stages import cut\n"
        "task = problem(Shape('small', 20, 32, 16, 4, 2, bias=True), CLIENT_CASES[4])\n"
        "made, want = cut(task), step(fedmoe('cpu'), task)()\n"
        "for run in (made.stages[n] for n in ('up', 'down', 'combine', 'data_gradient', 'weight_gradient')): run()\n"
        "got = {'y': made.y_TH, 'dw_in': made.dw_in, 'dw_out': made.dw_out}\n"
        "found = errors(got, {name: want[name] for name in got})\n"
        "assert max(found.values()) < 1e-6, found\n"
    )
    environment = of_a_child(TRITON_INTERPRET="1")
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
