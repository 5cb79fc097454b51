"""How a configuration is read, checked and written: msgspec's types and bounds, nearest names, TOML and key=value text.

msgspec checks one value at a time. It does not build the dataclasses: it would pass over unknown keys in silence, take
a set for a list, and not look at a section that Python code made.
"""

from __future__ import annotations

import json
import math
import re
import tomllib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import msgspec

from fedmoe_core.base.wording import nearest, unknown

T = TypeVar("T")
_KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", tuple: "a list of texts"}
_LIMITS = {
    "ge": "of at least {:g}",
    "gt": "greater than {:g}",
    "le": "of at most {:g}",
    "lt": "less than {:g}",
    "multiple_of": "a multiple of {}",
    "min_length": "of length {} or more",
    "max_length": "of length {} or less",
    "pattern": "that matches {}",
}


def one_of(*forms: str) -> msgspec.Meta:
    """Allow some words; ``csv:FILE`` stands for ``csv:`` and anything after it."""
    return msgspec.Meta(pattern=rf"\A(?:{'|'.join(map(_pattern, forms))})\Z", examples=list(forms))


@dataclass(frozen=True)
class Setting:
    """One key: the type that msgspec holds it to, its plain type, its bounds, and its words where only some will do."""

    hint: Any
    kind: type
    limits: msgspec.Meta
    words: tuple[str, ...]

    def __str__(self) -> str:
        """Say what a value may be: ``a whole number of at least 1``."""
        if self.words:
            return f"one of {', '.join(self.words)}"
        bounds = {name: bound for name in _LIMITS if (bound := getattr(self.limits, name)) is not None}
        between = f"from {bounds.pop('ge')} to {bounds.pop('le')}" if {"ge", "le"} <= bounds.keys() else ""
        words = [between, *(_LIMITS[name].format(bound) for name, bound in bounds.items())]
        return f"{_KINDS[self.kind]} {' and '.join(filter(None, words))}".rstrip()


Schema = Mapping[str, Setting]


@cache
def schema_of(record: type, prefix: str = "") -> dict[str, Setting]:
    """Return the settings of a dataclass and of the dataclasses inside it, by dotted key; a field of type Any is none.

    Raises:
        ValueError: a field holds something else than a number, a text, a list of texts, or true or false.
    """
    hints = get_type_hints(record, include_extras=True)
    found: dict[str, Setting] = {}
    for key, hint in ((prefix + item.name, hints[item.name]) for item in fields(record)):
        if is_dataclass(hint) and "." not in key:
            found |= schema_of(hint, f"{key}.")  # type: ignore[arg-type]
        elif hint is not Any:
            plain, limits = get_args(hint) if get_origin(hint) is Annotated else (hint, msgspec.Meta())
            words = get_args(plain) if get_origin(plain) is Literal else tuple(limits.examples or ())
            kind = type(words[0]) if get_origin(plain) is Literal else get_origin(plain) or plain
            odd = {type(word) for word in words} - {str} or (kind is tuple and get_args(plain) != (str, ...))
            if odd or kind not in _KINDS:
                raise ValueError(f"{key} is of type {hint}; give it one of {', '.join(_KINDS.values())}")
            found[key] = Setting(hint, kind, limits, words)
    return found


def checked(key: str, value: Any, setting: Setting) -> Any:
    """Return a value as its setting has it: 1 for a number is 1.0.

    Raises:
        ValueError: one sentence that names the key, the value and what would do.
    """
    finite = not isinstance(value, float) or math.isfinite(value)
    if finite and type(value) in _KINDS:  # msgspec would take a subclass too, which TOML cannot give back
        with suppress(msgspec.ValidationError, UnicodeEncodeError):  # the latter for a lone surrogate
            return msgspec.convert(value, setting.hint)
    shown = repr(list(value) if isinstance(value, tuple) else value)
    if setting.words:
        raise unknown(f"{key}={shown}", str(value), setting.words)
    raise ValueError(f"{key}={shown} does not fit; give {setting}{'' if finite else ', and a finite one'}")


def resolve_key(key: str, schema: Schema) -> str:
    """Return the key itself when it is known.

    Raises:
        ValueError: an unknown key, with the nearest valid one.
    """
    if key in schema:
        return key
    if inside := [known for known in schema if known.startswith(f"{key}.")]:
        raise ValueError(f"{key!r} is a section, not a value; set one of {', '.join(inside)}")
    leaves: dict[str, list[str]] = {}
    for known in schema:
        leaves.setdefault(known.rpartition(".")[2], []).append(known)
    close = nearest(key, list(schema))
    by_leaf = leaves.get(nearest(key.rpartition(".")[2], list(leaves)) or "", [])
    meant = leaves.get(key) or ([close] if close else by_leaf)
    hint = f"did you mean {' or '.join(map(repr, meant))}?" if meant else f"valid keys: {', '.join(schema)}"
    raise ValueError(f"unknown key {key!r}; {hint}")


