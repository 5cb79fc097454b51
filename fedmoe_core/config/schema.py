"""How a configuration is read, checked and written: types, bounds, nearest names, TOML and key=value text."""

from __future__ import annotations

import difflib
import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

T = TypeVar("T")
PLACE = "MODULE:CLASS"  # a form of OneOf: a class by the module it is in


@dataclass(frozen=True)
class Between:
    """Bounds of a number, both allowed."""

    low: float
    high: float

    def admits(self, value: float) -> bool:
        return self.low <= value <= self.high

    def __str__(self) -> str:
        return f"from {self.low} to {self.high}"


@dataclass(frozen=True)
class AtLeast:
    """The smallest number allowed."""

    low: float

    def admits(self, value: float) -> bool:
        return value >= self.low

    def __str__(self) -> str:
        return f"of at least {self.low:g}"


@dataclass(frozen=True)
class MoreThan:
    """The largest number that is not allowed any more."""

    low: float

    def admits(self, value: float) -> bool:
        return value > self.low

    def __str__(self) -> str:
        return f"greater than {self.low:g}"


class OneOf:
    """Allowed words; ``csv:FILE`` stands for ``csv:`` and anything after it."""

    def __init__(self, *forms: str) -> None:
        self.forms = forms

    def admits(self, value: str) -> bool:
        return any(_fits(form, value) for form in self.forms)

    def nearest(self, value: str) -> str | None:
        kind, colon, rest = value.partition(":")
        by_kind = {form.partition(":")[0]: form for form in self.forms}
        form = by_kind.get(nearest(kind, list(by_kind)) or "")
        if form is None or ":" not in form:
            return form
        return f"{form.partition(':')[0]}:{rest}" if colon and rest else form

    def __str__(self) -> str:
        return ", ".join(self.forms)


@dataclass(frozen=True)
class Setting:
    """One key: its plain type (int, float, bool, str or tuple of str) and what bounds it."""

    kind: type
    rule: Between | AtLeast | MoreThan | OneOf | None = None


Schema = Mapping[str, Setting]


@cache
def schema_of(record: type, prefix: str = "") -> dict[str, Setting]:
    """Return the settings of a dataclass and of the dataclasses inside it, by dotted key."""
    hints = get_type_hints(record, include_extras=True)
    found: dict[str, Setting] = {}
    for item in fields(record):
        hint = hints[item.name]
        key = prefix + item.name
        if is_dataclass(hint):
            found |= schema_of(hint, f"{key}.")  # type: ignore[arg-type]
        elif get_origin(hint) is Annotated:
            found[key] = Setting(*get_args(hint))
        elif get_origin(hint) is Literal:
            found[key] = Setting(str, OneOf(*get_args(hint)))
        else:
            found[key] = Setting(get_origin(hint) or hint)
    return found


def nearest(name: str, known: Sequence[str]) -> str | None:
    """Return the known name that is spelt most like ``name``, or None when nothing is close."""
    close = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.5)
    return close[0] if close else None


def check(key: str, value: object, setting: Setting) -> None:
    """Refuse a value of the wrong type or outside its bounds.

    Raises:
        ValueError: one sentence that names the key, the value and what would do.
    """
    fits = type(value) is setting.kind or (setting.kind is float and type(value) is int)
    if setting.kind is tuple:
        fits = isinstance(value, tuple) and all(isinstance(part, str) for part in value)
    if not fits:
        raise ValueError(f"{key}={_show(value)} is not {_NAMES[setting.kind]}; give {_NAMES[setting.kind]}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{key}={value} is not finite; give a finite number")
    rule = setting.rule
    if rule is None or rule.admits(value):  # type: ignore[arg-type]
        return
    if isinstance(rule, OneOf):
        close = rule.nearest(str(value))
        hint = f"did you mean {close!r}? " if close else ""
        raise ValueError(f"{key}={value!r} is unknown; {hint}valid: {rule}")
    raise ValueError(f"{key}={value} is out of range; give {_NAMES[setting.kind]} {rule}")


def resolve_key(key: str, schema: Schema) -> str:
    """Return the key itself when it is known.

    Raises:
        ValueError: an unknown key, with the nearest valid one.
    """
    if key in schema:
        return key
    sections = {known.partition(".")[0] for known in schema if "." in known}
    if key in sections:
        inside = ", ".join(known for known in schema if known.startswith(f"{key}."))
        raise ValueError(f"{key!r} is a section, not a value; set one of {inside}")
    leaves: dict[str, list[str]] = {}
    for known in schema:
        leaves.setdefault(known.rpartition(".")[2], []).append(known)
    close = nearest(key, list(schema))
    by_leaf = leaves.get(nearest(key.rpartition(".")[2], list(leaves)) or "", [])
    meant = leaves.get(key) or ([close] if close else by_leaf)
    hint = f"did you mean {' or '.join(map(repr, meant))}?" if meant else f"valid keys: {', '.join(schema)}"
    raise ValueError(f"unknown key {key!r}; {hint}")


