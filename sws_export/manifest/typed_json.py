"""Checking a parsed JSON document against the annotations of a `TypedDict`."""

import json
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints, is_typeddict


def check_type(value: Any, expected: Any, where: str = "") -> None:
    """Check that `value` has the type `expected`; keys that a `TypedDict` does not name are allowed.

    Args:
        value: As `json.loads` returns it.
        expected: Any, a `TypedDict`, a list, a dict with string keys, a `Literal`, a union of plain types, a
            union of one type with None, or a plain type.
        where: Path of the value in the document, for the message.

    Raises:
        ValueError: Names the field, what it should be and what was found.
    """
    arguments = get_args(expected)
    if expected is Any:
        return
    if is_typeddict(expected):
        _check_fields(value, expected, where)
    elif get_origin(expected) in (Union, UnionType):
        _check_union(value, arguments, where)
    elif get_origin(expected) is Literal:
        if value not in arguments:
            raise ValueError(f"{where}: expected one of {', '.join(arguments)}, found {_short(value)}")
    elif get_origin(expected) in (list, dict):
        _require(value, get_origin(expected), where)
        entries = value.items() if isinstance(value, dict) else enumerate(value)
        for key, entry in entries:
            check_type(entry, arguments[-1], f"{where}[{key}]")
    else:
        _require(value, expected, where)


def _check_fields(value: Any, expected: Any, where: str) -> None:
    _require(value, dict, where)
    for name, annotation in get_type_hints(expected).items():
        if name in value:
            check_type(value[name], annotation, f"{where}.{name}".lstrip("."))
        elif name in expected.__required_keys__:
            raise ValueError(f"{where or 'it'} has no field '{name}'")


def _check_union(value: Any, alternatives: tuple[Any, ...], where: str) -> None:
    """Either None is allowed beside one other type, or all are plain types."""
    if value is None and NoneType in alternatives:
        return
    others = [alternative for alternative in alternatives if alternative is not NoneType]
    if len(others) == 1:
        check_type(value, others[0], where)
    else:
        _require(value, tuple(others), where)


def _require(value: Any, expected: type | tuple[type, ...], where: str) -> None:
    # True is an int for Python.
    if not isinstance(value, expected) or (isinstance(value, bool) and expected is not bool):
        types = expected if isinstance(expected, tuple) else (expected,)
        names = " or ".join(_JSON_NAMES[kind] for kind in types)
        raise ValueError(f"{where or 'it'}: expected {names}, found {_short(value)}")


_JSON_NAMES: dict[type, str] = {
    bool: "true or false",
    dict: "an object",
    int: "an integer",
    list: "a list",
    str: "a string",
}


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:39]}…"
