"""Check the facts that a file has beside its weights, by the fields of a dataclass.

A sha256 says that a file is as it was written, not that what was written is right: anybody may vouch for a
file. So types are checked here, and ranges: those that `cluster.config.setting` gives the fields.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, get_args, get_origin, get_type_hints

from cluster.config import Rule, rules
from cluster.errors import UserError

LEAST_STD = 1e-6  # of a channel of images, in units of 0..1
EXPECTED = {int: "an integer", float: "a finite number", str: "text"}


def check_facts(kind: type, values: Any, source: str, cure: str, closed: bool = False) -> dict[str, Any]:
    """The values of the fields of dataclass `kind`, with JSON's lists as tuples.

    closed: whether other values are refused, as they are in a dataclass within; else they are left out.

    Fields may be int, float, str, Literal, tuples, dicts and dataclasses of these; floats are finite. source,
    cure: for the error. Raises UserError for a field that is missing and has no default, is of another type
    or is out of bounds.
    """
    try:
        return _fields(kind, values, "", closed)
    except ValueError as error:
        raise UserError(f"{source}: {error}; {cure}") from None


def _fields(kind: type, values: Any, prefix: str, closed: bool) -> dict[str, Any]:
    if not isinstance(values, Mapping):
        raise _refusal(prefix.rstrip(".") or "what it says of itself", values, "a table of names and values")
    hints, bounds, found = get_type_hints(kind), rules(kind), {}
    for field in dataclasses.fields(kind):
        name = prefix + field.name
        if field.name in values:
            rule = bounds.get(field.name, Rule())
            found[field.name] = _value(hints[field.name], values[field.name], name, rule)
        elif field.default is dataclasses.MISSING:
            raise ValueError(f"{name} is missing")
    foreign = sorted(map(str, set(values) - set(hints)))
    if closed and foreign:
        raise ValueError(f"{prefix}{foreign[0][:60]!r} is not known here")
    return found


def _value(hint: Any, value: Any, name: str, rule: Rule) -> Any:
    """The value as `hint` has it. Raises ValueError if it is of another type or out of bounds."""
    origin, parts = get_origin(hint), get_args(hint)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return hint(**_fields(hint, value, name + ".", True))
    if origin is Literal:
        if not isinstance(value, str) or value not in parts:
            raise _refusal(name, value, " or ".join(parts))
        return value
    if origin is dict:
        if not isinstance(value, Mapping):
            raise _refusal(name, value, "a table of names and values")
        return {_value(parts[0], k, name, Rule()): _value(parts[1], v, name, rule) for k, v in value.items()}
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise _refusal(name, value, "a list")
        inner = parts[:1] * len(value) if parts[-1] is Ellipsis else parts
        if len(value) != len(inner):
            raise _refusal(name, value, f"a list of {len(inner)}")
        return tuple(_value(part, item, name, rule) for part, item in zip(inner, value, strict=True))
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not (isinstance(value, hint) or (hint is float and number)) or isinstance(value, bool):
        raise _refusal(name, value, EXPECTED[hint])
    if hint is float and not abs(value) <= 1e300:  # NaN, infinite, or an integer that no float holds
        raise _refusal(name, value, EXPECTED[float])
    if number and rule.least is not None and not rule.least <= value <= rule.most:
        raise _refusal(name, value, f"from {rule.least:g} to {rule.most:g}")
    return float(value) if hint is float else value


def _refusal(name: str, value: Any, expected: str) -> ValueError:
    said = " ".join(repr(value).split())  # a tensor has several lines
    return ValueError(f"{name} is {said if len(said) <= 60 else said[:57] + '...'}, not {expected}")
