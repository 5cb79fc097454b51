"""What the files of a run may hold: read once, every known key checked, every text made visible."""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

from msgspec import Meta, ValidationError, convert, defstruct

from fedmoe_core.base.files import read_json_lines
from fedmoe_core.base.wording import visible
from fedmoe_core.budget.limits import Cost

WHOLE = 2**53  # above it a JSON reader may round
LONGEST = 1024  # bits of any whole number; Python refuses to print some thousand digits
REAL = 1e40  # any figure of a run is below it, and twice a figure is still finite
Number = Annotated[float, Meta(ge=-REAL, le=REAL)]
Amount = Annotated[float, Meta(ge=0, le=REAL)]
Count = Annotated[int, Meta(ge=0, le=WHOLE)]


@dataclass(frozen=True)
class FieldKind:
    """What a key may hold: in words, and as msgspec's type of a value from JSON or TOML. Null is "not measured"."""

    words: str
    hint: Any
    even: bool = False  # whether rows must be equally long

    def holds(self, value: Any) -> bool:
        """Tell whether a value is of this kind."""
        try:
            convert(value, self.hint)
        except (ValidationError, OverflowError):  # the latter for a whole number that no float holds
            return False
        return not self.even or len(set(map(len, value))) <= 1


def _matrix(entry: Any, words: str) -> FieldKind:
    return FieldKind(words, list[Annotated[list[entry], Meta(min_length=1)]], even=True)


TEXT = FieldKind("text", str)
FLAG = FieldKind("true or false", bool)
NUMBER = FieldKind("a finite number", Number)
AMOUNT = FieldKind("a finite number, 0 or more", Amount)
INTEGER = FieldKind("a whole number", Annotated[int, Meta(ge=-WHOLE, le=WHOLE)])
COUNT = FieldKind("a whole number, 0 or more", Count)
TEXTS = FieldKind("a list of texts", list[str])
PER_CLIENT = FieldKind("a list of finite numbers or nulls", list[Number | None])
BITS_LE = _matrix(Literal[0, 1], "a list of equally long rows of 0 and 1")
COSTS = [field.name for field in fields(Cost)]
COST = FieldKind(
    f"a table of amounts, 0 or more, such as {', '.join(COSTS)}",
    defstruct("Costs", [(name, Amount | None, None) for name in COSTS]),
)
ACTED = ("bounded", "left_out")  # what the guard of the sums did to changes of clients
REFUSED = FieldKind(
    'a list of tables with a whole number "client" and a text "reason"',
    list[defstruct("Refused", [("client", Count), ("reason", str)])],  # type: ignore[misc]
)

LATE = FieldKind(
    'a list of tables with a whole number "client" and an amount "seconds"',
    list[defstruct("Late", [("client", Count), ("seconds", Amount)])],  # type: ignore[misc]
)
CLOCK = FieldKind(
    "a table of amounts straggle and seconds", defstruct("Clock", [("straggle", Amount), ("seconds", Amount)])
)
FLIGHT = FieldKind(
    "a table of whole numbers version and staleness, and amounts dispatched and arrived",
    defstruct("Flight", [("version", Count), ("staleness", Count), ("dispatched", Amount), ("arrived", Amount)]),
)
GUARD = FieldKind(
    "a table of a text rule, whole numbers few and below_quorum, and tables of whole numbers bounded and left_out",
    defstruct(
        "Guard",
        [("rule", str), *[(name, Count) for name in ("few", "below_quorum")], *[(n, dict[str, Count]) for n in ACTED]],
    ),
)
GUARDED = FieldKind(
    "a table of a text rule and of whole numbers few, below_quorum, bounded and left_out",
    defstruct("Guarded", [("rule", str), *[(name, Count) for name in ("few", "below_quorum", *ACTED)]]),
)

