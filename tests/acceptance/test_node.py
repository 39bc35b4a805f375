"""`--preset node` over ten steps against the reference: the trained example, twins of SD 1.5 and SDXL."""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel

from graph_passes.parameters import SwsParameters
from sws_export import EngineOptions, ExportOptions, SizeOptions, SourceOptions, SwsOptions, export
from sws_export.checkpoint import open_checkpoint
from sws_export.checkpoint.unet_module import load_unet, unet_arguments
from sws_export.reference import ComfyUINodeReferenceUNet, comfyui_node_sites
from sws_export.reference.attention import SiteResult
from tests.acceptance.conftest import ExportTrained
from tests.export_runs import TRAINED, Array, Outputs, Session, difference

STEPS = 10
DEFAULT = SwsParameters()
# A radius of 1 moves attention little: with the node's own budget no bisection binds.
TIGHT = SwsParameters(kl_floor=2e-6, kl_slope=0.0)
PARAMETERS = {"free": DEFAULT, "tight": TIGHT}
STATE = "sws_state_text"


@dataclasses.dataclass(frozen=True)
class Case:
    """A UNet, graphs of it, and the inputs of a step.

    Attributes:
        unet: In float64.
        graphs: By the names of `PARAMETERS`.
        channels: Of the latent.
        text_width: Of the text.
        added: SDXL's further inputs, by their widths.
    """

    unet: UNet2DConditionModel
    graphs: dict[str, Path]
    channels: int
    text_width: int
    added: dict[str, int]

    def steps(self, batch: int, tokens: int) -> list[Outputs]:
        """Ten steps from noise to picture; members differ in latent and text."""
        random = np.random.default_rng((batch, tokens))
        fixed = {"encoder_hidden_states": random.standard_normal((batch, tokens, self.text_width))}
        fixed |= {name: random.standard_normal((batch, width)) for name, width in self.added.items()}
        return [
            {
                "sample": random.standard_normal((batch, self.channels, 16, 8)),
                "timestep": np.full(batch, 950.0 - 100.0 * index),
                "sigma": np.full(batch, sigma),
                "intensity": np.full(batch, 0.9),
                **fixed,
            }
            for index, sigma in enumerate(np.geomspace(20.0, 0.35, STEPS))
        ]

    def reference(
        self, steps: list[Outputs], parameters: SwsParameters
    ) -> Iterator[tuple[Array, Array, dict[str, SiteResult]]]:
        """Prediction, state and what the sites did, step by step."""
        reference, state = ComfyUINodeReferenceUNet(self.unet, parameters), None
        for inputs in steps:
            tensors = {name: torch.from_numpy(values) for name, values in inputs.items()}
            out, state = reference.step(**unet_arguments(tensors), state=state)
            yield out.numpy(), state[STATE].numpy(), dict(reference.records)


def compare(case: Case, name: str, batch: int, tokens: int, out_limit: float = 2e-4) -> None:
    steps = case.steps(batch, tokens)
    found = Session(case.graphs[name]).run(steps)
    for (out, state), (expected, kept, _) in zip(found, case.reference(steps, PARAMETERS[name]), strict=True):
        assert difference(out, expected) <= out_limit
        assert state[STATE].shape == (1, tokens, tokens)
        assert difference(state[STATE], kept) <= 1e-5


def twin(directory: Path, text_width: int, **changes: Any) -> Case:
    """A UNet of random weights whose hidden states differ in how certain their attention is."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        **{
            "sample_size": 16,
            "block_out_channels": (16, 32, 64),
            "layers_per_block": 1,
            "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
            "cross_attention_dim": text_width,
            "attention_head_dim": 2,
            "norm_num_groups": 8,
            **changes,
        }
    ).eval()
    with torch.no_grad():
        for path in comfyui_node_sites(unet):
            unet.get_submodule(path.replace("attn2", "norm2")).weight.mul_(4)
            unet.get_submodule(path).to_q.weight.mul_(4)
    unet.save_pretrained(directory / "unet")
    graphs = {}
    for name, parameters in PARAMETERS.items():
        graphs[name] = directory / f"{name}.onnx"
        options = ExportOptions(sws=SwsOptions(preset="node", parameters=parameters), validate=False)
        export(directory / "unet", graphs[name], options)
    return Case(unet.double(), graphs, 4, text_width, {})


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """The tensors here are small: threads of torch would wait for each other most of the time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def sd15(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """As in SD 1.5 the text is wider than the first levels' hidden states and narrower than the last's."""
    return twin(tmp_path_factory.mktemp("sd15"), 48)


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """As in SDXL the text is the widest, blocks are deep, projections linear, and sizes are an input."""
    case = twin(
        tmp_path_factory.mktemp("sdxl"),
        96,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 3),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=1280 + 6 * 8,
    )
    return dataclasses.replace(case, added={"text_embeds": 1280, "time_ids": 6})


@pytest.fixture(scope="module")
def trained(export_trained: ExportTrained) -> Case:
    """The trained example: text of the width of the finer sites, and narrower than the coarser."""
    graphs = {
        name: export_trained(ExportOptions(sws=SwsOptions(preset="node", parameters=parameters)))
        for name, parameters in PARAMETERS.items()
    }
    return Case(load_unet(open_checkpoint(TRAINED), torch.float64), graphs, 3, 64, {})


