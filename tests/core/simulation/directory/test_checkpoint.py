"""A checkpoint is the previous one or the new one, whatever happens while it is written (invariant 10)."""

from __future__ import annotations

import os
import random
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_cases import CONFIG, in_child, loaded_round, only_tensor_file, refused, save_round, tensors_of

from fedmoe_core.simulation.directory import checkpoint, claim
from fedmoe_core.simulation.directory.checkpoint import ensure_writable, load_checkpoint, save_checkpoint


def test_everything_comes_back_as_it_was(tmp_path: Path) -> None:
    base = torch.randn(4, 6)
    tensors = {
        "float32": torch.tensor([-0.0, float("nan"), float("inf"), 1e-45]),
        "bfloat16": torch.randn(3).bfloat16(),
        "float64": torch.randn(2, 3, dtype=torch.float64),
        "int64": torch.tensor([-(2**63), 2**63 - 1]),
        "bool": torch.tensor([True, False]),
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 3),
        "transposed": base.mT,
        "slice of shared memory": base[1:3],
        "whole shared memory": base,
        "same tensor twice": base,
        "needs grad": torch.randn(2, requires_grad=True),
    }
    meta = {
        "round": 3,
        "loss": 0.1 + 0.2,
        "nan": float("nan"),
        "clients": {10: 1, 9: 2},
        "lines": (1, 2),
        "ümlaut": "☃",
    }
    save_checkpoint(tmp_path, tensors, meta, CONFIG)
    loaded = load_checkpoint(tmp_path, expected_fingerprint=CONFIG)
    assert loaded.tensors.keys() == tensors.keys()
    for key, want in tensors.items():
        got = loaded.tensors[key]
        assert (got.dtype, got.shape) == (want.dtype, want.shape), key
        plain = want.detach().contiguous().reshape(-1)
        assert torch.equal(got.reshape(-1).view(torch.uint8), plain.view(torch.uint8)), key
    assert loaded.meta["nan"] != loaded.meta["nan"]
    del meta["nan"], loaded.meta["nan"]
    assert loaded.meta == meta | {"clients": {"10": 1, "9": 2}, "lines": [1, 2]}
    assert loaded.versions["torch"] == torch.__version__


def test_loaded_tensors_do_not_depend_on_the_file(tmp_path: Path) -> None:
    save_round(tmp_path, 1)
    loaded = load_checkpoint(tmp_path).tensors
    only_tensor_file(tmp_path).write_bytes(b"\0" * 10_000)
    assert torch.equal(loaded["moe.0.w_in"], tensors_of(1)["moe.0.w_in"])


def test_old_files_go_and_foreign_files_stay(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "weights.safetensors").write_text("mine too")
    for round_ in (1, 2, 2, 3):  # the same round twice: equal bytes, equal name
        save_round(tmp_path, round_)
        assert loaded_round(tmp_path) == round_
    assert len(list(tmp_path.glob("state-*"))) == 1
    assert {path.name for path in tmp_path.iterdir()} >= {"notes.txt", "weights.safetensors"}
    assert len(list(tmp_path.iterdir())) == 4


# Invariant 10: after kill -9, resume finds the previous checkpoint or the new one.


def test_inv10_kill_at_every_step_of_a_save_leaves_one_whole_checkpoint(tmp_path: Path) -> None:
    """The n-th file operation kills the process, for every n until a save lives through."""
    outcomes = []
    for step in range(1, 100):
        directory = tmp_path / str(step)
        save_round(directory, 1)

        def dying_save(step: int = step, directory: Path = directory) -> None:
            calls = 0

            def deadly(real: Callable[..., Any]) -> Callable[..., Any]:
                def call(*args: Any, **kwargs: Any) -> Any:
                    nonlocal calls
                    calls += 1
                    if calls == step:
                        os.kill(os.getpid(), signal.SIGKILL)
                    return real(*args, **kwargs)

                return call

            for module, name in ((os, "replace"), (os, "fsync"), (os, "open"), (Path, "unlink"), (Path, "write_text")):
                setattr(module, name, deadly(getattr(module, name)))
            checkpoint.save_file = deadly(checkpoint.save_file)  # type: ignore[assignment]
            save_round(directory, 2)

        status = in_child(dying_save)
        outcomes.append(loaded_round(directory))
        save_round(directory, 3)
        assert loaded_round(directory) == 3
        assert len(list(directory.iterdir())) == 2  # leftovers of the killed save are gone
        if status == 0:
            break
        assert status == -signal.SIGKILL
    assert outcomes == sorted(outcomes)
    assert (outcomes[0], outcomes[-2], outcomes[-1]) == (1, 2, 2)  # killed before and after the commit, and not at all
    assert len(outcomes) > 8


