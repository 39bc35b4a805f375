"""The graph of an export: traced, rewritten for its target, compared with the reference."""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import onnx_ir as ir

from graph_passes.pipeline import plain_passes
from graph_passes.weight_formats import WeightFormat
from sws_export.calibration import (
    Calibration,
    calibrate,
    record_steps,
    recorded_steps,
    trajectory_steps,
)
from sws_export.errors import ValidationError
from sws_export.files import FileDigest
from sws_export.manifest import METADATA_KEY, GraphDescription, QuantizationEntry, parse_manifest
from sws_export.onnx_files import (
    declared_sizes,
    graph_specs,
    release_weights,
    save_onnx,
    save_sharing_weights,
)
from sws_export.parameters import SwsParameters, recorded_parameters
from sws_export.pipeline.describe import describe_graph, embed, library_versions
from sws_export.pipeline.plan import ExportPlan
from sws_export.pipeline.quantize import calibrated_layers, quantize
from sws_export.pipeline.rewrite import RewriteReport, pass_errors, rewrite
from sws_export.pipeline.run_log import Recorded, RunLog
from sws_export.pipeline.source_check import SourceCheck
from sws_export.presets import recorded_preset
from sws_export.progress import Progress, SilentProgress
from sws_export.validation import OutputDifference, SwsSpec, ValidationReport
from sws_export.validation.sizes import validation_sizes
from sws_export.validation.static_shapes import STEPS, compare_static_shapes

_RUNNABLE = 5e11
"""Parameters times latent pixels up to which a static graph is run: SD 1.5 at 192 x 192. At 512 x 512 that
took two minutes and 2.4 times the weights, with the materialized logits that TensorRT-RTX needs."""


class WrittenGraph(NamedTuple):
    """A graph in memory, whose files are written, and a remark on how it was compared.

    Attributes:
        model: The graph; large weights stay on disk.
        files: The ONNX file and its external data, with the digests of the bytes that were written.
        remark: How a static graph was compared with the dynamic one; empty for others.
    """

    model: ir.Model
    files: Mapping[Path, FileDigest]
    remark: str = ""


class Graph:
    """An exported graph; its ONNX file is written when it is first needed.

    Attributes:
        path: Where the file is written.
        content: sha256, in hex, of the graph with its weights, if a cache needs it; else empty.
        recorded: What its making logged, that of its base included.
    """

    def __init__(
        self, path: Path, log: RunLog, write: Callable[[Path], WrittenGraph], base: "Graph | None" = None
    ) -> None:
        """A graph that `write` writes, after the file of `base`."""
        self.path = path
        self.content = ""
        self.recorded = Recorded()
        self._log = log
        self._write = write
        self._base = base

    @functools.cached_property
    def written(self) -> WrittenGraph:
        """The graph, after its file was written."""
        if self._base is not None:
            assert self._base.file
            self.recorded += self._base.recorded
        with self._log.record() as own:
            written = self._write(self.path)
        self.recorded += own
        return written

    @property
    def is_written(self) -> bool:
        """Whether the file is complete."""
        return "written" in self.__dict__

    @property
    def file(self) -> Path:
        """The complete ONNX file."""
        assert self.written
        return self.path

    @property
    def model(self) -> ir.Model:
        """The graph in memory; large weights stay on disk."""
        return self.written.model

    @property
    def files(self) -> Mapping[Path, FileDigest]:
        """The complete ONNX file and its external data, with their digests."""
        return self.written.files

    @property
    def remark(self) -> str:
        """How a static graph was compared with the dynamic one; empty for others."""
        return self.written.remark

    @property
    def description(self) -> GraphDescription:
        """The manifest embedded in the graph."""
        return parse_manifest(self.model.metadata_props[METADATA_KEY], str(self.path))


