"""UNets with IP-Adapters: exported with their image embeddings as inputs."""

import json
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel

from sws_export import ExportOptions, SwsOptions, export
from sws_export.adapters.diffusers import SWSUNet
from sws_export.checkpoint import open_checkpoint
from sws_export.errors import CheckpointError, ExportError
from sws_export.runtime import StepError
from tests import export_runs
from tests.sws_export.adapters.test_diffusers import SIDE, build, call, draw, vae  # noqa: F401  (fixture)
from tests.sws_export.conftest import TOKENS

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

WIDTH, TEXT = 12, 16
OPTIONS = ExportOptions(sws=SwsOptions(guard="literal", sites=("mid_block.*.attn1",)))


def adapter(unet: UNet2DConditionModel, seed: int) -> dict[str, Any]:
    """An IP-Adapter with random weights, as its files contain it."""
    generator = torch.Generator().manual_seed(seed)
    projection = {
        "proj.weight": torch.randn(4 * TEXT, WIDTH, generator=generator) * 0.3,
        "proj.bias": torch.zeros(4 * TEXT),
        "norm.weight": torch.ones(TEXT),
        "norm.bias": torch.zeros(TEXT),
    }
    sizes = [module.to_q.out_features for name, module in unet.named_modules() if name.endswith("attn2")]
    # diffusers numbers all attention modules, in the order of its own list of processors.
    names = [name for name in unet.attn_processors if name.endswith("attn2.processor")]
    widths = dict(zip([n for n, _ in unet.named_modules() if n.endswith("attn2")], sizes, strict=True))
    weights = {}
    for number, name in enumerate(names):
        for part in ("to_k_ip", "to_v_ip"):
            channels = widths[name.removesuffix(".processor")]
            weights[f"{2 * number + 1}.{part}.weight"] = (
                torch.randn(channels, TEXT, generator=generator) * 0.3
            )
    return {"image_proj": projection, "ip_adapter": weights}


def with_adapters(random_unet: Path, count: int) -> UNet2DConditionModel:
    unet = UNet2DConditionModel.from_pretrained(random_unet).eval()
    adapters = [adapter(unet, seed) for seed in range(count)]
    unet._load_ip_adapter_weights(adapters, low_cpu_mem_usage=False)
    return unet


@pytest.fixture(scope="module")
def saved(random_unet: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("ip") / "unet"
    with_adapters(random_unet, 1).save_pretrained(directory)
    return directory


def test_a_pipeline_with_an_image(vae: Any, random_unet: Path, saved: Path, tmp_path: Path) -> None:  # noqa: F811
    result = export(saved, tmp_path / "g.onnx", OPTIONS)
    assert result.manifest is not None
    inputs = {entry["name"]: entry["shape"] for entry in result.manifest["inputs"]}
    assert inputs["image_embeds"] == ["batch", 1, WIDTH]
    assert result.validation is not None
    assert result.validation.passed

    embeds = {"ip_adapter_image_embeds": [draw(2, 1, WIDTH, seed=21)]}
    torch_unet = with_adapters(random_unet, 1)
    plain = call(build(StableDiffusionPipeline, vae, UNet2DConditionModel.from_pretrained(random_unet)))
    expected = call(build(StableDiffusionPipeline, vae, torch_unet), **embeds)
    unet = SWSUNet.load(tmp_path / "g.onnx", device="cpu", threads=1)
    pipe = build(StableDiffusionPipeline, vae, unet)
    unet.attach(pipe)
    assert isinstance(unet.encoder_hid_proj.image_projection_layers[0], diffusers.models.ImageProjection)
    np.testing.assert_allclose(call(pipe, **embeds), expected, rtol=0, atol=1e-4)
    assert np.abs(expected - plain).max() > 1e-3
    with pytest.raises(StepError, match="needs the input image_embeds"):
        call(pipe)
    two = {"ip_adapter_image_embeds": [draw(2, 1, WIDTH)] * 2}
    with pytest.raises(StepError, match="image_embeds has 2 image embeddings, expected 1, one for each IP-A"):
        call(pipe, **two)


def test_two_adapters_and_their_sites(random_unet: Path, tmp_path: Path) -> None:
    unet = with_adapters(random_unet, 2)
    unet.save_pretrained(tmp_path / "unet")
    options = ExportOptions(sws=SwsOptions(guard="literal", sites=("mid_block.*",)), validate=False)
    result = export(tmp_path / "unet", tmp_path / "g.onnx", options)
    assert result.manifest is not None
    assert list(result.manifest["sites"]) == ["d2"]
    skipped = {site["reason"] for site in result.manifest["skipped_sites"] if "attn2" in site["name"]}
    assert "cross-attention with an IP-Adapter: its queries also attend to images" in skipped
    inputs = {
        "sample": draw(2, 4, 8, 6),
        "timestep": torch.tensor([500.0, 20.0]),
        "encoder_hidden_states": draw(2, TOKENS, TEXT),
    }
    images = [draw(2, 1, WIDTH, seed=1), draw(2, 1, WIDTH, seed=2)]
    with torch.no_grad():
        expected = unet(**inputs, added_cond_kwargs={"image_embeds": images}).sample
    session = export_runs.Session(tmp_path / "g.onnx")
    given = {name: value.numpy() for name, value in inputs.items()}
    given |= {f"image_embeds_{number}": image.numpy() for number, image in enumerate(images)}
    given |= {"sigma": np.full(2, 5.0, np.float32), "intensity": np.zeros(2, np.float32)}
    found, _ = session.step(given, session.zero_state(given))
    np.testing.assert_allclose(found, expected.numpy(), rtol=0, atol=1e-4)


def test_other_kinds_are_named(saved: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(saved / "diffusion_pytorch_model.safetensors")
    layer = "encoder_hid_proj.image_projection_layers.0."
    tensors[layer + "latents"] = tensors.pop(layer + "image_embeds.weight")
    (tmp_path / "unet").mkdir()
    save_file(tensors, tmp_path / "unet" / "diffusion_pytorch_model.safetensors")
    config = json.loads((saved / "config.json").read_text())
    (tmp_path / "unet" / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        CheckpointError, match=r"IP-Adapter 0 of the checkpoint has the tensors .*not support"
    ):
        open_checkpoint(tmp_path / "unet")


def test_an_adapter_without_tensors(random_unet: Path, tmp_path: Path) -> None:
    config = json.loads((random_unet / "config.json").read_text()) | {"encoder_hid_dim_type": "ip_image_proj"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="has no tensors of an IP-Adapter; save the UNet again"):
        open_checkpoint(random_unet, tmp_path / "config.json")


def test_dual_cross_attention_is_refused(tmp_path: Path) -> None:
    export_runs.make_unet(tmp_path / "unet", dual_cross_attention=True)
    with pytest.raises(
        ExportError, match=r"the UNet has dual_cross_attention .* export a UNet with one text"
    ):
        export(tmp_path / "unet", tmp_path / "g.onnx", OPTIONS)
