"""Exported UNets and the live node in the real ComfyUI, on the CPU.

    COMFYUI_PATH=.../ComfyUI python -m benchmarks.comfyui [--out benchmarks/results/comfyui.json] [--quick]

Small UNets with the topologies of SD 1.5 and SDXL are exported, loaded with the nodes of
integrations/comfyui/, and sampled with ComfyUI's own samplers. Every case is compared with ComfyUI's torch
UNet with the same weights. `COMFYUI_PATH` is a checkout whose requirements are installed.
"""

import argparse
import importlib.util
import json
import logging
import os
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SAMPLERS = ("euler", "euler_ancestral", "heun", "dpm_2", "lms", "dpmpp_2m", "dpmpp_sde", "uni_pc")
STEPS = 6
TOKENS = 77
SIDE = 16
# Attention of random weights is flat; these factors make it differ from row to row.
PEAK = 3.0
RANK = 4

SMALL_UNETS: dict[str, dict[str, Any]] = {
    "sd15": {
        "block_out_channels": (32, 64),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": 768,
        "attention_head_dim": 8,
    },
    "sdxl": {
        "block_out_channels": (64, 128),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2),
        "cross_attention_dim": 2048,
        "attention_head_dim": (1, 2),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}


def import_comfyui(path: Path, *options: str) -> ModuleType:
    """Make ComfyUI importable on the CPU, and import the node package under another name."""
    sys.path.insert(0, str(path))
    arguments, sys.argv = sys.argv, ["comfyui", "--cpu", *options]
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy.cli_args

    sys.argv = arguments
    folder = ROOT / "integrations" / "comfyui"
    spec = importlib.util.spec_from_file_location(
        "any_name", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None
    assert spec.loader is not None
    package = importlib.util.module_from_spec(spec)
    sys.modules["any_name"] = package
    spec.loader.exec_module(package)
    return package


def write_small_unet(directory: Path, name: str) -> None:
    """Save a small UNet in diffusers' layout."""
    import torch
    from diffusers import UNet2DConditionModel

    torch.manual_seed(3)
    unet = UNet2DConditionModel(sample_size=SIDE, layers_per_block=1, **SMALL_UNETS[name])
    with torch.no_grad():
        for path, module in unet.named_modules():
            if path.endswith(("attn1", "attn2")):
                module.to_q.weight.mul_(PEAK)
    unet.save_pretrained(directory)


def torch_model(directory: Path, name: str, dtype: str = "float32") -> Any:
    """A MODEL with ComfyUI's torch UNet and the weights of a small UNet that `write_small_unet` saved."""
    import comfy.model_patcher
    import comfy.supported_models
    import comfy.utils
    import torch
    from safetensors.torch import load_file

    from sws_export.adapters.comfyui.family import unet_config_of

    settings = unet_config_of(json.loads((directory / "config.json").read_text()))
    heads = {"num_heads": 8} if name == "sd15" else {"num_head_channels": 64}
    build = settings | heads | {"image_size": 32, "dtype": getattr(torch, dtype), "legacy": False}
    if name == "sdxl":
        build["num_classes"] = "sequential"
    supported = getattr(comfy.supported_models, {"sd15": "SD15", "sdxl": "SDXL"}[name])(build)
    supported.manual_cast_dtype = None
    model = supported.get_model({}, "")
    weights = load_file(directory / "diffusion_pytorch_model.safetensors")
    names = comfy.utils.unet_to_diffusers(settings)
    model.diffusion_model.load_state_dict({ldm: weights[own] for own, ldm in names.items() if own in weights})
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(model.eval(), load_device=cpu, offload_device=cpu)


def write_lora(file: Path, directory: Path) -> None:
    """Save a LoRA for a small UNet: of the values of its middle block, with names that ComfyUI reads."""
    import torch
    from safetensors.torch import load_file, save_file

    weights = load_file(directory / "diffusion_pytorch_model.safetensors")
    weight = weights["mid_block.attentions.0.transformer_blocks.0.attn1.to_v.weight"]
    random = torch.Generator().manual_seed(2)
    name = "diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_v"
    lora = {
        f"{name}.lora_up.weight": torch.randn(len(weight), RANK, generator=random),
        f"{name}.lora_down.weight": weight.std() * torch.randn(RANK, weight.shape[1], generator=random),
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(lora, file)


class SmallModel:
    """A small UNet in torch and as artefacts, with conditions.

    Attributes:
        torch_model: A MODEL with ComfyUI's torch UNet.
        positive: A conditioning.
        negative: A conditioning.
    """

    def __init__(self, directory: Path, name: str) -> None:
        import torch

        self.name, self.directory = name, directory / name
        self.nodes = sys.modules["any_name.nodes"]
        write_small_unet(self.directory, name)
        self.torch_model = torch_model(self.directory, name)
        random = torch.Generator().manual_seed(5)
        width = SMALL_UNETS[name]["cross_attention_dim"]
        self.positive, self.negative = (
            [
                [
                    torch.randn(1, TOKENS, width, generator=random),
                    {"pooled_output": torch.randn(1, 1280, generator=random), "width": 128, "height": 128},
                ]
            ]
            for _ in range(2)
        )

    def export(self, label: str, source_file: Path | None = None, **options: Any) -> Path:
        """An artefact of the small UNet, or of a graph of it, in a temporary folder."""
        from sws_export import ExportOptions, export

        out = self.directory / f"{label}.onnx"
        if not out.exists():
            export(source_file or self.directory, out, ExportOptions(**options, validate=False))
        return out

    def engine(self, label: str, **options: Any) -> Any:
        """A MODEL of an artefact."""
        return self.nodes.load.model_from(self.export(label, **options))

    def sample(
        self,
        model: Any,
        sampler: str = "euler",
        *,
        steps: int = STEPS,
        batch: int = 1,
        cfg: float = 4.0,
        size: tuple[int, int] = (SIDE, SIDE),
        scheduler: str = "normal",
        **given: Any,
    ) -> Any:
        """The latent that ComfyUI samples."""
        import comfy.sample
        import torch

        latent = torch.zeros(batch, 4, *size)
        noise = comfy.sample.prepare_noise(latent, 7)
        conditions = {"positive": self.positive, "negative": self.negative} | given
        return comfy.sample.sample(
            model,
            noise,
            steps,
            cfg,
            sampler,
            scheduler,
            conditions.pop("positive"),
            conditions.pop("negative"),
            latent,
            disable_pbar=True,
            seed=11,
            **conditions,
        )


def difference(found: Any, expected: Any) -> float:
    """The largest difference, relative to the largest value."""
    return float((found - expected).abs().max() / expected.abs().max())


def with_intensity(model: Any, intensity: float) -> Any:
    """The MODEL with an intensity."""
    nodes = sys.modules["any_name.nodes"]
    kind = nodes.SetSwsIntensity if hasattr(model, "unet") else nodes.SigmaWeightedShuffle
    return getattr(kind(), kind.FUNCTION)(model, intensity)[0]


def main() -> None:
    """Run the cases and write the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="write the results as JSON; default: print them")
    parser.add_argument(
        "--model", choices=SMALL_UNETS, help="this one only; the results of others in --out are kept"
    )
    parser.add_argument("--quick", action="store_true", help="two samplers instead of eight")
    parser.add_argument(
        "--record", type=Path, help="write the calls of the diffusion model as JSON, and stop"
    )
    parser.add_argument("--published-node", type=Path, help="checkout of geltz/sws, to compare with")
    options = parser.parse_args()
    path = os.environ.get("COMFYUI_PATH")
    if not path:
        parser.error("set COMFYUI_PATH to a checkout of ComfyUI")
    logging.getLogger().setLevel(logging.WARNING)
    import_comfyui(Path(path))
    from benchmarks.comfyui_cases import record_calls, run_cases

    with tempfile.TemporaryDirectory() as directory:
        if options.record:
            calls = record_calls(Path(directory))
            options.record.parent.mkdir(parents=True, exist_ok=True)
            options.record.write_text(json.dumps(calls, indent=1) + "\n", encoding="utf-8")
            return
        models = [options.model] if options.model else list(SMALL_UNETS)
        samplers = SAMPLERS[:2] if options.quick else SAMPLERS
        results = run_cases(Path(directory), models, samplers, options.published_node)
    if options.model and options.out and options.out.exists():
        before = json.loads(options.out.read_text("utf-8"))["cases"]
        results["cases"] += [case for case in before if case["model"] != options.model]
        results["cases"].sort(key=lambda case: case["model"])
    text = json.dumps(results, indent=1) + "\n"
    if options.out:
        options.out.write_text(text, encoding="utf-8")
    sys.stdout.write(text)


if __name__ == "__main__":
    main()
