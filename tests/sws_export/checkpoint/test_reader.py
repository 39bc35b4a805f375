"""Sources of the configuration and of other properties, and options that the user must pass."""

import json
from pathlib import Path
from typing import Any

import pytest

from sws_export.checkpoint import open_checkpoint
from sws_export.checkpoint.families import FAMILIES
from sws_export.errors import CheckpointError
from tests.export_runs import check_names

WEIGHTS = "diffusion_pytorch_model.safetensors"
SD1 = FAMILIES[0].config()


def write_json(file: Path, content: Any) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return file


def rewrite_config(directory: Path, **changes: Any) -> None:
    file = directory / "config.json"
    write_json(file, json.loads(file.read_text()) | changes)


def test_config_beside_the_weights(tiny_unet: Path) -> None:
    checkpoint = open_checkpoint(tiny_unet / WEIGHTS)
    assert checkpoint.config_source == "config.json beside the weights"
    assert checkpoint.config["attention_head_dim"] == 4
    assert checkpoint.config["norm_num_groups"] == 32
    assert "_class_name" not in checkpoint.config
    assert (checkpoint.family, checkpoint.vae_scale) == (None, None)
    assert check_names(checkpoint) == 0


def test_config_option_takes_precedence(tiny_unet: Path, tmp_path: Path, tiny_config: dict[str, Any]) -> None:
    config = write_json(tmp_path / "mine.json", tiny_config | {"attention_head_dim": 2})
    checkpoint = open_checkpoint(tiny_unet, config)
    assert checkpoint.config["attention_head_dim"] == 2
    assert checkpoint.config_source == f"--config {config}"


def test_pixel_space(
    tmp_path: Path, tiny_config: dict[str, Any], unet_shapes: Any, write_sparse: Any
) -> None:
    config = tiny_config | {"in_channels": 3, "out_channels": 3}
    write_sparse(tmp_path / WEIGHTS, unet_shapes(config))
    write_json(tmp_path / "config.json", config)
    assert open_checkpoint(tmp_path).vae_scale == 1


def test_pipeline_directory(tiny_unet: Path, tmp_path: Path) -> None:
    pipeline = tmp_path / "pipeline"
    pipeline.mkdir()
    tiny_unet.rename(pipeline / "unet")
    write_json(pipeline / "vae/config.json", {"block_out_channels": [32, 64, 64]})
    write_json(pipeline / "scheduler/scheduler_config.json", {"prediction_type": "v_prediction"})
    for path in (pipeline, pipeline / "unet", pipeline / "unet" / WEIGHTS):
        checkpoint = open_checkpoint(path)
        assert (checkpoint.vae_scale, checkpoint.prediction.type) == (4, "v_prediction")


def test_heads_are_required_and_used(tiny_unet: Path, tiny_config: dict[str, Any]) -> None:
    (tiny_unet / "config.json").unlink()
    with pytest.raises(
        CheckpointError, match=r"levels of 32, 64 channels.*--attention-head-dim.*--config FILE"
    ):
        open_checkpoint(tiny_unet)
    checkpoint = open_checkpoint(tiny_unet, attention_head_dim=(4,))
    assert checkpoint.config["attention_head_dim"] == 4
    assert checkpoint.config["cross_attention_dim"] == 48
    assert checkpoint.config_source == "inferred from tensor shapes, --attention-head-dim"
    assert "unknown family" in checkpoint.remarks[0]
    assert check_names(checkpoint) == 0
    assert open_checkpoint(tiny_unet, attention_head_dim=(4, 8)).config["attention_head_dim"] == [4, 8]
    with pytest.raises(CheckpointError, match=r"expected 1 number or 2 .* found 3"):
        open_checkpoint(tiny_unet, attention_head_dim=(4, 8, 8))


