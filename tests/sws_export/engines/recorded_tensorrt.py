"""A stand-in for the Python package `tensorrt` that accepts exactly the calls of one recorded release.

Classes, signatures, property types and enum members come from the files in `tensorrt_api`, which its
`record.py` writes from NVIDIA's bindings. A missing name raises AttributeError, wrong arguments TypeError, as
pybind11 does. Calls return a value of the recorded type: True, 0, "", or an object of the class.
`library.answers` replaces the result of single methods and properties.
"""

import enum
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "tensorrt_api"
VERSIONS = ("10.14", "10.16", "11.4")
_PLAIN = {
    "int": (int, 0),
    "bool": (bool, True),
    "str": (str, ""),
    "float": (float, 0.0),
    "bytes": ((bytes, bytearray, memoryview), b""),
    "Dims": ((tuple, list), ()),
    "tuple": (tuple, ()),
    "list": (list, []),
}


class RecordedLibrary:
    """The module `tensorrt` of one release.

    Attributes:
        answers: (class, member) → function of the object and the arguments, in place of the default result.
        calls: Names of the methods that were called, as `Class.method`, with their arguments by name.
    """

    __name__ = "tensorrt"

    def __init__(self, release: str) -> None:
        api = json.loads((FOLDER / f"{release}.json").read_text())
        self.__version__ = api["version"]
        self.answers: dict[tuple[str, str], Callable[..., Any]] = {}
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self._classes: dict[str, Any] = {}
        for name, description in api["classes"].items():
            self._classes[name] = self._make_class(name, description)
        for name, description in api["enums"].items():
            kind = enum.IntEnum if description["ordered"] else _Unordered
            members = kind(name, description["members"])  # type: ignore[call-overload]
            self._classes[name] = members
            owner, _, inner = name.rpartition(".")
            if owner:
                setattr(self._classes[owner], inner, members)
        for name, recorded in self._classes.items():
            setattr(self, name, recorded)

    def _make_class(self, name: str, description: dict[str, Any]) -> type:
        namespace: dict[str, Any] = {"_library": self}
        for method, signatures in description["methods"].items():
            namespace[method] = self._make_method(name, method, signatures)
        for member, kind in description["properties"].items():
            namespace[member] = self._make_property(name, member, **kind)
        base = self._classes.get(description["base"], _Recorded)
        return type(name, (base,), namespace)

    def _make_method(self, owner: str, name: str, signatures: list[str]) -> Callable[..., Any]:
        overloads = [_Overload(text) for text in signatures]

        def method(this: Any, *arguments: Any, **keywords: Any) -> Any:
            for overload in overloads:
                bound = overload.bind(self._classes, arguments, keywords)
                if bound is None:
                    continue
                self.calls.append((f"{owner}.{name}", bound))
                if answer := self.answers.get((owner, name)):
                    return answer(this, **bound)
                return self._default(overload.result)
            raise TypeError(f"{owner}.{name}: no overload takes {arguments} {keywords}: {signatures}")

        return method

    def _make_property(self, owner: str, name: str, *, writable: bool, type: str) -> property:
        def read(this: Any) -> Any:
            if answer := self.answers.get((owner, name)):
                return answer(this)
            return this.__dict__.get(name, self._default(type))

        def write(this: Any, value: Any) -> None:
            if value is not None and not _fits(self._classes, type, value):
                raise TypeError(f"{owner}.{name}: expected {type}, found {value!r}")
            this.__dict__[name] = value

        return property(read, write if writable else None)

    def _default(self, type: str) -> Any:
        if type in _PLAIN:
            return _PLAIN[type][1]
        recorded = self._classes.get(type)
        if recorded is None:
            return None if type == "None" else object()
        if issubclass(recorded, enum.Enum):
            return next(iter(recorded))
        return recorded.__new__(recorded)


class _Recorded:
    """Base of the recorded classes: refuses attributes that the release does not have."""

    def __setattr__(self, name: str, value: Any) -> None:
        known = isinstance(getattr(type(self), name, None), property) or name == "__class__"
        # A Python subclass, such as our logger, has a dictionary of its own.
        if not known and "_library" in vars(type(self)):
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        super().__setattr__(name, value)


class _Unordered(enum.Enum):
    """An enum of pybind11 without arithmetic: converts to int and does not compare."""

    def __int__(self) -> int:
        return int(self.value)


class _Overload:
    """One recorded signature, such as `f(self: A, x: int, y: B = None) -> bool`."""

    def __init__(self, text: str) -> None:
        match = re.fullmatch(r"\w+\(self: [\w.]+(?:, )?(.*)\) -> (.*)", text)
        assert match is not None, text
        self.result = match[2]
        self._parameters: list[tuple[str, str, bool]] = []
        for part in re.split(r", (?=\w+: )", match[1]) if match[1] else []:
            name, _, rest = part.partition(": ")
            kind, _, default = rest.partition(" = ")
            self._parameters.append((name, kind, bool(default)))

    def bind(
        self, classes: dict[str, Any], arguments: tuple[Any, ...], keywords: dict[str, Any]
    ) -> dict[str, Any] | None:
        """Arguments by name, or None if this overload does not take them."""
        if len(arguments) > len(self._parameters):
            return None
        bound = {name: value for (name, _, _), value in zip(self._parameters, arguments, strict=False)}
        if bound.keys() & keywords.keys():
            return None
        bound |= keywords
        kinds = {name: kind for name, kind, _ in self._parameters}
        required = {name for name, _, optional in self._parameters if not optional}
        if not required <= bound.keys() <= kinds.keys():
            return None
        return bound if all(_fits(classes, kinds[name], value) for name, value in bound.items()) else None


def _fits(classes: dict[str, Any], kind: str, value: Any) -> bool:
    if kind in _PLAIN:
        return isinstance(value, _PLAIN[kind][0])
    # Types outside the recording, such as capsules, are not checked.
    return kind not in classes or isinstance(value, classes[kind])
