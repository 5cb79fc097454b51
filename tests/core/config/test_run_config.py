"""Configuration: what goes in comes out, and every wrong word is named with the right one beside it."""

from __future__ import annotations

import dataclasses
import math
import re
import tomllib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmoe_core.config.run_config import (
    CLASSIFICATION_DEFAULTS,
    DENSE_DEFAULTS,
    INDIFFERENT,
    OWN,
    Config,
    TrainConfig,
    flatten,
    is_plain,
)
from fedmoe_core.config.schema import Setting, schema_of
from fedmoe_core.config.sections import EvalConfig
from fedmoe_core.config.systems import ALGORITHMS

SCHEMA = schema_of(Config)
TEXT = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=12)
TIER = st.sampled_from(("unlimited", "phone-8gb", "experts=12.5%", "memory=3.5MiB, down=1e6B", "  flops=3e12 "))
EXAMPLES = {
    "csv:FILE": "csv:a b.csv",
    "jsonl:FILE": "jsonl:é.jsonl",
    "folder:DIR": "folder:a/b",
    "parquet:FILE_OR_DIR": "parquet:rows.parquet",
    "hf:DIR": "hf:saved",
    "spam:DIR": "spam:package",
    "dirichlet:ALPHA": "dirichlet:0.3",
}


def values_of(setting: Setting) -> st.SearchStrategy[object]:
    """Values that a setting admits, taken from its own bounds."""
    if setting.words:
        forms = [form for form in setting.words if form != "MODULE:CLASS"]
        return st.sampled_from([EXAMPLES.get(form, form.replace("INDEX", "1")) for form in forms])
    if setting.kind is bool:
        return st.booleans()
    if setting.kind is str:
        return TEXT
    if setting.kind is tuple:
        return st.lists(TIER, min_size=1, max_size=3).map(tuple)
    limits = setting.limits
    low, high = limits.ge or 0.0, 1e9 if limits.le is None else limits.le
    if setting.kind is int:
        return st.integers(int(low), int(high))
    return st.floats(low, high, exclude_min=limits.gt is not None)


CROSS_CHECKED = {"clients", "clients_per_round", "min_clients", "ranks", "selection.reschedule"}
CROSS_CHECKED |= {"fft_moe.top_k", "fft_moe.experts", "cohort.memory"}
CROSS_CHECKED |= {"time.deadline", "time.straggle", "time.target"}  # they need budgets that state a speed
CROSS_CHECKED |= {"time.mode", "time.buffer"}  # one needs the other
CROSS_CHECKED |= {"selection.lam_change", "selection.beta_change", "aggregation.tau_change"}
CROSS_CHECKED |= {k for k in SCHEMA if "model_config" in k}
CROSS_CHECKED |= {k for k in SCHEMA if k.startswith("privacy.")}  # each needs the others
CROSS_CHECKED |= {"guard.quorum", "guard.rule"}  # they need as many clients
CROSS_CHECKED |= {"train.local_epochs"}  # it needs a plain model
CROSS_CHECKED |= {"split.experts", "split.top_k", "split.layers"}  # k of E experts, and N of last:N
FREE = {key: setting for key, setting in SCHEMA.items() if key not in CROSS_CHECKED}
SECTIONS = sorted({key.partition(".")[0] for key in FREE if "." in key})


def drawn(key: str) -> st.SearchStrategy[object]:
    """Values of a key that need no other: a plain model brings adapter, data and model together."""
    bound = {"adapter": is_plain, "data": is_plain_word, "model": is_plain_word}.get(key)
    return values_of(FREE[key]) if bound is None else values_of(FREE[key]).filter(lambda value: not bound(str(value)))


def is_plain_word(value: str) -> bool:
    return value == OWN


def replaced(values: dict[str, object]) -> Config:
    """A configuration with some values changed, built without the loader under test."""
    top: dict[str, object] = {k: v for k, v in values.items() if "." not in k}
    for section in sorted({key.partition(".")[0] for key in FREE if "." in key}):
        inner = {k.partition(".")[2]: v for k, v in values.items() if k.startswith(f"{section}.")}
        top[section] = dataclasses.replace(getattr(Config(), section), **inner)
    return dataclasses.replace(Config(), **top)