def test_an_unknown_family_with_the_added_conditions_of_sdxl(
    tmp_path: Path, tiny_config: dict[str, Any], unet_shapes: Any, write_sparse: Any
) -> None:
    added = {"addition_embed_type": "text_time", "projection_class_embeddings_input_dim": 2816}
    config = tiny_config | added | {"addition_time_embed_dim": 256}
    file = write_sparse(tmp_path / WEIGHTS, unet_shapes(config))
    with pytest.raises(CheckpointError, match="--attention-head-dim"):
        open_checkpoint(file)
    checkpoint = open_checkpoint(file, attention_head_dim=(4,))
    assert checkpoint.config["addition_time_embed_dim"] == 256
    assert checkpoint.remarks[0].endswith("(32 normalization groups, SiLU, and time_ids as in SDXL)")
    assert check_names(checkpoint) == 0


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("SD 1.x", {"in_channels": 12}),
        ("SD 1.x", {"in_channels": 13, "time_cond_proj_dim": 256}),
        ("SD 2.x", {"in_channels": 8}),
        ("SDXL base", {"in_channels": 12, "out_channels": 8}),
    ],
)
def test_other_input_channels_keep_the_family(
    family: str, changes: dict[str, Any], tmp_path: Path, unet_shapes: Any, write_sparse: Any
) -> None:
    expected = next(row for row in FAMILIES if row.name == family).config() | changes
    file = write_sparse(tmp_path / "x.safetensors", unet_shapes(expected))
    checkpoint = open_checkpoint(file)
    assert (checkpoint.family, checkpoint.vae_scale, checkpoint.config) == (family, 8, expected)
    assert checkpoint.config_source.endswith(f"{family} with {changes['in_channels']} input channels")
    write_json(tmp_path / "config.json", {"_class_name": "UNet2DConditionModel"} | expected)
    assert open_checkpoint(file).family == family


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_out_channels": [40, 64], "norm_num_groups": 8}, "not multiples of 32"),
        (
            {"encoder_hid_dim": 32, "encoder_hid_dim_type": "text_proj"},
            "projected text embeddings.*--config FILE",
        ),
        (
            {
                "addition_embed_type": "text_time",
                "addition_time_embed_dim": 8,
                "projection_class_embeddings_input_dim": 80,
            },
            "added conditions of width 80.*time_ids.*--config FILE",
        ),
        (
            {"cross_attention_dim": [48, 32], "down_block_types": ["CrossAttnDownBlock2D"] * 2},
            r"several widths \(\[32, 48\]\)",
        ),
        (
            {
                "down_block_types": ["DownBlock2D"] * 2,
                "up_block_types": ["UpBlock2D"] * 2,
                "mid_block_type": None,
            },
            "without cross-attention",
        ),
    ],
)
def test_what_shapes_do_not_determine(
    changes: dict[str, Any],
    message: str,
    tmp_path: Path,
    tiny_config: dict[str, Any],
    unet_shapes: Any,
    write_sparse: Any,
) -> None:
    file = write_sparse(tmp_path / "x.safetensors", unet_shapes(tiny_config | changes))
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(file, attention_head_dim=(4,))


@pytest.mark.parametrize(
    "changes",
    [
        {"layers_per_block": [1, 2]},
        {"transformer_layers_per_block": [2, 1]},
        {"mid_block_type": None},
        {"num_class_embeds": 10},
        {"only_cross_attention": [True, False]},
        {"time_cond_proj_dim": 16, "use_linear_projection": True},
        {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 20},
        {
            "down_block_types": ["CrossAttnDownBlock2D"] * 2,
            "up_block_types": ["CrossAttnUpBlock2D"] * 2,
            "layers_per_block": 2,
            "transformer_layers_per_block": [[1, 2], [2, 2]],
            "reverse_transformer_layers_per_block": [[1, 2, 3], [2, 2, 1]],
        },
    ],
)
def test_structures_of_unknown_families_are_inferred(
    changes: dict[str, Any], tmp_path: Path, tiny_config: dict[str, Any], unet_shapes: Any, write_sparse: Any
) -> None:
    shapes = unet_shapes(tiny_config | changes)
    checkpoint = open_checkpoint(write_sparse(tmp_path / "x.safetensors", shapes), attention_head_dim=(4,))
    assert unet_shapes(checkpoint.config) == shapes


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not valid JSON"),
        ([], r"bad\.json: expected an object, found \[\]"),
        (
            {"_class_name": "ControlNetModel", "block_out_channels": [32]},
            "is the configuration of a ControlNetModel; expected",
        ),
        ({"hidden_size": 3}, "is not the configuration of a UNet2DConditionModel"),
        ({"block_out_channels": [32, 64], "hidden_size": 3}, "unknown option 'hidden_size'"),
    ],
)
def test_bad_config(content: Any, message: str, tiny_unet: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tiny_unet, write_json(tmp_path / "bad.json", content))


