"""A run directory is fedmoe's by its marker alone, and fedmoe removes nothing from it but its own files."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmoe_core.base.halves import beside, whose
from fedmoe_core.simulation.directory import claim as run_directory
from fedmoe_core.simulation.directory.claim import (
    CHECKPOINT,
    FILES,
    LOCK,
    MARKER,
    claimed,
    exclusive,
    held,
    read_facts,
    refuse_claim,
)

FACTS = {"corpus_sha256": "c0ffee"}
WHOLE = [*FILES, f"{CHECKPOINT}/checkpoint.json", f"{CHECKPOINT}/state-0123456789abcdef.safetensors"]
HALVES = [".summary.json.vm-17-ab.half", f"{CHECKPOINT}/.checkpoint.json.vm-17-ab.half"]
OURS = [*WHOLE, *(f"{half}/state" for half in HALVES)]
THEIRS = ["notes.txt", ".git/HEAD", "checkpoint/mine.safetensors", "config.yaml", "data/config.toml", "report.html.bak"]


def tree(root: Path) -> dict[str, str]:
    """Every file and link below ``root`` with its content or target; the lock's own file aside."""
    return {
        str(path.relative_to(root)): os.readlink(path) if path.is_symlink() else path.read_text()
        for path in sorted(root.rglob("*"))
        if (path.is_symlink() or path.is_file()) and path.name != LOCK
    }


def fill(root: Path, names: list[str]) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"content of {name}")


def make_run(root: Path) -> str:
    """A marked directory with one file of every name that a run writes; the run's id."""
    with claimed(root, force=False) as claim:
        claim.begin(FACTS)
        fill(root, OURS)
    return claim.id


@given(
    names=st.lists(st.sampled_from([*OURS, *THEIRS, "a b/c", "é.txt"]), min_size=1, unique=True), force=st.booleans()
)
@settings(max_examples=60, deadline=None)
def test_a_directory_without_the_marker_is_refused_and_left_alone(
    tmp_path_factory: pytest.TempPathFactory, names: list[str], force: bool
) -> None:
    root = tmp_path_factory.mktemp("theirs")
    fill(root, names)
    before = tree(root)
    with (
        pytest.raises(ValueError, match=r"fedmoe did not make it .*choose another out=") as caught,
        claimed(root, force=force),
    ):
        pytest.fail("claimed what is not ours")
    assert "--force" not in str(caught.value)
    assert tree(root) == before


@pytest.mark.parametrize(
    "marker", ["", "{}", '{"format": "fedmoe-run"}', "[1]", '{"format": "other", "id": "x"}', "{" * 9999]
)
def test_a_file_that_only_bears_the_markers_name_marks_nothing(tmp_path: Path, marker: str) -> None:
    fill(tmp_path, ["config.toml", "notes.txt"])
    (tmp_path / MARKER).write_text(marker)
    before = tree(tmp_path)
    with pytest.raises(ValueError, match="fedmoe did not make it"), claimed(tmp_path, force=True):
        pytest.fail("claimed what is not ours")
    assert tree(tmp_path) == before


def test_an_edited_marker_marks_nothing_and_resume_says_which_file_it_is(tmp_path: Path) -> None:
    make_run(tmp_path)
    marker = tmp_path / MARKER
    marker.write_text(marker.read_text().replace("c0ffee", "c0ffe0"))
    with pytest.raises(ValueError, match="fedmoe did not make it"):
        refuse_claim(tmp_path, force=True)
    with (
        pytest.raises(ValueError, match=r"its fedmoe-run.json is damaged or foreign\); restore that file"),
        held(tmp_path),
    ):
        pytest.fail("held a run by an edited marker")


@pytest.mark.parametrize("form", ["a symbolic link", "a pipe", "a folder"])
def test_a_lock_that_is_not_a_file_is_refused_and_its_target_kept(tmp_path: Path, form: str) -> None:
    """Locking opens a file and empties it: through a link that would be anyone's."""
    make_run(tmp_path / "run")
    lock, victim = tmp_path / "run" / LOCK, tmp_path / "victim"
    lock.unlink(missing_ok=True)
    victim.write_text("precious")
    match form:
        case "a symbolic link":
            lock.symlink_to(victim)
        case "a pipe":
            os.mkfifo(lock)
        case _:
            lock.mkdir()
    for hold in (claimed(tmp_path / "run", force=True), held(tmp_path / "run"), exclusive(tmp_path / "run")):
        with pytest.raises(ValueError, match=f"{LOCK} is {form}"), hold:
            pytest.fail("locked what is not a file")
    assert victim.read_text() == "precious"


