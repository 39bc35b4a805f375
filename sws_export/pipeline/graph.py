"""The graph of an export: traced, rewritten for its target, compared with the reference."""

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import onnx_ir as ir

from graph_passes.weight_formats import WeightFormat
from sws_export.calibration import (
    Calibration,
    calibrate,
    record_steps,
    recorded_steps,
    trajectory_steps,
)
from sws_export.files import FileDigest, external_data_path
from sws_export.manifest import METADATA_KEY, GraphDescription, QuantizationEntry, parse_manifest
from sws_export.onnx_files import (
    declared_sizes,
    graph_specs,
    release_weights,
    save_onnx,
    save_sharing_weights,
)
from sws_export.pipeline.describe import describe_graph, embed, library_versions
from sws_export.pipeline.plan import ExportPlan
from sws_export.pipeline.quantize import calibrated_layers, quantize
from sws_export.pipeline.rewrite import RewriteReport, rewrite, rewrite_plain
from sws_export.pipeline.run_log import Recorded, RunLog
from sws_export.pipeline.source_check import SourceCheck
from sws_export.progress import SilentProgress
from sws_export.validation import SwsSpec, require_tolerances
from sws_export.validation.sizes import validation_sizes
from sws_export.validation.static_shapes import STEPS, compare_static_shapes

_RUNNABLE = 5e11
"""Parameters times latent pixels up to which a static graph is run: SD 1.5 at 192 x 192. At 512 x 512 that
took two minutes and 2.4 times the weights, with the materialized logits that TensorRT for RTX needs."""


class WrittenGraph(NamedTuple):
    """A graph in memory, whose files are written, and a remark on how it was compared.

    Attributes:
        path: The ONNX file.
        model: The graph; large weights stay on disk.
        files: The ONNX file and its external data, with the digests of the bytes that were written.
        remark: How a static graph was compared with the dynamic one; empty for others.
    """

    path: Path
    model: ir.Model
    files: Mapping[Path, FileDigest]
    remark: str = ""

    @property
    def description(self) -> GraphDescription:
        """The manifest embedded in the graph."""
        return parse_manifest(self.model.metadata_props[METADATA_KEY], str(self.path))


class Graph:
    """An exported graph; its files are written when they are first needed.

    Attributes:
        path: The ONNX file.
        recorded: What its making logged, that of its base included.
    """

    def __init__(
        self, path: Path, log: RunLog, write: Callable[..., WrittenGraph], base: "Graph | None" = None
    ) -> None:
        """A graph that `write(path)` writes, or `write(path, base.write())`."""
        self.path = path
        self.recorded = Recorded()
        self._log = log
        self._write = write
        self._base = base
        self._written: WrittenGraph | None = None

    def write(self) -> WrittenGraph:
        """Write the files, after those of the base, unless that was done."""
        if self._written is not None:
            return self._written
        bases = [] if self._base is None else [self._base.write()]
        with self._log.record() as own:
            self._written = self._write(self.path, *bases)
        self.recorded = (self._base.recorded if self._base else Recorded()) + own
        return self._written

    @property
    def is_written(self) -> bool:
        """Whether the files are complete."""
        return self._written is not None

    @property
    def remark(self) -> str:
        """How a static graph was compared with the dynamic one; empty for others."""
        return self.write().remark

    @property
    def description(self) -> GraphDescription:
        """The manifest embedded in the graph."""
        return self.write().description


