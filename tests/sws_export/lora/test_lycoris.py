"""Files that LyCORIS saved, compared with the weights that LyCORIS merges and with its modules' outputs."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lycoris.logging import logger
from lycoris.modules.base import LycorisBaseModule
from lycoris.modules.boft import ButterflyOFTModule
from lycoris.modules.diag_oft import DiagOFTModule
from lycoris.modules.full import FullModule
from lycoris.modules.glora import GLoRAModule
from lycoris.modules.ia3 import IA3Module
from lycoris.modules.locon import LoConModule
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from lycoris.modules.norms import NormModule
from safetensors.torch import load_file, save_file

from sws_export.checkpoint import Checkpoint, read_tensor
from sws_export.checkpoint.unet_module import load_unet
from sws_export.lora.fuse import fuse, open_lora

LINEAR = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0"
CONV = "down_blocks.1.resnets.0.conv1"
BOTH = (LINEAR, CONV)
NORMS = ("down_blocks.0.attentions.0.transformer_blocks.0.norm1", "down_blocks.1.resnets.0.norm1")
Make = Callable[[torch.nn.Module], LycorisBaseModule]


def of(kind: type[LycorisBaseModule], **options: Any) -> Make:
    return lambda layer: kind("layer", layer, 1.0, **options)


KINDS: dict[str, tuple[tuple[str, ...], Make]] = {
    "LoCon": (BOTH, of(LoConModule, lora_dim=4, alpha=2)),
    "Tucker LoCon": ((CONV,), of(LoConModule, lora_dim=4, alpha=2, use_tucker=True)),
    "DoRA of outputs": (BOTH, of(LoConModule, lora_dim=4, alpha=2, weight_decompose=True, wd_on_out=True)),
    "DoRA of inputs": (BOTH, of(LoConModule, lora_dim=4, alpha=2, weight_decompose=True, wd_on_out=False)),
    "LoHa": (BOTH, of(LohaModule, lora_dim=4, alpha=4)),
    "Tucker LoHa": ((CONV,), of(LohaModule, lora_dim=4, alpha=4, use_tucker=True)),
    "LoHa with DoRA": (BOTH, of(LohaModule, lora_dim=4, alpha=4, weight_decompose=True)),
    "LoKr": (BOTH, of(LokrModule, lora_dim=1, alpha=1, factor=2)),
    "LoKr of two products": (BOTH, of(LokrModule, lora_dim=1, alpha=1, factor=4, decompose_both=True)),
    "Tucker LoKr": ((CONV,), of(LokrModule, lora_dim=1, alpha=1, factor=2, use_tucker=True)),
    "full LoKr": (BOTH, of(LokrModule, lora_dim=4, alpha=2, factor=4, full_matrix=True)),
    "GLoRA": (BOTH, of(GLoRAModule, lora_dim=4, alpha=2)),
    "(IA)³ of outputs": (BOTH, of(IA3Module)),
    "(IA)³ of inputs": (BOTH, of(IA3Module, train_on_input=True)),
    "OFT": (BOTH, of(DiagOFTModule, lora_dim=4)),
    "rescaled OFT": (BOTH, of(DiagOFTModule, lora_dim=4, rescaled=True)),
    "constrained OFT": (BOTH, of(DiagOFTModule, lora_dim=4, constraint=0.01)),
    "BOFT": (BOTH, of(ButterflyOFTModule, lora_dim=4, rescaled=True)),
    "differences": (BOTH, of(FullModule)),
    "norms": (NORMS, of(NormModule)),
}
MULTIPLIERS = ("dora_scale", "rescale")


@pytest.fixture(scope="module")
def unet(checkpoint: Checkpoint) -> torch.nn.Module:
    return load_unet(checkpoint, torch.float32)


@pytest.fixture(autouse=True)
def _quiet() -> None:
    logger.setLevel(logging.ERROR)


def save(
    unet: torch.nn.Module, layers: tuple[str, ...], make: Make, file: Path
) -> dict[str, LycorisBaseModule]:
    """Save a random adaptation of `layers`; returns its modules."""
    torch.manual_seed(0)
    modules, tensors = {}, {}
    for layer in layers:
        module = modules[layer] = make(unet.get_submodule(layer))
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                parameter.copy_(0.3 * torch.randn_like(parameter) + (1 if name in MULTIPLIERS else 0))
            state = {name: value.clone() for name, value in module.state_dict().items()}
        if isinstance(module, FullModule):
            # Its state dict is only right after training.
            state = {"diff": module.weight.detach(), "diff_b": module.bias.detach()}
        tensors |= {f"lycoris_{layer.replace('.', '_')}.{name}": value for name, value in state.items()}
    save_file(tensors, file)
    return modules


@pytest.mark.parametrize("name", KINDS)
def test_adaptations_are_merged_as_by_lycoris(
    name: str, checkpoint: Checkpoint, unet: torch.nn.Module, tmp_path: Path
) -> None:
    layers, make = KINDS[name]
    modules = save(unet, layers, make, tmp_path / "lora.safetensors")
    lora = open_lora(tmp_path / "lora.safetensors", checkpoint)
    assert lora.warnings() == []
    fused = fuse(checkpoint, [lora])
    assert {parameter.rpartition(".")[0] for parameter in fused} == set(layers)
    for layer, module in modules.items():
        original = unet.get_submodule(layer).weight
        weight, bias = module.get_merged_weight(shape=original.shape)
        found = fused[f"{layer}.weight"]()
        assert (found - weight).abs().max() <= 1e-5
        assert (found - original).abs().max() > 0.01
        changes_bias = bias is not None and not torch.equal(bias, unet.get_submodule(layer).bias)
        assert changes_bias == (f"{layer}.bias" in fused)
        if changes_bias:
            assert (fused[f"{layer}.bias"]() - bias).abs().max() <= 1e-5


@pytest.mark.parametrize("kind", [LohaModule, LokrModule])
def test_alpha_scales_once(
    kind: type[LycorisBaseModule], checkpoint: Checkpoint, unet: torch.nn.Module, tmp_path: Path
) -> None:
    """LyCORIS multiplies by alpha / rank once when it runs, and twice when it merges LoHa and LoKr."""
    file = tmp_path / "lora.safetensors"
    modules = save(unet, BOTH, of(kind, lora_dim=1, alpha=3, factor=2), file)
    fused = fuse(checkpoint, [open_lora(file, checkpoint)])
    inputs = {LINEAR: torch.randn(2, 8), CONV: torch.randn(1, 8, 5, 5)}
    for layer, module in modules.items():
        bias = unet.get_submodule(layer).bias
        weight = fused[f"{layer}.weight"]()
        with torch.no_grad():
            if layer == LINEAR:
                found = F.linear(inputs[layer], weight, bias)
            else:
                found = F.conv2d(inputs[layer], weight, bias, padding=1)
            torch.testing.assert_close(found, module(inputs[layer]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", KINDS)
def test_the_scale_interpolates(
    name: str, checkpoint: Checkpoint, unet: torch.nn.Module, tmp_path: Path
) -> None:
    layers, make = KINDS[name]
    file = tmp_path / "lora.safetensors"
    save(unet, layers, make, file)
    full, part = (fuse(checkpoint, [open_lora(file, checkpoint, scale)]) for scale in (1.0, 0.3))
    for parameter, read in full.items():
        original = read_tensor(checkpoint.tensors[parameter]).float()
        expected = original + 0.3 * (read() - original)
        torch.testing.assert_close(part[parameter](), expected, rtol=0, atol=1e-5)


def test_early_glora_has_its_matrices_in_reverse_order(
    checkpoint: Checkpoint, unet: torch.nn.Module, tmp_path: Path
) -> None:
    file, early = tmp_path / "lora.safetensors", tmp_path / "early.safetensors"
    save(unet, (LINEAR,), of(GLoRAModule, lora_dim=4, alpha=2), file)
    reverse = {"a1": "a2", "a2": "a1", "b1": "b2", "b2": "b1"}
    tensors = {}
    for name, tensor in load_file(file).items():
        layer, role, *rest = name.split(".")
        tensors[".".join([layer, reverse.get(role, role), *rest])] = tensor
    save_file(tensors, early)
    expected, found = (fuse(checkpoint, [open_lora(path, checkpoint)]) for path in (file, early))
    assert torch.equal(found[f"{LINEAR}.weight"](), expected[f"{LINEAR}.weight"]())
