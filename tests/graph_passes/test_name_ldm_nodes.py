"""Names of ComfyUI's graphs as diffusers' module paths."""

import onnx_ir as ir

from graph_passes.find_sites import count_levels
from graph_passes.name_ldm_nodes import NameLdmNodes

# Two levels of two blocks each; names as torch 2.13 writes them, and with the repetition of older versions.
NAMES = {
    "/unet/input_blocks.0.0/Conv": "down_blocks.0.resnets.0/Conv",
    "/unet/input_blocks.1.0/in_layers/in_layers.2/Conv": "down_blocks.0.resnets.0.in_layers.in_layers.2/Conv",
    "/input_blocks.2/input_blocks.2.1/transformer_blocks.0/attn1/Softmax": (
        "down_blocks.0.attentions.1.transformer_blocks.0.attn1/Softmax"
    ),
    "/unet/input_blocks.3.0/op/Conv": "down_blocks.0.downsamplers.0.op/Conv",
    "/unet/input_blocks.4.0/Add": "down_blocks.1.resnets.0/Add",
    "/unet/input_blocks.5.1/transformer_blocks.1/attn2/MatMul": (
        "down_blocks.1.attentions.1.transformer_blocks.1.attn2/MatMul"
    ),
    "/unet/middle_block.1/transformer_blocks.0/attn1/MatMul": (
        "mid_block.attentions.0.transformer_blocks.0.attn1/MatMul"
    ),
    "/unet/middle_block.2/Add": "mid_block.resnets.1/Add",
    "/unet/output_blocks.2.1/transformer_blocks.0/attn1/MatMul": (
        "up_blocks.0.attentions.2.transformer_blocks.0.attn1/MatMul"
    ),
    "/unet/output_blocks.2.2/Resize": "up_blocks.0.upsamplers.2/Resize",
    "/unet/output_blocks.3.1/transformer_blocks.0/attn1/MatMul": (
        "up_blocks.1.attentions.0.transformer_blocks.0.attn1/MatMul"
    ),
    "/unet/out/out.2/Conv": "/unet/out/out.2/Conv",
}


def named(names: list[str]) -> ir.Model:
    nodes = [ir.node(name.rpartition("/")[2], [], name=name) for name in names]
    return ir.Model(ir.Graph([], [], nodes=nodes, opset_imports={"": 23}), ir_version=10)


def test_names_are_those_of_diffusers() -> None:
    model = named(list(NAMES))
    assert NameLdmNodes()(model).modified
    assert {old: node.name for old, node in zip(NAMES, model.graph, strict=True)} == NAMES
    assert count_levels(model) == 2


def test_other_names_stay() -> None:
    names = ["/down_blocks.1/attentions.0/attn1/MatMul", "/input_blocks/MatMul"]
    model = named(names)
    assert not NameLdmNodes()(model).modified
    assert [node.name for node in model.graph] == names
