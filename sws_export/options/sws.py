"""Options of Sigma-Weighted Shuffle."""

import argparse
import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args

from graph_passes.guard import GuardForm, GuardOptions, fused_guard_limit
from sws_export.errors import OptionError
from sws_export.options.arguments import changed_options
from sws_export.parameters import SwsParameters, check_parameters, parse_parameters
from sws_export.presets import DEFAULT_PRESET, PRESETS, Preset, preset_named
from sws_export.presets.preset import USource

if TYPE_CHECKING:
    from graph_passes.target import Target

GUARDS: tuple[GuardForm, ...] = ("fused", "literal")
Switch = Literal["on", "off"]
_SWITCHES: tuple[Switch, ...] = get_args(Switch)


@dataclass(frozen=True, kw_only=True)
class SwsOptions:
    """Which attention sites get SWS, and how it is computed.

    Attributes:
        preset: Name or alias of a preset; an alias is replaced by the name.
        u: `calls` or `sigma`: where the u of the preset `comfyui-node` comes from; None for `calls`.
        parameters: Constants of SWS.
        sites: Shell patterns of attention sites, self- and cross-attention; empty for all self-attention.
            With the preset `comfyui-node` of cross-attention only, and empty for all of it.
        guard: `literal` materializes the logits of a site to find the key mixing, `fused` does not; None for
            `fused`, or for `literal` with parameters that `fused` does not support.
        guard_rows: Share of the query rows that the guard evaluates, such as 1/8; below 1 an approximation.
            With kl:1/8 that of the KL divergence alone; entropies are of all rows.
        guard_branches: Whether the fused guard may have `If` nodes, which skip evaluations that cannot change
            its result; None for what the target supports.
        debug_outputs: Add outputs with metrics of each site at a step.
        plain: Export without SWS.
    """

    preset: str = DEFAULT_PRESET.name
    u: str | None = None
    parameters: SwsParameters = field(default_factory=SwsParameters, metadata={"option": "--sws"})
    sites: tuple[str, ...] = ()
    guard: GuardForm | None = None
    guard_rows: str = "1"
    guard_branches: Switch | None = None
    debug_outputs: bool = False
    plain: bool = False

    def __post_init__(self) -> None:
        preset = preset_named(self.preset, self.u)
        object.__setattr__(self, "preset", preset.name)
        check_parameters(self.parameters)
        preset.check_parameters(self.parameters)
        self._check_combination()
        if self.guard not in (None, *GUARDS):
            raise OptionError(f"--guard {self.guard} is unknown; choose {' or '.join(GUARDS)}")
        if self.guard_branches not in (None, *_SWITCHES):
            raise OptionError(f"--guard-branches: expected on or off, found '{self.guard_branches}'")
        self.guard_options()  # raises for an unknown share of the rows

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        """Add all arguments of the group."""
        group = parser.add_argument_group("SWS")
        group.add_argument(
            "--preset",
            metavar=f"{{{','.join(PRESETS)}}}",
            choices=[name for preset in PRESETS.values() for name in (preset.name, *preset.aliases)],
            default=DEFAULT_PRESET.name,
            help="; ".join(f"{preset.name}: {preset.summary}" for preset in PRESETS.values())
            + f"; default: {DEFAULT_PRESET.name}",
        )
        group.add_argument(
            "--u",
            choices=get_args(USource),
            help="where the u of --preset comfyui-node comes from: its counter of calls (calls), as the node "
            "runs in ComfyUI, or the noise level (sigma); default: calls",
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
            "--guard-rows",
            default="1",
            metavar="SHARE",
            help="query rows the guard evaluates, such as 1/8; kl:1/8: for the KL divergence alone",
        )
        group.add_argument(
            "--guard-branches",
            choices=_SWITCHES,
            help="If nodes in the fused guard; default: on for ONNX Runtime on the CPU, otherwise off",
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
            u=parsed.u,
            parameters=parse_parameters(parsed.parameters),
            sites=tuple(parsed.sites),
            guard=parsed.guard,
            guard_rows=parsed.guard_rows,
            guard_branches=parsed.guard_branches,
            debug_outputs=parsed.debug_outputs,
            plain=parsed.plain,
        )

    @property
    def chosen_preset(self) -> Preset:
        """The preset, with its source of u."""
        return preset_named(self.preset, self.u)

    @property
    def method(self) -> str:
        """`plain`, or the name of the preset."""
        return "plain" if self.plain else self.preset

    def _check_combination(self) -> None:
        """Raise an error for options that have no meaning with the preset, or without SWS."""
        preset = self.chosen_preset
        reasons = {}
        if self.plain and preset is not DEFAULT_PRESET:
            reasons["--plain"] = "it exports the UNet without SWS"
        if self.guard is not None and preset.fixed_guard:
            reasons["--guard"] = preset.fixed_guard
        if self.guard_rows != "1" and preset.fixed_guard:
            reasons["--guard-rows"] = preset.fixed_guard
        if self.guard_branches is not None and preset.fixed_guard:
            reasons["--guard-branches"] = preset.fixed_guard
        for option, reason in reasons.items():
            raise OptionError(
                f"{option} has no meaning with --preset {preset.name}: {reason}; leave one of them out"
            )
        if not self.plain:
            return
        for name, option in changed_options(self).items():
            if name != "plain":
                raise OptionError(
                    f"{option} has no meaning with --plain, which exports the UNet without SWS; leave it out"
                )

    def guard_options(self) -> GuardOptions:
        """The form of the key guard."""
        if preset_named(self.preset).fixed_guard:
            return GuardOptions()
        form: GuardForm = "literal" if fused_guard_limit(self.parameters) else "fused"
        try:
            return GuardOptions.parse(self.guard or form, self.guard_rows)
        except ValueError as error:
            raise OptionError(
                f"--guard-rows {self.guard_rows}: {error}, or kl: and one of them, such as kl:1/8, for the "
                "KL divergence alone"
            ) from None

    def target(self, target: "Target") -> "Target":
        """`target` with or without branches.

        Raises:
            OptionError: Branches are required for a target that has none, or the KL divergence of some rows
                for plugins, which have one set of rows.
        """
        if self.guard_options().kl_only and target.plugin_operators:
            raise OptionError(
                f"--guard-rows {self.guard_rows}: the KeyGuard plugin computes entropies and the KL "
                f"divergence from the same rows; use --guard-rows {self.guard_options().rows} or 1"
            )
        if self.guard_branches == "on" and not target.branches:
            raise OptionError(
                f"--guard-branches on: graphs for {target.name} have no branches; leave the option out"
            )
        return dataclasses.replace(target, branches=target.branches and self.guard_branches != "off")

    def cache_key(self) -> dict[str, Any]:
        """The options that the graph depends on, as JSON values."""
        guard = self.guard_options()
        chosen = {"u": self.chosen_preset.u, "guard": guard.form, "guard_rows": guard.rows_text}
        return dataclasses.asdict(self) | chosen
