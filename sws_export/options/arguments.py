"""From parsed command-line arguments to a group of options."""

import argparse
import dataclasses
from typing import Any, TypeVar

Group = TypeVar("Group")


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
