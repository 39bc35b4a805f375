"""Everything that drives an artefact, with one whose cross-attention is shuffled too: states of two kinds."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorrt_rtx as trt
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel

from sws_export.adapters import polygraphy_data
from sws_export.adapters.comfyui import SwsDiffusionModel
from sws_export.adapters.diffusers import SWSUNet
from sws_export.engines import network
from sws_export.engines.backend import BuildOptions
from sws_export.engines.choice import get_backend
from sws_export.engines.graph_check import check_graph
from sws_export.runtime import Session
from sws_export.runtime.contract import read_contract
from sws_export.runtime.session import Stream
from sws_export.runtime.tensorrt_backend import TensorRtBackend
from sws_export.tensors import Range, SizeRanges, shapes_for
from tests import export_runs
from tests.sws_export.adapters.test_comfyui import Sampler, by_hand
from tests.sws_export.adapters.test_diffusers import build, call, draw, vae
from tests.sws_export.runtime.test_tensorrt_backend import FakeLibrary, HostDevice, engine_contract

MakeInputs = Callable[..., dict[str, Any]]
TEXT = "sws_state_text"

__all__ = ["vae"]  # a fixture

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


@pytest.fixture(scope="session")
def session(text_graph: Path) -> Session:
    return Session.load(text_graph, device="cpu", threads=1)


class TestDiffusers:
    @pytest.fixture
    def unet(self, text_graph: Path, random_unet: Path) -> SWSUNet:
        config = UNet2DConditionModel.load_config(random_unet)
        return SWSUNet.load(text_graph, config=config, device="cpu", threads=1)

    def test_intensity_0_gives_the_pictures_of_the_torch_pipeline(
        self, unet: SWSUNet, random_unet: Path, vae: Any
    ) -> None:
        ours = build(StableDiffusionPipeline, vae, None)
        unet.attach(ours)
        theirs = build(StableDiffusionPipeline, vae, UNet2DConditionModel.from_pretrained(random_unet).eval())
        np.testing.assert_allclose(call(ours), call(theirs), rtol=0, atol=1e-3)
        assert unet.session.state()[TEXT].any()

    def test_prompts_of_other_lengths_one_after_the_other(self, unet: SWSUNet, vae: Any) -> None:
        """Each image is what it is alone, whatever was sampled before."""
        pipe = build(StableDiffusionPipeline, vae, None)
        unet.attach(pipe)
        prompts = {
            tokens: {
                "prompt_embeds": draw(1, tokens, 16, seed=tokens),
                "negative_prompt_embeds": draw(1, tokens, 16, seed=tokens + 1),
            }
            for tokens in (5, 12)
        }
        alone = {tokens: call(pipe, intensity=1.0, **given) for tokens, given in prompts.items()}
        for tokens in (12, 5, 5, 12):
            found = call(pipe, intensity=1.0, **prompts[tokens])
            np.testing.assert_allclose(found, alone[tokens], rtol=0, atol=1e-5)
            assert unet.session.state()[TEXT].shape == (2, 145, 1, tokens)
        assert np.abs(call(pipe, intensity=0.0, **prompts[5]) - alone[5]).max() > 1e-4


class TestComfyUi:
    """Conditions may have other numbers of tokens, from each other and from step to step."""

    @pytest.fixture
    def model(self, text_graph: Path) -> SwsDiffusionModel:
        return SwsDiffusionModel.load(text_graph, device="cpu", threads=1)

    def test_conditions_of_two_lengths(self, model: SwsDiffusionModel, session: Session) -> None:
        sampler = Sampler(model, together=False)
        sampler.conds[1] = (sampler.conds[1][0], draw(1, 12, 16, seed=4))
        latent, _ = by_hand(session, sampler)
        for _ in range(2):
            torch.testing.assert_close(sampler.run(), latent, rtol=0, atol=1e-4)

    def test_a_condition_that_grows_on_the_way(
        self, model: SwsDiffusionModel, session: Session, inputs: MakeInputs
    ) -> None:
        stream = session.stream()
        for number, tokens in enumerate((5, 5, 10, 10)):
            step = inputs(number, batch=1, tokens=tokens)
            x, context, sigma = (
                torch.from_numpy(step[name]) for name in ("sample", "encoder_hidden_states", "sigma")
            )
            options = {"sigmas": sigma, "sws_intensity": 1.0}
            found = model(x, torch.tensor([500.0]), context, transformer_options=options)
            expected = stream.step(x, 500.0, context, sigma=sigma, intensity=1.0)
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


class TestTensorRt:
    @pytest.mark.parametrize("cuda_graphs", [False, True])
    def test_the_state_of_the_text_begins_anew_with_other_tokens(
        self, text_graph: Path, tmp_path: Path, inputs: MakeInputs, session: Session, cuda_graphs: bool
    ) -> None:
        device = HostDevice()
        contract = engine_contract(text_graph, tmp_path)
        backend = TensorRtBackend(contract, FakeLibrary(text_graph, device), device, cuda_graphs=cuda_graphs)
        stream, other = Stream(contract, backend), session.stream()
        for number, tokens in enumerate((5, 5, 5, 9, 9, 9, 5, 5)):
            step = inputs(number, tokens=tokens)
            np.testing.assert_allclose(stream.step(**step), other.step(**step), rtol=0, atol=1e-6)
            for name, values in other.state().items():
                np.testing.assert_allclose(stream.state()[name], values, rtol=0, atol=1e-6)

    def test_the_parser_takes_the_graph_and_the_profile(self, traced: Path, tmp_path: Path) -> None:
        from sws_export import ExportOptions, SwsOptions, export

        graph = tmp_path / "sws_text.onnx"
        sws = SwsOptions(sites=("mid_block.*",))
        export(traced, graph, ExportOptions(sws=sws, validate=False, backend="tensorrt-rtx"))
        logger = trt.Logger(trt.Logger.ERROR)
        builder = trt.Builder(logger)
        check_graph(graph, custom_operators=False)
        options = BuildOptions(get_backend("tensorrt-rtx"))
        parsed = network.parse(trt, builder, logger, graph, options)
        names = [parsed.get_input(index).name for index in range(parsed.num_inputs)]
        assert names[-2:] == ["sws_state_d2", TEXT]
        contract = read_contract(graph)
        specs = [*contract.inputs, *(pair.spec for pair in contract.states)]
        sizes = SizeRanges(Range(1, 2, 2), Range(8, 8, 16), Range(8, 8, 16), Range(77, 77, 231))
        shapes = shapes_for(specs, sizes)
        assert shapes[TEXT] == ((1, 145, 1, 77), (2, 145, 1, 77), (2, 145, 1, 231))
        network.check_inputs(parsed, shapes)


def test_polygraphy_feeds_an_empty_state(
    text_graph: Path, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SWS_MANIFEST", f"{text_graph}.json")
    monkeypatch.setenv("SWS_SIZES", "batch=2,height=8,width=6,tokens=9")
    for step in map(dict, polygraphy_data.load_data()):
        assert step[TEXT].shape == (2, 145, 1, 9)
        assert not step.pop(TEXT).any()
        assert not step.pop("sws_state_d2").any()
        assert np.isfinite(session.stream().step(**step)).all()


def test_the_manifest_has_both_grids(session: Session) -> None:
    manifest = session.contract.manifest
    assert {grid: len(names) for grid, names in manifest["sites"].items()} == {"d2": 4, "text": 4}
    assert [pair["grid"] for pair in manifest["states"]] == ["d2", "text"]
    assert "number of text tokens" in manifest["states"][1]["reset"]
    assert [pair.spec.shape for pair in session.contract.states] == [
        ("batch", 145, "height/2", "width/2"),
        ("batch", 145, 1, "tokens"),
    ]


@pytest.mark.usefixtures("quick_trace")
@pytest.mark.parametrize("precision", ["fp16", pytest.param("bf16", marks=pytest.mark.slow)])
def test_low_precision(random_unet: Path, tmp_path: Path, precision: Any) -> None:
    """Validated against the reference; bfloat16 through its float32 copy."""
    from sws_export import ExportOptions, SourceOptions, SwsOptions, export

    report = export(
        random_unet,
        tmp_path / "g.onnx",
        ExportOptions(
            source=SourceOptions(precision=precision),
            sws=SwsOptions(sites=("mid_block.*.attn2",), guard="literal"),
        ),
    )
    assert report.validation is not None
    assert report.validation.passed
    assert [output.name for output in report.validation.outputs] == ["out_sample", f"{TEXT}_out"]


def test_the_graph_for_tensorrt_keeps_the_guard_as_a_plugin_alone(
    traced: Path, tmp_path: Path, text_graph: Path, inputs: MakeInputs
) -> None:
    """The row of the text needs no plugin for its transport; the kept functions compute the same."""
    import onnx_ir as ir

    from graph_passes.guard import GuardOptions
    from graph_passes.parameters import SwsParameters
    from graph_passes.target import TARGETS
    from sws_export.pipeline.rewrite import rewrite
    from sws_export.progress import SilentProgress

    model = ir.load(traced)
    rewrite(model, SwsParameters(), ["*"], GuardOptions("fused"), TARGETS["tensorrt"], SilentProgress())
    kept = [node.op_type for node in model.graph if node.domain == "sws"]
    assert {name: kept.count(name) for name in set(kept)} == {"KeyGuard": 8, "BandedTransport": 4}
    ir.save(model, tmp_path / "kept.onnx")
    steps = [inputs(number, tokens=20) for number in range(3)]
    runs = (export_runs.Session(path).run(steps) for path in (tmp_path / "kept.onnx", text_graph))
    for (one, _), (other, _) in zip(*runs, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5)
