"""Small artefacts that many tests read, inputs for them, and exports that do not trace again."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sws_export import ExportOptions, SwsOptions, export
from tests import export_runs
from tests.export_runs import SharedTraces, remove_results

TOKENS = 5
# A graph with the literal guard is exported in half the time of the default and loaded in a quarter.
LITERAL = ExportOptions(sws=SwsOptions(guard="literal"), validate=False)
POOLED = 1280
Inputs = dict[str, Any]


@pytest.fixture(scope="session")
def sws_graph(tmp_path_factory: pytest.TempPathFactory, traced: Path) -> Path:
    """A small UNet with SWS on one grid, height/2 by width/2."""
    return export_runs.shared(tmp_path_factory, "sws.onnx", lambda path: export(traced, path, LITERAL))


@pytest.fixture(scope="session")
def text_graph(tmp_path_factory: pytest.TempPathFactory, traced: Path) -> Path:
    """The same UNet with SWS in its self- and cross-attention."""
    options = ExportOptions(sws=SwsOptions(sites=("*",), guard="literal"), validate=False)
    return export_runs.shared(tmp_path_factory, "sws_text.onnx", lambda path: export(traced, path, options))


@pytest.fixture(scope="session")
def node_graph(tmp_path_factory: pytest.TempPathFactory, traced: Path) -> Path:
    """The same UNet with the preset `comfyui-node`, sigma as input, and debug outputs."""
    sws = SwsOptions(preset="comfyui-node", u="sigma", debug_outputs=True)
    options = ExportOptions(sws=sws, validate=False)
    return export_runs.shared(tmp_path_factory, "node.onnx", lambda path: export(traced, path, options))


@pytest.fixture(scope="session")
def calls_graph(tmp_path_factory: pytest.TempPathFactory, traced: Path) -> Path:
    """The same UNet with the preset `comfyui-node`, which counts its calls, and debug outputs."""
    options = ExportOptions(sws=SwsOptions(preset="comfyui-node", debug_outputs=True), validate=False)
    return export_runs.shared(tmp_path_factory, "calls.onnx", lambda path: export(traced, path, options))


@pytest.fixture(scope="session")
def metrics_graph(tmp_path_factory: pytest.TempPathFactory, random_unet: Path) -> Path:
    """A small UNet with SWS and debug outputs, validated at the export."""
    return export_runs.shared(
        tmp_path_factory,
        "metrics.onnx",
        lambda path: export(
            random_unet, path, ExportOptions(sws=SwsOptions(guard="literal", debug_outputs=True))
        ),
    )


@pytest.fixture(scope="session")
def sdxl_unet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers directory with a small UNet that has the inputs of SDXL."""
    return export_runs.shared(
        tmp_path_factory,
        "sdxl_unet",
        lambda path: export_runs.make_unet(
            path,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=POOLED + 6 * 8,
            use_linear_projection=True,
        ),
    )


@pytest.fixture(scope="session")
def sdxl_graph(tmp_path_factory: pytest.TempPathFactory, sdxl_unet: Path) -> Path:
    """`sdxl_unet` with SWS."""
    return export_runs.shared(
        tmp_path_factory,
        "sdxl.onnx",
        lambda path: export(sdxl_unet, path, LITERAL),
    )


@pytest.fixture
def graph_copy(sws_graph: Path, tmp_path: Path) -> Path:
    """A copy with its manifest, which the test may change."""
    for file in (sws_graph, sws_graph.with_name(sws_graph.name + ".json")):
        shutil.copy(file, tmp_path)
    return tmp_path / sws_graph.name


@pytest.fixture
def edit_manifest(graph_copy: Path) -> Callable[..., Path]:
    """Replace entries of the manifest of `graph_copy`."""

    def edit(**changes: Any) -> Path:
        path = graph_copy.with_name(graph_copy.name + ".json")
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
        return graph_copy

    return edit


@pytest.fixture
def inputs() -> Callable[..., Inputs]:
    """Inputs of a step, determined by number, batch and sizes."""

    def make(
        number: int = 0, batch: int = 2, height: int = 8, width: int = 6, tokens: int = TOKENS
    ) -> Inputs:
        random = np.random.default_rng((number, batch, height, width))
        return {
            "sample": random.standard_normal((batch, 4, height, width), np.float32),
            "timestep": np.linspace(900.0 - 100 * number, 500.0, batch, dtype=np.float32),
            "encoder_hidden_states": random.standard_normal((batch, tokens, 16), np.float32),
            "sigma": np.linspace(9.0, 4.0, batch, dtype=np.float32) / (number + 1),
            "intensity": np.linspace(1.0, 0.6, batch, dtype=np.float32),
        }

    return make


def text_parts(folder: Path) -> tuple[Any, Any]:
    """A tokenizer of single letters and a text encoder of random weights."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    words = {"<|startoftext|>": 0, "<|endoftext|>": 1}
    for letter in "abcdefghijklmnopqrstuvwxyz":
        words |= {letter: len(words), letter + "</w>": len(words) + 1}
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps(words))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=8)
    config = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=8,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return tokenizer, CLIPTextModel(config).eval()


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory: pytest.TempPathFactory, random_unet: Path) -> Path:
    """A Stable Diffusion pipeline directory around `random_unet`."""

    def make(path: Path) -> None:
        import torch
        from diffusers import (
            AutoencoderKL,
            EulerDiscreteScheduler,
            StableDiffusionPipeline,
            UNet2DConditionModel,
        )

        torch.manual_seed(2)
        tokenizer, encoder = text_parts(path.with_name("words"))
        StableDiffusionPipeline(
            vae=AutoencoderKL(latent_channels=4, block_out_channels=(8,), norm_num_groups=4),
            text_encoder=encoder,
            tokenizer=tokenizer,
            unet=UNet2DConditionModel.from_pretrained(random_unet),
            scheduler=EulerDiscreteScheduler(beta_schedule="scaled_linear"),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        ).save_pretrained(path)

    return export_runs.shared(tmp_path_factory, "pipeline", make)


@pytest.fixture(scope="session")
def traces(tmp_path_factory: pytest.TempPathFactory) -> SharedTraces:
    """The traces of UNets that tests have exported with a cache."""
    return SharedTraces(export_runs.shared(tmp_path_factory, "traces", Path.mkdir))


@pytest.fixture(scope="module")
def quick_trace(traces: SharedTraces, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """To the end of the module, a cache for traces: UNets of one configuration are traced once.

    Returns:
        The directory of the cache.
    """
    directory = tmp_path_factory.mktemp("traces")
    with pytest.MonkeyPatch.context() as patch, traces.used_in(directory, patch):
        yield directory


@pytest.fixture(autouse=True)
def _only_traces(request: pytest.FixtureRequest) -> None:
    """Tests with `quick_trace` find no other result of an earlier test in its cache."""
    if "quick_trace" in request.fixturenames:
        remove_results(request.getfixturevalue("quick_trace"))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """An empty directory for artefacts."""
    directory = tmp_path / "out"
    directory.mkdir()
    return directory
