"""Scaled-down UNets of the families: both layouts, validation, and the parser of TensorRT for RTX."""

from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest

from examples.make_checkpoint import family_config, small_config, write_checkpoint
from sws_export import ExportOptions, SizeOptions, SourceOptions, SwsOptions, export
from sws_export.checkpoint.families import FAMILIES, Family
from sws_export.checkpoint.unet_io import size_multiple
from sws_export.engines import network as steps
from sws_export.engines.backend import BuildOptions
from sws_export.engines.choice import get_backend
from sws_export.manifest import METADATA_KEY, tensor_specs
from sws_export.tensors import ProfileShapes, shapes_for


def families(*names: str) -> pytest.MarkDecorator:
    """All families of the table. Those not named have similar topologies and are slow tests."""
    cases = [
        pytest.param(family, marks=() if family.name in names else pytest.mark.slow) for family in FAMILIES
    ]
    return pytest.mark.parametrize("family", cases, ids=[family.name for family in FAMILIES])


SIDE = "256:512:512"


def one_site_of_each_block(config: dict[str, Any]) -> tuple[str, ...]:
    """Patterns for one site each of the down blocks, the up blocks and, if it attends, the middle block."""
    blocks = ["down_blocks.2", "up_blocks.1"]
    if config.get("mid_block_type") == "UNetMidBlock2DCrossAttn":
        blocks.append("mid_block")
    return tuple(f"{block}.attentions.0.transformer_blocks.0.attn1" for block in blocks)


def parsed_layers(graph: Path, shapes: ProfileShapes) -> int:
    """The number of layers that the parser of TensorRT for RTX makes of a graph."""
    trt = pytest.importorskip("tensorrt_rtx")
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = steps.parse(trt, builder, logger, graph, BuildOptions(get_backend("tensorrt-rtx")))
    steps.check_inputs(network, shapes)
    return int(network.num_layers)


@families(
    # Class labels and linear projections; asymmetric depth with pooled text and guidance embedding; three
    # levels without a middle block.
    *("SD 2.1 unCLIP (ViT-L)", "SSD-1B LCM", "BK-SDM tiny / tiny-sd"),
)
def test_a_small_unet_is_validated_and_parsed(family: Family, tmp_path: Path) -> None:
    config = small_config(family.config())
    if family.name == "SD 2.1 unCLIP (ViT-L)":
        # The embedding of the class is the point; unCLIP (ViT-H) has the layers, as a slow test.
        config["layers_per_block"] = 1
    write_checkpoint(tmp_path / "unet", config, dtype="fp32")
    options = ExportOptions(
        backend="tensorrt-rtx",
        source=SourceOptions(precision="fp16"),
        # Families differ in topology, not in their guard or in further attentions of a block.
        sws=SwsOptions(sites=one_site_of_each_block(config), guard="literal"),
    )
    report = export(tmp_path / "unet", tmp_path / "graph.onnx", options)
    assert report.validation is not None
    assert report.validation.passed
    assert report.validation.reference == "eager reference in float64"
    sizes = SizeOptions(vae_scale=8, batch="1:2:2", height=SIDE, width=SIDE, tokens="1:77:77")
    (profile,) = sizes.engine_profiles(config, size_multiple(config), None)
    shapes = shapes_for(tensor_specs(report.manifest["inputs"]), profile)
    assert parsed_layers(tmp_path / "graph.onnx", shapes) > 100
    found = {spec["name"] for spec in report.manifest["inputs"]}
    structure = family.structure
    expected = {"sample", "timestep", "encoder_hidden_states", "sigma", "intensity"}
    expected |= {"text_embeds", "time_ids"} if structure.addition else set()
    expected |= {"timestep_cond"} if structure.time_cond else set()
    expected |= {"class_labels"} if structure.class_projection else set()
    assert {name for name in found if not name.startswith("sws_state_")} == expected
    assert report.manifest["states"]
    assert sum(map(len, report.manifest["sites"].values())) == len(options.sws.sites)
    channels = {
        spec["name"]: spec["shape"][1] for spec in report.manifest["inputs"] if spec["name"] == "sample"
    }
    assert channels == {"sample": structure.in_channels}


@families("BK-SDM tiny / tiny-sd")
def test_both_layouts_make_the_same_graph(family: Family, tmp_path: Path) -> None:
    config = small_config(family.config())
    write_checkpoint(tmp_path / "unet", config, dtype="fp32")
    ldm = write_checkpoint(tmp_path / "original.safetensors", config, layout="ldm", dtype="fp32")
    plain = ExportOptions(
        sws=SwsOptions(plain=True),
        source=SourceOptions(config=tmp_path / "unet" / "config.json"),
        validate=False,
    )
    graphs = []
    for source, layout in ((tmp_path / "unet", "diffusers"), (ldm, "ldm")):
        report = export(source, tmp_path / f"{layout}.onnx", plain)
        assert report.manifest["source"]["layout"] == layout
        model = ir.load(tmp_path / f"{layout}.onnx")
        # Only the manifest's source differs.
        del model.metadata_props[METADATA_KEY]
        graphs.append(ir.to_proto(model).SerializeToString(deterministic=True))
    assert graphs[0] == graphs[1]


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_full_size_reaches_a_plan_in_little_memory(family: str, tmp_path: Path) -> None:
    """In float16, as in benchmarks/README.md: everything before the build in 1.3 times the weights."""
    write_checkpoint(tmp_path / "unet", family_config(family), dtype="fp16")
    report = export(
        tmp_path / "unet", tmp_path / "e.plan", ExportOptions(sizes=SizeOptions(batch="1:1:2"), cache=False)
    )
    assert report.validation is not None
    assert report.validation.passed
    weights = (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").stat().st_size
    for timing in report.stages:
        if timing.name != "build":
            assert timing.peak_memory <= 1.3 * weights, timing
    assert (tmp_path / "e.plan").stat().st_size == pytest.approx(report.preflight.engine_size, rel=0.05)
