"""Command-line arguments of groups of options."""

import argparse
import dataclasses
from typing import Any, TypeVar

Group = TypeVar("Group")


def option_name(field: dataclasses.Field[Any]) -> str:
    """The command-line option of a field of a group; its metadata has one that is not named as the field."""
    return str(field.metadata.get("option", "--" + field.name.replace("_", "-")))


def changed_options(group: Any) -> dict[str, str]:
    """The command-line options of the fields of `group` that do not have their defaults, by field."""
    defaults = type(group)()
    return {
        field.name: option_name(field)
        for field in dataclasses.fields(group)
        if getattr(group, field.name) != getattr(defaults, field.name)
    }


def group_from_arguments(group: type[Group], parsed: argparse.Namespace) -> Group:
    """An instance of the dataclass `group`, whose field names are the destinations of the arguments.

    Fields without an argument keep their default. Repeated arguments arrive as lists and become tuples.
    """
    values: dict[str, Any] = {
        field.name: getattr(parsed, field.name)
        for field in dataclasses.fields(group)  # type: ignore[arg-type]  # the caller gives a dataclass
        if hasattr(parsed, field.name)
    }
    return group(
        **{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    )
