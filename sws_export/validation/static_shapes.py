"""Run a graph of fixed sizes beside the one of any size that was compared with the reference."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from sws_export.progress import Progress
from sws_export.tensors import Precision, TensorSpec
from sws_export.validation.compare import OutputDifference, compare_outputs, worst
from sws_export.validation.onnx_runner import OnnxRunner
from sws_export.validation.tolerances import allowed_differences
from sws_export.validation.trajectory import Array, Trajectory
from sws_export.validation.validate import SwsSpec

STEPS = 2


def compare_static_shapes(
    fixed: Path,
    general: Path,
    inputs: Sequence[TensorSpec],
    sizes: Mapping[str, int],
    shuffled: SwsSpec,
    precision: Precision,
    progress: Progress,
) -> tuple[OutputDifference, ...]:
    """The largest differences of the outputs, states included, over steps with the state fed back.

    Args:
        fixed: The graph of fixed sizes.
        general: The graph that takes any size.
        inputs: The UNet's inputs as `general` declares them.
        sizes: batch, height, width (latent) and tokens to run at.
        shuffled: The SWS in both.
        precision: Precision of the export.
        progress: Receives the stage.
    """
    trajectory = Trajectory(inputs, sizes, STEPS)
    fed: list[dict[str, Array]] = []
    expected: list[dict[str, Array]] = []
    with progress.stage("compare fixed sizes", total=2 * STEPS) as stage:
        runner = OnnxRunner(general)
        for step in trajectory.steps():
            fed.append(trajectory.inputs(step) | {"sigma": step.sigma, "intensity": trajectory.intensity})
            expected += runner.run([fed[-1]], stage)
            trajectory.advance(step, expected[-1]["out_sample"].astype(np.float64))
        del runner
        found = OnnxRunner(fixed).run(fed, stage)
    allowed = allowed_differences(expected, shuffled.parameters, shuffled.guard_rows, precision)
    return worst(
        [
            compare_outputs(
                {name: step_found[name] for name in allowed},
                {name: step_expected[name] for name in allowed},
                allowed,
            )
            for step_found, step_expected in zip(found, expected, strict=True)
        ]
    )
