"""Small artefacts that many tests read, inputs for them, and exports that do not trace again."""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from sws_export import ExportOptions, SwsOptions, export
from sws_export.checkpoint import Checkpoint
from sws_export.progress import Progress, SilentProgress
from sws_export.tensors import Precision
from tests import export_runs

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


@pytest.fixture(scope="module")
def quick_trace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """To the end of the module, UNets of one configuration are traced once; weights are the checkpoint's."""
    from sws_export.onnx_files import save_onnx
    from sws_export.tracing.export_unet import export_plain, plain_weights

    def load(
        checkpoint: Checkpoint, precision: Precision, progress: Progress, fused: Any, *, controlnet: bool
    ) -> ir.Model:
        weights = plain_weights(checkpoint, precision, fused)

        def trace(path: Path) -> None:
            traced = export_plain(checkpoint, precision, controlnet=controlnet)
            # Those of this checkpoint may be damaged.
            for name, value in traced.graph.initializers.items():
                if name in weights and value.const_value is not None:
                    zeros = np.zeros(value.const_value.shape.numpy(), value.const_value.dtype.numpy())
                    value.const_value = ir.Tensor(zeros, dtype=value.const_value.dtype, name=name)
            save_onnx(traced, path, SilentProgress())

        key = json.dumps([checkpoint.config, precision, controlnet], sort_keys=True)
        name = f"trace-{hashlib.sha256(key.encode()).hexdigest()[:16]}.onnx"
        model = ir.load(export_runs.shared(tmp_path_factory, name, trace))
        model.metadata_props.clear()
        for name, value in model.graph.initializers.items():
            value.const_value = weights.get(name, value.const_value)
        return model

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sws_export.sources.checkpoint.export_plain", load)
        yield


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """An empty directory for artefacts."""
    directory = tmp_path / "out"
    directory.mkdir()
    return directory
