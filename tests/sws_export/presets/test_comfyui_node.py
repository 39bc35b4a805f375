"""`--preset comfyui-node` on graphs: its sites, its bases, and graphs that it refuses."""

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from graph_passes.grids import TEXT
from graph_passes.guard import GuardOptions
from graph_passes.parameters import SwsParameters
from graph_passes.target import TARGETS
from sws_export import ExportOptions, SwsOptions, export
from sws_export.errors import ExportError, OptionError, ValidationError
from sws_export.onnx_files import graph_specs
from sws_export.pipeline.rewrite import RewriteReport, rewrite
from sws_export.presets import preset_named
from sws_export.progress import SilentProgress
from sws_export.reference.orthonormal_basis import orthonormal_basis
from sws_export.tensors import TensorSpec

DOWN, MID, UP, SECOND_UP = (
    f"{block}.transformer_blocks.0.attn2"
    for block in (
        "down_blocks.1.attentions.0",
        "mid_block.attentions.0",
        "up_blocks.0.attentions.0",
        "up_blocks.0.attentions.1",
    )
)


def rewritten(model: ir.Model, *patterns: str) -> RewriteReport:
    target, preset = TARGETS["tensorrt-rtx"], preset_named("comfyui-node")
    return rewrite(model, SwsParameters(), patterns, GuardOptions(), target, SilentProgress(), preset=preset)


def attention(model: ir.Model, name: str) -> ir.Node:
    return next(node for node in model.graph if node.op_type == "Attention" and name in str(node.name))


def test_all_cross_attention_by_default(traced: Path) -> None:
    model = ir.load(traced)
    report = rewritten(model)
    assert report.preset.name == "comfyui-node"
    assert report.sites == {TEXT: (DOWN, MID, UP, SECOND_UP)}
    assert [(pair.input, pair.output) for pair in report.states] == [
        ("sws_state_text", "sws_state_text_out"),
        ("calls", "calls_out"),
    ]
    assert {site.reason for site in report.skipped} == {"the node leaves self-attention alone"}
    assert graph_specs(model.graph.inputs)[-3:] == (
        TensorSpec("calls", "float32", (1,)),
        TensorSpec("intensity", "float32", ("batch",)),
        TensorSpec("sws_state_text", "float32", (1, "tokens", "tokens")),
    )


def test_its_bases_are_torchs(traced: Path) -> None:
    """The hidden states have 64 channels, the text 16."""
    model = ir.load(traced)
    rewritten(model)
    found = [
        value.const_value.numpy()
        for value in model.graph.initializers.values()
        if value.const_value is not None and tuple(value.const_value.shape) == (16, 64)
        if value.const_value.dtype == ir.DataType.FLOAT
    ]
    assert any(np.array_equal(array, orthonormal_basis(64, 16).numpy().T) for array in found)


def test_a_pattern_selects_among_cross_attention(traced: Path) -> None:
    report = rewritten(ir.load(traced), "mid_block.*", "up_blocks.*")
    assert report.site_names == (MID, UP, SECOND_UP)
    assert [site.name for site in report.skipped if site.reason == "not selected by --sites"] == [DOWN]


def test_a_pattern_of_self_attention_alone(traced: Path) -> None:
    with pytest.raises(OptionError, match=r"--sites '\*attn1' matches no attention site; there are down"):
        rewritten(ir.load(traced), "*attn1")


def test_a_site_that_cannot_be_taken_is_named(traced: Path) -> None:
    model = ir.load(traced)
    attention(model, UP).attributes["is_causal"] = ir.AttrInt64("is_causal", 1)
    with pytest.raises(
        ExportError, match=rf"--preset comfyui-node cannot take the attention site {UP}: it is causal"
    ):
        rewritten(model)
    # Left out by name it is in nobody's way.
    assert rewritten(model, "mid_block.*").site_names == (MID,)


def test_self_attention_that_cannot_be_taken_is_in_nobodys_way(traced: Path) -> None:
    model = ir.load(traced)
    attention(model, UP.replace("attn2", "attn1")).attributes["is_causal"] = ir.AttrInt64("is_causal", 1)
    assert len(rewritten(model).site_names) == 4


def test_a_projection_with_a_bias_is_named(traced: Path) -> None:
    model = ir.load(traced)
    node = attention(model, MID)
    projected = node.inputs[1].producer().inputs[0].producer().inputs[0]
    bias = ir.Value(
        name="bias",
        type=ir.TensorType(ir.DataType.FLOAT),
        shape=ir.Shape([64]),
        const_value=ir.tensor(np.ones(64, np.float32), name="bias"),
    )
    model.graph.register_initializer(bias)
    add = ir.node("Add", [projected, bias], name="bias/Add")
    add.outputs[0].name = "biased"
    add.outputs[0].type, add.outputs[0].shape = projected.type, projected.shape
    model.graph.insert_after(projected.producer(), add)
    node.inputs[1].producer().inputs[0].producer().replace_input_with(0, add.outputs[0])
    with pytest.raises(
        ExportError, match=rf"^{MID}: the tensor that its keys are projected from was not found"
    ):
        rewritten(model)


def test_a_plain_graph_becomes_the_node_too(traced: Path, tmp_path: Path) -> None:
    """Without the checkpoint, what is compared is the plain UNet, which the node is at sigma_max only."""
    sws = SwsOptions(preset="comfyui-node", u="sigma")
    report = export(traced, tmp_path / "node.onnx", ExportOptions(sws=sws))
    assert report.validation is not None
    assert report.validation.reference == "plain graph, at intensity 0 and sigma 25"
    assert report.validation.passed
    assert report.manifest["preset"] == "comfyui-node"


def test_counting_calls_it_never_is_the_plain_graph(traced: Path, tmp_path: Path) -> None:
    options = ExportOptions(sws=SwsOptions(preset="comfyui-node"))
    with pytest.raises(ValidationError, match=r"--u calls a graph never equals the plain one, .* --u sigma"):
        export(traced, tmp_path / "node.onnx", options)
    assert not list(tmp_path.iterdir())
