"""The secret's file: its owner alone reads it, it holds no earlier key, and what is not the run's own is refused."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from fedmoe_core.privacy.chance import Secret
from fedmoe_core.simulation.directory import secret_file
from fedmoe_core.simulation.directory.prefix_log import Prefix
from fedmoe_core.simulation.directory.secret_file import SECRET, read_secret, write_secret
from fedmoe_core.simulation.directory.standing import Standing

KEY = bytes(range(32))
FIRST = Secret(0, KEY)


def standing(round: int, *, of: Secret = FIRST) -> Standing:
    none = Prefix(0, 0, "0" * 64)
    return Standing(round, "0" * 16, {}, none, none, "0" * 64, secret=of.at(round).digest)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    write_secret(tmp_path, FIRST.at(3))
    return tmp_path


def test_its_owner_alone_may_read_it_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        for round in (0, 1):
            write_secret(tmp_path, FIRST.at(round))
            assert (tmp_path / SECRET).stat().st_mode & 0o777 == 0o600
    finally:
        os.umask(before)
    assert [path.name for path in tmp_path.iterdir()] == [SECRET]


def test_it_holds_the_key_of_one_round_and_none_before(out: Path) -> None:
    held = json.loads((out / SECRET).read_text())
    assert held == {"round": 3, "key": FIRST.at(3).key.hex()}


@pytest.mark.parametrize("round", [3, 4, 9])
def test_it_leads_to_the_round_of_the_checkpoint(round: int, out: Path) -> None:
    assert read_secret(out, standing(round)) == FIRST.at(round)


def test_an_older_checkpoint_that_was_put_back_is_refused(out: Path) -> None:
    said = r"secret\.json is of round 3 and .*checkpoint of round 2: an older checkpoint was put back, and rounds that"
    with pytest.raises(ValueError, match=said):
        read_secret(out, standing(2))


def emptied(path: Path) -> None:
    path.write_text("")


def halved(path: Path) -> None:
    path.write_text(path.read_text()[:40])


def lengthened(path: Path) -> None:
    path.write_text(path.read_text() + " " * 5000)


def changed(path: Path) -> None:
    path.write_text(path.read_text().replace(FIRST.at(3).key.hex(), "0" * 64))


def of_another_round(path: Path) -> None:
    path.write_text(path.read_text().replace('"round": 3', '"round": 2'))


def of_no_round(path: Path) -> None:
    path.write_text(path.read_text().replace('"round": 3', '"round": -1'))


def with_more(path: Path) -> None:
    path.write_text(path.read_text().replace('"round": 3', '"round": 3, "more": 1'))


def with_a_short_key(path: Path) -> None:
    path.write_text(path.read_text().replace(FIRST.at(3).key.hex(), FIRST.at(3).key.hex()[:-2]))


def linked(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to(path.with_name("elsewhere"))


def piped(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def shown_to_the_group(path: Path) -> None:
    path.chmod(0o640)


def shown_to_all(path: Path) -> None:
    path.chmod(0o604)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (Path.unlink, r"secret\.json is missing: who takes part and the noise follow from it; restore"),
        (emptied, r"secret\.json is damaged or cut short; restore the run's own file"),
        (halved, r"secret\.json is damaged or cut short"),
        (lengthened, r"secret\.json has \d+ bytes, and such a file has at most 4096"),
        (of_no_round, r"secret\.json is damaged or cut short"),
        (with_more, r"secret\.json is damaged or cut short"),
        (with_a_short_key, r"secret\.json is damaged or cut short"),
        (changed, r"secret\.json is not the secret with which .*checkpoint was made"),
        (of_another_round, r"secret\.json is not the secret with which .*checkpoint was made"),
        (linked, r"secret\.json is a symbolic link"),
        (piped, r"secret\.json is a pipe"),
        (shown_to_the_group, r"secret\.json can be read by others, who could take the noise off; `chmod 600` it if"),
        (shown_to_all, r"secret\.json can be read by others"),
    ],
)
def test_a_file_that_is_not_the_runs_own_is_refused_by_name(
    spoil: Callable[[Path], None], said: str, out: Path
) -> None:
    spoil(out / SECRET)
    with pytest.raises(ValueError, match=said) as refusal:
        read_secret(out, standing(3))
    shown = f"{refusal.value!r} {refusal.value.__cause__!r}"
    assert "\n" not in str(refusal.value)
    assert not any(part in shown for part in (FIRST.at(3).key.hex()[:16], "0000000000000000"))


def test_a_file_system_without_permissions_is_refused_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(secret_file, "_open_to_others", lambda mode: True)
    with pytest.raises(ValueError, match="can be read by others on this file system; choose an out=DIRECTORY on"):
        write_secret(tmp_path, FIRST)
    assert not (tmp_path / SECRET).exists()