@settings(max_examples=150, deadline=None)
@given(st.fixed_dictionaries({}, optional={key: drawn(key) for key in FREE}))
def test_toml_round_trip_is_exact(tmp_path_factory: pytest.TempPathFactory, values: dict[str, object]) -> None:
    config = replaced(values)
    path = tmp_path_factory.mktemp("config") / "config.toml"
    path.write_text(config.to_toml(), encoding="utf-8")
    again = Config.load(path)
    assert again == config
    assert again.decisive() == config.decisive()
    assert again.to_toml() == config.to_toml()
    assert not config.diff(again)


def test_a_plain_models_configuration_survives_its_file(tmp_path: Path) -> None:
    config = Config.load(overrides=["adapter=my.module:model", "train.local_epochs=2", "clients=3"])
    assert (config.data, config.model, config.algorithm, config.budgets) == (OWN, OWN, "fedavg", ("unlimited",))
    path = tmp_path / "config.toml"
    path.write_text(config.to_toml(), encoding="utf-8")
    assert Config.load(path) == config


def test_saved_text_holds_every_key() -> None:
    tree = tomllib.loads(Config().to_toml())
    saved = {
        f"{k}.{leaf}" if isinstance(v, dict) else k
        for k, v in tree.items()
        for leaf in (v if isinstance(v, dict) else "x")
    }
    assert saved == set(SCHEMA)


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("train.lr=1e-3", "train.lr", 1e-3),
        ("train.lr=1", "train.lr", 1.0),
        ("rounds=12", "rounds", 12),
        ("aggregation.participation=false", "aggregation.participation", False),
        ('budgets=["memory=30MiB","experts=25%"]', "budgets", ("memory=30MiB", "experts=25%")),
        ("budgets=memory=30MiB,down=1MiB; experts=25%", "budgets", ("memory=30MiB,down=1MiB", "experts=25%")),
        ("budgets=experts=4", "budgets", ("experts=4",)),
        ("out='runs/a b'", "out", "runs/a b"),
        ("data=csv:x=y.csv", "data", "csv:x=y.csv"),
        ("partition=dirichlet:.5", "partition", "dirichlet:.5"),
    ],
)
def test_override(text: str, key: str, value: object) -> None:
    got = flatten(Config.load(overrides=[text]))[key]
    assert got == value
    assert type(got) is type(value)


