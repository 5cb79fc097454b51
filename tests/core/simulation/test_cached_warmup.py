"""The cached warm-up: damaged or foreign entries are made again and told, what is not a file is refused."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoint_cases import in_child
from torch import Tensor

from fedmoe_core.base.halves import beside, whose
from fedmoe_core.simulation.directory.checkpoint import save_checkpoint
from fedmoe_core.simulation.directory.claim import JSON_NAME
from fedmoe_core.simulation.warmup import cached_warmup

KEY = "0123456789abcdef"
WARM = {"dense.0": torch.arange(6.0).view(2, 3), "moe.0.w_in": torch.ones(4)}
FORMS = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in WARM.items()}


def warm(directory: Path) -> tuple[dict[str, Tensor], bool]:
    return cached_warmup(directory, KEY, lambda: dict(WARM), FORMS)


def save(place: Path, tensors: dict[str, Tensor], key: str = KEY) -> None:
    save_checkpoint(place, tensors, {"warmup": key}, {})


def flip(place: Path) -> None:
    (file,) = place.glob("*.safetensors")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


FOREIGN: dict[str, Callable[[Path], object]] = {
    "a flipped bit": flip,
    "no tensors": lambda place: next(iter(place.glob("*.safetensors"))).unlink(),
    "a cut JSON": lambda place: (place / "checkpoint.json").write_text("{"),
    "of another key": lambda place: save(place, WARM, "f" * 16),
    "one more": lambda place: save(place, {**WARM, "dense.1": torch.ones(1)}),
    "of another shape": lambda place: save(place, {**WARM, "dense.0": torch.ones(3, 2)}),
    "of another dtype": lambda place: save(place, {**WARM, "moe.0.w_in": torch.ones(4, dtype=torch.int32)}),
    "not finite": lambda place: save(place, {**WARM, "moe.0.w_in": torch.full((4,), torch.nan)}),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_a_damaged_or_foreign_entry_is_made_again_and_told_in_one_line(case: str, tmp_path: Path) -> None:
    assert warm(tmp_path)[1] is False
    found, cached = warm(tmp_path)
    assert cached
    assert all(torch.equal(found[key], tensor) for key, tensor in WARM.items())
    FOREIGN[case](tmp_path / f"warmup-{KEY}")
    with pytest.warns(UserWarning, match="the cached warm-up is made again: ") as told:
        found, cached = warm(tmp_path)
    assert not cached
    assert ["\n" in str(warning.message) for warning in told] == [False]
    assert all(torch.equal(found[key], tensor) for key, tensor in WARM.items())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert warm(tmp_path)[1] is True


def as_pipe(path: Path, elsewhere: Path) -> None:
    os.mkfifo(path)


def as_link(path: Path, elsewhere: Path) -> None:
    path.symlink_to(elsewhere)


def as_folder(path: Path, elsewhere: Path) -> None:
    path.mkdir()


@pytest.mark.parametrize("make", [as_pipe, as_link, as_folder])
@pytest.mark.parametrize("name", [f"warmup-{KEY}", f"warmup-{KEY}/checkpoint.json"])
def test_what_is_not_a_file_of_ours_is_refused_and_nothing_is_written_elsewhere(
    name: str, make: Callable[[Path, Path], None], tmp_path: Path
) -> None:
    cache, elsewhere = tmp_path / "cache", tmp_path / "elsewhere"
    if "/" in name:
        warm(cache)
        (cache / name).rename(elsewhere)
    elif make is as_folder:
        return  # that is what lies there
    else:
        cache.mkdir()
        elsewhere.mkdir()
    make(cache / name, elsewhere)
    before = sorted(map(str, elsewhere.rglob("*")))
    with pytest.raises(ValueError, match=r"is (a pipe|a symbolic link|a folder), and fedmoe .*; move it away"):
        warm(cache)
    assert sorted(map(str, elsewhere.rglob("*"))) == before


def test_two_runs_that_begin_at_once_make_one_warm_up_and_neither_takes_the_other_s_half(tmp_path: Path) -> None:
    place = tmp_path / f"warmup-{KEY}"
    place.mkdir()
    with beside(place / JSON_NAME) as living:  # of a process that runs
        (living / "tensors").write_text("half")
        assert in_child(lambda: warm(tmp_path)) == 0
        assert (living / "tensors").read_text() == "half"
    child = os.fork()
    if child == 0:
        with beside(place / JSON_NAME):
            os._exit(0)
    os.waitpid(child, 0)
    assert [whose(entry) for entry in place.iterdir() if whose(entry)] == [JSON_NAME]
    (place / JSON_NAME).unlink()
    assert in_child(lambda: warm(tmp_path)) == 0
    assert not any(map(whose, place.iterdir()))
