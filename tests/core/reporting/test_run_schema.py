"""A run's files may come from anyone: what no run writes is refused in one sentence, and all else makes a page."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from synthetic_run import make_run

from fedmoe_core.reporting.report import report
from fedmoe_core.reporting.run import read_runs
from fedmoe_core.simulation.directory import run_schema

RAW = {  # JSON text that json.dumps does not write
    "@NaN": "NaN",
    "@huge": "1e999",
    "@digits": "7" * 5000,
    "@wide": "7" * 400,
    "@deep": "[" * 2000 + "]" * 2000,
    "@deeper": '{"a":' * 200_000 + "1" + "}" * 200_000,
    "@surrogate": '"\\ud800"',
}
WRONG = (
    *RAW,
    *("<img src=x onerror=alert(1)>", "x", "", "\x1b[2J\r\n", True, False, None),
    *(-1, 0, 1, 10**30, 2**53, 1.5, -1.5, 1e-40, 1e30, 1e39, 1e300),
    *([], [1], [None], ["x"], [[]], [[None]], [[1], [1, 2]], [[1, 0]], [[-1, 2]], {}, {"a": 1}, [{"client": "x"}]),
)
NAMES = ("summary.json", "metrics.jsonl", "ledger.jsonl", "partition.json")
ROUND = {"type": "round", "round": 0, "loss": 4.0}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    changes = {"over_budget": ["client 0: 2 over 1"], "personal_loss_C": [1.0, 2.0], "worst_client_loss": 4.5}
    return make_run(tmp_path_factory.mktemp("sound") / "run", clients=2, layers=1, experts=2, rounds=2, **changes)


def places(value: Any, above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a JSON value: its root, every key, the first and the last entry of every list."""
    yield above
    inner = value.items() if isinstance(value, dict) else ()
    if isinstance(value, list) and value:
        inner = {0: value[0], len(value) - 1: value[-1]}.items()
    for key, entry in inner:
        yield from places(entry, (*above, key))


def replaced(value: Any, place: tuple[Any, ...], wrong: Any) -> Any:
    if not place:
        return wrong
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[place[0]] = replaced(value[place[0]], place[1:], wrong)
    return copy


def written(value: Any) -> str:
    text = json.dumps(value)
    return re.sub(r'"(@\w+)"', lambda found: RAW[found[1]], text)


def damages(sound: Path) -> list[tuple[str, int, tuple[Any, ...], Any]]:
    """Every file, line, place and wrong value; of several lines of one kind the first and the last."""
    found = []
    for name in NAMES:
        lines = [json.loads(text) for text in (sound / name).read_text("utf-8").splitlines()]
        kinds = [(line.get("type"), line.get("round") == 0) for line in lines]
        ends = {kinds.index(kind) for kind in kinds} | {len(lines) - 1}
        found += [(name, n, place, wrong) for n in sorted(ends) for place in places(lines[n]) for wrong in WRONG]
    return found


def damaged(sound: Path, path: Path, damage: tuple[str, int, tuple[Any, ...], Any]) -> Path:
    path.mkdir(exist_ok=True)
    name, number, place, wrong = damage
    for file in sound.iterdir():
        if file.is_file():
            (path / file.name).write_bytes(file.read_bytes())
    lines = (sound / name).read_text("utf-8").splitlines()
    lines[number] = written(replaced(json.loads(lines[number]), place, wrong))
    (path / name).write_text("\n".join(lines) + "\n", "utf-8")
    if name == "ledger.jsonl" and number % 2:  # then the budgets of an unfinished run are judged from the ledger
        (path / "summary.json").unlink()
    return path


def sentence(error: ValueError, path: Path) -> None:
    """One sentence that begins with the damaged file."""
    assert str(error).startswith(str(path))
    assert len(str(error)) < 400 + len(str(path))
    assert "\n" not in str(error)


