"""Exports with 8-bit weights: what is written, how it is validated, and what it is combined with."""

import dataclasses
import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from graph_passes.weight_formats import WEIGHT_FORMATS, WeightFormat
from sws_export import ExportOptions, QuantizationOptions, SizeOptions, SwsOptions, export
from sws_export.calibration import Calibration, calibrate, recorded_steps
from sws_export.errors import CheckpointError, ExportError, OptionError, ValidationError
from sws_export.inspection import inspect_file
from sws_export.onnx_files import graph_specs, load_onnx
from sws_export.pipeline.quantize import calibrated_layers, quantize
from sws_export.pipeline.validate import validate
from sws_export.progress import SilentProgress
from sws_export.report.explanation import Explanation
from sws_export.report.tables import quantization_facts, validation_table
from sws_export.tensors import concrete_shape
from tests.conftest import RunOnnx
from tests.export_runs import (
    TRAINED,
    AtStage,
    RecordingProgress,
    changed_copy,
    difference,
    listing,
    open_session,
    with_options,
)
from tests.graph_passes.layer_models import QUANTIZED, layer_feeds, layer_model
from tests.graph_passes.small_models import op_counts

INT8 = ExportOptions(
    sws=SwsOptions(guard="literal", sites=("mid*attn1",)),
    quantization=QuantizationOptions(weights="int8"),
    validate=False,
)
PLAIN: dict[str, Any] = {"plain": True, "guard": None, "sites": ()}

pytestmark = pytest.mark.usefixtures("quick_trace")


def inputs(batch: int = 2, intensity: float = 1.0) -> dict[str, Any]:
    random = np.random.default_rng(0)
    return {
        "sample": random.standard_normal((batch, 4, 8, 6)),
        "timestep": np.full(batch, 500.0),
        "encoder_hidden_states": random.standard_normal((batch, 7, 16)),
        "sigma": np.full(batch, 3.0),
        "intensity": np.full(batch, intensity),
    }


def prediction(graph: Path, intensity: float = 1.0, residuals: float = 0.0) -> Any:
    """The prediction for `inputs`, with residuals of a ControlNet of this size if the graph has them."""
    session, given = open_session(graph), inputs(intensity=intensity)
    random = np.random.default_rng(1)
    for spec in graph_specs(load_onnx(graph).graph.inputs):
        if "additional_residual" in spec.name:
            sizes = dict(zip(("batch", "_", "height", "width"), given["sample"].shape, strict=True))
            given[spec.name] = residuals * random.standard_normal(concrete_shape(spec, sizes))
    return session.step(given, session.zero_state(given))[0]