CASES = ["trained", "sd15", "sdxl"]
# Each batch and each length of the text: in one row, and 64 on 8 x 8.
SIZES = [(1, 231), (2, 77), (3, 64), (2, 154)]


@pytest.mark.parametrize(("batch", "tokens"), SIZES)
@pytest.mark.parametrize("name", PARAMETERS)
@pytest.mark.parametrize("case", CASES)
def test_ten_steps_equal_the_reference(
    request: pytest.FixtureRequest, case: str, name: str, batch: int, tokens: int
) -> None:
    compare(request.getfixturevalue(case), name, batch, tokens)


@pytest.mark.parametrize("case", CASES)
def test_the_tight_budget_binds_and_the_free_one_does_not(request: pytest.FixtureRequest, case: str) -> None:
    found: Case = request.getfixturevalue(case)
    shares: dict[str, list[float]] = {}
    for name, parameters in PARAMETERS.items():
        shares[name] = []
        for _, _, records in found.reference(found.steps(2, 12), parameters):
            for record in records.values():
                free = parameters.key_cap * record.amplitude * (1 - 2.0**-parameters.bisection_steps)
                if record.alpha_k[0] > 0:
                    shares[name].append(float(record.alpha_k[0] / free[0]))
    assert len(shares["tight"]) > 20
    assert min(shares["free"]) > 0.999
    # Many searches end somewhere in between, neither at nothing nor at the limit.
    assert np.mean([0.02 < share < 0.98 for share in shares["tight"]]) > 0.5


@pytest.mark.parametrize("case", ["sd15", "sdxl"])
def test_the_twins_have_text_on_the_side_that_they_shall(request: pytest.FixtureRequest, case: str) -> None:
    found: Case = request.getfixturevalue(case)
    widths = {found.unet.get_submodule(path).to_q.in_features for path in comfyui_node_sites(found.unet)}
    narrower, wider = min(widths) < found.text_width, max(widths) > found.text_width
    assert (narrower, wider) == (True, case == "sd15")


def test_float16_equals_the_reference(export_trained: ExportTrained, trained: Case) -> None:
    graph = export_trained(
        ExportOptions(sws=SwsOptions(preset="node"), source=SourceOptions(precision="fp16"))
    )
    compare(dataclasses.replace(trained, graphs={"free": graph}), "free", 2, 77, out_limit=2e-2)


def test_bfloat16_is_validated_by_its_float32_twin(tmp_path: Path) -> None:
    report = export(
        TRAINED,
        tmp_path / "node.onnx",
        ExportOptions(sws=SwsOptions(preset="node"), source=SourceOptions(precision="bf16")),
    )
    assert report.validation is not None
    assert report.validation.passed
    assert {spec["dtype"] for spec in report.manifest["inputs"]} == {"float32", "bfloat16"}


def test_one_noise_level_and_intensity_for_a_batch(trained: Case) -> None:
    """Those of the first sample: what the others say is not looked at."""
    steps = trained.steps(2, 7)[4:6]
    others = [
        inputs | {"sigma": inputs["sigma"] * [1, 0.1], "intensity": inputs["intensity"] * [1, 0]}
        for inputs in steps
    ]
    session = Session(trained.graphs["free"])
    for (out, state), (same, kept) in zip(session.run(steps), session.run(others), strict=True):
        assert np.array_equal(out, same)
        assert np.array_equal(state[STATE], kept[STATE])


def test_a_picture_depends_on_its_batch(trained: Case) -> None:
    steps, session = trained.steps(2, 7)[4:5], Session(trained.graphs["free"])
    ((together, _),) = session.run(steps)
    alone = [{name: values[:1] for name, values in inputs.items()} for inputs in steps]
    ((single, _),) = session.run(alone)
    assert difference(together[:1], single) > 1e-6


def test_the_state_carries_over(trained: Case) -> None:
    steps, session = trained.steps(2, 64), Session(trained.graphs["free"])
    (_, state), (fed_back, _) = list(session.run(steps[3:5]))
    forgotten, _ = session.step(steps[4], session.zero_state(steps[4]))
    assert difference(forgotten, fed_back) > 1e-7
    np.testing.assert_allclose(state[STATE].sum(axis=1), 1.0, atol=1e-5)


@pytest.mark.parametrize("sigma", [1e-4, 0.28, 25.0, 1e4])
def test_where_nothing_is_mixed_the_state_stays(trained: Case, sigma: float) -> None:
    session = Session(trained.graphs["free"])
    ((_, state),) = session.run(trained.steps(2, 7)[4:5])
    step = trained.steps(2, 7)[4] | {"sigma": np.full(2, sigma)}
    out, kept = session.step(step, state)
    assert np.isfinite(out).all()
    assert np.array_equal(kept[STATE], state[STATE])
    assert not session.step(step, session.zero_state(step))[1][STATE].any()


def test_an_engine_takes_any_text_length(export_trained: Callable[..., Path], tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    options = ExportOptions(
        sws=SwsOptions(preset="node"),
        source=SourceOptions(precision="fp16"),
        sizes=SizeOptions(tokens="7:77:231", vae_scale=1),
        engine=EngineOptions(compute_capabilities=("8.9",)),
        validate=False,
        backend="tensorrt-rtx",
    )
    report = export(TRAINED, tmp_path / "node.plan", options)
    assert report.engine is not None
    assert report.manifest["profile"][STATE] == {"min": [1, 7, 7], "opt": [1, 77, 77], "max": [1, 231, 231]}