def build(record: type[T], values: Mapping[str, Any]) -> T:
    """Build a nested dataclass from checked values by dotted key; keys that are absent keep their defaults."""
    tree: dict[str, Any] = {}
    for key, value in values.items():
        section, _, leaf = key.rpartition(".")
        (tree.setdefault(section, {}) if section else tree)[leaf] = value
    hints = get_type_hints(record)
    return record(**{name: hints[name](**part) if is_dataclass(hints[name]) else part for name, part in tree.items()})


def read_toml(path: Path) -> dict[str, Any]:
    """Read the tables of a TOML file.

    Raises:
        ValueError: not TOML.
        OSError: the file cannot be read.
    """
    if not path.is_file():
        raise FileNotFoundError(f"config file {path} does not exist; check the path")
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # also a text that is not UTF-8, and a number of 5000 digits
        raise ValueError(f"{path} is not valid TOML ({error}); correct it there") from None


def by_key(
    tree: Mapping[str, Any], schema: Schema, retired: Mapping[str, object] = MappingProxyType({})
) -> dict[str, Any]:
    """Return the checked values of a TOML file by dotted key.

    Args:
        tree: the file.
        schema: every key that there is.
        retired: keys that are gone, at the value at which they did nothing: so they may stand in older files.

    Raises:
        ValueError: an unknown section or key, or a value that does not fit.
    """
    sections = dict.fromkeys(key.partition(".")[0] for key in schema if "." in key)
    found: dict[str, Any] = {}
    for name, value in tree.items():
        if name in sections and isinstance(value, dict):
            found |= {f"{name}.{leaf}": part for leaf, part in value.items()}
        elif isinstance(value, dict) and name not in schema:
            close = nearest(name, list(sections))
            hint = f"did you mean [{close}]?" if close else f"valid sections: {', '.join(sections)}"
            raise ValueError(f"unknown section [{name}]; {hint}")
        else:
            found[name] = value
    gone = [key for key in found if key in retired]
    if strange := [key for key in gone if found.pop(key) != retired[key]]:
        raise ValueError(f"{strange[0]} is not a setting any more; run this file with the fedmoe that wrote it")
    plain = {key: tuple(value) if isinstance(value, list) else value for key, value in found.items()}
    return {key: checked(key, value, schema[resolve_key(key, schema)]) for key, value in plain.items()}


def parse_override(text: str, schema: Schema) -> tuple[str, Any]:
    """Read key and checked value of ``key=value``; a list as a TOML array or separated by ``;``.

    Raises:
        ValueError: no ``=``, an unknown key, or a value that does not fit.
    """
    key, equals, word = text.partition("=")
    if not equals:
        raise ValueError(f"{text!r} is neither key=value nor a .toml file; write for example train.lr=1e-3")
    setting = schema[resolve_key(key := key.strip(), schema)]
    return key, checked(key, _parse(key, word.strip(), setting.kind), setting)


def write_toml(values: Mapping[str, Any], schema: Schema) -> str:
    """Write values by dotted key as TOML, sections last and in one piece each; floats round-trip exactly.

    A text and a list of texts are spelt alike in JSON and TOML, but for the character 127, which TOML wants escaped.
    """
    lines, current = [], ""
    for key, value in values.items():
        section, _, leaf = key.rpartition(".")
        if section != current:
            lines += ["", f"[{section}]"]
        current = section
        plain = float(value) if schema[key].kind is float else value
        lines.append(f"{leaf} = {json.dumps(plain, ensure_ascii=False)}".replace(chr(127), r"\u007f"))
    return "\n".join(lines) + "\n"


def _pattern(form: str) -> str:
    kind, colon, _ = form.partition(":")
    return re.escape(kind) + (r":[\s\S]+" if colon else "")


def _parse(key: str, word: str, kind: type) -> Any:
    """What a word says; one that cannot be read stays a text, for ``checked`` to refuse."""
    if kind is tuple:
        return _parse_list(key, word) if word.startswith("[") else tuple(part.strip() for part in word.split(";"))
    if kind is bool:
        return {"true": True, "false": False}.get(word.lower(), word)
    if kind is str:
        quoted = len(word) > 1 and word[0] == word[-1] and word[0] in "'\""
        return word[1:-1] if quoted else word
    try:
        return kind(word)
    except ValueError:
        return word


def _parse_list(key: str, word: str) -> tuple[Any, ...]:
    try:
        return tuple(tomllib.loads(f"list = {word}")["list"])
    except (ValueError, RecursionError):
        raise ValueError(
            f"{key}={word} is not a list of quoted texts; quote it for the shell, as '{key}=[\"experts=25%\"]', "
            f"or separate the parts with ;"
        ) from None