def test_overrides_win_over_the_file_and_the_last_one_wins(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text("rounds = 3\nclients = 4\n[train]\nlr = 1\n")
    config = Config.load(path, ["rounds=5", "rounds=6"])
    assert (config.rounds, config.clients, config.train.lr) == (6, 4, 1.0)
    assert isinstance(config.train.lr, float)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ("train.lrr=1", ["train.lrr", "did you mean 'train.lr'"]),
        ("lr=1", ["'lr'", "did you mean 'warmup.lr' or 'train.lr'?"]),
        ("local_step=1", ["did you mean 'train.local_steps'"]),
        ("algoritm=fedavg", ["did you mean 'algorithm'"]),
        ("algorithm=hfedmo", ["'hfedmo'", "did you mean 'hfedmoe'", ", ".join(ALGORITHMS)]),
        ("selection.score=tailor", ["did you mean 'taylor'"]),
        ("data=stdlb", ["did you mean 'stdlib'"]),
        ("data=cvs:x.csv", ["did you mean 'csv:x.csv'"]),
        ("data=csv:", ["did you mean 'csv:FILE'"]),
        ("partition=dirichlt:0.1", ["did you mean 'dirichlet:0.1'"]),
        ("partition=dirichlet:-1", ["greater than 0"]),
        ("partition=dirichlet:x", ["dirichlet:0.5"]),
        ("device=gpu", ["valid: auto, cpu, cuda"]),
        ("train=1", ["section", "train.lr"]),
        ("zzzz=1", ["unknown key 'zzzz'", "valid keys"]),
        ("rounds", ["key=value"]),
        ("rounds=0", ["rounds=0 does not fit; give a whole number of at least 1"]),
        ("rounds=-1", ["at least 1"]),
        ("rounds=two", ["'two'", "whole number"]),
        ("rounds=1.5", ["whole number"]),
        ("clients=0", ["at least 1"]),
        ("seed=-1", ["seed=-1"]),
        ("ranks=0", ["ranks=0"]),
        ("threads=-1", ["threads=-1"]),
        ("train.lr=0", ["greater than 0"]),
        ("train.lr=nan", ["finite"]),
        ("train.lr=inf", ["finite"]),
        ("train.clip=-1", ["train.clip"]),
        ("train.token_dropout=1.5", ["0.95"]),
        ("selection.explore=2", ["from 0.0 to 1.0"]),
        ("selection.beta=-0.1", ["at least 0"]),
        ("aggregation.participation=maybe", ["true or false"]),
        ("aggregation.scale_bits=60", ["from 8 to 52"]),
        ("model_config.top_k=17", ["top_k=17", "experts=16"]),
        ("model_config.kv_heads=3", ["multiple"]),
        ("model_config.head_dim=31", ["head_dim=31", "a multiple of 2"]),
        ("model_config.experts=0", ["at least 1"]),
        ("clients_per_round=11", ["clients=10"]),
        ("min_clients=11", ["min_clients=11"]),
        ("budgets=", ["budget '': '' is neither", "unlimited"]),
        ("budgets=experts=1;;", ["budget '': '' is neither", "unlimited"]),
        ("budgets=[]", ["budgets=[] does not fit; give a list of texts of length 1 or more"]),
        ("budgets=[experts=25%]", ["quote it for the shell"]),
        ("budgets=[1]", ["a list of texts"]),
        ("out=", ["out='' does not fit; give a text of length 1 or more"]),
        ("model=", ["model=''", "length 1 or more"]),
    ],
)
def test_wrong_override_is_one_sentence_with_the_remedy(wrong: str, words: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        Config.load(overrides=[wrong])
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("rounds = ", ["not valid TOML"]),
        ("rounds = '3'", ["rounds='3'", "whole number"]),
        ("rounds = true", ["whole number"]),
        ("aggregation.participation = 1", ["true or false"]),
        ("budgets = 'experts=1'", ["list of texts"]),
        ("budgets = [1]", ["list of texts"]),
        ("[trian]\nlr = 1", ["[trian]", "did you mean [train]"]),
        ("[train]\nlearning = 1", ["train.learning"]),
        ("train = 3", ["section"]),
        ("rounds.x = 3", ["rounds="]),
        ("[train.lr]\nx = 3", ["train.lr="]),
        ("roundz = 3", ["did you mean 'rounds'"]),
    ],
)
def test_wrong_file_is_one_sentence(tmp_path: Path, text: str, words: list[str]) -> None:
    path = tmp_path / "c.toml"
    path.write_text(text)
    with pytest.raises(ValueError) as error:
        Config.load(path)
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


