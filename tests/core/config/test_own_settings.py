"""The settings of a system from elsewhere: its class declares them, and they are kept like every other."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import TINY, write_notes

from fedmoe_core.config.run_config import Config, flatten
from fedmoe_core.config.schema import schema_of
from fedmoe_core.config.systems import place_of, section_of
from fedmoe_core.simulation import run as simulator

MODULE = '''
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from msgspec import Meta

from fedmoe_core.algorithms.baselines import RandomExperts


@dataclass(frozen=True)
class Turns:
    start: Annotated[int, Meta(ge=1, multiple_of=2)] = 2
    rate: Annotated[float, Meta(gt=0.0, lt=1.0)] = 0.5
    order: Literal["up", "down"] = "up"
    loud: bool = False
    names: tuple[str, ...] = ("a",)
    kept: ClassVar[int] = 3

    def __post_init__(self) -> None:
        if self.order == "down" and self.start == 2:
            raise ValueError("TakeTurns.order=down begins at 4; set TakeTurns.start=4")


class TakeTurns(RandomExperts):
    settings: ClassVar[type | None] = Turns

    def plan(self, state: Any, clients: Any) -> Any:
        assert self.population.config.settings.start == 6
        return super().plan(state, clients)


class Plain(RandomExperts):
    """It declares none."""
'''


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on the path with a module of systems, and a package's names for them."""
    (tmp_path / "turns_module.py").write_text(MODULE)
    names = "take_turns = turns_module:TakeTurns\nplain = turns_module:Plain\ntrain = turns_module:TakeTurns\n"
    names += "broken = no_such_module:X\na.b = turns_module:TakeTurns\n"
    facts = tmp_path / "turns_package-1.0.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: turns-package\nVersion: 1.0\n")
    (facts / "entry_points.txt").write_text(f"[fedmoe.algorithms]\n{names}")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "turns_module", raising=False)
    return tmp_path


@pytest.mark.parametrize("algorithm", ["turns_module:TakeTurns", "take_turns"])
def test_a_declared_section_is_read_kept_and_compared_like_every_other(elsewhere: Path, algorithm: str) -> None:
    section = section_of(algorithm)
    path = elsewhere / "c.toml"
    path.write_text(f"algorithm = '{algorithm}'\nrounds = 3\n[{section}]\nstart = 4\nnames = ['x', 'y']\n")
    config = Config.load(path, [f"{section}.rate=.25", f"{section}.loud=true"])
    own = config.settings
    assert (type(own).__name__, own.start, own.rate, own.order, own.loud) == ("Turns", 4, 0.25, "up", True)
    assert own.names == ("x", "y")
    assert config.rounds == 3

    mine = {key: value for key, value in flatten(config).items() if key.startswith(f"{section}.")}
    assert list(mine) == [f"{section}.{name}" for name in ("start", "rate", "order", "loud", "names")]
    assert len(flatten(config)) == len(schema_of(Config)) + 5
    assert mine.items() <= config.decisive().items()
    path.write_text(config.to_toml())
    again = Config.load(path)
    assert again == config
    assert hash(again) == hash(config)
    assert again.to_toml() == config.to_toml()
    assert f"\n[{section}]\nstart = 4\n" in config.to_toml()
    assert config.diff(Config.load(path, [f"{section}.start=8"])) == {f"{section}.start": (4, 8)}
    assert dataclasses.replace(config, seed=1).resolved().settings == own

    default = Config(algorithm=algorithm)
    assert default.settings == type(own)()
    assert default.diff(Config())[f"{section}.start"] == (2, None)
    assert Config().diff(default)[f"{section}.start"] == (None, 2)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["take_turns.strat=2"], "unknown key 'take_turns.strat'; did you mean 'take_turns.start'?"),
        (["start=2"], "unknown key 'start'; did you mean 'take_turns.start'?"),
        (["take_turns=2"], "'take_turns' is a section, not a value; set one of take_turns.start, "),
        (["take_turn.start=2"], "did you mean 'take_turns.start'?"),
        (
            ["take_turns.start=3"],
            "start=3 does not fit; give a whole number of at least 1 and a multiple of 2",
        ),
        (["take_turns.start=x"], "take_turns.start='x' does not fit; give a whole number of at least 1 and"),
        (["take_turns.rate=1"], "take_turns.rate=1.0 does not fit; give a number greater than 0 and less than 1"),
        (
            ["take_turns.rate=nan"],
            "rate=nan does not fit; give a number greater than 0 and less than 1, and a finite one",
        ),
        (["take_turns.order=dwn"], "take_turns.order='dwn' is unknown; did you mean 'down'? valid: up, down"),
        (["take_turns.loud=1"], "take_turns.loud='1' does not fit; give true or false"),
        (["take_turns.kept=1"], "unknown key 'take_turns.kept'"),
        (["take_turns.order=down"], "begins at 4; set TakeTurns.start=4"),
        (["take_turns.start=4", "algorithm=fedavg"], "unknown key 'take_turns.start'"),
        (["algorithm=plain", "plain.start=4"], "unknown key 'plain.start'"),
        (["algorithm=take_trns"], "algorithm='take_trns' is unknown; did you mean 'take_turns'? valid: hfedmoe, "),
        (["algorithm=train"], "algorithm='train' needs a section [train], which is taken; rename the system"),
        (["algorithm=a.b"], "needs a section [a.b], and such a name may hold letters, digits, _ and -"),
        (["algorithm=broken"], "algorithm='broken' cannot be loaded (No module named 'no_such_module'); install its"),
    ],
)
def test_what_a_declared_section_does_not_admit_is_refused(elsewhere: Path, words: list[str], sentence: str) -> None:
    with pytest.raises(ValueError) as error:
        Config.load(overrides=["algorithm=take_turns", *words])
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_may_not_hold_the_section_of_another_system(elsewhere: Path) -> None:
    path = elsewhere / "c.toml"
    path.write_text("algorithm = 'take_turns'\n[take_turnz]\nstart = 4\n")
    with pytest.raises(ValueError, match=r"unknown section \[take_turnz\]; did you mean \[take_turns\]\?"):
        Config.load(path)
    path.write_text("[take_turns]\nstart = 4\n")
    with pytest.raises(ValueError, match=r"unknown section \[take_turns\]"):
        Config.load(path)
    assert Config.load(path, ["algorithm=take_turns"]).settings.start == 4