@pytest.fixture(scope="module")
def validated(middle_unet: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A graph with int8 weights, validated at the export."""
    graph = tmp_path_factory.mktemp("int8") / "graph.onnx"
    export(middle_unet, graph, with_options(INT8, validate=True))
    return graph


def test_the_manifest_names_the_layers(validated: Path, middle_unet: Path) -> None:
    manifest = json.loads(validated.with_name("graph.onnx.json").read_text())
    entry = manifest["quantization"]
    assert entry["weights"] == "int8"
    layers = sum(entry["layers"].values())
    assert op_counts(ir.load(validated))["DequantizeLinear"] == layers > 20
    assert entry["skipped_layers"]["first convolution"] == ["conv_in"]
    assert entry["skipped_layers"]["last convolution"] == ["conv_out"]
    embeddings = entry["skipped_layers"]["embedding of the timestep or of another condition"]
    assert {"time_embedding.linear_1", "mid_block.resnets.0.time_emb_proj"} < set(embeddings)
    stored = (middle_unet / "diffusion_pytorch_model.safetensors").stat().st_size
    indices = (ir.DataType.INT32, ir.DataType.INT64)
    weights = sum(
        value.const_value.nbytes
        for value in ir.load(validated).graph.initializers.values()
        if value.const_value is not None and value.dtype not in indices
    )
    assert weights < 0.45 * stored
    assert inspect_file(validated)["quantization"] == entry


def test_both_errors_are_measured(validated: Path) -> None:
    manifest = json.loads(validated.with_name("graph.onnx.json").read_text())
    errors = {entry["name"]: entry for entry in manifest["validation"]["outputs"]}
    without = manifest["validation"]["unquantized"]
    assert without["name"] == "out_sample"
    assert (
        without["maximum"] < 1e-5 < errors["out_sample"]["maximum"] < errors["out_sample"]["tolerance"] == 0.1
    )
    assert errors["sws_state_d2_out"]["tolerance"] == 1e-5
    explanation = Explanation(manifest, "graph.onnx", 0.5, {}, "", "artefact", {}, ())
    assert "out_sample, not quantized" in validation_table(explanation)
    facts = quantization_facts(explanation)
    assert facts["8-bit weights"].startswith("int8: ")
    assert "first convolution: conv_in" in facts["layers without"]


def test_it_is_validated_again_with_its_own_tolerance(validated: Path, middle_unet: Path) -> None:
    report = validate(validated, middle_unet)
    assert report.passed
    assert {output.name: output.tolerance for output in report.outputs}["out_sample"] == 0.1


@pytest.mark.parametrize(
    ("option", "allowed", "remedy"),
    [
        ("weights", "1e-01", "--weights fp8, or no 8 bits"),
        ("activations", "2e-01", "--weights int8, --precision fp8, --calibration PIPELINE --prompts FILE"),
    ],
)
def test_a_graph_over_its_tolerance_is_not_written(
    option: str, allowed: str, remedy: str, middle_unet: Path, out: Path, tmp_path: Path
) -> None:
    model = with_cancelled_constant(middle_unet, tmp_path)
    options = with_options(INT8, validate=True, **PLAIN | {"weights": None} | {option: "int8"})
    message = (
        f"out_sample by .* allowed is {allowed}; nothing was written. Without 8 bits it .*: use {remedy}"
    )
    with pytest.raises(ValidationError, match=message):
        export(model, out / "graph.onnx", options)
    assert listing(out) == {}


def with_cancelled_constant(model: Path, folder: Path) -> Path:
    """A UNet in which a bias cancels a large constant, computed from weights with outliers.

    The 8 bits of two weights are coarse, since their last columns are large, for inputs of zero.
    """
    block = "mid_block.attentions.0.transformer_blocks.0"
    weights = load_file(model / "diffusion_pytorch_model.safetensors")
    others = np.arange(64) < 63
    constant = np.where(others, 50, 0).astype(np.float32)
    larger, smaller = np.where(others, 1, 16), np.where(others, 1, 1e-3)
    to_v = weights[f"{block}.attn1.to_v.weight"] * larger * smaller[:, None]
    to_out = weights[f"{block}.attn1.to_out.0.weight"] * larger
    return changed_copy(
        model,
        folder,
        {
            f"{block}.norm1.weight": np.zeros_like,
            f"{block}.norm1.bias": lambda _: constant,
            f"{block}.attn1.to_v.weight": lambda _: to_v,
            f"{block}.attn1.to_out.0.weight": lambda _: to_out,
            f"{block}.attn1.to_out.0.bias": lambda bias: bias - to_out @ to_v @ constant,
        },
    )


@pytest.mark.parametrize("activations", WEIGHT_FORMATS)
def test_a_layer_with_outliers_is_sensitive(activations: WeightFormat, run_onnx: RunOnnx) -> None:
    """One channel of the text is large and has no weight: int8 with a scale for it loses the others."""

    def model() -> ir.Model:
        built = layer_model()
        for name, axis in (("mid_block.to_q", 1), ("mid_block.to_k", 0)):
            weight = built.graph.initializers[f"{name}.weight"]
            assert weight.const_value is not None
            array = weight.const_value.numpy().copy()
            np.moveaxis(array, axis, 0)[0] = 0
            weight.const_value = ir.tensor(array, name=weight.name)
        return built

    feeds = layer_feeds()
    feeds["encoder_hidden_states"][..., 0] *= 300
    steps = recorded_steps([feeds], "a step")
    found = calibrate(model(), calibrated_layers(model()), activations, steps, SilentProgress())
    quantized = model()
    entry = quantize(quantized, activations, found, SilentProgress())
    sensitive = entry["skipped_layers"].get("its error with 8 bits is above 10%", [])
    # The exponent of float8 keeps small values beside large ones.
    assert sensitive == (["mid_block.to_q", "mid_block.to_k"] if activations == "int8" else [])
    assert {name for name, error in entry["layer_errors"].items() if error > 0.1} == set(sensitive)
    assert sum(entry["layers"].values()) == len(QUANTIZED) - len(sensitive)
    nodes = {node.name: node for node in quantized.graph}
    for name in sensitive:
        source = nodes[f"{name}/MatMul"].inputs[0]
        assert source is not None
        assert source.name == "encoder_hidden_states"
        assert f"{name}.weight" in quantized.graph.initializers
    exact, rounded = (run_onnx(each, feeds)["out_sample"] for each in (model(), quantized))
    assert difference(rounded, exact) < 0.1


def with_errors(model: ir.Model, *errors: float) -> Calibration:
    """A calibration whose layers have these errors, in graph order, and the last one from there on."""
    names = [layer.name for layer in calibrated_layers(model)]
    found = itertools.chain(errors, itertools.repeat(errors[-1]))
    return Calibration("int8", dict.fromkeys(names, 4.0), dict(zip(names, found, strict=False)), "", 1)


def test_every_layer_can_be_too_sensitive() -> None:
    model = layer_model()
    message = "every layer has an error above 10% with --precision int8; use --weights"
    with pytest.raises(ExportError, match=message):
        quantize(model, "int8", with_errors(model, 0.101), SilentProgress())


def test_sensitive_layers_keep_their_precision() -> None:
    model = layer_model()
    first, second, *_ = (layer.name for layer in calibrated_layers(model))
    entry = quantize(model, "int8", with_errors(model, 0.101, 0.099), SilentProgress())
    assert entry["skipped_layers"]["its error with 8 bits is above 10%"] == [first]
    assert f"{first}.weight_int8" not in model.graph.initializers
    assert f"{second}.weight_int8" in model.graph.initializers


ACTIVATIONS: dict[str, Any] = {"weights": None, "activations": "int8"}
NODE: dict[str, Any] = {"preset": "comfyui-node", "guard": None, "u": "sigma", "sites": ("mid*attn2",)}


@pytest.mark.parametrize(
    "changes",
    [
        PLAIN | {"precision": "fp16"},
        pytest.param(NODE, marks=pytest.mark.slow),
        NODE | ACTIVATIONS,
        pytest.param({"backend": "tensorrt-rtx", "weights": "fp8"}, marks=pytest.mark.slow),
        {"backend": "tensorrt-rtx", "weights": None, "activations": "fp8", "precision": "fp16"},
        ACTIVATIONS | {"backend": "tensorrt"},
    ],
    ids=lambda changes: " ".join(map(str, changes.values())),
)
def test_it_combines_with(changes: dict[str, Any], middle_unet: Path, out: Path) -> None:
    options = with_options(INT8, **changes)
    report = export(middle_unet, out / "graph.onnx", options)
    assert report.manifest is not None
    entry = report.manifest["quantization"]
    assert entry["weights"] == (options.quantization.weight_format or "")
    counts = op_counts(ir.load(out / "graph.onnx"))
    rounded = counts.get("QuantizeLinear", 0)
    assert counts["DequantizeLinear"] == sum(entry["layers"].values()) + rounded
    assert ("activations" in entry) == (rounded > 0)
    export(middle_unet, out / "exact.onnx", with_options(options, weights=None, activations=None))
    assert 1e-4 < difference(prediction(out / "graph.onnx"), prediction(out / "exact.onnx")) < 0.15


def test_residuals_of_a_controlnet_are_added_unrounded(middle_unet: Path, out: Path) -> None:
    options = with_options(INT8, **PLAIN | ACTIVATIONS, controlnet=True)
    export(middle_unet, out / "graph.onnx", options)
    export(middle_unet, out / "exact.onnx", with_options(options, activations=None))
    found, exact = (prediction(out / f"{name}.onnx", residuals=1.0) for name in ("graph", "exact"))
    assert 1e-4 < difference(found, exact) < 0.1
    effect = difference(exact, prediction(out / "exact.onnx"))
    assert effect > 0.2
    assert difference(found, prediction(out / "graph.onnx")) == pytest.approx(effect, rel=0.1)


def test_fused_loras_are_quantized(middle_unet: Path, out: Path) -> None:
    layer = "mid_block.attentions.0.transformer_blocks.0.attn1.to_v"
    random = np.random.default_rng(3)
    factors = {
        f"unet.{layer}.lora_A.weight": random.standard_normal((2, 64), np.float32),
        f"unet.{layer}.lora_B.weight": random.standard_normal((64, 2), np.float32),
    }
    save_file(factors, out / "lora.safetensors")
    options = with_options(INT8, loras=(f"{out / 'lora.safetensors'}:0.5",))
    export(middle_unet, out / "graph.onnx", options)
    export(middle_unet, out / "exact.onnx", with_options(options, weights=None))
    export(middle_unet, out / "without.onnx", INT8)
    found, exact, without = (prediction(out / f"{name}.onnx") for name in ("graph", "exact", "without"))
    assert difference(found, exact) < 0.1 < difference(found, without)
    initializers = ir.load(out / "graph.onnx").graph.initializers
    with safe_open(middle_unet / "diffusion_pytorch_model.safetensors", "np") as stored:
        weight = stored.get_tensor(f"{layer}.weight").astype(np.float64)
    a, b = factors.values()
    weight += 0.5 * (b.astype(np.float64) @ a)
    restored = (
        data(initializers, f"{layer}.weight_int8") * data(initializers, f"{layer}.weight_scale")[:, None]
    )
    # Half a step of the channel's scale, and the rounding of the scale.
    assert (np.abs(restored - weight).max(1) <= 0.51 * np.abs(weight).max(1) / 127).all()


def data(initializers: Mapping[str, ir.Value], name: str) -> Any:
    tensor = initializers[name].const_value
    assert tensor is not None
    return tensor.numpy().astype(np.float64)


def test_a_plain_quantized_graph_as_the_source(middle_unet: Path, out: Path) -> None:
    export(middle_unet, out / "plain.onnx", with_options(INT8, **PLAIN))
    report = export(out / "plain.onnx", out / "sws.onnx", ExportOptions(sws=INT8.sws))
    assert report.manifest is not None
    assert report.manifest["quantization"]["weights"] == "int8"
    with pytest.raises(OptionError, match="has int8 weights already; leave out --weights"):
        export(out / "plain.onnx", out / "again.onnx", INT8)


def test_a_plain_graph_is_quantized(traced: Path, out: Path) -> None:
    progress = RecordingProgress(SilentProgress())
    report = export(traced, out / "graph.onnx", with_options(INT8, **ACTIVATIONS, validate=True), progress)
    (warning,) = (text for warned, text in progress.lines if warned)
    assert "random text embeddings" in warning
    assert "--calibration PIPELINE --prompts FILE" in warning
    assert report.validation is not None
    (prediction,) = report.validation.outputs
    without = report.validation.unquantized
    assert without is not None
    assert without.maximum < 1e-5 < prediction.maximum < prediction.tolerance == 0.2


def test_targets_without_float8(middle_unet: Path, out: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    sizes = SizeOptions(height="16", width="16", vae_scale=1)
    options = ExportOptions(sizes=sizes, quantization=QuantizationOptions(weights="fp8"), dry_run=True)
    progress = RecordingProgress(SilentProgress())
    needs = export(middle_unet, out / "engine.plan", options, progress).preflight
    assert (False, "not built for compute capability 8.0, 8.6: no float8 before 8.9") in progress.lines
    exact = export(middle_unet, out / "engine.plan", with_options(options, weights=None)).preflight
    assert needs.graph_size < 0.55 * exact.graph_size
    named = with_options(options, compute_capabilities=("8.6", "8.9"))
    with pytest.raises(OptionError, match=r"--compute-capability 8\.6: GPUs before 8\.9 have no float8"):
        export(middle_unet, out / "engine.plan", named)
    export(middle_unet, out / "engine.plan", with_options(named, weights="int8"))
    # A graph that has such weights already is no different.
    export(middle_unet, out / "plain.onnx", with_options(INT8, **PLAIN | {"weights": "fp8"}))
    sizes = SizeOptions(batch="1", height="16", width="16", tokens="7", vae_scale=1)
    again = ExportOptions(sizes=sizes, dry_run=True)
    progress = RecordingProgress(SilentProgress())
    needs = export(out / "plain.onnx", out / "engine.plan", again, progress).preflight
    assert (False, "not built for compute capability 8.0, 8.6: no float8 before 8.9") in progress.lines
    assert needs.graph_size == pytest.approx((out / "plain.onnx").stat().st_size, rel=0.3)
    with pytest.raises(
        OptionError, match=r"--compute-capability 8\.6: .*use a checkpoint with --weights int8"
    ):
        export(out / "plain.onnx", out / "engine.plan", with_options(again, compute_capabilities=("8.6",)))


@pytest.fixture(scope="module")
def activations(middle_unet: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A graph with int8 weights and activations, in float32 beside them, validated at the export."""
    graph = tmp_path_factory.mktemp("activations") / "graph.onnx"
    options = with_options(INT8, validate=True, weights=None, activations="int8", precision="fp32")
    export(middle_unet, graph, options)
    return graph


def test_activations_are_calibrated_and_validated(activations: Path) -> None:
    manifest = json.loads(activations.with_name("graph.onnx.json").read_text())
    entry = manifest["quantization"]
    assert entry["activations"] == entry["weights"] == "int8"
    assert entry["calibration"] == {"source": "the trajectory of the validation", "steps": 5}
    assert all(
        name.endswith("conv_shortcut") for name in entry["skipped_layers"]["convolution of a shortcut"]
    )
    errors = entry["layer_errors"]
    assert all(0 < error < 0.1 for error in errors.values())
    assert len(errors) == sum(entry["layers"].values())
    counts = op_counts(ir.load(activations))
    # Queries, keys and values are projections of one tensor.
    assert 0 < counts["QuantizeLinear"] < len(errors)
    assert counts["DequantizeLinear"] == len(errors) + counts["QuantizeLinear"]
    found = {output["name"]: output for output in manifest["validation"]["outputs"]}["out_sample"]
    assert manifest["validation"]["unquantized"]["maximum"] < 1e-5 < found["maximum"] < found["tolerance"]


def test_a_pipeline_that_cannot_be_used_is_rejected_before_the_export(
    middle_unet: Path, out: Path, tmp_path: Path
) -> None:
    progress = AtStage()
    prompts = tmp_path / "prompts.txt"
    quantization = QuantizationOptions(activations="int8", calibration=tmp_path / "none", prompts=prompts)
    options = dataclasses.replace(INT8, quantization=quantization)
    with pytest.raises(OptionError, match=r"--prompts .*prompts\.txt: No such file or directory"):
        export(middle_unet, out / "graph.onnx", options, progress)
    prompts.write_text("a cat")
    with pytest.raises(CheckpointError, match="none: no such directory"):
        export(middle_unet, out / "graph.onnx", options, progress)
    quantization = dataclasses.replace(quantization, calibration=TRAINED.parent)
    with pytest.raises(OptionError, match="add --trust-code"):
        export(
            middle_unet, out / "graph.onnx", dataclasses.replace(INT8, quantization=quantization), progress
        )
    assert progress.stages == 3 * ["open"]
    assert listing(out) == {}


def test_options_of_activations(tmp_path: Path) -> None:
    with pytest.raises(
        OptionError, match=r"--precision int8 has weights of the same format; leave out --weights fp8"
    ):
        QuantizationOptions(weights="fp8", activations="int8")
    with pytest.raises(OptionError, match="--calibration PIPELINE and --prompts FILE belong together"):
        QuantizationOptions(activations="int8", calibration=tmp_path)
    with pytest.raises(OptionError, match="--calibration has no meaning without 8-bit activations"):
        QuantizationOptions(weights="int8", calibration=tmp_path, prompts=tmp_path / "prompts.txt")
    (tmp_path / "prompts.txt").write_text("a cat\n\n a dog \n")
    options = QuantizationOptions(activations="fp8", calibration=tmp_path, prompts=tmp_path / "prompts.txt")
    assert options.read_prompts() == ["a cat", "a dog"]
    before = options.cache_key()
    (tmp_path / "prompts.txt").write_text("a bird\n")
    assert options.cache_key() != before
    (tmp_path / "prompts.txt").write_text("\n")
    with pytest.raises(OptionError, match="expected one prompt per line, found an empty file"):
        options.read_prompts()
