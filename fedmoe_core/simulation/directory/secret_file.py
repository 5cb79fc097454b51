"""The file that holds the secret of a run, readable by its owner alone: the key of the next round and none before it.

A round that is on record is never played again. Some device may fail in the second one that did not in the first, and
under the same noise the difference of the two models is what that device had sent.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from fedmoe_core.base.files import json_text, opened, require_file, write_whole
from fedmoe_core.privacy.chance import Secret
from fedmoe_core.simulation.directory.prefix_log import Count
from fedmoe_core.simulation.directory.standing import Standing

SECRET = "secret.json"
LARGEST = 1 << 12  # bytes; ours has a hundred
AFRESH = "restore the run's own file, or start the run afresh in another directory"


class _Form(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    round: Count
    key: Annotated[str, Meta(pattern=r"\A[0-9a-f]{64}\Z")]


def write_secret(out: Path, secret: Secret) -> None:
    """Replace the secret's file in a run directory; the key that stood there is gone.

    Raises:
        ValueError: the file system lets others read what is made for its owner alone.
        OSError: as ``write_whole``.
    """
    path = out / SECRET
    write_whole(path, json_text({"round": secret.round, "key": secret.key.hex()}), private=True)
    if _open_to_others(path.stat().st_mode):
        path.unlink()
        raise ValueError(f"{path} can be read by others on this file system; choose an out=DIRECTORY on another one")


def read_secret(out: Path, standing: Standing) -> Secret:
    """Read the secret of a run that goes on from a checkpoint.

    Raises:
        ValueError: the file is missing, damaged, open to others, of another run, or of a later round than the
            checkpoint; one sentence.
        OSError: it cannot be read.
    """
    path = out / SECRET
    require_file(path, most=LARGEST)
    try:
        with opened(path) as file:
            mode, raw = os.fstat(file.fileno()).st_mode, file.read()
    except FileNotFoundError:
        raise ValueError(f"{path} is missing: who takes part and the noise follow from it; {AFRESH}") from None
    if _open_to_others(mode):
        raise ValueError(
            f"{path} can be read by others, who could take the noise off; `chmod 600` it if they did not, else start "
            "the run afresh"
        )
    try:
        found = msgspec.json.decode(raw, type=_Form)
    except msgspec.DecodeError:  # its words may show the key
        raise ValueError(f"{path} is damaged or cut short; {AFRESH}") from None
    if found.round > standing.round:
        raise ValueError(
            f"{path} is of round {found.round} and {out}/checkpoint of round {standing.round}: an older checkpoint was "
            "put back, and rounds that were published must not be played again; restore the last checkpoint, or start "
            "the run afresh"
        )
    secret = Secret(found.round, bytes.fromhex(found.key)).at(standing.round)
    if secret.digest != standing.secret:
        raise ValueError(f"{path} is not the secret with which {out}/checkpoint was made; {AFRESH}")
    return secret


def _open_to_others(mode: int) -> bool:
    return os.name == "posix" and bool(mode & (stat.S_IRWXG | stat.S_IRWXO))