def test_settings_belong_to_their_system(elsewhere: Path) -> None:
    config = Config(algorithm="take_turns")
    with pytest.raises(ValueError, match=r"settings=Turns\(.*algorithm='fedavg'; leave settings out"):
        dataclasses.replace(config, algorithm="fedavg")
    assert dataclasses.replace(config, algorithm="fedavg", settings=None) == Config(algorithm="fedavg")
    assert Config(algorithm="plain").settings is None
    with pytest.raises(ValueError, match=r"take_turns\.rate=-1 does not fit"):
        Config(algorithm="take_turns", settings=dataclasses.replace(config.settings, rate=-1))


@pytest.mark.parametrize(
    ("declared", "sentence"),
    [
        ("3", "is not a frozen dataclass; make it one"),
        ("type('S', (), {})", "is not a frozen dataclass; make it one"),
        ("dataclass(type('S', (), {'__annotations__': {'x': int}, 'x': 1}))", "is not a frozen dataclass; make it one"),
        ("made(x=int)", "Mine.x has no default; give it one in S"),
        ("made(x=(list[int], field(default_factory=list)))", r"Mine.x is of type list\[int\]; give it one of a whole"),
        ("made(x=(tuple[int, ...], ()))", "Mine.x is of type tuple"),
        ("made(x=(int | None, None))", "Mine.x is of type"),
        ("made(x=(Literal[1, 'a'], 1))", "Mine.x is of type"),
        ("made(x=(Inner, Inner()))", "Mine.x is of type .*Inner"),
    ],
)
def test_a_declaration_that_cannot_be_kept_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, declared: str, sentence: str
) -> None:
    (tmp_path / "bad_settings.py").write_text(
        "from dataclasses import dataclass, field, make_dataclass\nfrom typing import Literal\n"
        "def made(**kinds):\n"
        "    parts = [(n, *k) if isinstance(k, tuple) else (n, k) for n, k in kinds.items()]\n"
        "    return make_dataclass('S', parts, frozen=True)\n"
        "@dataclass(frozen=True)\nclass Inner:\n    y: int = 1\n"
        f"class Mine:\n    settings = {declared}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "bad_settings", raising=False)
    with pytest.raises(ValueError, match=sentence):
        Config(algorithm="bad_settings:Mine")


def test_a_class_that_cannot_be_found_yet_declares_nothing() -> None:
    """``fedmoe`` puts the current folder on the path once it has read the configuration."""
    assert Config(algorithm="no_such_module:X").settings is None


def test_places(elsewhere: Path) -> None:
    assert place_of("take_turns") == "turns_module:TakeTurns"
    assert place_of("own.module:Mine") == "own.module:Mine"
    assert place_of("flux") == "fedmoe_core.algorithms.flux.flux:Flux"
    for word in ("", ":", "own:", ":Mine", "a b:C", "own:Mine:More", "own:1", "Flux", "flux "):
        with pytest.raises(ValueError, match=r"^algorithm='.*' is unknown; .*valid: hfedmoe, .*MODULE:CLASS$"):
            place_of(word)


def test_only_the_system_that_runs_is_imported(elsewhere: Path) -> None:
    code = (
        "import sys; from fedmoe_core.config.run_config import Config; Config.load(overrides=['algorithm=flux']); "
        "assert not {'torch', 'turns_module'} & sys.modules.keys(); Config(algorithm='take_turns'); "
        "assert 'turns_module' in sys.modules"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_run_holds_its_systems_settings_and_its_system_reads_them(elsewhere: Path) -> None:
    notes = write_notes(elsewhere / "notes.jsonl")
    where = [f"data=jsonl:{notes}", f"out={elsewhere / 'run'}", f"cache={elsewhere / 'cache'}"]
    own = ["algorithm=turns_module:TakeTurns", "TakeTurns.start=6"]
    summary: dict[str, Any] = simulator.run(Config.load(overrides=[*TINY, *where, *own]))
    assert summary["rounds"] == 1
    saved = elsewhere / "run" / "config.toml"
    assert Config.load(saved).settings.start == 6
    text = saved.read_text()
    simulator.resume(elsewhere / "run")
    saved.write_text(text.replace("start = 6", "start = 8"))
    with pytest.raises(ValueError, match=r"TakeTurns\.start = 6 then, 8 now"):
        simulator.resume(elsewhere / "run")
