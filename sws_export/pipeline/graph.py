"""The graph of an export: compared with the reference, and fixed to the sizes asked for."""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir

from sws_export import manifest as manifests
from sws_export.errors import ValidationError
from sws_export.onnx_files import graph_specs, release_weights, save_onnx, save_sharing
from sws_export.options.options import guard_options
from sws_export.pipeline.cached_graph import find_validation, store_validation
from sws_export.pipeline.job import Job
from sws_export.pipeline.rewrite import RewriteReport, finish_plain, rewrite
from sws_export.progress import Progress, Silent
from sws_export.stage_timings import StageLog
from sws_export.tracing.export_unet import OPSET
from sws_export.validation import OutputDifference, SwsSpec, ValidationReport
from sws_export.validation.static_shapes import STEPS, compare_static_shapes

_RUNNABLE = 5e11
"""Parameters times pixels of the latent up to which a graph is run once more: SD 1.5 at 192 x 192. At
512 x 512 that took two minutes and 2.4 times the weights, with logits stored as TensorRT-RTX needs them."""


@dataclasses.dataclass(frozen=True)
class GraphMaking:
    """Makes the graph of one export.

    Attributes:
        job: The export.
        description: What the manifest says of the source.
        key: What the graph of any size and its validation depend on.
        log: Takes times and memory.
        progress: Hears of the stages.
    """

    job: Job
    description: dict[str, Any]
    key: str
    log: StageLog
    progress: Progress

    def make(self, path: Path) -> tuple[ir.Model, ValidationReport | None]:
        """Write the graph to `path`; returns it with the result of its validation, if there was one.

        The reference is slow and sees a small grid, so that the graph is compared before its sizes are
        fixed. Where a step at these sizes is short enough, the fixed graph runs beside the one compared.

        Raises:
            ValidationError: The graph differs from the reference.
        """
        with self.log.measure("export"):
            model = self.job.source.plain_model(self.progress)
        later = self.job.sizes if self.job.options.validate else {}
        plain = model.clone() if later else model
        with self.log.measure("rewrite"):
            rewritten = self._finish(model, {} if later else self.job.sizes, self.progress)
        with self.log.measure("save"):
            save_onnx(model, path, self.progress)
        if not self.job.options.validate:
            return model, None
        shuffled = self._shuffled(rewritten)
        validation = self._validate(path, shuffled)
        if not later:
            return model, validation
        with self.log.measure("fix sizes"):
            general = path.replace(path.with_name("any-size.onnx"))
            self._finish(plain, self.job.sizes, Silent())
            save_sharing(plain, path, model, general, self.progress)
            remark = self._compare(path, general, shuffled)
        remarks = (*validation.remarks, remark)
        return plain, dataclasses.replace(validation, remarks=remarks)

    def _validate(self, path: Path, shuffled: SwsSpec) -> ValidationReport:
        """Compare the graph of any size with the reference, unless that was done before."""
        known = find_validation(self.job.cache, self.key)
        if known is not None:
            validation, figures = known
            self.job.progress.log(f"validation: from the cache ({self.key[:12]})")
            self.log.recall(figures)
            return validation
        with self.log.measure("validate") as figures:
            validation = self.job.source.validate(path, shuffled, self.progress)
        _check_differences(validation.outputs, validation.reference)
        store_validation(self.job.cache, self.key, validation, figures, self.job.what, self.job.progress)
        return validation

    def _finish(self, model: ir.Model, sizes: Mapping[str, int], progress: Progress) -> RewriteReport | None:
        """Rewrite a plain model for `sizes`, in place, and let it say what it is."""
        rewritten = None
        if self.job.options.plain:
            finish_plain(model, sizes)
        else:
            rewritten = rewrite(
                model,
                self.job.options.parameters,
                self.job.options.sites,
                guard_options(self.job.options),
                self.job.target,
                progress,
                preset=self.job.options.preset,
                debug_outputs=self.job.options.debug_outputs,
                sizes=sizes,
            )
        release_weights(model)
        model.producer_name, model.producer_version = "sws-export", manifests.library_versions()["sws-export"]
        manifests.embed(
            model,
            manifests.describe_graph(
                source=self.description,
                inputs=graph_specs(model.graph.inputs),
                outputs=graph_specs(model.graph.outputs),
                parameters=self.job.options.parameters if rewritten else None,
                rewrite=rewritten,
                precision=self.job.source.precision,
                target=self.job.target,
                guard=guard_options(self.job.options) if rewritten else None,
                opset=OPSET,
            ),
        )
        return rewritten

    def _shuffled(self, rewritten: RewriteReport | None) -> SwsSpec:
        sites = rewritten.site_names if rewritten else ()
        debug_sites = rewritten.debug_sites if rewritten else ()
        return SwsSpec(
            self.job.options.parameters,
            sites,
            guard_options(self.job.options).rows,
            debug_sites,
            self.job.options.preset,
        )

    def _compare(self, fixed: Path, general: Path, shuffled: SwsSpec) -> str:
        """Run the fixed graph beside the one of any size, if that is affordable; what to say of it."""
        text = "compared before " + ", ".join(
            f"{name} was fixed to {size}" for name, size in self.job.sizes.items()
        )
        side = 2 * self.job.source.multiple
        sizes = {"batch": 1, "height": side, "width": side, "tokens": 7} | dict(self.job.sizes)
        work = self.job.source.parameters * sizes["batch"] * sizes["height"] * sizes["width"]
        if work > _RUNNABLE:
            return f"{text}; the fixed graph was not run, a step on this processor would be long"
        differences = compare_static_shapes(
            fixed, general, self.job.source.inputs, sizes, shuffled, self.job.source.precision, self.progress
        )
        _check_differences(differences, "graph that takes any size")
        largest = max(difference.maximum for difference in differences)
        return f"{text}; the fixed graph differs by up to {largest:.1g} in {STEPS} steps"


def _check_differences(outputs: tuple[OutputDifference, ...], reference: str) -> None:
    failed = [output for output in outputs if not output.passed]
    if not failed:
        return
    worst = max(failed, key=lambda output: output.maximum / output.tolerance)
    if math.isinf(worst.maximum):
        raise ValidationError(
            f"{worst.name} of the graph holds NaN or Inf, the {reference} does not: the precision is "
            "too small for this model; nothing was written. Export with --precision bf16 or fp32"
        )
    raise ValidationError(
        f"the graph differs from the {reference}: {worst.name} by {worst.maximum:.2g} of its largest "
        f"value, allowed is {worst.tolerance:.0e}; nothing was written. --no-validate skips the comparison"
    )
