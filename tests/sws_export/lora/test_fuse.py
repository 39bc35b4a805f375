"""LoRA files in all naming schemes, compared with the formula."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from examples.make_checkpoint import ldm_names
from sws_export.checkpoint import Checkpoint, read_tensor
from sws_export.errors import CheckpointError, OptionError
from sws_export.lora.fuse import fuse, open_lora, parse_lora
from tests.sws_export.lora.conftest import write_family

RANK = 3
SKIPPED = ("norm", "class_embedding", "time_cond")

Naming = Callable[[str], tuple[str, str]]


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


def lora_layer(layer: str) -> tuple[str, str]:
    return f"unet.{layer}.lora_layer.down.weight", f"unet.{layer}.lora_layer.up.weight"


def nested_peft(layer: str) -> tuple[str, str]:
    return f"unet.base_model.model.{layer}.lora_A.weight", f"unet.base_model.model.{layer}.lora_B.weight"


def simple_tuner(layer: str) -> tuple[str, str]:
    name = "lycoris_" + layer.replace(".", "_")
    return f"{name}.lora_down.weight", f"{name}.lora_up.weight"


def old_diffusers(layer: str) -> tuple[str, str]:
    attention, _, projection = layer.replace("to_out.0", "to_out").rpartition(".")
    name = f"unet.{attention}.processor.{projection}_lora"
    return f"{name}.down.weight", f"{name}.up.weight"


NAMINGS = (kohya, peft, bare_peft, diffusers, lora_layer, nested_peft, simple_tuner)


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


@pytest.mark.parametrize("naming", NAMINGS, ids=lambda naming: naming.__name__)
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


def comfyui(layer: str) -> tuple[str, str]:
    return f"diffusion_model.{layer}.lora_down.weight", f"diffusion_model.{layer}.lora_up.weight"


@pytest.mark.parametrize("naming", [kohya, comfyui], ids=lambda naming: naming.__name__)
def test_namings_of_the_original_layers(naming: Naming, each_checkpoint: Checkpoint, tmp_path: Path) -> None:
    shapes = {name: stored.shape for name, stored in each_checkpoint.tensors.items()}
    original = ldm_names(shapes, each_checkpoint.config)

    def original_naming(layer: str) -> tuple[str, str]:
        name = original[f"{layer}.weight"].removeprefix("model.diffusion_model.")
        return naming(name.removesuffix(".weight"))

    file = tmp_path / "lora.safetensors"
    made = make(each_checkpoint, original_naming)
    assert any("input_blocks" in name for name in made.tensors)
    save_file(made.tensors, file)
    assert_fused(each_checkpoint, file, made, 1.0)


def test_norms_of_the_original_layers(each_checkpoint: Checkpoint, tmp_path: Path) -> None:
    shapes = {name: stored.shape for name, stored in each_checkpoint.tensors.items()}
    original = ldm_names(shapes, each_checkpoint.config)
    norms = [name.removesuffix(".weight") for name in shapes if "norm" in name and name.endswith("weight")]
    tensors = {}
    for norm in norms:
        layer = original[f"{norm}.weight"].removeprefix("model.diffusion_model.").removesuffix(".weight")
        tensors |= {
            f"lora_unet_{layer.replace('.', '_')}.w_norm": torch.full(shapes[f"{norm}.weight"], 0.5),
            f"lora_unet_{layer.replace('.', '_')}.b_norm": torch.full(shapes[f"{norm}.bias"], 0.25),
        }
    file = tmp_path / "lora.safetensors"
    save_file(tensors, file)
    lora = open_lora(file, each_checkpoint, 2.0)
    assert (lora.unmatched, lora.unknown) == ((), ())
    fused = fuse(each_checkpoint, [lora])
    assert set(fused) == {f"{norm}.{part}" for norm in norms for part in ("weight", "bias")}
    for name, read in fused.items():
        change = read() - read_tensor(each_checkpoint.tensors[name]).float()
        torch.testing.assert_close(change, torch.full_like(change, 1.0 if "weight" in name else 0.5))


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


def test_tensors_that_are_not_used_are_named(checkpoint: Checkpoint, tmp_path: Path) -> None:
    file = tmp_path / "lora.safetensors"
    made = make(checkpoint, kohya, attention_only=True)
    other = dict(zip(kohya("down_blocks.9.conv"), (torch.ones(1, 2), torch.ones(2, 1)), strict=True))
    text = {"lora_te_text_model_x.lora_down.weight": torch.ones(1, 2), "lora_te1_x.alpha": torch.ones(())}
    unknown = {
        "bundle_emb.x.string_to_param": torch.ones(2),
        f"{kohya('conv_in')[0][:17]}.rescale": torch.ones(1),
    }
    save_file(made.tensors | other | text | unknown, file)
    lora = open_lora(file, checkpoint)
    assert set(lora.changes) == set(made.products)
    assert lora.describe() == [
        f"LoRA lora.safetensors at 1: {len(made.products)} parameters",
        "LoRA lora.safetensors: ignored 2 tensors of the text encoder "
        "(lora_te1_x.alpha, lora_te_text_model_x.lora_down.weight)",
    ]
    assert lora.warnings() == [
        f"{file}: ignored 1 layers that this UNet does not have (lora_unet_down_blocks_9_conv)",
        f"{file}: ignored 2 tensors without a known role "
        "(bundle_emb.x.string_to_param, lora_unet_conv_in.rescale)",
    ]


def test_lora_of_the_text_encoder_only(checkpoint: Checkpoint, tmp_path: Path) -> None:
    file = tmp_path / "lora.safetensors"
    layer = "lora_te_text_model_encoder_layers_0_mlp_fc1"
    save_file(
        {f"{layer}.lora_down.weight": torch.ones(4, 8), f"{layer}.lora_up.weight": torch.ones(8, 4)}, file
    )
    with pytest.raises(CheckpointError, match=r"adapts the text encoder only \(2 tensors, first 'lora_te_"):
        open_lora(file, checkpoint)


def test_two_adapters_in_one_file(checkpoint: Checkpoint, tmp_path: Path) -> None:
    file = tmp_path / "lora.safetensors"
    names = [f"conv_in.lora_{side}.{adapter}.weight" for adapter in ("a", "b") for side in "AB"]
    save_file({name: torch.ones(1, 1) for name in names}, file)
    with pytest.raises(CheckpointError, match="contains several adapters: layer 'conv_in' has both"):
        open_lora(file, checkpoint)


def test_a_bias_that_the_layer_does_not_have(checkpoint: Checkpoint, tmp_path: Path) -> None:
    file = tmp_path / "lora.safetensors"
    layer = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    save_file({f"{kohya(layer)[0].split('.')[0]}.diff_b": torch.ones(8)}, file)
    with pytest.raises(CheckpointError, match=rf"changes '{layer}.bias', which the UNet does not have"):
        open_lora(file, checkpoint)


def test_lora_of_another_family_by_shape(checkpoint: Checkpoint, tmp_path: Path) -> None:
    file = tmp_path / "lora.safetensors"
    made = make(checkpoint, kohya, attention_only=True)
    name = next(name for name in made.tensors if "attn2_to_k.lora_down" in name)
    made.tensors[name] = torch.ones(RANK, 1024)
    save_file(made.tensors, file)
    with pytest.raises(
        CheckpointError, match=r"another family: '.*attn2.to_k.weight' has shape \[.* down \[3, 1024\]"
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
        ("x.vera_lambda_b", "VeRA"),
        ("base_model.model.x.lora_E", "AdaLoRA"),
        ("base_model.model.x.boft_R.default", "PEFT's BOFT"),
        ("base_model.model.x.oft_r.default", "an early form of OFT"),
        ("lora_unet_x.oft_diag", "an early form of OFT"),
        ("lora_unet_x.lambda_layer", "T-LoRA"),
        ("lora_unet_x.bm.weight", "GLoRA with Tucker decomposition"),
        ("lora_unet_x.reshape_weight", "a LoRA that changes the shape of a weight"),
    ],
)
def test_other_adaptations_are_named(name: str, kind: str, checkpoint: Checkpoint, tmp_path: Path) -> None:
    file = tmp_path / "lora.safetensors"
    save_file({name: torch.ones(1)}, file)
    with pytest.raises(CheckpointError, match=rf"contains {kind} \('{name}'\), which is not supported"):
        open_lora(file, checkpoint)


def test_file_that_is_not_a_lora(checkpoint: Checkpoint) -> None:
    with pytest.raises(CheckpointError, match="is not a LoRA"):
        open_lora(checkpoint.files[0], checkpoint)


@pytest.mark.parametrize(
    ("roles", "missing"),
    [
        (["lora_down.weight"], "up"),
        (["lora_up.weight"], "down"),
        (["hada_w1_a", "hada_w1_b", "hada_w2_a"], "hada_w2_b"),
        (["lokr_w1", "lokr_w2_a"], "lokr_w2_b"),
        (["a1.weight", "b1.weight", "b2.weight"], "a2"),
    ],
)
def test_a_missing_matrix(roles: list[str], missing: str, checkpoint: Checkpoint, tmp_path: Path) -> None:
    file = tmp_path / "lora.safetensors"
    save_file({f"lora_unet_conv_in.{role}": torch.ones(1, 1) for role in roles}, file)
    with pytest.raises(CheckpointError, match=f"is damaged: layer 'conv_in' has .*, but no {missing}$"):
        open_lora(file, checkpoint)


def test_pickled_lora(checkpoint: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"only \.safetensors LoRAs are supported"):
        open_lora(tmp_path / "lora.pt", checkpoint)


def test_lora_behind_a_symbolic_link(checkpoint: Checkpoint, tmp_path: Path) -> None:
    made = make(checkpoint, kohya, attention_only=True)
    save_file(made.tensors, tmp_path / "blob")
    (tmp_path / "lora.safetensors").symlink_to(tmp_path / "blob")
    assert_fused(checkpoint, tmp_path / "lora.safetensors", made, 1.0)


def test_modules_to_save_are_replaced(checkpoint: Checkpoint, tmp_path: Path) -> None:
    made = make(checkpoint, peft, attention_only=True)
    conv_in = read_tensor(checkpoint.tensors["conv_in.weight"])
    file = tmp_path / "lora.safetensors"
    save_file(made.tensors | {"unet.conv_in.modules_to_save.default.weight": conv_in + 2}, file)
    fused = fuse(checkpoint, [open_lora(file, checkpoint, 0.5)])
    torch.testing.assert_close(fused["conv_in.weight"](), conv_in + 1)


def test_broken_lora(checkpoint: Checkpoint, tmp_path: Path) -> None:
    file = tmp_path / "lora.safetensors"
    made = make(checkpoint, kohya, attention_only=True)
    broken = next(iter(made.tensors))
    made.tensors[broken][0, 0] = float("nan")
    save_file(made.tensors, file)
    fused = fuse(checkpoint, [open_lora(file, checkpoint)])
    with pytest.raises(CheckpointError, match="contains NaN or Inf after fusing"):
        fused[next(iter(made.products))]()


def test_record(checkpoint: Checkpoint, tmp_path: Path) -> None:
    import hashlib

    file = tmp_path / "lora.safetensors"
    save_file(make(checkpoint, kohya, attention_only=True).tensors, file)
    assert open_lora(file, checkpoint, 0.5).record() == {
        "file": "lora.safetensors",
        "scale": 0.5,
        "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
    }


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.safetensors", ("a.safetensors", 1.0)),
        ("a.safetensors:0.5", ("a.safetensors", 0.5)),
        ("a.safetensors:-1", ("a.safetensors", -1.0)),
        ("C:/a.safetensors", ("C:/a.safetensors", 1.0)),
        ("C:\\\\adapter", ("C:\\\\adapter", 1.0)),
        ("C:/adapter:0.5", ("C:/adapter", 0.5)),
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
