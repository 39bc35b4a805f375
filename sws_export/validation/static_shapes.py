"""Compare a graph with static shapes with the dynamic-shape graph that was validated."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from sws_export.progress import Progress
from sws_export.tensors import Precision, TensorSpec
from sws_export.validation.compare import OutputDifference, compare_outputs, max_over_steps
from sws_export.validation.onnx_runner import OnnxRunner
from sws_export.validation.sws_spec import SwsSpec
from sws_export.validation.tolerances import output_tolerances
from sws_export.validation.trajectory import Array, Trajectory

STEPS = 2


def compare_static_shapes(
    static_path: Path,
    dynamic_path: Path,
    inputs: Sequence[TensorSpec],
    sizes: Mapping[str, int],
    sws_spec: SwsSpec,
    precision: Precision,
    progress: Progress,
) -> tuple[OutputDifference, ...]:
    """The largest differences of the outputs, states included, over `STEPS` steps with the state fed back.

    Args:
        static_path: The graph with static shapes.
        dynamic_path: The graph with dynamic shapes.
        inputs: Inputs of the UNet as the graph with dynamic shapes declares them.
        sizes: batch, height, width (of the latent) and tokens to run with.
        sws_spec: The SWS configuration of both graphs.
        precision: Precision of the export.
        progress: Receives the stage.
    """
    trajectory = Trajectory(inputs, sizes, STEPS)
    step_inputs: list[dict[str, Array]] = []
    expected: list[dict[str, Array]] = []
    with progress.stage("compare static shapes", total=2 * STEPS) as stage:
        runner = OnnxRunner(dynamic_path)
        for step in trajectory.steps():
            step_inputs.append(
                trajectory.inputs(step) | {"sigma": step.sigma, "intensity": trajectory.intensity}
            )
            expected += runner.run([step_inputs[-1]], stage)
            trajectory.advance(step, expected[-1]["out_sample"].astype(np.float64))
        del runner
        actual = OnnxRunner(static_path).run(step_inputs, stage)
    # Both graphs have the same weights.
    tolerances = output_tolerances(
        expected, dataclasses.replace(sws_spec, weights=None, activations=None), precision
    )
    return max_over_steps(
        [
            compare_outputs(
                {name: step_actual[name] for name in tolerances},
                {name: step_expected[name] for name in tolerances},
                tolerances,
            )
            for step_actual, step_expected in zip(actual, expected, strict=True)
        ]
    )
