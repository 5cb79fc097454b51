"""The batch script for Slurm, on two nodes that are stand-ins: what it starts meets, trains, and has the usual bits."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from tiny_runs import HOUSE, TINY, fedmoe_here, write_notes

SCRIPT = HOUSE / "examples" / "cluster" / "slurm.sh"
STAND_INS = {
    "scontrol": 'echo "127.0.0.1"; echo "127.0.0.1"\n',
    # One task a node, all at once; the first bad end is the end.
    "srun": 'shift\nSLURM_NODEID=0 "$@" & first=$!\nSLURM_NODEID=1 "$@" & second=$!\nwait $first && wait $second\n',
    "torchrun": f'exec {sys.executable} -m torch.distributed.run "$@"\n',
}


def test_the_batch_script_is_bash_and_the_image_copies_what_is_here() -> None:
    assert subprocess.run(["bash", "-n", str(SCRIPT)], capture_output=True).returncode == 0
    copied = [
        word
        for line in (SCRIPT.parent / "Dockerfile").read_text().splitlines()
        if line.startswith("COPY ")
        for word in line.split()[1:-1]
    ]
    assert copied
    assert all((HOUSE / word).exists() for word in copied)


def test_the_first_of_many_nodes_is_found(tmp_path: Path) -> None:
    """A list too long for a pipe's buffer: a reader that stops early ends the program that still writes it."""
    tools = tmp_path / "tools"
    tools.mkdir()
    bodies = {"scontrol": "seq -f node%06g 1 20000\n", "srun": 'echo "$MASTER_ADDR"\n'}
    for name, body in bodies.items():
        (tools / name).write_text(f"#!/bin/bash\n{body}")
        (tools / name).chmod(0o755)
    env = {"PATH": f"{tools}{os.pathsep}{os.environ['PATH']}", "SLURM_JOB_NODELIST": "node", "SLURM_JOB_ID": "1"}
    done = subprocess.run(["bash", str(SCRIPT)], env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "node000001\n"), done.stderr


def free_port() -> int:
    """A free port of those that the script takes."""
    for port in range(20000 + os.getpid() % 5000, 30000):
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port - 20000
    raise AssertionError("no port from 20000 to 29999 is free")


def test_two_nodes_of_the_batch_script_give_the_bits_of_one_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    words = [*TINY, f"data=jsonl:{write_notes(tmp_path / 'notes.jsonl')}", f"cache={tmp_path / 'cache'}", "rounds=2"]
    assert fedmoe_here("simulate", *words, f"out={tmp_path / 'one'}", "--quiet").returncode == 0
    tools = tmp_path / "tools"
    tools.mkdir()
    for name, body in STAND_INS.items():
        (tools / name).write_text(f"#!/bin/bash\n{body}")
        (tools / name).chmod(0o755)
    port = free_port()
    env = {
        **os.environ,
        "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join(str(HOUSE / part) for part in (".", "kernels", "bindings")),
        "GLOO_SOCKET_IFNAME": "lo",
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_NNODES": "2",
        "SLURM_JOB_ID": str(port),  # of which the script makes its port
        "SLURM_CPUS_PER_TASK": "1",
        "RANKS_PER_NODE": "1",
    }
    done = subprocess.run(
        ["bash", str(SCRIPT), *words, f"out={tmp_path / 'two'}", "--quiet"],
        env=env,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr
    hashes = [json.loads((tmp_path / name / "summary.json").read_text())["model_hash"] for name in ("one", "two")]
    assert hashes[0] == hashes[1]
