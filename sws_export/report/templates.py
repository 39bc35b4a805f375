"""The templates of the report, whose engine escapes every value that is not `Markup` already."""

from typing import Protocol, cast

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup


def environment(*packages: str) -> Environment:
    """An environment that finds templates in these packages, and in this one."""
    loaders = [PackageLoader(package, "") for package in (*packages, "sws_export.report")]
    return Environment(loader=ChoiceLoader(loaders), autoescape=True, undefined=StrictUndefined)


_ENVIRONMENT = environment()
PAGE = _ENVIRONMENT.get_template("report.html")
"""The page."""


class _Macro(Protocol):
    def __call__(self, *values: object) -> Markup: ...


class _Macros(Protocol):
    figure: _Macro
    heat_map: _Macro
    line_chart: _Macro
    picture: _Macro
    pictures: _Macro
    table: _Macro
    definitions: _Macro


MACROS = cast(_Macros, _ENVIRONMENT.get_template("charts.html").module)
"""Charts and tables; their arguments are in `charts.html`."""