def test_every_damage_is_read_or_refused_in_one_sentence(sound: Path, tmp_path: Path) -> None:
    """One draw in nine of some thousands: about 2 s."""
    every = damages(sound)
    refused = 0
    for damage in random.Random(0).sample(every, len(every) // 9):
        path = damaged(sound, tmp_path / "run", damage)
        try:
            read_runs([path])
        except ValueError as error:
            refused += 1
            sentence(error, path)
    assert len(every) > 4000
    assert refused > len(every) // 9 // 3


def test_what_is_read_makes_a_page(sound: Path, tmp_path: Path) -> None:
    """A page takes a second, so a dozen are drawn of the damages that reading lets through."""
    pages, every = 0, damages(sound)
    random.Random(1).shuffle(every)
    for damage in every:
        path = damaged(sound, tmp_path / "run", damage)
        try:
            read_runs([path])
        except ValueError:
            continue
        out, lines = report([path, sound] if pages % 3 == 0 else [path], out=tmp_path / "report.html")
        text = out.read_text("utf-8")
        assert "<img src" not in text
        assert not any(ord(sign) < 32 and sign != "\n" for sign in text + "".join(lines))
        pages += 1
        if pages == 12:
            return
    raise AssertionError("too few damages are harmless for this test to say anything")


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        (
            "summary.json",
            '{"experts_held_min": "<img>"}',
            'experts_held_min must be a whole number, 0 or more, not "<img>"',
        ),
        ("summary.json", '{"loss_after": "x"}', "loss_after must be a finite number"),
        ("summary.json", '{"rounds": [1]}', "rounds must be a whole number, 0 or more"),
        ("summary.json", '{"budgeted": 1}', "budgeted must be true or false"),
        ("summary.json", "[]", "must hold a table of keys"),
        ("summary.json", '{"seed": NaN}', "is not JSON"),
        ("summary.json", '{"seed": 1e999}', "is not JSON"),
        ("summary.json", "[" * 100_000, "is not JSON"),
        ("summary.json", '{"label": "\xe9"}', "is not UTF-8"),
        ("partition.json", '{"counts": [[1], [1, 2]]}', "counts must be a list of equally long rows"),
        ("partition.json", '{"counts": [[1, 2]], "names": ["a"]}', "names must be as many as the columns of counts"),
        ("ledger.jsonl", '{"round": 1, "client": -1}', "ledger.jsonl line 1: client must be a whole number"),
        ("ledger.jsonl", '{"round": 1, "client": 0, "real": {"flops": "x"}}', "real must be a table of amounts"),
        (
            "ledger.jsonl",
            '{"round": 1, "client": 0, "budget": {"energy_joules": "x"}}',
            "budget must be a table of amounts",
        ),
        ("metrics.jsonl", '{"type": "round"}', "metrics.jsonl line 1: round must be a whole number"),
        ("metrics.jsonl", f"{json.dumps(ROUND | {'refused': [{}]})}", "refused must be a list of tables"),
        (
            "metrics.jsonl",
            '{"type": "client", "round": 1, "client": "0"}',
            "metrics.jsonl line 1: client must be a whole number",
        ),
        (
            "metrics.jsonl",
            '{"type": "client", "round": 1, "client": 0, "held_LE": [[1]]}',
            "trained_LE must be there where held_LE is",
        ),
        (
            "metrics.jsonl",
            "\n".join(json.dumps(ROUND | {"round": n, "loss_clients": [1.0] * (n + 1)}) for n in (0, 1)),
            "line 2: the losses of the clients must be 1 as before, not 2",
        ),
        ("config.toml", "seed = 'x'", "seed must be a whole number"),
        ("config.toml", "x = " + "[" * 5000 + "]" * 5000, "config.toml is not TOML"),
        ("config.toml", "x = 0x" + "f" * 5000, "config.toml is not TOML"),
    ],
)
def test_the_sentence_names_file_key_and_what_was_expected(
    sound: Path, tmp_path: Path, name: str, text: str, said: str
) -> None:
    path = tmp_path / "run"
    path.mkdir()
    for file in sound.iterdir():
        if file.is_file():
            (path / file.name).write_bytes(file.read_bytes())
    (path / name).write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=re.escape(said)) as error:
        read_runs([path])
    sentence(error.value, path)
    assert name in str(error.value)


def test_unknown_keys_are_left_alone_and_null_is_absent(sound: Path, tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    path.write_text('{"seed": null, "future": {"a\\u001b": [1, "b\\n"]}}', "utf-8")
    assert run_schema.read_summary(path) == {"future": {"a\\x1b": [1, "b\\x0a"]}}


def test_the_names_of_a_run_are_visible(tmp_path: Path) -> None:
    path = make_run(tmp_path / "a\x1b[2J\u202e\\1", clients=2, layers=1, experts=2, rounds=1, label="L\x9b\r")
    first, twin = read_runs([path, path])
    assert first.name == twin.name == "L\\x9b\\x0d, a\\x1b[2J\\u202e\\1"