def leave_halves(*paths: Path) -> None:
    """Begin to write each of these files in a process that dies."""
    gone = os.fork()
    if gone == 0:
        with ExitStack() as stack:
            for path in paths:
                stack.enter_context(beside(path))
            os._exit(0)
    os.waitpid(gone, 0)


def halves_in(run: Path) -> list[str]:
    return sorted(filter(None, map(whose, run.rglob("*"))))


def test_what_a_kill_left_half_written_goes_and_does_not_lock_the_directory_out(tmp_path: Path) -> None:
    """A kill between the making of the directory and its marker leaves half a marker and nothing else."""
    run = tmp_path / "run"
    run.mkdir()
    leave_halves(run / MARKER, run / "probe")
    with claimed(run, force=False) as claim:
        assert halves_in(run) == []
        claim.begin(FACTS)
        fill(run, ["config.toml", f"{CHECKPOINT}/checkpoint.json"])
    leave_halves(*(run / name for name in (MARKER, "config.toml", f"{CHECKPOINT}/checkpoint.json")))
    assert halves_in(run) == sorted([MARKER, "config.toml", "checkpoint.json"])
    with beside(run / "report.html"), held(run):  # by a command that still runs
        assert halves_in(run) == ["report.html"]
    (tmp_path / "precious").mkdir()
    link = tmp_path / "other" / f".{MARKER}.vm-17-ab.half"
    link.parent.mkdir()
    link.symlink_to(tmp_path / "precious")
    with pytest.raises(ValueError, match="fedmoe did not make it"):
        refuse_claim(link.parent, force=True)