class GraphExporter:
    """Writes the graphs of one export, all from one trace of the UNet."""

    def __init__(
        self, plan: ExportPlan, check: SourceCheck, trace: Callable[[], ir.Model], log: RunLog
    ) -> None:
        """An exporter of the plain graph that `trace` returns."""
        self._plan = plan
        self._check = check
        self._trace = trace
        self._log = log
        sws = plan.options.sws
        self._rewrite: Callable[..., RewriteReport | None] = rewrite_plain
        if not sws.plain:
            self._rewrite = functools.partial(
                rewrite,
                parameters=sws.parameters,
                patterns=sws.sites,
                guard=sws.guard_options(),
                target=plan.target,
                preset=sws.chosen_preset,
                debug_outputs=sws.debug_outputs,
                largest=plan.largest_sizes,
            )

    def graphs(self, path: Path) -> tuple[Graph, Graph]:
        """The graph to validate, and the one to publish at `path`.

        They are one graph, unless static sizes are validated: the dynamic graph is, and the static one shares
        its weights.
        """
        if not self._makes_two:
            graph = Graph(path, self._log, functools.partial(self.write, sizes=self._plan.static_sizes))
            return graph, graph
        # The weights are beside the graph that is published.
        write = functools.partial(self.write, sizes={}, data=external_data_path(path))
        dynamic = Graph(path.with_name("dynamic.onnx"), self._log, write)
        return dynamic, Graph(path, self._log, self.write_static, base=dynamic)

    def write(self, path: Path, *, sizes: Mapping[str, int], data: Path | None = None) -> WrittenGraph:
        """Write the graph with `sizes` static.

        Args:
            path: The ONNX file.
            sizes: Static sizes by symbol; the others are dynamic.
            data: File of large weights; by default the usual name beside `path`.

        Raises:
            ExportError: The UNet cannot be traced, or its graph cannot be rewritten.
            OSError: `path` cannot be written.
        """
        model, quantization = self._quantized_copy()
        with self._log.measure("rewrite"):
            report = self._rewrite(model, sizes=sizes, progress=self._log)
        self._embed_description(model, report, quantization)
        with self._log.measure("save"):
            files = save_onnx(model, path, self._log, data, whole=self._check.whole_files)
            return WrittenGraph(path, model, files)

    def write_static(self, path: Path, dynamic: WrittenGraph) -> WrittenGraph:
        """Write the graph with static shapes, and run it beside `dynamic` if that is affordable.

        Raises:
            ValidationError: Both graphs run and differ.
        """
        with self._log.measure("static shapes"):
            model, quantization = self._quantized_copy()
            report = self._rewrite(model, sizes=self._plan.static_sizes, progress=SilentProgress())
            self._embed_description(model, report, quantization)
            files = save_sharing_weights(model, path, dynamic.model, dynamic.path, self._log)
            shared = {file: digest for file, digest in dynamic.files.items() if file != dynamic.path}
            return WrittenGraph(path, model, shared | files, self._compare_static(path, dynamic))

    def unquantized(self) -> ir.Model | None:
        """The dynamic graph with its weights as in the source, not written; None if it quantizes none."""
        if self._plan.options.quantization.weight_format is None:
            return None
        return self._dynamic_copy()

    @property
    def _makes_two(self) -> bool:
        """Whether a dynamic graph is validated before the static one is written."""
        return bool(self._plan.static_sizes) and self._plan.options.validate

    def _sizes_to_run(self) -> dict[str, int] | None:
        """Sizes at which the static graph runs; None if a step would take too long."""
        source = self._plan.source
        side = 2 * source.size_multiple
        sizes = {"batch": 1, "height": side, "width": side, "tokens": 7} | dict(self._plan.static_sizes)
        work = source.parameter_count * sizes["batch"] * sizes["height"] * sizes["width"]
        return sizes if work <= _RUNNABLE else None

    def _quantized_copy(self) -> tuple[ir.Model, QuantizationEntry | None]:
        """The plain graph to be rewritten in place, with its weights as the export stores them."""
        model, quantization = self._quantized
        return (model.clone() if self._makes_two else model), quantization

    def _dynamic_copy(self) -> ir.Model:
        """The graph with dynamic shapes and with its weights as in the source."""
        model = self._plain.clone()
        self._rewrite(model, sizes={}, progress=SilentProgress())
        return model

    def _embed_description(
        self, model: ir.Model, report: RewriteReport | None, quantization: QuantizationEntry | None
    ) -> None:
        """Embed the manifest of a rewritten graph."""
        plan, sws = self._plan, self._plan.options.sws
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
        model = self._dynamic_copy()
        if options.calibration is None:
            self._log.warn(
                "activations are calibrated over random text embeddings; larger values, which those of text "
                "encoders have, will be clipped: for images give --calibration PIPELINE --prompts FILE"
            )
            sizes = validation_sizes(source.size_multiple, source.parameter_count)
            steps = trajectory_steps(source.inputs, sizes | declared_sizes(model))
        else:
            prompts, pipeline = options.read_prompts(), options.calibration
            # A stage of its own: the weights of the pipeline are released at its end.
            with self._log.measure("record"):
                recorded = record_steps(
                    pipeline, prompts, source.inputs, self._log, trust_code=options.trust_code
                )
            count = "1 prompt" if len(prompts) == 1 else f"{len(prompts)} prompts"
            steps = recorded_steps(recorded, f"{pipeline.name}, {count}")
        with self._log.measure("calibrate"):
            return calibrate(model, calibrated_layers(self._plain), activations, steps, self._log)

    @functools.cached_property
    def _plain(self) -> ir.Model:
        with self._log.measure("export"):
            self._check.check_names()
            return self._trace()

    def _compare_static(self, path: Path, dynamic: WrittenGraph) -> str:
        plan, sizes = self._plan, self._sizes_to_run()
        text = "compared before " + ", ".join(
            f"{name} was set to {size}" for name, size in plan.static_sizes.items()
        )
        if sizes is None:
            return f"{text}; the static graph was not run, a step on this processor would be long"
        differences = compare_static_shapes(
            path,
            dynamic.path,
            plan.source.inputs,
            sizes,
            SwsSpec.from_manifest(dynamic.description),
            plan.source.precision,
            self._log,
        )
        require_tolerances(differences, "graph with dynamic shapes")
        largest = max(difference.maximum for difference in differences)
        return f"{text}; the static graph differs by up to {largest:.1g} in {STEPS} steps"
