"""The stand-ins for megablocks' extensions, against definitions in plain loops, and how they are put in; needs no
megablocks."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from dmoe_truth import relative
from torch import Tensor

from fedmoe_bindings.megablocks import copies, install_backend, stages, uninstall_backend
from fedmoe_bindings.megablocks.backend import INSTALL, PACKAGE, StandIn, installed, missing

T, K, E, H = 11, 2, 4, 6
BLOCK = 8


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


class Choices:
    """T tokens' choices of K of E experts, sorted as megablocks sorts them; expert 2 has none."""

    def __init__(self) -> None:
        experts = torch.randint(0, E - 1, (T, K), generator=torch.Generator().manual_seed(3)).flatten()
        experts = torch.where(experts == 2, 3, experts).int()
        self.bin_ids, self.indices = torch.empty_like(experts), torch.empty_like(experts)
        stages.sort(experts, 2, self.bin_ids, self.indices)
        self.counts = stages.histogram(experts, E)
        self.bins, self.padded_bins = torch.empty_like(self.counts), torch.empty_like(self.counts)
        stages.inclusive_cumsum(self.counts, 0, self.bins)
        stages.inclusive_cumsum((self.counts + BLOCK - 1) // BLOCK * BLOCK, 0, self.padded_bins)
        self.experts = experts

    def padded(self, row: int) -> int:
        """Where a sorted row lies once every expert's rows are rounded up."""
        e = int(self.bin_ids[row])
        return row - int(self.bins[e] - self.counts[e]) + (int(self.padded_bins[e - 1]) if e else 0)

    def binned(self, row: int, capacity: int) -> int | None:
        """Where it lies in (E * capacity); None = dropped."""
        e = int(self.bin_ids[row])
        within = row - int(self.bins[e] - self.counts[e])
        return e * capacity + within if within < capacity else None


def test_sort_histogram_and_sums() -> None:
    c = Choices()
    assert c.counts.dtype == torch.int32
    assert c.counts.tolist() == [c.experts.tolist().count(e) for e in range(E)]
    assert c.counts[2] == 0
    assert c.bin_ids.tolist() == sorted(c.experts.tolist())
    assert c.indices.tolist() == sorted(range(T * K), key=lambda place: (int(c.experts[place]), place))
    before = torch.empty_like(c.counts)
    stages.exclusive_cumsum(c.counts, 0, before)
    assert before.tolist() == [0, *itertools.accumulate(c.counts.tolist())][:-1]
    matrix = torch.tensor([[0, 1, 1], [2, 2, 2]])
    assert stages.histogram(matrix, 3).tolist() == [[1, 2, 0], [0, 0, 3]]


def test_the_blocks_of_a_sparse_matrix() -> None:
    out = torch.empty(4 * 3, dtype=torch.int16)
    stages.indices(torch.tensor([BLOCK, BLOCK, 4 * BLOCK], dtype=torch.int32), BLOCK, 4, 3, out)
    assert out.view(4, 3).tolist() == [[0, 1, 2], [6, 7, 8], [6, 7, 8], [6, 7, 8]]


def test_replicate_and_its_derivative() -> None:
    bins, x = torch.tensor([2, 2, 5]), drawn(3, 3)
    out, back = torch.empty(3, 5, dtype=x.dtype), torch.empty(3, 3, dtype=x.dtype)
    stages.replicate_forward(x, bins, out)
    assert torch.equal(out, x[:, [0, 0, 2, 2, 2]])
    grad = drawn(3, 5, seed=1)
    stages.replicate_backward(grad, bins, back)
    assert relative(back, torch.stack([grad[:, :2].sum(1), torch.zeros(3), grad[:, 2:].sum(1)], 1)) < 1e-15


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("form", ["plain", "padded"])
def test_gather_and_scatter(form: str, weighted: bool) -> None:
    c, x, weights = Choices(), drawn(T, H), drawn(T * K, seed=1) if weighted else None
    room = T * K if form == "plain" else int(c.padded_bins[-1])
    want = torch.zeros(room, H, dtype=x.dtype)
    where = [row if form == "plain" else c.padded(row) for row in range(T * K)]
    for row, place in enumerate(c.indices.tolist()):
        want[where[row]] = x[place // K] * (1 if weights is None else weights[place])
    bounds = (c.bins,) if form == "plain" else (c.bins, c.padded_bins)
    gather, scatter = (
        (copies.gather, copies.scatter) if form == "plain" else (copies.padded_gather, copies.padded_scatter)
    )
    wgrad = copies.scatter_wgrad if form == "plain" else copies.padded_scatter_wgrad
    assert torch.equal(gather(x, c.indices, c.bin_ids, weights, *bounds, K), want)
    rows, back = drawn(room, H, seed=2), torch.zeros(T, H, dtype=x.dtype)
    grad, want_w = drawn(T, H, seed=4), torch.zeros(T * K, dtype=x.dtype)
    for row, place in enumerate(c.indices.tolist()):
        back[place // K] += rows[where[row]] * (1 if weights is None else weights[place])
        want_w[place] = rows[where[row]] @ grad[place // K]
    assert relative(scatter(rows, c.indices, c.bin_ids, weights, *bounds, K), back) < 1e-15
    assert relative(wgrad(rows, grad, c.indices, c.bin_ids, *bounds, K), want_w) < 1e-15


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("capacity", [1, 5, 40], ids=["most are dropped", "some are dropped", "none is dropped"])
def test_binned_gather_and_scatter(capacity: int, weighted: bool) -> None:
    c, x, weights = Choices(), drawn(T, H), drawn(T * K, seed=1) if weighted else None
    want = torch.zeros(E * capacity, H, dtype=x.dtype)
    rows, back = drawn(E, capacity, H, seed=2), torch.zeros(T, H, dtype=x.dtype)
    grad, want_w = drawn(T, H, seed=4), torch.zeros(T * K, dtype=x.dtype)
    for row, place in enumerate(c.indices.tolist()):
        if (at := c.binned(row, capacity)) is not None:
            scale = 1 if weights is None else weights[place]
            want[at] = x[place // K] * scale
            back[place // K] += rows.view(-1, H)[at] * scale
            want_w[place] = rows.view(-1, H)[at] @ grad[place // K]
    got = copies.binned_gather(x, c.indices, weights, c.bins, capacity, K)
    assert torch.equal(got, want.view(E, capacity, H))
    assert relative(copies.binned_scatter(rows, c.indices, weights, c.bins, K), back) < 1e-15
    assert relative(copies.binned_scatter_wgrad(rows, grad, c.indices, c.bins, K), want_w) < 1e-15


def test_sums_of_half_precision_are_rounded_once() -> None:
    """Four rows of which the first is large: summed in bfloat16 the others would be lost."""
    rows = torch.tensor([[256.0], [0.75], [0.75], [0.75]], dtype=torch.bfloat16)
    zero, four = torch.zeros(4, dtype=torch.int32), torch.tensor([4], dtype=torch.int32)
    got = copies.scatter(rows, torch.arange(4, dtype=torch.int32), zero, None, four, 4)
    assert got.item() == 258.0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_grouped_gemm_by_its_definition(dtype: torch.dtype) -> None:
    sizes, tolerance = torch.tensor([3, 0, 5]), {torch.float64: 1e-14, torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
    bounds = list(itertools.pairwise([0, 3, 3, 8]))
    a, b, bt, other = (drawn(*s, seed=i).to(dtype) for i, s in enumerate([(8, 5), (3, 5, 6), (3, 6, 5), (8, 6)]))
    plain = torch.cat([a[i:j].double() @ b[e].double() for e, (i, j) in enumerate(bounds)])
    turned = torch.cat([a[i:j].double() @ bt[e].double().T for e, (i, j) in enumerate(bounds)])
    outer = torch.stack([a[i:j].double().T @ other[i:j].double() for i, j in bounds])
    assert relative(stages.gmm(a, b, sizes), plain) < tolerance
    assert relative(stages.gmm(a, bt, sizes, trans_b=True), turned) < tolerance
    assert relative(stages.gmm_op(a, bt, sizes, trans_b=True), turned) < tolerance
    assert relative(stages.gmm(a, other, sizes, trans_a=True), outer) < tolerance
    room = torch.full((8, 6), torch.nan, dtype=dtype)
    assert stages.gmm(a, b, sizes, c=room) is room
    assert relative(room, plain) < tolerance


def test_grouped_gemm_has_gradients() -> None:
    sizes = torch.tensor([3, 0, 2])
    a, b = drawn(5, 4).requires_grad_(), drawn(3, 6, 4, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: stages.gmm_op(a, b, sizes, trans_b=True), (a, b))


def test_grouped_gemm_refuses_what_it_has_not() -> None:
    with pytest.raises(ValueError, match="add up to 4, and a has 5 rows"):
        stages.gmm(drawn(5, 4), drawn(2, 4, 3), torch.tensor([3, 1]))
    with pytest.raises(ValueError, match="no such product"):
        stages.gmm(drawn(5, 4), drawn(2, 4, 3), torch.tensor([3, 2]), trans_a=True, trans_b=True)


# What imports as megablocks does: both extensions and its kernels, from a package whose folder has none.
FAKE = """
import grouped_gemm, megablocks_ops
from megablocks.backend import kernels
from megablocks.backend.kernels import gather
gmm = grouped_gemm.ops.gmm
"""


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package that is called megablocks, and nothing of it imported before or after."""
    outside = {name: module for name, module in sys.modules.items() if name.split(".")[0] in (PACKAGE, "stk")}
    for name in outside:
        monkeypatch.delitem(sys.modules, name)
    for folder in ("stk", "megablocks/backend", "megablocks-0.10.0.dist-info"):
        (tmp_path / folder).mkdir(parents=True)
    for path, text in (("stk", ""), ("megablocks", FAKE), ("megablocks/backend", "")):
        (tmp_path / path / "__init__.py").write_text(text)
    (tmp_path / "megablocks-0.10.0.dist-info" / "METADATA").write_text("Name: megablocks\nVersion: 0.10.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    uninstall_backend()


def test_the_package_imports_our_modules_and_lets_go_of_them(fake: Path) -> None:
    with pytest.raises(ModuleNotFoundError, match="grouped_gemm"):
        import megablocks
    install_backend()
    install_backend()
    import megablocks

    assert megablocks.kernels.gather is megablocks.gather is copies.gather
    assert megablocks.gmm is stages.gmm_op
    assert installed()
    uninstall_backend()
    assert not installed()
    assert not [name for name, module in sys.modules.items() if isinstance(module, StandIn)]
    assert PACKAGE not in sys.modules
    uninstall_backend()


@pytest.mark.parametrize("early", ["grouped_gemm", "megablocks_ops", "megablocks"])
def test_what_was_imported_before_is_not_taken_away(fake: Path, early: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, early, ModuleType(early))
    with pytest.raises(RuntimeError, match=f"{early} is imported already; call install_backend"):
        install_backend()
    assert not installed()


def test_another_version_is_told(fake: Path) -> None:
    (fake / "megablocks-0.10.0.dist-info" / "METADATA").write_text("Name: megablocks\nVersion: 0.7.0\n")
    with pytest.warns(UserWarning, match=r"megablocks is 0\.7\.0"):
        install_backend()


def test_without_the_package_the_command_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A folder of its name, such as that of these tests, is not the package."""
    without = [entry for entry in sys.path if not (Path(entry) / PACKAGE / "__init__.py").exists()]
    monkeypatch.setattr(sys, "path", [str(tmp_path), *without])
    for name in [name for name in sys.modules if name.split(".")[0] == PACKAGE]:
        monkeypatch.delitem(sys.modules, name)
    (tmp_path / PACKAGE).mkdir()
    with pytest.raises(ModuleNotFoundError, match="pip install --no-deps --no-build-isolation"):
        install_backend()
    assert missing() == PACKAGE
    assert "megablocks==0.10.0" in INSTALL


def test_the_binding_alone_puts_nothing_into_sys_modules() -> None:
    import subprocess

    from processes import of_a_child

    said = (
        "import sys, fedmoe_bindings.megablocks; print([m for m in ('grouped_gemm', 'megablocks') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", said], env=of_a_child(), capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