class GraphExporter:
    """Builds the graphs of one export from one trace of the UNet."""

    def __init__(self, plan: ExportPlan, check: SourceCheck, log: RunLog) -> None:
        self._plan = plan
        self._check = check
        self._log = log

    def write(self, path: Path) -> WrittenGraph:
        """Write the graph with dynamic shapes, or with static ones if there will be no validation.

        Raises:
            ExportError: The UNet cannot be traced, or its graph cannot be rewritten.
            OSError: `path` cannot be written.
        """
        model = self._rewritten({} if self.makes_two else self._plan.static_sizes, self._log)
        with self._log.measure("save"):
            return WrittenGraph(model, save_onnx(model, path, self._log))

    def write_dynamic(self, path: Path, static_path: Path) -> WrittenGraph:
        """As `write`, with the weights beside `static_path`, where the static graph shares them."""
        written = self.write(static_path)
        static_path.replace(path)
        files = {path if file == static_path else file: digest for file, digest in written.files.items()}
        return written._replace(files=files)

    def write_static(self, path: Path, dynamic: Graph) -> WrittenGraph:
        """Write the graph with static shapes, and run it beside `dynamic` if that is affordable.

        Raises:
            ValidationError: Both graphs run and differ.
        """
        with self._log.measure("static shapes"):
            model = self._rewritten(self._plan.static_sizes, SilentProgress())
            files = save_sharing_weights(model, path, dynamic.model, dynamic.path, self._log)
            shared = {file: digest for file, digest in dynamic.files.items() if file != dynamic.path}
            return WrittenGraph(model, shared | files, self._compare_static(path, dynamic))

    @property
    def makes_two(self) -> bool:
        """Whether a dynamic graph is validated before the static one is written."""
        return bool(self._plan.static_sizes) and self._plan.options.validate

    def _sizes_to_run(self) -> dict[str, int] | None:
        """Sizes at which the static graph runs; None if a step would take too long."""
        source = self._plan.source
        side = 2 * source.size_multiple
        sizes = {"batch": 1, "height": side, "width": side, "tokens": 7} | dict(self._plan.static_sizes)
        work = source.parameter_count * sizes["batch"] * sizes["height"] * sizes["width"]
        return sizes if work <= _RUNNABLE else None

    def _rewritten(self, sizes: Mapping[str, int], progress: Progress) -> ir.Model:
        """The plain graph rewritten for `sizes`, with its manifest embedded."""
        plan, sws = self._plan, self._plan.options.sws
        model, quantization = self._quantized
        if self.makes_two:
            model = model.clone()
        with _measured(self._log, "rewrite", progress):
            report = self._lower(model, sizes, progress)
        release_weights(model)
        model.producer_name, model.producer_version = "sws-export", library_versions()["sws-export"]
        embed(
            model,
            describe_graph(
                source=self._check.description,
                inputs=graph_specs(model.graph.inputs),
                outputs=graph_specs(model.graph.outputs),
                parameters=sws.parameters if report else None,
                rewrite=report,
                precision=plan.source.precision,
                target=plan.target,
                guard=sws.guard_options() if report else None,
                opset=model.graph.opset_imports[""],
                quantization=quantization,
            ),
        )
        return model

    def unquantized(self) -> ir.Model | None:
        """The dynamic graph with its weights as in the source, not written; None if it quantizes none."""
        if self._plan.options.quantization.weight_format is None:
            return None
        return self._lowered_copy()

    def _lowered_copy(self) -> ir.Model:
        model = self._plain.clone()
        self._lower(model, {}, SilentProgress())
        return model

    def _lower(self, model: ir.Model, sizes: Mapping[str, int], progress: Progress) -> RewriteReport | None:
        """Insert SWS and lower the graph, in place; None for a plain export."""
        sws = self._plan.options.sws
        if sws.plain:
            with pass_errors():
                plain_passes(sizes)(model)
            return None
        return rewrite(
            model,
            sws.parameters,
            sws.sites,
            sws.guard_options(),
            self._plan.target,
            progress,
            preset=sws.chosen_preset,
            debug_outputs=sws.debug_outputs,
            sizes=sizes,
            largest=self._plan.largest_sizes,
        )

    @functools.cached_property
    def _quantized(self) -> tuple[ir.Model, QuantizationEntry | None]:
        """The plain graph with its weights as the export stores them, and their description."""
        options = self._plan.options.quantization
        if options.weight_format is None:
            return self._plain, self._plan.source.quantization
        calibration = self._calibrate(options.activations) if options.activations else None
        model = self._plain.clone() if self._plan.options.validate else self._plain
        return model, quantize(model, options.weight_format, calibration, self._log)

    def _calibrate(self, activations: WeightFormat) -> Calibration:
        """Measure the inputs of the layers on the graph that is exported."""
        source, options = self._plan.source, self._plan.options.quantization
        model = self._lowered_copy()
        with self._log.measure("calibrate"):
            if options.calibration is None:
                sizes = validation_sizes(source.size_multiple, source.parameter_count)
                run_steps = trajectory_steps(source.inputs, sizes | declared_sizes(model))
                inputs = "the trajectory of the validation"
            else:
                prompts, pipeline = options.read_prompts(), options.calibration
                recorded = record_steps(
                    pipeline, prompts, source.inputs, self._log, trust_code=options.trust_code
                )
                run_steps = recorded_steps(recorded)
                inputs = f"{pipeline.name}, {len(prompts)} prompts"
            layers = calibrated_layers(self._plain)
            return calibrate(model, layers, activations, run_steps, inputs, self._log)

    @functools.cached_property
    def _plain(self) -> ir.Model:
        with self._log.measure("export"):
            self._check.check_names()
            return self._plan.source.plain_model(self._log)

    def _compare_static(self, path: Path, dynamic: Graph) -> str:
        plan, sizes = self._plan, self._sizes_to_run()
        text = "compared before " + ", ".join(
            f"{name} was set to {size}" for name, size in plan.static_sizes.items()
        )
        if sizes is None:
            return f"{text}; the static graph was not run, a step on this processor would be long"
        differences = compare_static_shapes(
            path,
            dynamic.file,
            plan.source.inputs,
            sizes,
            sws_spec(dynamic.description),
            plan.source.precision,
            self._log,
        )
        _check_differences(differences, "graph with dynamic shapes")
        largest = max(difference.maximum for difference in differences)
        return f"{text}; the static graph differs by up to {largest:.1g} in {STEPS} steps"


