"""Several ranks on one machine: no pickle, no socket beyond loopback, and none outlives what started it."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rank_processes import descendants, ended, popen, rank_of
from tiny_runs import HOUSE, TINY, fedmoe_here, write_notes

from fedmoe_core.simulation import launch

LINUX = pytest.mark.skipif(not Path("/proc/self/net/tcp").exists(), reason="sockets are read from Linux's /proc")

# Every process of a run imports this first: it reports all that enters an unpickler, in Python or in C.
WATCH = """
import os, pickle, sys, _pickle

report = os.open(os.environ["HEARD"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
os.write(report, f"start {os.getpid()}\\n".encode())
sys.addaudithook(lambda event, _: os.write(report, b"audit\\n") if event.startswith("pickle") else None)

def heard(real):
    class Heard(real):
        def __init__(self, *arguments, **options):
            os.write(report, b"unpickler\\n")
            super().__init__(*arguments, **options)
    return Heard

def reported(real):
    def read(*arguments, **options):
        os.write(report, b"unpickler\\n")
        return real(*arguments, **options)
    return read

for module in (pickle, _pickle):
    module.Unpickler = heard(module.Unpickler)
    module.load, module.loads = reported(module.load), reported(module.loads)
"""


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A run of many short rounds, its corpus and warm-up already in the cache."""
    place = tmp_path_factory.mktemp("launch")
    words = [*TINY, f"data=jsonl:{write_notes(place / 'notes.jsonl')}", f"cache={place / 'cache'}"]
    done = fedmoe_here("simulate", *words, f"out={place / 'one'}", "--quiet")
    assert done.returncode == 0, done.stderr
    return words


@pytest.fixture(scope="module")
def one(words: list[str]) -> dict[str, Any]:
    """What that run came to in a single process."""
    corpus = Path(words[len(TINY)].rpartition(":")[2])
    return results(corpus.parent / "one")


def results(run: Path) -> dict[str, Any]:
    """Figures of a run that must not depend on how many processes it had."""
    summary = json.loads((run / "summary.json").read_text())
    keys = ("model_hash", "loss_before", "loss_after", "bytes_down", "bytes_up", "flops", "budget_violations")
    return {key: summary[key] for key in keys}


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, str]]:
    """This process's variables for a child that imports this checkout; in this process they are set too."""
    paths = [str(HOUSE / part) for part in (".", "kernels", "bindings")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", launch.LAUNCHED):
        monkeypatch.delenv(name, raising=False)
    return lambda first="", **more: {
        **os.environ,
        **more,
        "PYTHONPATH": os.pathsep.join([first, *paths] if first else paths),
        "OMP_NUM_THREADS": "1",
    }


@pytest.fixture
def watch(tmp_path: Path, environment: Callable[..., dict[str, str]]) -> dict[str, str]:
    """Variables under which every Python process reports its unpickling to ``tmp_path/heard``."""
    (tmp_path / "hook").mkdir()
    (tmp_path / "hook" / "sitecustomize.py").write_text(WATCH)
    return environment(str(tmp_path / "hook"), HEARD=str(tmp_path / "heard"))


def listening(process: int) -> set[str]:
    """Local addresses, in the kernel's hexadecimal, on which TCP sockets of a process listen."""
    found: set[str] = set()
    try:
        links = [os.readlink(entry.path) for entry in os.scandir(f"/proc/{process}/fd")]
        inodes = {match[1] for link in links if (match := re.fullmatch(r"socket:\[(\d+)\]", link))}
        for table in ("tcp", "tcp6"):
            path = Path(f"/proc/{process}/net/{table}")
            for line in path.read_text().splitlines()[1:] if path.exists() else ():
                fields = line.split()
                if fields[3] == "0A" and fields[9] in inodes:
                    found.add(fields[1].partition(":")[0])
    except OSError:
        pass  # it has just ended
    return found


def addresses_of(started: subprocess.Popen[str]) -> set[str]:
    """Every address on which some process of ``started`` listened until it ended."""
    found: set[str] = set()
    while started.poll() is None:
        for process in descendants(started.pid):
            found |= listening(process)
        time.sleep(0.02)
    return found


@LINUX
def test_inv10_inv12_two_ranks_give_the_bits_of_one_read_no_pickle_and_listen_on_loopback_alone(
    words: list[str], one: dict[str, Any], watch: dict[str, str], tmp_path: Path
) -> None:
    # Another interface in the environment, as clusters set it, must not bring a run on one node onto the network.
    others = [name for _, name in socket.if_nameindex() if not name.startswith("lo")]
    env = {**watch, "GLOO_SOCKET_IFNAME": others[0] if others else "lo"}
    out = tmp_path / "run"
    started = popen("-m", "fedmoe_core.cli", "simulate", *words, f"out={out}", "ranks=2", "--quiet", env=env)
    addresses = addresses_of(started)
    _, said = started.communicate(timeout=60)
    assert started.returncode == 0, said
    assert results(out) == one
    assert addresses == {"0100007F"}  # 127.0.0.1: gloo's own sockets, so the search does see some
    heard = (tmp_path / "heard").read_text().splitlines()
    assert len(heard) == 3  # the launcher and two ranks
    assert all(line.startswith("start ") for line in heard)


@LINUX
def test_the_watch_sees_a_socket_on_every_interface_and_hears_each_way_to_unpickle(
    watch: dict[str, str], tmp_path: Path
) -> None:
    script = (
        "import io, pickle, socket, subprocess, sys, time\n"
        "data = pickle.dumps([1])\n"
        "pickle.loads(data), pickle.load(io.BytesIO(data)), pickle.Unpickler(io.BytesIO(data)).load()\n"
        "pickle._loads(pickle.dumps(socket.AF_INET))\n"
        "child = 'import socket, time; s = socket.create_server((str(), 0)); time.sleep(1)'\n"
        "subprocess.run([sys.executable, '-c', child])\n"
    )
    assert addresses_of(popen("-c", script, env=watch)) == {"00000000"}
    heard = (tmp_path / "heard").read_text().splitlines()
    assert heard.count("unpickler") == 3
    assert "audit" in heard


def test_inv12_torchrun_across_nodes_with_a_static_rendezvous_reads_no_pickle(
    words: list[str], one: dict[str, Any], watch: dict[str, str], tmp_path: Path
) -> None:
    """Two launchers, as on two nodes, with the options that the documentation gives; the bits of one process."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    nodes = []
    for number in range(2):
        meet = ["--nnodes=2", f"--node-rank={number}", "--master-addr=127.0.0.1", f"--master-port={port}"]
        command = ["-m", "torch.distributed.run", *meet, "--nproc-per-node=1", "-m", "fedmoe_core.cli", "simulate"]
        env = {**watch, "GLOO_SOCKET_IFNAME": "lo"}
        nodes.append(popen(*command, *words, f"out={tmp_path / 'two'}", "ranks=2", "--quiet", env=env))
    for node in nodes:
        _, said = node.communicate(timeout=120)
        assert node.returncode == 0, said
    assert results(tmp_path / "two") == one
    heard = (tmp_path / "heard").read_text().splitlines()
    assert len(heard) == 4
    assert all(line.startswith("start ") for line in heard)


def begun(words: list[str], out: Path, env: dict[str, str]) -> tuple[subprocess.Popen[str], list[int]]:
    """A run of two ranks after its first checkpoint, and the processes of its ranks in order."""
    started = popen("-m", "fedmoe_core.cli", "simulate", *words, f"out={out}", "ranks=2", "--quiet", env=env)
    deadline = time.monotonic() + 60
    while not (out / "checkpoint" / "checkpoint.json").exists() and started.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return started, sorted(descendants(started.pid)[1:], key=rank_of)


@LINUX
def test_a_killed_launcher_takes_its_ranks_with_it(
    words: list[str], environment: Callable[..., dict[str, str]], tmp_path: Path
) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    started, ranks = begun([*words, "rounds=60"], tmp_path / "run", environment(TMPDIR=str(temporary)))
    assert len(ranks) == 2
    started.kill()
    _, said = started.communicate(timeout=60)
    assert ended(ranks)
    assert said == "error: the process that started this run is gone, so the run stops; resume it\n"
    assert not (tmp_path / "run" / "summary.json").exists()
    assert list(temporary.iterdir()) == []


@LINUX
def test_inv10_a_killed_rank_is_one_sentence_and_the_resumed_run_has_the_bits_of_one_process(
    words: list[str], environment: Callable[..., dict[str, str]], tmp_path: Path
) -> None:
    out, long = tmp_path / "cut", [*words, "rounds=8"]
    started, ranks = begun(long, out, environment())
    os.kill(ranks[1], signal.SIGKILL)
    printed, said = started.communicate(timeout=60)
    assert ended(ranks)
    assert (started.returncode, printed) == (137, "")
    why = "rank 1 was ended by SIGKILL, which the system sends when memory runs out"
    assert said == f"error: {why}; go on with: fedmoe resume {out}\n"
    again = popen("-m", "fedmoe_core.cli", "resume", str(out), "--quiet", env=environment())
    _, said = again.communicate(timeout=60)
    assert again.returncode == 0, said
    assert fedmoe_here("simulate", *long, f"out={tmp_path / 'whole'}", "--quiet").returncode == 0
    assert results(out) == results(tmp_path / "whole")


# What a rank is to a launcher, without the seconds that torch takes to load.
RANK = "import os, signal, sys, time\n"
LAUNCHER = f"""
import sys
from fedmoe_core.simulation import launch
try:
    launch.run_ranks([], ranks=2, threads=1, program=("-c", {RANK!r} + sys.argv[1]))
except KeyboardInterrupt:
    sys.exit(130)
"""


def play(script: str, ranks: int = 2) -> None:
    launch.run_ranks([], ranks=ranks, threads=1, program=("-c", RANK + script))


@LINUX
@pytest.mark.parametrize("sent", [[signal.SIGINT], [signal.SIGTERM], [signal.SIGHUP], [signal.SIGINT] * 2])
def test_a_stopped_launcher_lets_its_ranks_unwind_and_leaves_nothing(
    environment: Callable[..., dict[str, str]], tmp_path: Path, sent: list[signal.Signals]
) -> None:
    """A rank gets one request however often the launcher is stopped; the second one ends its patience, not the rank."""
    temporary, ready, unwound = (tmp_path / name for name in ("temporary", "ready", "unwound"))
    for place in (temporary, ready, unwound):
        place.mkdir()
    wait = "0.3" if len(sent) == 1 else "300"
    rank = (
        "from fedmoe_core.simulation.launch import stoppable\n"
        "try:\n  with stoppable():\n"
        f"    open({str(ready)!r} + '/' + os.environ['RANK'], 'w').close(); time.sleep(300)\n"
        f"except KeyboardInterrupt:\n  time.sleep({wait}); open({str(unwound)!r} + '/' + os.environ['RANK'], 'w')\n"
    )
    started = popen("-c", LAUNCHER, rank, env=environment(TMPDIR=str(temporary)))
    deadline = time.monotonic() + 60
    while len(list(ready.iterdir())) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    ranks = descendants(started.pid)[1:]
    for number in sent:
        started.send_signal(number)
        time.sleep(0.3)
    started.communicate(timeout=5)  # well below the patience of 10 s
    assert started.returncode == 130
    assert ended(ranks)
    assert len(list(unwound.iterdir())) == (2 if len(sent) == 1 else 0)
    assert list(temporary.iterdir()) == []


def test_a_rank_whose_parent_cannot_be_told_speaks_for_itself(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv(launch.LAUNCHED, str(tmp_path))
    assert launch.tell_parent("why \udcff")
    assert (tmp_path / "rank-1.txt").read_text() == "why \\udcff"
    monkeypatch.setenv(launch.LAUNCHED, str(tmp_path / "gone"))
    assert not launch.tell_parent("why")
    monkeypatch.delenv(launch.LAUNCHED)
    assert not launch.tell_parent("why")


def test_ranks_know_their_place_and_all_end_well(environment: Callable[..., dict[str, str]], tmp_path: Path) -> None:
    keys = "('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'OMP_NUM_THREADS')"
    play(f"open({str(tmp_path)!r} + '/' + os.environ['RANK'], 'w').write(' '.join(os.environ[k] for k in {keys}))", 3)
    assert sorted(path.read_text() for path in tmp_path.iterdir()) == ["0 3 0 1", "1 3 1 1", "2 3 2 1"]
    assert launch.LAUNCHED not in os.environ


@pytest.mark.parametrize(
    ("script", "said", "code"),
    [
        ("sys.exit(7 if os.environ['RANK'] == '1' else 0)", "rank 1 ended with status 7; its own words are above", 7),
        # Rank 0 ends first, yet only because rank 1 is gone.
        ("sys.exit(3) if os.environ['RANK'] == '0' else (time.sleep(0.5), sys.exit(9))", "rank 1 ended with", 9),
        ("sys.exit(3)", "ended with status 3", 3),
        ("os.kill(os.getpid(), signal.SIGABRT)", "was ended by SIGABRT", 134),
        # The others do not notice and have to be stopped: by a request, and where that is ignored by force.
        ("time.sleep(0 if os.environ['RANK'] == '0' else 300); sys.exit(8)", "rank 0 ended with status 8", 8),
    ],
)
def test_the_cause_is_named_and_not_its_effects(
    environment: Callable[..., dict[str, str]], monkeypatch: pytest.MonkeyPatch, script: str, said: str, code: int
) -> None:
    monkeypatch.setattr(launch, "SETTLE", 2.0)
    with pytest.raises(launch.RankError, match=said) as error:
        play(script)
    assert error.value.code == code


def test_a_rank_that_will_not_stop_is_killed(
    environment: Callable[..., dict[str, str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(launch, "SETTLE", 1.0)
    monkeypatch.setattr(launch, "PATIENCE", 0.5)
    mark = tmp_path / "ready"
    deaf = f"signal.signal(signal.SIGTERM, signal.SIG_IGN); open({str(mark)!r}, 'w').close(); time.sleep(300)"
    first = f"\nwhile not os.path.exists({str(mark)!r}): time.sleep(0.01)\nsys.exit(5)"
    with pytest.raises(launch.RankError, match="status 5"):
        play(f"if os.environ['RANK'] == '1':\n  {deaf}{first}")


@LINUX
def test_a_killed_comparison_takes_its_runs_with_it(
    words: list[str], environment: Callable[..., dict[str, str]], tmp_path: Path
) -> None:
    out = tmp_path / "study"
    options = ["--systems", "random", "--seeds", "0", "--workers", "1", "--out", str(out), "--quiet"]
    started = popen("-m", "fedmoe_core.cli", "compare", *words, "rounds=60", *options, env=environment())
    while not list(out.glob("runs/*/*/checkpoint/checkpoint.json")) and started.poll() is None:
        time.sleep(0.05)
    runs = descendants(started.pid)[1:]
    assert runs
    started.kill()
    started.communicate(timeout=60)
    assert ended(runs)