def test_inv10_kill_at_random_moments_leaves_one_whole_checkpoint(tmp_path: Path) -> None:
    size, last, rng = 500_000, 0, random.Random(0)  # 2 MB, so that kills land in the middle of writing
    save_round(tmp_path, 0, size)
    for _ in range(12):
        child = os.fork()
        if child == 0:
            torch.set_num_threads(1)
            for round_ in range(last + 1, 10**6):
                save_round(tmp_path, round_, size)
            os._exit(1)
        time.sleep(rng.uniform(0.005, 0.1))
        os.kill(child, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        found = loaded_round(tmp_path, size)
        assert found >= last
        last = found
    assert last > 0


def test_inv10_every_file_is_on_disk_before_its_name_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A power cut cannot be staged here; the order of the calls that guard against it can be read."""
    calls: list[tuple[str, str]] = []
    fsync, replace = os.fsync, os.replace

    def watched_fsync(descriptor: int) -> None:
        calls.append(("sync", Path(os.readlink(f"/proc/self/fd/{descriptor}")).name))
        fsync(descriptor)

    def watched_replace(source: Path, target: Path) -> None:
        calls.append(("rename", source.name))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(os, "replace", watched_replace)
    save_round(tmp_path, 1)
    tensors, json_, names = "tensors", claim.JSON_NAME, tmp_path.name
    order = [("sync", tensors), ("rename", tensors), ("sync", json_), ("sync", names), ("rename", json_)]
    assert calls == [*order, ("sync", names)]


@pytest.mark.parametrize(("size", "padding"), [(10_000, 0), (10, 10_000)], ids=["in the tensors", "in the JSON"])
def test_full_disk_leaves_the_previous_checkpoint(tmp_path: Path, size: int, padding: int) -> None:
    """A limit on file size stands for the full disk: writing past it fails with an OSError in the same place."""

    def save_beyond_the_limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        with pytest.raises(OSError, match="the previous checkpoint is intact") as caught:
            save_checkpoint(tmp_path, tensors_of(2, size), {"round": 2, "padding": "x" * padding}, CONFIG)
        assert "\n" not in str(caught.value)

    save_round(tmp_path, 1)
    assert in_child(save_beyond_the_limit) == 0
    assert loaded_round(tmp_path) == 1
    assert len(list(tmp_path.iterdir())) == 2


def test_unwritable_directory_is_one_sentence_before_any_work(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    for directory in (file, file / "below", Path("/proc/fedmoe")):
        with pytest.raises(PermissionError, match="choose another directory") as caught:
            ensure_writable(directory)
        assert str(directory) in str(caught.value)
    assert ensure_writable(tmp_path / "a" / "b").is_dir()
    assert list((tmp_path / "a" / "b").iterdir()) == []


def test_directory_of_another_user_is_refused(tmp_path: Path) -> None:
    """Root passes every permission bit, so as root the check runs as another user."""
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o555)

    def check() -> None:
        if os.geteuid() == 0:
            os.setuid(65534)
        with pytest.raises(PermissionError, match="Permission denied"):
            ensure_writable(locked)

    assert in_child(check) == 0


def test_config_mismatch_names_the_first_differing_keys(tmp_path: Path) -> None:
    save_round(tmp_path, 1)
    own = {"train.lr": 0.001, "train.clip": 1.0, "train.trunk": "frozen"}
    now = {"algorithm": "fedavg", **own, "budgets": ("experts=25%",)}
    text = refused(tmp_path, expected_fingerprint=now)
    assert "algorithm = 'hfedmoe' then, 'fedavg' now" in text
    assert "budgets = ['experts=25%', 'experts=50%'] then, ['experts=25%'] now" in text
    assert "train.lr = 0.002 then, 0.001 now" in text
    assert "and 1 more" in text
    assert "train.clip" not in text
    text = refused(tmp_path, expected_fingerprint={**CONFIG, "seed": 1})
    assert "seed = absent then, 1 now" in text
    same = {**CONFIG, "budgets": tuple(CONFIG["budgets"])}  # type: ignore[arg-type]
    assert load_checkpoint(tmp_path, expected_fingerprint=same).meta == {"round": 1}