def build(record: type[T], values: Mapping[str, object], prefix: str = "") -> T:
    """Build a nested dataclass from values by dotted key; keys that are absent keep their defaults."""
    hints = get_type_hints(record)
    chosen: dict[str, Any] = {}
    for item in fields(record):  # type: ignore[arg-type]
        key = prefix + item.name
        if is_dataclass(hints[item.name]):
            chosen[item.name] = build(hints[item.name], values, f"{key}.")
        elif key in values:
            value = values[key]
            chosen[item.name] = float(value) if hints[item.name] is float and type(value) is int else value
        elif item.default is MISSING and item.default_factory is MISSING:
            raise ValueError(f"{key} has no value; set {key}=...")
    return record(**chosen)


def read_toml(path: Path, schema: Schema) -> dict[str, object]:
    """Read the values of a TOML file by dotted key.

    Raises:
        ValueError: not TOML, or an unknown key.
        OSError: the file cannot be read.
    """
    if not path.is_file():
        raise FileNotFoundError(f"config file {path} does not exist; check the path")
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid TOML ({error}); correct it there") from None
    sections = {known.partition(".")[0] for known in schema if "." in known}
    values: dict[str, object] = {}
    for name, value in tree.items():
        inner = value.items() if isinstance(value, dict) else None
        if inner is None or (name not in sections and name in schema):
            values[resolve_key(name, schema)] = _frozen(value)
        elif name not in sections:
            close = nearest(name, sorted(sections))
            hint = f"did you mean [{close}]?" if close else f"valid sections: {', '.join(sorted(sections))}"
            raise ValueError(f"unknown section [{name}] in {path}; {hint}")
        else:
            for leaf, part in inner:
                values[resolve_key(f"{name}.{leaf}", schema)] = _frozen(part)
    return values


def parse_override(text: str, schema: Schema) -> tuple[str, object]:
    """Read key and typed value of ``key=value``; tiers of ``budgets`` as a TOML array or separated by ``;``.

    Raises:
        ValueError: no ``=``, an unknown key, or a value that its type cannot read.
    """
    key, equals, word = text.partition("=")
    if not equals:
        raise ValueError(f"{text!r} is neither key=value nor a .toml file; write for example train.lr=1e-3")
    key = resolve_key(key.strip(), schema)
    return key, _parse(key, word.strip(), schema[key].kind)


def write_toml(values: Mapping[str, Any], schema: Schema) -> str:
    """Write values by dotted key as TOML: plain keys first, then one table per section; floats round-trip exactly."""
    top = {key: value for key, value in values.items() if "." not in key}
    lines = [f"{key} = {_format(value, schema[key].kind)}" for key, value in top.items()]
    section = ""
    for key in values:
        name, dot, leaf = key.partition(".")
        if not dot:
            continue
        if name != section:
            section = name
            lines += ["", f"[{name}]"]
        lines.append(f"{leaf} = {_format(values[key], schema[key].kind)}")
    return "\n".join(lines) + "\n"


_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", tuple: "a list of texts"}


def _fits(form: str, value: str) -> bool:
    kind, colon, _ = form.partition(":")
    if form == PLACE:
        module, colon, name = value.partition(":")
        return all(part.isidentifier() for part in [*module.split("."), name])
    return value.startswith(f"{kind}:") and len(value) > len(kind) + 1 if colon else value == form


def _show(value: object) -> str:
    return repr(list(value)) if isinstance(value, tuple) else repr(value)


def _frozen(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


def _parse(key: str, word: str, kind: type) -> object:
    if kind is tuple:
        return _parse_list(key, word)
    if kind is bool:
        if word.lower() not in ("true", "false"):
            raise ValueError(f"{key}={word!r} is not true or false; give true or false")
        return word.lower() == "true"
    if kind is str:
        quoted = len(word) > 1 and word[0] == word[-1] and word[0] in "'\""
        return word[1:-1] if quoted else word
    try:
        return kind(word)
    except ValueError:
        raise ValueError(f"{key}={word!r} is not {_NAMES[kind]}; give {_NAMES[kind]}") from None


def _parse_list(key: str, word: str) -> tuple[object, ...]:
    if not word.startswith("["):
        return tuple(part.strip() for part in word.split(";"))
    try:
        return tuple(tomllib.loads(f"list = {word}")["list"])
    except tomllib.TOMLDecodeError:
        raise ValueError(
            f"{key}={word} is not a list of quoted texts; quote it for the shell, as '{key}=[\"experts=25%\"]', "
            f"or separate the parts with ;"
        ) from None


def _format(value: Any, kind: type) -> str:
    if kind is tuple:
        return f"[{', '.join(_quote(part) for part in value)}]"
    if kind is str:
        return _quote(value)
    if kind is bool:
        return "true" if value else "false"
    return repr(float(value)) if kind is float else str(value)


def _quote(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{"".join(c if c >= " " and c != chr(127) else f"{chr(92)}u{ord(c):04x}" for c in escaped)}"'