CONFIG = {"algorithm": TEXT, "model": TEXT, "data": TEXT, "clients": COUNT, "seed": INTEGER, "budgets": TEXTS}
SUMMARY = {
    **dict.fromkeys(("algorithm", "label", "task", "partition"), TEXT),
    **dict.fromkeys(("corpus_sha256", "model_sha256", "model_hash", "code", "torch"), TEXT),
    **dict.fromkeys(("loss_before", "loss_after", "worst_client_loss"), NUMBER),
    **dict.fromkeys(("accuracy_before", "accuracy_after"), NUMBER),
    **dict.fromkeys(("bytes_down", "bytes_up", "flops", "peak_memory_bytes"), AMOUNT),
    **dict.fromkeys(("seconds", "engine_seconds", "client_seconds"), AMOUNT),
    **dict.fromkeys(("rounds", "experts_held_min", "experts_held_max"), COUNT),
    **dict.fromkeys(("budget_violations", "budgets_broken", "refused_updates", "clients_in_cohorts", "cohorts"), COUNT),
    "clients_alone": FieldKind("a table of whole numbers, 0 or more, by reason", dict[str, Count]),
    **dict.fromkeys(("personal_loss_C", "personal_accuracy_C"), PER_CLIENT),
    "seed": INTEGER,
    "budgeted": FLAG,
    "guard": GUARDED,
    **dict.fromkeys(("virtual_seconds", "virtual_seconds_to_target", "staleness_mean"), AMOUNT),
    **dict.fromkeys(("late_updates", "staleness_max"), COUNT),
    **dict.fromkeys(("over_budget", "broken_by", "absent_clients"), TEXTS),
    **dict.fromkeys(("nothing_trained", "stopped"), TEXT),
    **dict.fromkeys(("epsilon", "delta"), AMOUNT),
}
ROUND = {
    "round": COUNT,
    **dict.fromkeys(("loss", "accuracy", "lost_mass", "coverage", "load_cv"), NUMBER),
    **dict.fromkeys(("loss_clients", "accuracy_clients", "personal_loss_C", "personal_accuracy_C"), PER_CLIENT),
    **dict.fromkeys(("bytes_down_total", "bytes_up_total", "flops_total", "seconds", "engine_seconds"), AMOUNT),
    **dict.fromkeys(("virtual_seconds", "virtual_seconds_total", "staleness_mean", "epsilon"), AMOUNT),
    **dict.fromkeys(("staleness_max", "in_flight"), COUNT),
    "late": LATE,
    "guard": GUARD,
    "refused": REFUSED,
    "importance_LE": _matrix(Number | None, "a list of equally long rows of finite numbers or nulls"),
}
CLIENT = {
    **dict.fromkeys(("round", "client"), COUNT),
    **dict.fromkeys(("tier", "status", "error"), TEXT),
    **dict.fromkeys(("held_LE", "trained_LE"), BITS_LE),
    **dict.fromkeys(("loss_first", "loss_last"), NUMBER),
}
LEDGER = {
    **dict.fromkeys(("round", "client"), COUNT),
    **dict.fromkeys(("budget", "bound_by"), COST),
    **dict.fromkeys(("predicted", "real"), COST),
    "clock": CLOCK,
    "flight": FLIGHT,
}
PARTITION = {
    **dict.fromkeys(("names", "clients"), TEXTS),
    "counts": _matrix(Amount, "a list of equally long rows of finite numbers, 0 or more"),
}


def read_summary(path: Path) -> dict[str, Any]:
    """Read ``summary.json``.

    Raises:
        ValueError: not JSON, or a key holds what no run writes; the sentence names file, key and what was expected.
        OSError: the file cannot be read.
    """
    return _known(_checked(_json(path), SUMMARY, str(path)))


def read_config(path: Path) -> dict[str, Any]:
    """Read the ``config.toml`` of a run as a tree of tables; raises as ``read_summary``."""
    text = read_text(path)
    try:
        tree = _seen(tomllib.loads(text))
    except (ValueError, RecursionError):
        raise ValueError(f"{path} is not TOML; run again, or remove it") from None
    return _checked(tree, CONFIG, str(path))


def read_partition(path: Path) -> dict[str, Any]:
    """Read ``partition.json``: names of clients and of labels or domains, and rows of each; raises as
    ``read_summary``."""
    found = _known(_checked(_json(path), PARTITION, str(path)))
    counts, names = found.get("counts"), found.get("names")
    if counts and names is not None and len(names) != len(counts[0]):
        raise ValueError(f"{path}: names must be as many as the columns of counts, {len(counts[0])}, not {len(names)}")
    return found