@pytest.mark.parametrize(
    ("options", "shown"),
    [
        (
            {"decay": 0.9999, "use_ema_warmup": False, "optimization_step": 100},
            "decay, optimization_step, use_ema_warmup",
        ),
        ({"an_option_of_another_version": None}, "an_option_of_another_version"),
    ],
)
def test_options_without_a_meaning_are_ignored(options: dict[str, Any], shown: str, tiny_unet: Path) -> None:
    expected = open_checkpoint(tiny_unet)
    rewrite_config(tiny_unet, **options)
    checkpoint = open_checkpoint(tiny_unet)
    assert checkpoint.config == expected.config
    assert checkpoint.remarks[0] == f"{tiny_unet / 'config.json'}: ignored {shown}"


def test_missing_config_file(tiny_unet: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"cannot read .*none.json"):
        open_checkpoint(tiny_unet, tmp_path / "none.json")


def test_config_of_another_model_beside_the_weights_is_ignored(
    tmp_path: Path, unet_shapes: Any, write_sparse: Any
) -> None:
    file = write_sparse(tmp_path / "x.safetensors", unet_shapes(SD1))
    write_json(tmp_path / "config.json", {"model_type": "clip"})
    checkpoint = open_checkpoint(file)
    assert checkpoint.family == "SD 1.x"
    assert "configuration of clip" in checkpoint.remarks[0]


def test_missing_tensors_are_named(
    tmp_path: Path, tiny_config: dict[str, Any], unet_shapes: Any, write_sparse: Any, tiny_unet: Path
) -> None:
    shapes = {name: shape for name, shape in unet_shapes(tiny_config).items() if "conv_shortcut" not in name}
    missing = len(unet_shapes(tiny_config)) - len(shapes)
    file = write_sparse(tmp_path / "x.safetensors", shapes)
    with pytest.raises(
        CheckpointError, match=rf"lacks {missing} of the .*conv_shortcut.weight.* and {missing - 3} more"
    ):
        check_names(open_checkpoint(file, tiny_unet / "config.json"))


def test_extra_tensors_are_counted(
    tmp_path: Path, tiny_config: dict[str, Any], unet_shapes: Any, write_sparse: Any, tiny_unet: Path
) -> None:
    file = write_sparse(tmp_path / "x.safetensors", unet_shapes(tiny_config) | {"a.b": (1,), "c": (2,)})
    assert check_names(open_checkpoint(file, tiny_unet / "config.json")) == 2


def test_shapes_that_contradict_the_config(tiny_unet: Path) -> None:
    rewrite_config(tiny_unet, cross_attention_dim=64)
    with pytest.raises(
        CheckpointError, match=r"attn2.to_k.weight' expected \[32, 64\], found \[32, 48\].*--config FILE"
    ):
        check_names(open_checkpoint(tiny_unet))


def test_config_that_diffusers_refuses(tiny_unet: Path) -> None:
    rewrite_config(tiny_unet, up_block_types=["UpBlock2D"])
    with pytest.raises(CheckpointError, match="diffusers rejects the configuration"):
        check_names(open_checkpoint(tiny_unet))


def test_integers_for_weights(
    tmp_path: Path, tiny_config: dict[str, Any], unet_shapes: Any, write_sparse: Any, tiny_unet: Path
) -> None:
    file = write_sparse(tmp_path / "x.safetensors", unet_shapes(tiny_config), dtype="U8")
    with pytest.raises(CheckpointError, match=r"not floating-point .*quantized"):
        check_names(open_checkpoint(file, tiny_unet / "config.json"))
