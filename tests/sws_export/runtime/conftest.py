"""One SWS graph with its manifest, and inputs for it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sws_export import ExportOptions, export
from tests import road

TOKENS = 5
POOLED = 1280
Inputs = dict[str, Any]


@pytest.fixture(scope="session")
def sws_graph(tmp_path_factory: pytest.TempPathFactory, traced: Path) -> Path:
    """A small UNet with SWS on one grid, height/2 by width/2; not to be changed."""
    return road.shared(
        tmp_path_factory, "sws.onnx", lambda path: export(traced, path, ExportOptions(validate=False))
    )


@pytest.fixture(scope="session")
def text_graph(tmp_path_factory: pytest.TempPathFactory, traced: Path) -> Path:
    """The same UNet with SWS in its self- and cross-attention."""
    options = ExportOptions(sites=("*",), validate=False)
    return road.shared(tmp_path_factory, "sws_text.onnx", lambda path: export(traced, path, options))


@pytest.fixture(scope="session")
def node_graph(tmp_path_factory: pytest.TempPathFactory, traced: Path) -> Path:
    """The same UNet with the published node in its cross-attention."""
    options = ExportOptions(preset="node", debug_outputs=True, validate=False)
    return road.shared(tmp_path_factory, "node.onnx", lambda path: export(traced, path, options))


@pytest.fixture(scope="session")
def telling_graph(tmp_path_factory: pytest.TempPathFactory, random_unet: Path) -> Path:
    """A small UNet with SWS, the figures of its sites among the outputs; validated as it was exported."""
    return road.shared(
        tmp_path_factory,
        "telling.onnx",
        lambda path: export(random_unet, path, ExportOptions(debug_outputs=True)),
    )


@pytest.fixture(scope="session")
def sdxl_unet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers directory with a small UNet that takes what SDXL's takes."""
    return road.shared(
        tmp_path_factory,
        "sdxl_unet",
        lambda path: road.make_unet(
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
    return road.shared(
        tmp_path_factory,
        "sdxl.onnx",
        lambda path: export(sdxl_unet, path, ExportOptions(validate=False)),
    )


@pytest.fixture
def graph_copy(sws_graph: Path, tmp_path: Path) -> Path:
    """A copy with its manifest, to be damaged."""
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
    """Inputs of a step: the same for the same number, batch and size."""

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
