"""LoRA files in all naming schemes, compared with the formula."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from examples.make_checkpoint import family_config, ldm_names, write_checkpoint
from sws_export.checkpoint import Checkpoint, open_checkpoint, read_tensor
from sws_export.errors import CheckpointError, OptionError
from sws_export.lora.fuse import fuse, open_lora, parse_lora

RANK = 3
SKIPPED = ("norm", "class_embedding", "time_cond")

Naming = Callable[[str], tuple[str, str]]


def write_family(directory: Path, family: str) -> Checkpoint:
    """A UNet with the topology of `family` and few channels."""
    config = family_config(family, twin=True)
    narrow = {
        "block_out_channels": [8 << level for level in range(len(config["block_out_channels"]))],
        "attention_head_dim": 2,
        "norm_num_groups": 4,
        "cross_attention_dim": 12,
    }
    return open_checkpoint(write_checkpoint(directory, config | narrow, dtype="fp32"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return write_family(tmp_path_factory.mktemp("sd"), "tiny-sd")


@pytest.fixture(scope="module", params=["tiny-sd", "sdxl"])
def each_checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return write_family(tmp_path_factory.mktemp("base"), request.param)


def kohya(layer: str) -> tuple[str, str]:
    name = "lora_unet_" + layer.replace(".", "_")
    return f"{name}.lora_down.weight", f"{name}.lora_up.weight"


def peft(layer: str) -> tuple[str, str]:
    return f"unet.{layer}.lora_A.weight", f"unet.{layer}.lora_B.weight"


def bare_peft(layer: str) -> tuple[str, str]:
    return (
        f"base_model.model.{layer}.lora_A.default.weight",
        f"base_model.model.{layer}.lora_B.default.weight",
    )


def diffusers(layer: str) -> tuple[str, str]:
    return f"unet.{layer}.lora.down.weight", f"unet.{layer}.lora.up.weight"


def old_diffusers(layer: str) -> tuple[str, str]:
    attention, _, projection = layer.replace("to_out.0", "to_out").rpartition(".")
    name = f"unet.{attention}.processor.{projection}_lora"
    return f"{name}.down.weight", f"{name}.up.weight"


@dataclass
class Made:
    """Tensors of a LoRA, and up · down for each weight."""

    tensors: dict[str, torch.Tensor]
    products: dict[str, torch.Tensor]


def make(checkpoint: Checkpoint, naming: Naming, attention_only: bool = False, rank: int = RANK) -> Made:
    """A LoRA of random matrices for each linear and convolutional layer."""
    torch.manual_seed(0)
    made = Made({}, {})
    for weight, stored in checkpoint.tensors.items():
        layer = weight.removesuffix(".weight")
        if (
            layer == weight
            or any(part in layer for part in SKIPPED)
            or (attention_only and ".attn" not in layer)
        ):
            continue
        down_name, up_name = naming(layer)
        down = torch.randn(rank, *stored.shape[1:])
        up = torch.randn(stored.shape[0], rank, *[1] * (len(stored.shape) - 2))
        made.tensors |= {down_name: down, up_name: up}
        made.products[weight] = torch.einsum("or,r...->o...", up.flatten(1), down)
    return made


def assert_fused(checkpoint: Checkpoint, file: Path, made: Made, factor: float, scale: float = 1.0) -> None:
    lora = open_lora(file, checkpoint, scale)
    assert lora.unmatched == ()
    fused = fuse(checkpoint, [lora])
    assert set(fused) == set(made.products)
    for name, product in made.products.items():
        found = fused[name]()
        assert found.dtype == torch.float32
        expected = read_tensor(checkpoint.tensors[name]).float() + scale * factor * product
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("naming", [kohya, peft, bare_peft, diffusers], ids=lambda naming: naming.__name__)
def test_namings(naming: Naming, each_checkpoint: Checkpoint, tmp_path: Path) -> None:
    file = tmp_path / "lora.safetensors"
    made = make(each_checkpoint, naming)
    save_file(made.tensors, file)
    assert_fused(each_checkpoint, file, made, 1.0, scale=0.7)


def test_old_diffusers_naming(checkpoint: Checkpoint, tmp_path: Path) -> None:
    file = tmp_path / "lora.safetensors"
    made = make(checkpoint, lambda layer: old_diffusers(layer) if "to_" in layer else peft(layer), True)
    save_file(made.tensors, file)
    assert_fused(checkpoint, file, made, 1.0)


def test_kohya_naming_with_the_original_blocks(each_checkpoint: Checkpoint, tmp_path: Path) -> None:
    checkpoint = each_checkpoint
    shapes = {name: stored.shape for name, stored in checkpoint.tensors.items()}
    original = ldm_names(shapes, checkpoint.config)

    def naming(layer: str) -> tuple[str, str]:
        return kohya(
            original[f"{layer}.weight"].removeprefix("model.diffusion_model.").removesuffix(".weight")
        )

    file = tmp_path / "lora.safetensors"
    made = make(checkpoint, naming)
    assert any("input_blocks" in name for name in made.tensors)
    save_file(made.tensors, file)
    assert_fused(checkpoint, file, made, 1.0)


@pytest.mark.parametrize("naming", [kohya, peft], ids=lambda naming: naming.__name__)
def test_alpha_divides_by_the_rank(naming: Naming, checkpoint: Checkpoint, tmp_path: Path) -> None:
    file = tmp_path / "lora.safetensors"
    made = make(checkpoint, naming)
    alphas = {name.split(".lora_")[0] + ".alpha": torch.tensor(6.0) for name in made.tensors}
    save_file(made.tensors | alphas, file)
    assert_fused(checkpoint, file, made, 6 / RANK)


@pytest.mark.parametrize(
    ("config", "factor"),
    [
        ({"unet.lora_alpha": 6, "unet.r": RANK}, 2.0),
        ({"unet.lora_alpha": 6, "unet.r": RANK, "unet.use_rslora": True}, 6 / RANK**0.5),
        ({"unet.lora_alpha": 1, "unet.alpha_pattern": {"[a-z].*": 9}}, 3.0),
        ({"text_encoder.lora_alpha": 6}, 1.0),
    ],
)
def test_alpha_of_peft_metadata(
    config: dict[str, object], factor: float, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    file = tmp_path / "lora.safetensors"
    made = make(checkpoint, peft, attention_only=True)
    save_file(made.tensors, file, metadata={"lora_adapter_metadata": json.dumps(config)})
    assert_fused(checkpoint, file, made, factor)


def test_linear_lora_for_a_convolution_of_one_pixel(checkpoint: Checkpoint, tmp_path: Path) -> None:
    weight = "down_blocks.0.attentions.0.proj_in.weight"
    down_name, up_name = kohya(weight.removesuffix(".weight"))
    file = tmp_path / "lora.safetensors"
    save_file({down_name: torch.full((1, 8), 2.0), up_name: torch.full((8, 1), 3.0)}, file)
    fused = fuse(checkpoint, [open_lora(file, checkpoint)])[weight]()
    assert fused.shape == (8, 8, 1, 1)
    torch.testing.assert_close(fused, read_tensor(checkpoint.tensors[weight]).float() + 6)


def test_several_loras_add_up(checkpoint: Checkpoint, tmp_path: Path) -> None:
    file = tmp_path / "lora.safetensors"
    made = make(checkpoint, kohya, attention_only=True)
    save_file(made.tensors, file)
    fused = fuse(checkpoint, [open_lora(file, checkpoint, scale) for scale in (0.5, -0.2)])
    for name, product in made.products.items():
        expected = read_tensor(checkpoint.tensors[name]).float() + 0.3 * product
        torch.testing.assert_close(fused[name](), expected, rtol=1e-5, atol=1e-5)


def test_other_tensors_are_counted_and_unmatched_layers_named(checkpoint: Checkpoint, tmp_path: Path) -> None:
    file = tmp_path / "lora.safetensors"
    made = make(checkpoint, kohya, attention_only=True)
    stranger = dict(zip(kohya("down_blocks.9.conv"), (torch.ones(1, 2), torch.ones(2, 1)), strict=True))
    text = {"lora_te_text_model_x.lora_down.weight": torch.ones(1, 2), "lora_te1_x.alpha": torch.ones(())}
    save_file(made.tensors | stranger | text, file)
    lora = open_lora(file, checkpoint)
    assert lora.unmatched == ("lora_unet_down_blocks_9_conv",)
    assert lora.ignored == {"text encoder": 2}
    assert set(lora.changes) == set(made.products)


def test_lora_of_another_family_by_shape(checkpoint: Checkpoint, tmp_path: Path) -> None:
    file = tmp_path / "lora.safetensors"
    made = make(checkpoint, kohya, attention_only=True)
    name = next(name for name in made.tensors if "attn2_to_k.lora_down" in name)
    made.tensors[name] = torch.ones(RANK, 1024)
    save_file(made.tensors, file)
    with pytest.raises(
        CheckpointError, match=r"another family: '.*attn2.to_k.weight' has shape \[.* and \[3, 1024\]"
    ):
        open_lora(file, checkpoint)


def test_lora_of_another_family_by_name(checkpoint: Checkpoint, tmp_path: Path) -> None:
    file = tmp_path / "lora.safetensors"
    names = kohya("double_blocks.0.img_attn_qkv")
    save_file(dict(zip(names, (torch.ones(1, 2), torch.ones(2, 1)), strict=True)), file)
    with pytest.raises(CheckpointError, match=r"changes no layer of .* 1 layers have other names"):
        open_lora(file, checkpoint)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("lora_unet_mid_block_x.hada_w1_a", "LoHa"),
        ("lora_unet_mid_block_x.lokr_w1", "LoKr"),
        ("lora_unet_mid_block_x.dora_scale", "DoRA"),
        ("lora_unet_mid_block_x.lora_mid.weight", "LoCon"),
        ("lora_unet_mid_block_x.diff_b", "full differences"),
    ],
)
def test_other_adaptations_are_named(name: str, kind: str, checkpoint: Checkpoint, tmp_path: Path) -> None:
    file = tmp_path / "lora.safetensors"
    save_file({name: torch.ones(1)}, file)
    with pytest.raises(CheckpointError, match=f"contains {kind}.*expected a plain LoRA"):
        open_lora(file, checkpoint)


def test_file_that_is_not_a_lora(checkpoint: Checkpoint) -> None:
    with pytest.raises(CheckpointError, match="is not a LoRA"):
        open_lora(checkpoint.files[0], checkpoint)


def test_half_a_pair(checkpoint: Checkpoint, tmp_path: Path) -> None:
    file = tmp_path / "lora.safetensors"
    save_file({kohya("conv_in")[0]: torch.ones(1, 2)}, file)
    with pytest.raises(CheckpointError, match="'lora_unet_conv_in' has only one of its two matrices"):
        open_lora(file, checkpoint)


def test_pickled_lora(checkpoint: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"only \.safetensors LoRAs are supported"):
        open_lora(tmp_path / "lora.pt", checkpoint)


def test_broken_lora(checkpoint: Checkpoint, tmp_path: Path) -> None:
    file = tmp_path / "lora.safetensors"
    made = make(checkpoint, kohya, attention_only=True)
    broken = next(iter(made.tensors))
    made.tensors[broken][0, 0] = float("nan")
    save_file(made.tensors, file)
    fused = fuse(checkpoint, [open_lora(file, checkpoint)])
    with pytest.raises(CheckpointError, match="contains NaN or Inf after fusing"):
        fused[next(iter(made.products))]()


def test_hash_is_that_of_the_file(checkpoint: Checkpoint, tmp_path: Path) -> None:
    import hashlib

    file = tmp_path / "lora.safetensors"
    save_file(make(checkpoint, kohya, attention_only=True).tensors, file)
    assert open_lora(file, checkpoint).sha256() == hashlib.sha256(file.read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.safetensors", ("a.safetensors", 1.0)),
        ("a.safetensors:0.5", ("a.safetensors", 0.5)),
        ("a.safetensors:-1", ("a.safetensors", -1.0)),
        ("C:/a.safetensors", ("C:/a.safetensors", 1.0)),
    ],
)
def test_option(text: str, expected: tuple[str, float]) -> None:
    assert parse_lora(text) == (Path(expected[0]), expected[1])


@pytest.mark.parametrize(
    "text", ["a.safetensors:", "a.safetensors:x", "a.safetensors:nan", "a.safetensors:inf"]
)
def test_bad_option(text: str) -> None:
    with pytest.raises(OptionError, match="expected FILE or FILE:SCALE with a number"):
        parse_lora(text)
