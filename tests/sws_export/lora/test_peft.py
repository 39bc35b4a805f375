"""Adapters that PEFT saved, compared with the weights that PEFT merges."""

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoHaConfig, LoKrConfig, LoraConfig, OFTConfig, PeftConfig, get_peft_model
from safetensors.torch import save_file

from sws_export.checkpoint import Checkpoint
from sws_export.checkpoint.unet_module import load_unet
from sws_export.errors import CheckpointError
from sws_export.lora.fuse import open_lora
from tests.sws_export.lora.conftest import assert_parameters

LAYERS = ["to_q", "to_out.0", "conv1", "ff.net.2", "proj_in"]
LORA: dict[str, Any] = {"r": 4, "lora_alpha": 16, "target_modules": LAYERS}
OFT: dict[str, Any] = {"oft_block_size": 4, "target_modules": ["to_q"]}
CONFIGS: dict[str, PeftConfig] = {
    "LoRA": LoraConfig(**LORA),
    "rsLoRA": LoraConfig(**LORA, use_rslora=True),
    "patterns": LoraConfig(
        **LORA,
        rank_pattern={"to_q": 2, "down_blocks.0.*conv1": 3},
        alpha_pattern={"attn1.to_q": 5, "conv1|to_out.0": 7, "to_q": 11},
    ),
    "DoRA": LoraConfig(**LORA, use_dora=True),
    "LoRA with bias": LoraConfig(**LORA | {"target_modules": ["to_out.0", "conv1"]}, lora_bias=True),
    "all biases": LoraConfig(**LORA, bias="all"),
    "biases of the layers": LoraConfig(**LORA, bias="lora_only"),
    "modules to save": LoraConfig(**LORA, modules_to_save=["conv_in", "norm1"]),
    "LoHa": LoHaConfig(r=4, alpha=2, target_modules=LAYERS),
    "Tucker LoHa": LoHaConfig(r=4, alpha=2, target_modules=LAYERS, use_effective_conv2d=True),
    "LoKr": LoKrConfig(r=2, alpha=1, target_modules=LAYERS, rank_pattern={"to_q": 1}),
    "Tucker LoKr": LoKrConfig(
        r=2, alpha=1, target_modules=LAYERS, use_effective_conv2d=True, decompose_both=True
    ),
    "full LoKr": LoKrConfig(r=16, alpha=8, target_modules=LAYERS),
    "(IA)³": IA3Config(target_modules=LAYERS, feedforward_modules=["ff.net.2", "conv1"]),
    "OFT": OFTConfig(**OFT | {"target_modules": ["to_q", "to_out.0", "conv1"]}),
    "OFT of two terms": OFTConfig(**OFT, num_cayley_neumann_terms=2),
    "OFT of three terms": OFTConfig(**OFT, num_cayley_neumann_terms=3),
    "exact OFT": OFTConfig(**OFT, use_cayley_neumann=False),
    "OFT with one block": OFTConfig(**OFT, block_share=True),
}


def save(
    checkpoint: Checkpoint, config: PeftConfig, directory: Path, scale: float = 1.0
) -> dict[str, torch.Tensor]:
    """Save a random adapter; returns the parameters that PEFT merges with it."""
    torch.manual_seed(0)
    model = get_peft_model(load_unet(checkpoint, torch.float32), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.2 * torch.randn_like(parameter)
    with warnings.catch_warnings():
        # PEFT takes the bias of a LoRA for a damaged matrix.
        warnings.filterwarnings("ignore", message="Adapter 'default': .* have invalid shape: .*bias")
        model.save_pretrained(directory)
    if scale != 1.0:
        for module in model.modules():
            if hasattr(module, "set_scale"):
                module.set_scale("default", scale)
    return model.merge_and_unload().state_dict()


@pytest.mark.parametrize("name", CONFIGS)
def test_adapters_are_merged_as_by_peft(name: str, checkpoint: Checkpoint, tmp_path: Path) -> None:
    expected = save(checkpoint, CONFIGS[name], tmp_path)
    lora = open_lora(tmp_path, checkpoint)
    assert lora.warnings() == []
    assert_parameters(checkpoint, lora, expected)


@pytest.mark.parametrize("name", ["LoRA", "rsLoRA", "DoRA", "LoRA with bias"])
def test_the_scale_is_that_of_peft(name: str, checkpoint: Checkpoint, tmp_path: Path) -> None:
    expected = save(checkpoint, CONFIGS[name], tmp_path, scale=0.7)
    assert_parameters(checkpoint, open_lora(tmp_path, checkpoint, 0.7), expected)


def test_places_of_the_adapter(checkpoint: Checkpoint, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    expected = save(checkpoint, CONFIGS["LoRA"], adapter)
    file = adapter / "adapter_model.safetensors"
    assert_parameters(checkpoint, open_lora(file, checkpoint), expected)
    shutil.copytree(adapter, tmp_path / "pipeline" / "unet")
    assert_parameters(checkpoint, open_lora(tmp_path / "pipeline", checkpoint), expected)
    renamed = file.rename(adapter / "renamed.safetensors")
    assert_parameters(checkpoint, open_lora(renamed, checkpoint), expected)
    assert_parameters(checkpoint, open_lora(adapter, checkpoint), expected)


def test_the_configuration_of_another_file_is_not_used(checkpoint: Checkpoint, tmp_path: Path) -> None:
    save(checkpoint, CONFIGS["LoRA"], tmp_path)
    file = (tmp_path / "adapter_model.safetensors").rename(tmp_path / "a.safetensors")
    shutil.copy(file, tmp_path / "b.safetensors")
    lora = open_lora(file, checkpoint)
    assert lora.peft is None
    assert lora.describe() == [f"LoRA a.safetensors at 1: {len(lora.changes)} parameters"]


def change_config(directory: Path, **changes: Any) -> None:
    file = directory / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_the_configuration_is_recorded(checkpoint: Checkpoint, tmp_path: Path) -> None:
    save(checkpoint, CONFIGS["LoRA"], tmp_path)
    lora = open_lora(tmp_path, checkpoint)
    assert lora.describe()[0].endswith(" parameters, adapter_config.json")
    before = lora.record()
    change_config(tmp_path, lora_alpha=4)
    after = open_lora(tmp_path, checkpoint).record()
    assert before["sha256"] == after["sha256"]
    assert before["config_sha256"] != after["config_sha256"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"peft_type": "VERA"},
            r"adapters of type .VERA. are not supported \(expected LORA, .*merge_and_unload",
        ),
        ({"init_lora_weights": "pissa_niter_4"}, "adapters with init_lora_weights=pissa_niter_4 are not"),
        ({"alora_invocation_tokens": [1]}, "adapters with alora_invocation_tokens are not supported"),
        ({"peft_type": "OFT", "coft": True}, "adapters with coft are not supported"),
    ],
)
def test_other_adapters_are_named(
    changes: dict[str, Any], message: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    save(checkpoint, CONFIGS["LoRA"], tmp_path)
    change_config(tmp_path, **changes)
    with pytest.raises(CheckpointError, match=f"adapter_config.json: {message}"):
        open_lora(tmp_path, checkpoint)


@pytest.mark.parametrize(("files", "number"), [([], "no"), (["a", "b"], "several")])
def test_directory_without_an_adapter(
    files: list[str], number: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    for name in files:
        save_file({"x": torch.zeros(1)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(
        CheckpointError, match=rf"contains {number} \.safetensors files; expected a LoRA file or"
    ):
        open_lora(tmp_path, checkpoint)