HOSTILE = {
    "rounds = 1.0": "rounds=1.0 does not fit; give a whole number of at least 1",
    "rounds = false": "rounds=False does not fit; give a whole number of at least 1",
    "rounds = 1979-05-27": "rounds=datetime.date(1979, 5, 27) does not fit; give a whole number of at least 1",
    "rounds = [1]": "rounds=[1] does not fit; give a whole number of at least 1",
    "seed = 9223372036854775808": "does not fit; give a whole number from 0 to 9223372036854775807",
    "cache = 3": "cache=3 does not fit; give a text",
    "data = 3": "data=3 is unknown; valid: stdlib, csv:FILE, jsonl:FILE",
    "data = ['stdlib']": "data=['stdlib'] is unknown; did you mean 'stdlib'? valid: stdlib, csv:FILE, jsonl:FILE",
    'tokenizer = "bpe\\n"': "tokenizer='bpe\\n' is unknown; did you mean 'bpe'? valid: auto, bpe, bpe-lower, word",
    'tokenizer = "\\u001b[2Jbpe"': "tokenizer='\\x1b[2Jbpe' is unknown; did you mean 'bpe'? valid: auto",
    "budgets = [['experts=1']]": "budgets=[['experts=1']] does not fit; give a list of texts",
    "[train]\nlr = true": "train.lr=True does not fit; give a number greater than 0",
    "[train]\nlr = '1'": "train.lr='1' does not fit; give a number greater than 0",
    "[train]\nlr = nan": "train.lr=nan does not fit; give a number greater than 0, and a finite one",
    "[train]\nlr = inf": "train.lr=inf does not fit; give a number greater than 0, and a finite one",
    "[selection]\nlam_change = -inf": "selection.lam_change=-inf does not fit; give a number, and a finite one",
    f"[train]\nlr = 1{'0' * 400}": "does not fit; give a number greater than 0",  # no float holds it
    f"[selection]\nlam_change = 1{'0' * 400}": "does not fit; give a number",
    f"rounds = {'9' * 5000}": "not valid TOML (Exceeds the limit",
    "a = " + "[" * 2000: "not valid TOML (maximum recursion depth exceeded",
    "rounds = 1\nrounds = 2": "not valid TOML (Cannot overwrite a value",
    "[train]\nlr = 1\n[train]\nclip = 2": "not valid TOML (Cannot declare ('train',) twice",
    "[train]\nlr = 1\nlr = 2": "not valid TOML (Cannot overwrite a value",
    "[zzzz]": "unknown section [zzzz]; valid sections: model_config, split, warmup, train",
    "[rounds]": "rounds={} does not fit; give a whole number of at least 1",
    "[[train]]\nlr = 1": "'train' is a section, not a value; set one of train.batch_size, ",
    "'train.lr' = 3\n'train.lrr' = 3": "unknown key 'train.lrr'; did you mean 'train.lr'?",
    "'' = 3": "unknown key ''",
    "settings = 3": "unknown key 'settings'",
    "[settings]\nx = 1": "unknown section [settings]",
    "algorithm = 3": "algorithm=3 is unknown; valid: hfedmoe, ",
}


@pytest.mark.parametrize(("text", "words"), HOSTILE.items(), ids=[text[:30] for text in HOSTILE])
def test_what_no_file_may_say_is_refused_by_key_and_value_with_all_that_is_valid(
    tmp_path: Path, text: str, words: str
) -> None:
    path = tmp_path / "c.toml"
    path.write_text(text, "utf-8")
    with pytest.raises(ValueError) as error:
        Config.load(path)
    assert words in str(error.value)
    assert str(error.value).isprintable()


class Word(str): ...


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *[("rounds", value) for value in (None, "3", True, 3.0, np.int64(3), b"3", "\ud800", [3], {}, object())],
        *[("train.lr", value) for value in (None, "1", True, np.float64(0.5), math.nan, math.inf, 10**400, 1j)],
        *[("aggregation.participation", value) for value in (None, 1, 0.0, "true", np.bool_(True))],
        *[("model", value) for value in (None, 3, b"tiny", Path("tiny"), Word("tiny"), "", ("tiny",))],
        *[("train.trunk", value) for value in (None, 3, "", "Frozen", "\ud800", ("frozen",), Word("frozen"))],
        *[("budgets", value) for value in (None, "experts=1", ["experts=1"], {"experts=1"}, (), (1,), range(2))],
        *[("train", value) for value in (None, {}, {"lr": 1.0}, 3, EvalConfig(), TrainConfig)],
        *[("settings", value) for value in (3, {}, TrainConfig())],
    ],
)
def test_what_no_python_code_may_say_is_refused_by_its_key(key: str, value: object) -> None:
    section, dot, leaf = key.rpartition(".")
    changed = {key: value} if not dot else {section: dataclasses.replace(getattr(Config(), section), **{leaf: value})}
    with pytest.raises(ValueError, match=rf"^{re.escape(key)}=.*; (give|leave|did you mean|valid)"):
        dataclasses.replace(Config(), **changed)


