"""Starts the ranks of one run on this machine and brings back the first failure as one sentence."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

LAUNCHED = "FEDMOE_LAUNCHED"  # set for ranks that this module started; they leave speaking to their parent


class RankError(Exception):
    """A rank ended with an error; ``code`` is its exit status, the text its sentence (empty when it gave none)."""

    def __init__(self, sentence: str, code: int) -> None:
        super().__init__(sentence)
        self.code = code


def rank() -> int:
    """Return this process's rank; 0 outside torchrun."""
    return int(os.environ.get("RANK", "0"))


def launched() -> bool:
    """Tell whether this process is a rank under torchrun, no matter which process started it."""
    return "WORLD_SIZE" in os.environ and "RANK" in os.environ


def speaks() -> bool:
    """Tell whether this process tells the user how it ended: rank 0, unless a parent of ours waits for it."""
    return rank() == 0 and LAUNCHED not in os.environ


def check_world(ranks: int) -> None:
    """Refuse a configuration that disagrees with the torchrun around it.

    Raises:
        ValueError: WORLD_SIZE and ``ranks`` differ.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if launched() and world != ranks:
        raise ValueError(
            f"ranks={ranks} but torchrun started {world}; set ranks={world}, or start fedmoe without torchrun"
        )


def run_ranks(arguments: Sequence[str], *, ranks: int, threads: int) -> None:
    """Run ``python -m fedmoe_core.cli ARGUMENTS`` as ``ranks`` processes under torch's elastic launcher, to the end.

    What ``torchrun --standalone`` does, in this process, because its own report of a failed rank is a traceback.

    Raises:
        RankError: a rank ended with a non-zero status.
        KeyboardInterrupt: the user or the system stopped the run.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    logging.getLogger("torch.distributed.launcher").setLevel(logging.CRITICAL)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        run_id=f"fedmoe-{os.getpid()}-{time.time_ns()}",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="127.0.0.1",
        max_restarts=0,
    )
    try:
        with _environment({LAUNCHED: "1", "OMP_NUM_THREADS": str(threads)}):
            elastic_launch(config, sys.executable)("-u", "-m", "fedmoe_core.cli", *arguments)
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        spoke = failure.error_file_data.get("message") if failure.error_file_data else None
        raise RankError(spoke if isinstance(spoke, str) else "", failure.exitcode) from None
    except SignalException:
        raise KeyboardInterrupt from None


def tell_parent(sentence: str) -> bool:
    """Hand an error to the process that started this rank; False without one: the rank must say it itself."""
    target = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if LAUNCHED not in os.environ or not target:
        return False
    Path(target).write_text(json.dumps({"message": sentence, "timestamp": int(time.time())}), encoding="utf-8")
    return True


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Variables that child processes inherit, put back afterwards."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
