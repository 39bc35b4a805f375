"""Nodes are named after the modules they come from."""

import onnx_ir as ir
import pytest

from graph_passes.name_nodes import NameNodes
from tests.conftest import RunOnnx
from tests.graph_passes.small_models import SiteSpec, build_model, feeds, graph_bytes, op_counts

SCOPES = "pkg.torch.onnx.name_scopes"


def _scoped_model(*scopes: str) -> ir.Model:
    """Nodes without names and with the exporter's metadata; an empty text means none."""
    model = build_model([SiteSpec()])
    for node, note in zip(list(model.graph), scopes, strict=False):
        node.name = "was"
        if note:
            node.metadata_props[SCOPES] = note
    return model


@pytest.mark.parametrize(
    ("scopes", "name"),
    [
        ("['', 'unet', 'unet.mid_block.resnets.0', 'conv_1']", "mid_block.resnets.0/Neg"),
        ("['', 'mid_block.resnets.0', 'conv_1']", "mid_block.resnets.0/Neg"),
        ("['', 'unet', 'add_3']", "root/Neg"),
        ("['', 'add_3']", "root/Neg"),
    ],
)
def test_a_node_is_named_after_its_module(scopes: str, name: str) -> None:
    model = _scoped_model(scopes)
    assert NameNodes()(model).modified
    assert model.graph[0].name == name


def test_nodes_of_one_type_in_one_module_are_numbered() -> None:
    model = build_model([SiteSpec(bias=True)])
    for node in model.graph:
        node.metadata_props[SCOPES] = "['', 'unet', 'unet.mid_block', 'x']"
    NameNodes()(model)
    matmuls = [node.name for node in model.graph if node.op_type == "MatMul"]
    assert matmuls == ["mid_block/MatMul", "mid_block/MatMul_2", "mid_block/MatMul_3", "mid_block/MatMul_4"]
    names = [node.name for node in model.graph]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("scopes", ["", "['lonely']", "[]"])
def test_a_node_without_a_module_keeps_its_name(scopes: str) -> None:
    model = _scoped_model(scopes)
    before = graph_bytes(model)
    assert not NameNodes()(model).modified
    assert graph_bytes(model) == before


def test_only_names_change(run_onnx: RunOnnx) -> None:
    plain = build_model([SiteSpec()])
    named = _scoped_model("['', 'unet', 'unet.mid_block', 'x']", "['', 'unet', 'unet.conv_in', 'y']")
    NameNodes()(named)
    assert op_counts(named) == op_counts(plain)
    expected, found = run_onnx(plain, feeds()), run_onnx(named, feeds())
    assert (found["out_sample"] == expected["out_sample"]).all()


def test_a_second_run_changes_nothing() -> None:
    model = _scoped_model("['', 'unet', 'unet.mid_block', 'x']")
    assert NameNodes()(model).modified
    before = graph_bytes(model)
    assert not NameNodes()(model).modified
    assert graph_bytes(model) == before
