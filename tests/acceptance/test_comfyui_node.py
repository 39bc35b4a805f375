"""`--preset comfyui-node` against the reference: the trained example and small UNets of SD 1.5 and SDXL."""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

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
from tests.acceptance.small_unets import SMALL_UNETS, write_small_unet
from tests.conftest import ShapesOnnx
from tests.export_runs import TRAINED, Array, Outputs, difference, export_once, open_session, shared, trace

STEPS = 5
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
        """Steps from noise to image; samples differ in latent and text."""
        random = np.random.default_rng((batch, tokens))
        fixed = {"encoder_hidden_states": random.standard_normal((batch, tokens, self.text_width))}
        fixed |= {name: random.standard_normal((batch, width)) for name, width in self.added.items()}
        return [
            {
                "sample": random.standard_normal((batch, self.channels, 16, 8)),
                "timestep": np.full(batch, 950.0 - 200.0 * index),
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
    found = open_session(case.graphs[name]).run(steps)
    for (out, state), (expected, kept, _) in zip(found, case.reference(steps, PARAMETERS[name]), strict=True):
        assert difference(out, expected) <= out_limit
        assert state[STATE].shape == (1, tokens, tokens)
        assert difference(state[STATE], kept) <= 1e-5


def peak(unet: UNet2DConditionModel) -> None:
    """Let hidden states differ in how certain their attention is."""
    for path in comfyui_node_sites(unet):
        unet.get_submodule(path.replace("attn2", "norm2")).weight.mul_(4)
        unet.get_submodule(path).to_q.weight.mul_(4)


@pytest.fixture(scope="session")
def make_case(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path, Path, int, int], Case]:
    """The case of a model and its plain graph, exported with each of `PARAMETERS`."""

    def make(model: Path, plain: Path, channels: int, text_width: int) -> Case:
        graphs = {}
        for name, parameters in PARAMETERS.items():
            options = ExportOptions(
                sws=SwsOptions(preset="node", u="sigma", parameters=parameters), validate=False
            )
            graphs[name] = export_once(tmp_path_factory, plain, options)
        return Case(load_unet(open_checkpoint(model), torch.float64), graphs, channels, text_width, {})

    return make


@pytest.fixture(scope="session")
def small_unet(
    make_case: Callable[..., Case], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Case]:
    def make(name: str) -> Case:
        model = shared(tmp_path_factory, f"node_{name}", lambda path: write_small_unet(path, name, peak))
        plain = shared(tmp_path_factory, f"node_{name}.onnx", lambda path: trace(model, path))
        return make_case(model, plain, 4, SMALL_UNETS[name]["cross_attention_dim"])

    return make


@pytest.fixture(scope="session")
def sd15(small_unet: Callable[[str], Case]) -> Case:
    """As in SD 1.5 the text is wider than the first levels' hidden states and narrower than the last's."""
    return small_unet("sd15")


@pytest.fixture(scope="session")
def sdxl(small_unet: Callable[[str], Case]) -> Case:
    """As in SDXL the text is the widest, blocks are deep, projections linear, and sizes are an input."""
    return dataclasses.replace(small_unet("sdxl"), added={"text_embeds": 1280, "time_ids": 6})


@pytest.fixture(scope="session")
def trained(make_case: Callable[..., Case], shapes_onnx: ShapesOnnx) -> Case:
    """The trained example: text of the width of the finer sites, and narrower than the coarser."""
    return make_case(TRAINED, shapes_onnx("fp32"), 3, 64)


CASES = ["trained", "sd15", "sdxl"]


@pytest.mark.parametrize(
    ("case", "name", "batch", "tokens"),
    # Each batch size and text length with both budgets: in one row, and 64 on 8 x 8.
    [
        ("trained", "free", 1, 231),
        ("trained", "tight", 2, 77),
        ("trained", "free", 3, 64),
        ("trained", "tight", 2, 154),
        ("sd15", "free", 2, 77),
        ("sd15", "tight", 3, 64),
        ("sdxl", "free", 2, 154),
        ("sdxl", "tight", 1, 231),
    ],
)
def test_steps_equal_the_reference(
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
    assert len(shares["tight"]) > 10
    assert min(shares["free"]) > 0.999
    # Many searches end somewhere in between, neither at nothing nor at the limit.
    assert np.mean([0.02 < share < 0.98 for share in shares["tight"]]) > 0.5


@pytest.mark.parametrize("case", ["sd15", "sdxl"])
def test_text_width_is_between_or_above_the_channels(request: pytest.FixtureRequest, case: str) -> None:
    found: Case = request.getfixturevalue(case)
    widths = {found.unet.get_submodule(path).to_q.in_features for path in comfyui_node_sites(found.unet)}
    narrower, wider = min(widths) < found.text_width, max(widths) > found.text_width
    assert (narrower, wider) == (True, case == "sd15")


def test_float16_equals_the_reference(export_trained: ExportTrained, trained: Case) -> None:
    graph = export_trained("fp16", preset="node", u="sigma")
    compare(dataclasses.replace(trained, graphs={"free": graph}), "free", 2, 77, out_limit=5e-3)


def test_bfloat16_is_validated_in_float32(random_unet: Path, tmp_path: Path) -> None:
    report = export(
        random_unet,
        tmp_path / "node.onnx",
        ExportOptions(
            sws=SwsOptions(preset="node", sites=("mid_block.*",)), source=SourceOptions(precision="bf16")
        ),
    )
    assert report.validation is not None
    assert report.validation.passed
    assert {spec["dtype"] for spec in report.manifest["inputs"]} == {"float32", "bfloat16"}


def test_one_noise_level_and_intensity_for_a_batch(trained: Case) -> None:
    """Those of the first sample: the others are ignored."""
    steps = trained.steps(2, 7)[2:4]
    others = [
        inputs | {"sigma": inputs["sigma"] * [1, 0.1], "intensity": inputs["intensity"] * [1, 0]}
        for inputs in steps
    ]
    session = open_session(trained.graphs["free"])
    for (out, state), (same, kept) in zip(session.run(steps), session.run(others), strict=True):
        assert np.array_equal(out, same)
        assert np.array_equal(state[STATE], kept[STATE])


def test_a_picture_depends_on_its_batch(trained: Case) -> None:
    steps, session = trained.steps(2, 7)[2:3], open_session(trained.graphs["free"])
    ((together, _),) = session.run(steps)
    alone = [{name: values[:1] for name, values in inputs.items()} for inputs in steps]
    ((single, _),) = session.run(alone)
    assert difference(together[:1], single) > 1e-6


def test_the_state_carries_over(trained: Case) -> None:
    steps, session = trained.steps(2, 64), open_session(trained.graphs["free"])
    (_, state), (fed_back, _) = list(session.run(steps[1:3]))
    forgotten, _ = session.step(steps[2], session.zero_state(steps[4]))
    assert difference(forgotten, fed_back) > 1e-7
    np.testing.assert_allclose(state[STATE].sum(axis=1), 1.0, atol=1e-5)


@pytest.mark.parametrize("sigma", [1e-4, 0.28, 25.0, 1e4])
def test_where_nothing_is_mixed_the_state_stays(trained: Case, sigma: float) -> None:
    session = open_session(trained.graphs["free"])
    ((_, state),) = session.run(trained.steps(2, 7)[2:3])
    step = trained.steps(2, 7)[2] | {"sigma": np.full(2, sigma)}
    out, kept = session.step(step, state)
    assert np.isfinite(out).all()
    assert np.array_equal(kept[STATE], state[STATE])
    assert not session.step(step, session.zero_state(step))[1][STATE].any()


def test_an_engine_takes_any_text_length(traced: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    options = ExportOptions(
        sws=SwsOptions(preset="node", sites=("mid_block.*",)),
        sizes=SizeOptions(height="16", width="16", tokens="7:77:231", vae_scale=1),
        engine=EngineOptions(compute_capabilities=("8.9",), optimization_level=0),
        validate=False,
        backend="tensorrt-rtx",
    )
    report = export(traced, tmp_path / "node.plan", options)
    assert report.engine is not None
    assert report.manifest["profiles"][0][STATE] == {
        "min": [1, 7, 7],
        "opt": [1, 77, 77],
        "max": [1, 231, 231],
    }
