"""A plain model whose clients do what devices do: raise, leave, sleep, hang; commands name it as an adapter.

FAULT says what, and FAULT_AT at which call of the loss in this process, counted from 1; calls before training count.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from itertools import count

from small_plain import blobs, correct, cross_entropy, network, sgd
from torch import Tensor, nn

from fedmoe_core.data.rows import Rows
from fedmoe_core.model.plain import PlainModel, plain


def fault(kind: str) -> None:
    """Do it."""
    if kind == "raises":
        raise KeyError("a column that this client lacks")
    if kind == "leaves":
        sys.exit("no battery")
    if kind == "sleeps":
        try:
            time.sleep(600)
        except Exception:  # as careless code does; it must not keep the server waiting
            time.sleep(600)
    if kind in ("hangs", "holds"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})
        wait = time.sleep if kind == "hangs" else ctypes.PyDLL(None).sleep  # the second keeps Python's lock
        wait(600)
    if kind == "dies":
        os._exit(7)


def made(kind: str = "", at: int = 0) -> PlainModel:
    """Make the model; its loss counts its calls."""
    calls = count(1)

    def loss(model: nn.Module, batch: Rows) -> Tensor:
        if next(calls) == at:
            fault(kind)
        return cross_entropy(model, batch)

    return plain(network, loss, train=blobs(90), test=blobs(40, seed=1), correct_fn=correct, optimizer_fn=sgd)


adapter = made(os.environ.get("FAULT", ""), int(os.environ.get("FAULT_AT", "0")))
