"""Sites of a rewrite, its messages, and the graphs that it refuses."""

from pathlib import Path

import onnx_ir as ir
import pytest

from graph_passes.grids import TEXT, Grid
from graph_passes.guard import GuardOptions
from graph_passes.insert_sws import StatePair
from graph_passes.parameters import SwsParameters
from graph_passes.target import TARGETS
from sws_export.errors import ExportError, OptionError
from sws_export.onnx_files import graph_specs
from sws_export.pipeline.rewrite import RewriteReport, describe_sites, rewrite
from sws_export.progress import SilentProgress
from sws_export.tensors import TensorSpec

DOWN, MID, UP = (
    f"{block}.attentions.0.transformer_blocks.0.attn1"
    for block in ("down_blocks.1", "mid_block", "up_blocks.0")
)
SECOND_UP = UP.replace("attentions.0", "attentions.1")


class Listener(SilentProgress):
    """Records messages."""

    def __init__(self) -> None:
        self.remarks: list[str] = []

    def log(self, message: str) -> None:
        self.remarks.append(message)


def rewritten(traced: Path, *patterns: str) -> tuple[ir.Model, RewriteReport, list[str]]:
    model, progress = ir.load(traced), Listener()
    report = rewrite(model, SwsParameters(), patterns, GuardOptions(), TARGETS["tensorrt-rtx"], progress)
    return model, report, progress.remarks


def test_all_self_attention_by_default(traced: Path) -> None:
    model, report, remarks = rewritten(traced)
    assert report.sites == {Grid(2): (DOWN, MID, UP, SECOND_UP)}
    assert report.states == (StatePair("sws_state_d2", "sws_state_d2_out", Grid(2)),)
    assert report.nodes == len(model.graph)
    assert len(report.skipped) == 4
    assert {site.reason.split(":")[0] for site in report.skipped} == {"cross-attention"}
    assert remarks == [*describe_sites(report), "key guard: literal, all of the query rows"]
    assert remarks[0].startswith("SWS at 4 sites, latent/2: down_blocks.1.attentions.0.*.attn1, mid_block")
    assert remarks[1].startswith("skipped 4, cross-attention")


def test_a_pattern_selects(traced: Path) -> None:
    model, report, remarks = rewritten(traced, "up_blocks.*.attentions.1.*attn1", "mid_block.*attn1")
    assert report.site_names == (MID, SECOND_UP)
    deselected = [site.name for site in report.skipped if site.reason == "not selected by --sites"]
    cross = [name.replace("attn1", "attn2") for name in (DOWN, MID, UP, SECOND_UP)]
    assert sorted(deselected) == sorted([DOWN, UP, *cross])
    assert any(line.startswith("skipped 6, not selected by --sites: ") for line in remarks)
    assert [value.name for value in model.graph.inputs][-1] == "sws_state_d2"


def test_a_pattern_that_matches_nothing(traced: Path) -> None:
    with pytest.raises(
        OptionError, match=r"--sites 'down_blocks\.0\.\*' matches no attention site; there are down"
    ):
        rewritten(traced, "mid_block.*", "down_blocks.0.*")


def test_a_pattern_selects_cross_attention(traced: Path) -> None:
    model, report, remarks = rewritten(traced, "mid_block.*", "up_blocks.*.attn2")
    cross = tuple(name.replace("attn1", "attn2") for name in (MID, UP, SECOND_UP))
    assert report.sites == {Grid(2): (MID,), TEXT: cross}
    assert [(pair.input, pair.output) for pair in report.states] == [
        ("sws_state_d2", "sws_state_d2_out"),
        ("sws_state_text", "sws_state_text_out"),
    ]
    assert graph_specs(model.graph.inputs)[-1] == TensorSpec(
        "sws_state_text", "float32", ("batch", 145, 1, "tokens")
    )
    assert remarks[1].startswith(
        "SWS at 3 sites, cross-attention to the text: mid_block.attentions.0.*.attn2"
    )


def test_cross_attention_alone(traced: Path) -> None:
    model, report, _ = rewritten(traced, "*.attn2")
    assert list(report.sites) == [TEXT]
    assert [value.name for value in model.graph.outputs] == ["out_sample", "sws_state_text_out"]


def test_a_graph_with_sws_is_refused(traced: Path) -> None:
    model, _, _ = rewritten(traced, "mid_block.*attn1")
    with pytest.raises(ExportError, match="SWS"):
        rewrite(model, SwsParameters(), (), GuardOptions(), TARGETS["tensorrt-rtx"], SilentProgress())


def test_reasons_are_counted_if_no_site_remains(traced: Path) -> None:
    model = ir.load(traced)
    for node in model.graph:
        if node.op_type == "Attention":
            node.attributes["is_causal"] = ir.AttrInt64("is_causal", 1)
    with pytest.raises(ExportError, match=r"no attention site that SWS can take: 8 × it is causal"):
        rewrite(model, SwsParameters(), (), GuardOptions(), TARGETS["tensorrt-rtx"], SilentProgress())


def test_specs_of_a_graph(traced: Path) -> None:
    model, _, _ = rewritten(traced)
    assert graph_specs(model.graph.inputs)[-1] == TensorSpec(
        "sws_state_d2", "float32", ("batch", 145, "height/2", "width/2")
    )
    model.graph.inputs[0].shape = None
    with pytest.raises(
        ExportError, match="input or output sample of the graph has no declared type and shape"
    ):
        graph_specs(model.graph.inputs)