def test_the_marker_of_a_later_version_is_refused_by_name(tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    marker = tmp_path / "run" / MARKER
    marker.write_text(json.dumps({**json.loads(marker.read_text()), "format_version": 99}))
    with pytest.raises(ValueError, match="format version 99, this fedmoe reads 2"):
        refuse_claim(tmp_path / "run", force=True)


@given(theirs=st.lists(st.sampled_from(THEIRS), unique=True))
@settings(max_examples=30, deadline=None)
def test_force_removes_our_files_and_no_others(tmp_path_factory: pytest.TempPathFactory, theirs: list[str]) -> None:
    root = tmp_path_factory.mktemp("runs") / "run"
    first = make_run(root)
    fill(root, theirs)
    with pytest.raises(ValueError, match="replace it with --force"), claimed(root, force=False):
        pytest.fail("claimed over a run without force")
    with claimed(root, force=True) as claim:
        assert set(WHOLE) <= set(tree(root))  # nothing goes before the new run begins
        claim.begin({"corpus_sha256": "new"})
        assert set(tree(root)) == {MARKER, *theirs}
        fill(root, ["config.toml"])
    facts = read_facts(root)
    assert facts is not None
    assert (facts["id"], facts["corpus_sha256"]) == (claim.id, "new")
    assert claim.id != first


def test_a_failure_before_the_new_run_begins_leaves_the_old_one(tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    before = tree(tmp_path / "run")
    with pytest.raises(RuntimeError), claimed(tmp_path / "run", force=True):
        raise RuntimeError("the data file does not exist")
    after = tree(tmp_path / "run")
    assert after.keys() >= set(WHOLE)
    assert before.keys() - after.keys() == {f"{HALVES[1]}/state"}, "no living save can be in a held directory"
    assert {name: before[name] for name in after} == after


@pytest.mark.parametrize("existing", [False, True])
def test_a_failure_before_the_first_run_begins_leaves_no_trace(tmp_path: Path, existing: bool) -> None:
    root = tmp_path / "run"
    if existing:
        root.mkdir()

    def start() -> None:
        with claimed(root, force=False):
            assert json.loads((root / MARKER).read_text())["format"] == "fedmoe-run"  # first of all
            assert [path.name for path in root.iterdir() if path.name != LOCK] == [MARKER]
            raise RuntimeError

    with pytest.raises(RuntimeError):
        start()
    assert root.exists() == existing
    assert not existing or list(root.iterdir()) == []


def test_a_directory_that_was_marked_but_where_no_run_began_may_be_used_again(tmp_path: Path) -> None:
    root = tmp_path / "run"
    with claimed(root, force=False) as claim:
        claim.begin(FACTS)  # and then a kill -9: no configuration was written
        marker = (root / MARKER).read_text()
    root.mkdir()
    (root / MARKER).write_text(marker)
    assert read_facts(root) is None
    with claimed(root, force=False) as claim:
        claim.begin(FACTS)
        fill(root, ["config.toml"])
    assert read_facts(root) is not None


def link_file(name: str) -> Callable[[Path, Path], None]:
    def put(root: Path, victim: Path) -> None:
        path = root / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        path.symlink_to(victim if name in HALVES else victim / "precious.txt")

    return put


def link_checkpoint(root: Path, victim: Path) -> None:
    shutil.rmtree(root / CHECKPOINT)
    fill(victim, ["checkpoint.json"])
    (root / CHECKPOINT).symlink_to(victim)


def folder(root: Path, victim: Path) -> None:
    (root / "summary.json").unlink()
    (root / "summary.json").mkdir()


def fifo(root: Path, victim: Path) -> None:
    (root / "metrics.jsonl").unlink()
    os.mkfifo(root / "metrics.jsonl")


@pytest.mark.parametrize(
    "damage",
    [*map(link_file, [*WHOLE, *HALVES]), link_checkpoint, folder, fifo],
)
def test_nothing_is_removed_or_written_through_a_link(tmp_path: Path, damage: Callable[[Path, Path], None]) -> None:
    root, victim = tmp_path / "run", tmp_path / "victim"
    make_run(root)
    fill(victim, ["precious.txt"])
    damage(root, victim)
    before = sorted(map(str, tmp_path.rglob("*"))), tree(victim)
    for hold in (claimed(root, force=True), held(root)):
        with pytest.raises(ValueError, match=r"is a (symbolic link|folder|pipe), not of the kind"), hold:
            pytest.fail("used a directory with a foreign file of our name")
    assert (sorted(map(str, tmp_path.rglob("*"))), tree(victim)) == before


def test_a_linked_marker_marks_nothing(tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    (tmp_path / "run" / MARKER).rename(tmp_path / "elsewhere.json")
    (tmp_path / "run" / MARKER).symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(ValueError, match="fedmoe did not make it"):
        refuse_claim(tmp_path / "run", force=True)


def test_force_does_not_follow_a_linked_directory(tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    (tmp_path / "link").symlink_to(tmp_path / "run")
    before = tree(tmp_path / "run")
    with pytest.raises(ValueError, match="is a symbolic link"), claimed(tmp_path / "link", force=True):
        pytest.fail("followed a link")
    assert tree(tmp_path / "run") == before


def test_a_kill_in_the_middle_of_removing_leaves_a_run_that_can_be_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, unlink, removed = tmp_path / "run", Path.unlink, 0
    make_run(root)

    def dying(self: Path, missing_ok: bool = False) -> None:
        nonlocal removed
        if self.name in FILES:
            removed += 1
            if removed > 2:
                raise KeyboardInterrupt
        unlink(self, missing_ok)

    def replace() -> None:
        with monkeypatch.context() as patch, claimed(root, force=True) as claim:
            patch.setattr(Path, "unlink", dying)
            claim.begin(FACTS)

    with pytest.raises(KeyboardInterrupt):
        replace()
    assert read_facts(root) is not None
    assert not set(OURS) <= set(tree(root))
    with claimed(root, force=True) as claim:
        claim.begin(FACTS)
        assert set(tree(root)) == {MARKER}


def test_a_second_run_or_resume_in_the_same_directory_is_refused(tmp_path: Path) -> None:
    make_run(tmp_path)
    for first in (claimed(tmp_path, force=True), held(tmp_path)):
        with first:
            for second in (claimed(tmp_path, force=True), held(tmp_path)):
                with pytest.raises(ValueError, match="in use by another fedmoe process"), second:
                    pytest.fail("two at once")
    with held(tmp_path):
        pass  # released


def test_another_process_is_refused_until_the_first_dies_even_by_sigkill(tmp_path: Path) -> None:
    code = "import sys, time\nfrom pathlib import Path\nfrom fedmoe_core.simulation.directory.claim import exclusive\n"
    code += "with exclusive(Path(sys.argv[1])):\n    print('held', flush=True)\n    time.sleep(60)\n"
    house = Path(run_directory.__file__).parents[3]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(house), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match="in use by another"), exclusive(tmp_path):
            pytest.fail("two at once")
        other.send_signal(signal.SIGKILL)
        other.wait()
    with exclusive(tmp_path):
        pass


def test_what_is_no_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "broken").symlink_to(tmp_path / "nowhere")
    for name in ("file", "broken"):
        with pytest.raises(ValueError, match="is not a directory"):
            refuse_claim(tmp_path / name, force=True)
    with pytest.raises(ValueError, match="holds no run"), held(tmp_path):
        pytest.fail("resumed what is no run")