def test_missing_and_binary_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"nothing\.toml does not exist"):
        Config.load(tmp_path / "nothing.toml")
    (tmp_path / "b.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"b\.toml is not valid TOML"):
        Config.load(tmp_path / "b.toml")


def test_construction_is_checked_too() -> None:
    with pytest.raises(ValueError, match=r"train\.lr"):
        Config(train=TrainConfig(lr=-1.0))
    with pytest.raises(ValueError, match="rounds"):
        dataclasses.replace(Config(), rounds="3")


def test_labeled_data_starts_from_its_preset_below_the_users_words(tmp_path: Path) -> None:
    preset = flatten(Config.load(overrides=["data=csv:rows.csv"]))
    assert {key: preset[key] for key in CLASSIFICATION_DEFAULTS} == dict(CLASSIFICATION_DEFAULTS)
    key = "train.token_dropout"
    assert flatten(Config.load(overrides=["data=csv:rows.csv", f"{key}=0.1"]))[key] == 0.1
    path = tmp_path / "c.toml"
    path.write_text("data = 'csv:rows.csv'\n[train]\ntoken_dropout = 0.2\n")
    assert flatten(Config.load(path))[key] == 0.2
    assert flatten(Config.load(path, ["data=stdlib"]))["train.trunk"] == TrainConfig().trunk

    labeled, plain = tmp_path / "l.jsonl", tmp_path / "p.jsonl"
    labeled.write_text('\n{"label": "a", "text": "b"}\n')
    plain.write_text('{"text": "b"}\n')
    assert Config.load(overrides=[f"data=jsonl:{labeled}"]).train.trunk == "fedavg"
    assert Config.load(overrides=[f"data=jsonl:{plain}"]).train.trunk == "frozen"
    assert Config.load(overrides=["data=jsonl:absent.jsonl"]).train.trunk == "frozen"


def test_a_dense_model_starts_from_its_preset_also_with_labels() -> None:
    for words in (["model=smollm2"], ["model=dense:there", "data=csv:rows.csv"]):
        preset = flatten(Config.load(overrides=words))
        assert {key: preset[key] for key in DENSE_DEFAULTS} == dict(DENSE_DEFAULTS)
        assert Config.load(overrides=[*words, "train.lr=1e-2"]).train.lr == 1e-2
    assert Config.load(overrides=["model=somewhere"]).train.lr == TrainConfig().lr
    assert Config.load(overrides=["model=dense:there", "data=csv:rows.csv"]).train.trunk == "fedavg"


def test_preset_is_itself_valid() -> None:
    assert set(CLASSIFICATION_DEFAULTS) | set(DENSE_DEFAULTS) <= set(SCHEMA)
    assert Config.load(overrides=["data=csv:x"]).decisive() != Config().decisive()


@given(st.sampled_from(sorted(FREE)), st.data())
@settings(max_examples=150, deadline=None)
def test_fingerprint_changes_exactly_with_what_decides_results(key: str, data: st.DataObject) -> None:
    config = Config()
    value = data.draw(drawn(key))
    other = replaced({key: value})
    changed = value != flatten(config)[key]
    by_content = key in ("data", "model")  # only their kind counts, never a path
    was, now = config.decisive().get(key), other.decisive().get(key)
    decides = changed and key not in INDIFFERENT and (was != now or not by_content)
    assert (config.decisive() != other.decisive()) == decides
    assert config.diff(other) == ({key: (was, now)} if decides else {})


def test_resolved_names_its_threads_and_keeps_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    config = Config()
    assert config.threads == 0
    one, two = config.resolved(), dataclasses.replace(config, ranks=2).resolved()
    assert one.threads >= two.threads >= 1
    assert one.resolved() == one
    assert dataclasses.replace(config, threads=3).resolved().threads == 3
    for asked, threads in (("3", 3), ("", one.threads), ("many", one.threads), ("0", one.threads)):
        monkeypatch.setenv("OMP_NUM_THREADS", asked)  # what a batch system allots each process
        assert config.resolved().threads == threads


def test_a_retired_key_may_stand_in_an_older_file_at_the_value_at_which_it_did_nothing(tmp_path: Path) -> None:
    path = tmp_path / "older.toml"
    path.write_text("[plus]\nredundancy = 0.0\nexplore = 0.1\n")
    assert Config.load(path).plus.explore == 0.1
    assert "redundancy" not in Config.load(path).to_toml()
    path.write_text("[plus]\nredundancy = 0.5\n")
    with pytest.raises(
        ValueError, match=r"plus.redundancy is not a setting any more; run this file with the fedmoe that"
    ):
        Config.load(path)
    with pytest.raises(ValueError, match=r"unknown key 'plus.redundancy'"):
        Config.load(overrides=["plus.redundancy=0.0"])
