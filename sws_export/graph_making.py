"""The graph of an export: compared with the reference, and fixed to the sizes asked for."""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir

from sws_export import manifest as manifests
from sws_export.errors import ValidationError
from sws_export.onnx_export import OPSET
from sws_export.onnx_files import save_onnx, save_sharing
from sws_export.options import ExportOptions, guard_options
from sws_export.progress import Progress, Silent
from sws_export.rewrite import RewriteReport, Target, finish_plain, graph_specs, rewrite
from sws_export.sources import Source
from sws_export.stages import StageLog
from sws_export.validation import OutputDifference, Shuffled, ValidationReport
from sws_export.validation.fixed_sizes import STEPS, compare_fixed_sizes

_RUNNABLE = 5e12
"""Parameters times elements of the latent up to which a graph is run once more: SD 1.5 at 512 x 512."""


@dataclasses.dataclass(frozen=True)
class GraphMaking:
    """Makes the graph of one export.

    Attributes:
        source: What is exported.
        description: What the manifest says of it.
        options: What was asked for.
        target: Runtime that the graph is for.
        sizes: batch, height and width (latent) and tokens, as far as the graph is fixed to them.
        log: Takes times and memory.
        progress: Hears of the stages.
    """

    source: Source
    description: dict[str, Any]
    options: ExportOptions
    target: Target
    sizes: Mapping[str, int]
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
            model = self.source.plain_model(self.progress)
        later = self.sizes if self.options.validate else {}
        plain = model.clone() if later else model
        with self.log.measure("rewrite"):
            rewritten = self._finish(model, {} if later else self.sizes, self.progress)
        with self.log.measure("save"):
            save_onnx(model, path, self.progress)
        if not self.options.validate:
            return model, None
        shuffled = self._shuffled(rewritten)
        with self.log.measure("validate"):
            validation = self.source.validate(path, shuffled, self.progress)
        _check_differences(validation.outputs, validation.reference)
        if not later:
            return model, validation
        with self.log.measure("fix sizes"):
            general = path.replace(path.with_name("any-size.onnx"))
            self._finish(plain, self.sizes, Silent())
            save_sharing(plain, path, model, general, self.progress)
            remark = self._compare(path, general, shuffled)
        remarks = (*validation.remarks, remark)
        return plain, dataclasses.replace(validation, remarks=remarks)

    def _finish(self, model: ir.Model, sizes: Mapping[str, int], progress: Progress) -> RewriteReport | None:
        """Rewrite a plain model for `sizes`, in place, and let it say what it is."""
        rewritten = None
        if self.options.plain:
            finish_plain(model, sizes)
        else:
            rewritten = rewrite(
                model,
                self.options.parameters,
                self.options.sites,
                guard_options(self.options),
                self.target,
                progress,
                preset=self.options.preset,
                debug_outputs=self.options.debug_outputs,
                sizes=sizes,
            )
        model.producer_name, model.producer_version = "sws-export", manifests.library_versions()["sws-export"]
        manifests.embed(
            model,
            manifests.describe_graph(
                source=self.description,
                inputs=graph_specs(model.graph.inputs),
                outputs=graph_specs(model.graph.outputs),
                parameters=self.options.parameters if rewritten else None,
                rewrite=rewritten,
                precision=self.source.precision,
                target=self.target,
                guard=guard_options(self.options) if rewritten else None,
                opset=OPSET,
            ),
        )
        return rewritten

    def _shuffled(self, rewritten: RewriteReport | None) -> Shuffled:
        sites = rewritten.site_names if rewritten else ()
        debug_sites = rewritten.debug_sites if rewritten else ()
        return Shuffled(
            self.options.parameters, sites, guard_options(self.options).rows, debug_sites, self.options.preset
        )

    def _compare(self, fixed: Path, general: Path, shuffled: Shuffled) -> str:
        """Run the fixed graph beside the one of any size, if that is affordable; what to say of it."""
        text = "compared before " + ", ".join(
            f"{name} was fixed to {size}" for name, size in self.sizes.items()
        )
        side = 2 * self.source.multiple
        sizes = {"batch": 1, "height": side, "width": side, "tokens": 7} | dict(self.sizes)
        work = self.source.parameters * sizes["batch"] * sizes["height"] * sizes["width"]
        if work > _RUNNABLE:
            return f"{text}; the fixed graph was not run, a step on this processor would be long"
        if self.source.precision == "bf16":
            return f"{text}; the fixed graph was not run, ONNX Runtime has no bfloat16"
        differences = compare_fixed_sizes(
            fixed, general, self.source.inputs, sizes, shuffled, self.source.precision, self.progress
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
