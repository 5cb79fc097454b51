"""Under torchrun: a lost rank is one sentence and a restart goes on to the same bits, and no process stays behind."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest
from rank_processes import descendants, ended, popen, rank_of
from tiny_runs import HOUSE, TINY, fedmoe_here, write_notes

from fedmoe_core.simulation import launch

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are found in Linux's /proc")
LONG = ("rounds=12", "ranks=2")


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A run whose corpus and warm-up lie in the cache."""
    place = tmp_path_factory.mktemp("torchrun")
    words = [*TINY, f"data=jsonl:{write_notes(place / 'notes.jsonl')}", f"cache={place / 'cache'}"]
    assert fedmoe_here("simulate", *words, f"out={place / 'one'}", "--quiet").returncode == 0
    return words


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", launch.LAUNCHED):
        monkeypatch.delenv(name, raising=False)
    paths = os.pathsep.join(str(HOUSE / part) for part in (".", "kernels", "bindings"))
    return {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
        return port


def torchrun(
    *words: str, env: dict[str, str], options: tuple[str, ...] = ("--nproc-per-node=2",), port: int = 0
) -> subprocess.Popen[str]:
    meet = ("--master-addr=127.0.0.1", f"--master-port={port or free_port()}", *options)
    return popen("-m", "torch.distributed.run", *meet, *words, env=env)


def ranks_after_a_round(started: subprocess.Popen[str], out: Path, expected: int = 2) -> list[int]:
    """The processes of the ranks, in order, once a round is on record."""
    deadline = time.monotonic() + 90
    while not (out / "checkpoint" / "checkpoint.json").exists() and started.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    ranks = sorted(descendants(started.pid)[1:], key=rank_of)
    assert len(ranks) == expected, started.communicate(timeout=60)
    return ranks


def hash_of(out: Path) -> str:
    return str(json.loads((out / "summary.json").read_text())["model_hash"])


@pytest.fixture(scope="module")
def whole(words: list[str], tmp_path_factory: pytest.TempPathFactory) -> str:
    """The model's hash after an uninterrupted run of one process."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert fedmoe_here("simulate", *words, "rounds=12", f"out={out}", "--quiet").returncode == 0
    return hash_of(out)


SIMULATE = ("-m", "fedmoe_core.cli", "simulate")


def test_inv10_a_killed_rank_is_restarted_by_torchrun_and_the_run_goes_on_to_the_same_bits(
    words: list[str], whole: str, environment: dict[str, str], tmp_path: Path
) -> None:
    out, options = tmp_path / "run", ("--nproc-per-node=2", "--max-restarts=1")
    started = torchrun(*SIMULATE, *words, *LONG, f"out={out}", "--quiet", env=environment, options=options)
    ranks = ranks_after_a_round(started, out)
    os.kill(ranks[1], signal.SIGKILL)
    _, said = started.communicate(timeout=120)
    assert started.returncode == 0, said
    assert ended(ranks)
    assert hash_of(out) == whole


def test_inv10_on_two_nodes_a_lost_rank_restarts_both_and_only_the_first_needs_the_run_directory(
    words: list[str], whole: str, environment: dict[str, str], tmp_path: Path
) -> None:
    """Two launchers stand for two nodes; what node 1 calls ``out`` does not exist."""
    port, nodes = free_port(), []
    for number in range(2):
        options = ("--nnodes=2", f"--node-rank={number}", "--nproc-per-node=1", "--max-restarts=1")
        place = tmp_path / ("run" if number == 0 else "elsewhere")
        command = (*SIMULATE, *words, *LONG, f"out={place}", "--quiet")
        nodes.append(torchrun(*command, env=environment, options=options, port=port))
    ranks_after_a_round(nodes[0], tmp_path / "run", expected=1)
    (rank_1,) = descendants(nodes[1].pid)[1:]
    os.kill(rank_1, signal.SIGKILL)
    for node in nodes:
        _, said = node.communicate(timeout=120)
        assert node.returncode == 0, said
    assert hash_of(tmp_path / "run") == whole
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("lost", ["a rank", "torchrun by SIGTERM", "torchrun by SIGKILL"])
def test_without_restarts_the_run_ends_with_a_sentence_and_no_process_stays(
    words: list[str], whole: str, environment: dict[str, str], tmp_path: Path, lost: str
) -> None:
    out = tmp_path / "run"
    started = torchrun(*SIMULATE, *words, *LONG, f"out={out}", "--quiet", env=environment)
    ranks = ranks_after_a_round(started, out)
    if lost == "a rank":
        os.kill(ranks[1], signal.SIGKILL)
    else:
        started.send_signal(signal.SIGTERM if lost.endswith("TERM") else signal.SIGKILL)
    _, said = started.communicate(timeout=120)
    assert started.returncode != 0
    assert ended(ranks)
    stopped = f"stopped; go on with: fedmoe resume {re.escape(str(out))} \\(under torchrun again\\)"
    gone = "error: the process that started this run is gone, so the run stops; resume it"
    assert re.search(rf"^(error: rank 0 lost the others|{stopped}|{gone})", said, flags=re.MULTILINE), said
    assert not (out / "summary.json").exists()
    if lost != "torchrun by SIGKILL":
        return  # one kind of loss is enough to see that the run can go on
    again = torchrun("-m", "fedmoe_core.cli", "resume", str(out), "--quiet", env=environment)
    _, said = again.communicate(timeout=120)
    assert again.returncode == 0, said
    assert hash_of(out) == whole


# The second round of rank 1 raises what is not a client's failure but ours.
FAILING = """
import os, sys
from fedmoe_core.cli.main import main
from fedmoe_core.simulation.worlds import moe

before = moe.answers
def answers(world, state, *rest):
    if os.environ["RANK"] == "1" and state.round == 1:
        raise TypeError("a fault of ours")
    return before(world, state, *rest)
moe.answers = answers
sys.argv = ["fedmoe", *sys.argv[1:]]
main()
"""


@pytest.mark.parametrize("launcher", ["torchrun", "fedmoe"])
def test_a_fault_in_one_rank_ends_all_and_the_others_name_it(
    words: list[str],
    environment: dict[str, str],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    launcher: str,
) -> None:
    script, out = tmp_path / "failing.py", tmp_path / "run"
    script.write_text(FAILING)
    command = [str(script), "simulate", *words, *LONG, f"out={out}", "--quiet"]
    if launcher == "torchrun":
        started = torchrun(*command, env=environment)
        _, said = started.communicate(timeout=120)
        assert started.returncode == 1
    else:
        monkeypatch.setenv("PYTHONPATH", environment["PYTHONPATH"])
        with pytest.raises(launch.RankError, match="rank 1 ended with status 1; its own words are above") as error:
            launch.run_ranks(command[1:], ranks=2, threads=1, program=(str(script),))
        assert error.value.code == 1
        said = capfd.readouterr().err
    assert "TypeError: a fault of ours" in said
    if launcher == "torchrun":  # fedmoe's own launcher prints the cause alone
        why = "rank 1 failed while training round 2 (TypeError: a fault of ours), so rank 0 stops; mend that"
        assert f"error: {why}" in said
    assert not (out / "summary.json").exists()


def test_a_rank_that_never_joins_is_named_in_bounded_time(
    words: list[str], environment: dict[str, str], tmp_path: Path
) -> None:
    """Half a rendezvous: both processes were started, one of them never gets as far as fedmoe."""
    script = tmp_path / "half.py"
    script.write_text(
        "import os, runpy, sys, time\n"
        "if os.environ['RANK'] == '1':\n    time.sleep(300)\n"
        "sys.argv = ['fedmoe', *sys.argv[1:]]\n"
        "runpy.run_module('fedmoe_core.cli', run_name='__main__')\n"
    )
    env = {**environment, "FEDMOE_JOIN_SECONDS": "1"}
    out = tmp_path / "run"
    started = torchrun(str(script), "simulate", *words, *LONG, f"out={out}", "--quiet", env=env)
    _, said = started.communicate(timeout=120)
    assert started.returncode != 0
    assert "error: rank 0 waited 1 s for rank 1 of 2, which did not come; see why there, or raise FEDMOE_JOIN" in said
    assert not out.exists()
