"""What an export is asked to do."""

import dataclasses
from fractions import Fraction
from pathlib import Path
from typing import Literal

from graph_passes.errors import GraphError
from graph_passes.functions import Guard, check_fused_guard
from sws_export.errors import OptionError
from sws_export.files import ENGINE_SUFFIXES
from sws_export.parameters import Preset, SwsParameters, check_preset
from sws_export.pipeline.rewrite import GuardOptions
from sws_export.tensors import Precision

GUARDS: tuple[Guard, ...] = ("fused", "literal")
PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16", "bf16")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """Options of `sws_export.export`, as on the command line.

    Attributes:
        precision: Precision of the UNet; None for that of the checkpoint.
        preset: `sws` is the method as it is described, `node` what the published ComfyUI node computes.
        parameters: Constants of SWS.
        sites: Shell patterns of attention sites, self- and cross-attention; empty for all self-attention.
            With the preset `node` of cross-attention only, and empty for all of it.
        guard: `literal` stores the logits of a site to find the key mixing, `fused` does not; None for
            `fused`, or for `literal` with parameters that `fused` refuses. docs/performance.md says how
            exact `fused` is.
        guard_rows: Share of the query rows that the guard looks at, such as 1/8; below 1 an approximation.
        debug_outputs: Give the graph outputs that tell what each site does at a step.
        plain: Export without SWS.
        config: A diffusers config.json, where none lies beside the checkpoint.
        ema: Take the EMA weights of a checkpoint that holds both.
        variant: Variant of the files in a directory, such as `fp16`.
        attention_head_dim: Heads a level, for a UNet of no known family.
        prediction_type: What the UNet predicts, where the checkpoint does not say.
        loras: FILE or FILE:SCALE of each LoRA to fuse.
        controlnet: Give the graph inputs for the residuals of a ControlNet.
        batch: One number, which the graph is then fixed to, or for an engine MIN:OPT:MAX; None for 1:2:2 in
            an engine, for any size in a graph. `tokens` likewise, 77 in an engine.
        height: As `batch`, pixels; in an engine None for the size that the UNet was trained on.
        width: As `height`.
        vae_scale: Pixels a latent value covers; None for what the checkpoint says.
        backend: `tensorrt-rtx` or `tensorrt`; None for what suits the machine.
        compute_capabilities: Targets of the engine, such as `8.9`.
        optimization_level: 0 to 5; None for the backend's default.
        timing_cache: File of kernel timings that builds share (tensorrt).
        refit: Make the weights of the engine replaceable (tensorrt).
        strip_weights: Leave the weights out of the plan, to be refitted (tensorrt).
        version_compatible: Let later versions of the library load the engine (tensorrt).
        hardware_compatible: Let every GPU from Ampere on run the engine (tensorrt).
        weight_streaming: Let the runtime keep part of the weights outside GPU memory.
        validate: Compare the graph with the reference before anything is written.
        keep_onnx: Keep the ONNX graph beside an engine.
        cache: Take results of earlier runs, and keep those of this one.
        dry_run: Stop after the preflight.
    """

    precision: Precision | None = None
    preset: Preset = "sws"
    parameters: SwsParameters = dataclasses.field(default_factory=SwsParameters)
    sites: tuple[str, ...] = ()
    guard: Guard | None = None
    guard_rows: str = "1"
    debug_outputs: bool = False
    plain: bool = False
    config: Path | None = None
    ema: bool = False
    variant: str | None = None
    attention_head_dim: tuple[int, ...] | None = None
    prediction_type: str | None = None
    loras: tuple[str, ...] = ()
    controlnet: bool = False
    batch: str | None = None
    height: str | None = None
    width: str | None = None
    tokens: str | None = None
    vae_scale: int | None = None
    backend: str | None = None
    compute_capabilities: tuple[str, ...] = ()
    optimization_level: int | None = None
    timing_cache: Path | None = None
    refit: bool = False
    strip_weights: bool = False
    version_compatible: bool = False
    hardware_compatible: bool = False
    weight_streaming: bool = False
    validate: bool = True
    keep_onnx: bool = False
    cache: bool = True
    dry_run: bool = False

    def __post_init__(self) -> None:
        check_preset(self.preset, self.parameters)
        if self.preset == "node":
            _check_node(self)
        if self.plain and (self.sites or self.debug_outputs or self.parameters != SwsParameters()):
            raise OptionError(
                "--plain exports the UNet without SWS; leave out --sws, --sites and --debug-outputs"
            )
        if self.vae_scale is not None and self.vae_scale < 1:
            raise OptionError(
                f"--vae-scale {self.vae_scale}: expected 1 or more, such as 8 (Stable Diffusion)"
            )


def _check_node(options: ExportOptions) -> None:
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


def guard_options(options: ExportOptions) -> GuardOptions:
    """The form of the key guard.

    Raises:
        OptionError: The form is unknown, or the share of rows is none.
    """
    if options.preset == "node":
        return GuardOptions("literal")
    if options.guard not in (None, *GUARDS):
        raise OptionError(f"--guard {options.guard} is unknown; choose {' or '.join(GUARDS)}")
    try:
        rows = Fraction(options.guard_rows)
    except (ValueError, ZeroDivisionError):
        rows = Fraction(0)
    if not 0 < rows <= 1:
        raise OptionError(
            f"--guard-rows {options.guard_rows}: expected a share of the rows, such as 1/8, or 1 for all"
        )
    return GuardOptions(options.guard or _exact_guard(options.parameters), rows)


def _exact_guard(parameters: SwsParameters) -> Guard:
    try:
        check_fused_guard(parameters)
    except GraphError:
        return "literal"
    return "fused"


Kind = Literal["onnx", "engine"]


def artefact_kind(out: Path) -> Kind:
    """What is to be written, by the suffix of `--out`.

    Raises:
        OptionError: The suffix names neither an ONNX graph nor an engine.
    """
    if out.suffix == ".onnx":
        return "onnx"
    if out.suffix in ENGINE_SUFFIXES:
        return "engine"
    raise OptionError(
        f"--out {out}: expected a name ending in .onnx, .plan or .engine, found '{out.suffix or out.name}'"
    )
