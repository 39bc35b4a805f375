"""Options of Sigma-Weighted Shuffle."""

import argparse
import dataclasses
from dataclasses import dataclass, field
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from sws_export.errors import OptionError
from sws_export.parameters import Preset, SwsParameters, check_preset, parse_parameters

if TYPE_CHECKING:
    from graph_passes.functions import Guard
    from sws_export.pipeline.rewrite import GuardOptions

GUARDS = ("fused", "literal")


@dataclass(frozen=True, kw_only=True)
class SwsOptions:
    """Which attention sites get SWS, and how it is computed.

    Attributes:
        preset: `sws` for the method as described, `node` for what the published ComfyUI node computes.
        parameters: Constants of SWS.
        sites: Shell patterns of attention sites, self- and cross-attention; empty for all self-attention.
            With the preset `node` of cross-attention only, and empty for all of it.
        guard: `literal` materializes the logits of a site to find the key mixing, `fused` does not; None for
            `fused`, or for `literal` with parameters that `fused` does not support.
        guard_rows: Share of the query rows that the guard evaluates, such as 1/8; below 1 an approximation.
        debug_outputs: Add outputs with metrics of each site at a step.
        plain: Export without SWS.
    """

    preset: Preset = "sws"
    parameters: SwsParameters = field(default_factory=SwsParameters)
    sites: tuple[str, ...] = ()
    guard: "Guard | None" = None
    guard_rows: str = "1"
    debug_outputs: bool = False
    plain: bool = False

    def __post_init__(self) -> None:
        check_preset(self.preset, self.parameters)
        if self.preset == "node":
            _check_node(self)
        if self.plain and (self.sites or self.debug_outputs or self.parameters != SwsParameters()):
            raise OptionError(
                "--plain exports the UNet without SWS; leave out --sws, --sites and --debug-outputs"
            )

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        """Add all arguments of the group."""
        group = parser.add_argument_group("SWS")
        group.add_argument(
            "--preset",
            choices=("sws", "node"),
            default="sws",
            help="sws: as described (default); node: what the published ComfyUI node computes",
        )
        group.add_argument(
            "--sws",
            dest="parameters",
            action="extend",
            nargs="+",
            default=[],
            metavar="NAME=VALUE",
            help="parameters of SWS, see docs/method.md; repeatable",
        )
        group.add_argument(
            "--sites",
            action="append",
            default=[],
            metavar="PATTERN",
            help="attention sites by name, as in 'up_blocks.*.attn1'; '*.attn2' is cross-attention; "
            "repeatable; default: all self-attention",
        )
        group.add_argument(
            "--guard",
            choices=GUARDS,
            help="how the key mixing is found: without (fused) or with materialized logits; "
            "default: fused, unless the parameters do not support it",
        )
        group.add_argument(
            "--guard-rows", default="1", metavar="SHARE", help="query rows the guard evaluates, such as 1/8"
        )
        group.add_argument(
            "--debug-outputs", action="store_true", help="add outputs with metrics of each site"
        )
        group.add_argument("--plain", action="store_true", help="export the UNet without SWS")

    @classmethod
    def from_arguments(cls, parsed: argparse.Namespace) -> "SwsOptions":
        """The options that were parsed by the arguments of `add_arguments`."""
        return cls(
            preset=parsed.preset,
            parameters=parse_parameters(parsed.parameters),
            sites=tuple(parsed.sites),
            guard=parsed.guard,
            guard_rows=parsed.guard_rows,
            debug_outputs=parsed.debug_outputs,
            plain=parsed.plain,
        )

    @property
    def method(self) -> str:
        """`plain`, or the name of the preset."""
        return "plain" if self.plain else self.preset

    def guard_options(self) -> "GuardOptions":
        """The form of the key guard.

        Raises:
            OptionError: The form is unknown, or the share of rows is not between 0 and 1.
        """
        from sws_export.pipeline.rewrite import GuardOptions

        if self.preset == "node":
            return GuardOptions("literal")
        if self.guard not in (None, *GUARDS):
            raise OptionError(f"--guard {self.guard} is unknown; choose {' or '.join(GUARDS)}")
        try:
            rows = Fraction(self.guard_rows)
        except (ValueError, ZeroDivisionError):
            rows = Fraction(0)
        if not 0 < rows <= 1:
            raise OptionError(
                f"--guard-rows {self.guard_rows}: expected a share of the rows, such as 1/8, or 1 for all"
            )
        return GuardOptions(self.guard or _exact_guard(self.parameters), rows)

    def cache_key(self) -> dict[str, Any]:
        """The options that the graph depends on, as JSON values."""
        guard = self.guard_options()
        return dataclasses.asdict(self) | {"guard": guard.form, "guard_rows": str(guard.rows)}


def _check_node(options: SwsOptions) -> None:
    """Refuse what has no meaning with `--preset node`."""
    given = {
        "--plain": options.plain,
        "--guard": options.guard is not None,
        "--guard-rows": options.guard_rows != "1",
    }
    for option, is_given in given.items():
        if is_given:
            reason = (
                "it exports the UNet without SWS"
                if option == "--plain"
                else "its guard has one form, which stores the few logits of the text and looks at all rows"
            )
            raise OptionError(f"{option} has no meaning with --preset node: {reason}; leave one of them out")


def _exact_guard(parameters: SwsParameters) -> "Guard":
    from graph_passes.errors import GraphError
    from graph_passes.functions import check_fused_guard

    try:
        check_fused_guard(parameters)
    except GraphError:
        return "literal"
    return "fused"