def read_metrics(path: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Read ``metrics.jsonl`` as round records and client records, in the file's order; raises as ``read_summary``."""
    rounds: list[dict[str, Any]] = []
    clients: list[dict[str, Any]] = []
    shapes: dict[str, tuple[int, ...]] = {}
    for where, record in _lines(path):
        if record.get("type") == "round":
            rounds.append(_checked(record, ROUND, where, ("round",)))
            for key in ("loss_clients", "personal_loss_C"):
                _alike(shapes, "the losses of the clients", record.get(key), where)
        elif record.get("type") == "client":
            clients.append(_checked(record, CLIENT, where, ("round", "client")))
            if record.get("held_LE") and not record.get("trained_LE"):
                raise ValueError(f"{where}: trained_LE must be there where held_LE is; run again, or remove this line")
        # One shape in the whole file: a layer is a layer of one model.
        for key in ("held_LE", "trained_LE", "importance_LE"):
            _alike(shapes, "the tables of layers and experts", record.get(key), where)
    return rounds, clients


def read_ledger(path: Path) -> list[dict[str, Any]]:
    """Read ``ledger.jsonl`` in the file's order; raises as ``read_summary``."""
    return [_known(_checked(record, LEDGER, where, ("round", "client"))) for where, record in _lines(path)]


def read_text(path: Path) -> str:
    """Read a UTF-8 file; raises as ``read_summary``."""
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8 text; run again, or remove it") from None


def _checked(found: Any, kinds: Mapping[str, FieldKind], where: str, needed: Sequence[str] = ()) -> dict[str, Any]:
    if not isinstance(found, dict):
        raise ValueError(f"{where} must hold a table of keys, not {_short(found)}; run again, or remove it")
    for key, kind in kinds.items():
        value = found.get(key)
        if (value is None and key in needed) or (value is not None and not kind.holds(value)):
            raise ValueError(f"{where}: {key} must be {kind.words}, not {_short(value)}; run again, or remove it")
    return found


def _known(found: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out what is null, so that null and absent are one."""
    return {key: value for key, value in found.items() if value is not None}


def _alike(shapes: dict[str, tuple[int, ...]], name: str, value: Any, where: str) -> None:
    """Refuse a list or table whose shape is not that of its first appearance; null and empty count as absent."""
    if not value:
        return
    shape = (len(value), len(value[0])) if isinstance(value[0], list) else (len(value),)
    known = shapes.setdefault(name, shape)
    if shape != known:
        told = [" x ".join(map(str, sizes)) for sizes in (known, shape)]
        raise ValueError(f"{where}: {name} must be {told[0]} as before, not {told[1]}; run again, or remove this line")


def _lines(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Records with the words for where each stands."""
    found = read_json_lines(path, _parsed, lenient=True)
    return [(where, _checked(record, {"type": TEXT}, where)) for where, record in found]


def _json(path: Path) -> Any:
    text = read_text(path)
    try:
        return _parsed(text)
    except (ValueError, RecursionError):
        raise ValueError(f"{path} is not JSON; run again, or remove it") from None


def _parsed(text: str) -> Any:
    value = json.loads(text, parse_constant=_no_constant, parse_float=_finite)
    # Where no sign is unseen and none is escaped, all texts are visible: to walk a line takes 3 times its parsing.
    return value if text.isascii() and text.isprintable() and "\\" not in text else _seen(value)


def _no_constant(word: str) -> NoReturn:
    raise ValueError(f"{word} is not JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is too large")
    return value


def _seen(value: Any) -> Any:
    """Return parsed JSON or TOML with every text in it visible, keys included."""
    if isinstance(value, str):
        return visible(value)
    if isinstance(value, dict):
        return {visible(key): _seen(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_seen(entry) for entry in value]
    if isinstance(value, int) and value.bit_length() > LONGEST:
        raise ValueError("a whole number has too many digits")
    return value


def _short(value: Any) -> str:
    """Name a value in at most 60 characters."""
    if isinstance(value, dict):
        return "a table"
    if isinstance(value, list):
        return "this list"
    text = "null" if value is None else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."
