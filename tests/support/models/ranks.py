"""The ranks of a test, mostly two: how it starts them and what it learns of them, how they meet and how they part."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist
import torch.distributed.nn.functional  # noqa: F401

RANKS = 2


def run_ranks(
    script: Path, folder: Path, *words: str, env: Mapping[str, str] = os.environ, limit: int = 150
) -> list[str]:
    """Run ``script RANK FOLDER WORDS`` as both ranks at once; neither outlives the call.

    Returns:
        What each rank printed.

    Raises:
        AssertionError: a rank failed; with the last words of both.
        subprocess.TimeoutExpired: a rank took longer than ``limit`` seconds.
    """
    paths = os.pathsep.join(filter(None, [str(Path(__file__).parent), env.get("PYTHONPATH", "")]))
    ranks = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), str(folder), *words],
            env={**env, "PYTHONPATH": paths},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(RANKS)
    ]
    try:
        told = [rank.communicate(timeout=limit) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    codes, last = [rank.returncode for rank in ranks], "\n".join(wrong[-2000:] for _, wrong in told)
    assert codes == [0] * RANKS, f"the ranks ended with {codes}:\n{last}"
    return [said for said, _ in told]


@contextmanager
def process_group(rank: int, folder: Path, ranks: int = RANKS) -> Iterator[None]:
    """Join the other ranks over gloo; at the end leave nothing of the group behind.

    Whatever holds a group lets it outlive ``destroy_process_group``, and a thread of gloo that runs while Python ends
    aborts the process ("terminate called without an active exception"). A model in a reference cycle holds one, and so
    do the default values of torch.distributed.nn.functional where it is imported later than here.
    """
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=ranks)
    yield
    gc.collect()
    dist.barrier()
    dist.destroy_process_group()