@contextlib.contextmanager
def _measured(log: RunLog, name: str, progress: Progress) -> Iterator[None]:
    """Measure the block, unless it is a part of a stage that is measured already."""
    if progress is log:
        with log.measure(name):
            yield
    else:
        yield


def validate_graph(
    plan: ExportPlan, graph: Graph, log: RunLog, unquantized: ir.Model | None = None
) -> ValidationReport:
    """Compare the graph with what it should compute.

    Args:
        plan: The export.
        graph: Its graph with dynamic shapes.
        log: Receives the stage.
        unquantized: The same graph with its weights as in the source, whose error is reported, too.

    Raises:
        ValidationError: They differ by more than is allowed.
    """
    file, spec = graph.file, sws_spec(graph.description)
    with log.measure("validate"):
        validation = plan.source.validate(file, spec, log, unquantized)
    _check_differences(validation.outputs, validation.reference)
    return validation


def sws_spec(description: GraphDescription) -> SwsSpec:
    """The SWS in a graph and the format of its weights, from its manifest."""
    quantization = description.get("quantization")
    weights = quantization["weights"] if quantization else None
    activations = quantization.get("activations") if quantization else None
    preset = recorded_preset(description)
    if description["sws"] is None or preset is None:
        return SwsSpec(SwsParameters(), (), weights=weights, activations=activations)
    guard, debug = description["guard"], description["debug_outputs"]
    return SwsSpec(
        recorded_parameters(description["sws"]),
        tuple(name for names in description["sites"].values() for name in names),
        Fraction(guard["rows"]) if guard else Fraction(1),
        tuple(debug["sites"]) if debug else (),
        preset,
        weights,
        activations,
    )


def _check_differences(outputs: tuple[OutputDifference, ...], reference: str) -> None:
    failed = [output for output in outputs if not output.passed]
    if not failed:
        return
    worst = max(failed, key=lambda output: output.maximum / output.tolerance)
    if math.isinf(worst.maximum):
        raise ValidationError(
            f"{worst.name} of the graph has NaN or Inf, the {reference} has none: the precision is "
            "too small for this model; nothing was written. Export with --precision bf16 or fp32"
        )
    raise ValidationError(
        f"the graph differs from the {reference}: {worst.name} by {worst.maximum:.2g} of its largest "
        f"value, allowed is {worst.tolerance:.0e}; nothing was written. --no-validate skips the comparison"
    )
