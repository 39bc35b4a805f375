"""The other exporters of `export.py`, each run as `python export_peers.py NAME UNET OUT`.

`torchscript` is torch's TorchScript exporter at opset 17, called as ComfyUI's TensorRT converter calls it.
`optimum` is the function behind `optimum-cli export onnx` for the UNet of a pipeline; without a GPU it
supports float32 only. Both export diffusers' UNet with small example inputs and dynamic shapes.
"""

import sys
from pathlib import Path
from typing import Any


def torchscript(unet_path: Path, out: Path) -> None:
    import torch
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(unet_path, torch_dtype=torch.float16).eval()
    inputs = {
        "sample": torch.randn(2, unet.config.in_channels, 24, 40).half(),
        "timestep": torch.tensor([500.0, 400.0]),
        "encoder_hidden_states": torch.randn(2, 77, unet.config.cross_attention_dim).half(),
    }
    axes = {
        "sample": {0: "batch", 2: "height", 3: "width"},
        "timestep": {0: "batch"},
        "encoder_hidden_states": {0: "batch", 1: "tokens"},
    }
    if unet.config.addition_embed_type == "text_time":
        inputs["text_embeds"] = torch.randn(2, 1280).half()
        inputs["time_ids"] = torch.zeros(2, 6).half()
        axes |= {"text_embeds": {0: "batch"}, "time_ids": {0: "batch"}}

    class Step(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unet = unet

        def forward(self, sample: Any, timestep: Any, text: Any, *added: Any) -> Any:
            conditions = dict(zip(("text_embeds", "time_ids"), added, strict=True)) if added else None
            return self.unet(sample, timestep, text, added_cond_kwargs=conditions, return_dict=False)[0]

    with torch.no_grad():
        torch.onnx.export(
            Step(),
            tuple(inputs.values()),
            str(out),
            dynamo=False,
            opset_version=17,
            input_names=list(inputs),
            output_names=["out_sample"],
            dynamic_axes=axes,
        )


def optimum(unet_path: Path, out: Path) -> None:
    from diffusers import UNet2DConditionModel
    from optimum.exporters.onnx.convert import export
    from optimum.exporters.onnx.model_configs import UNetOnnxConfig

    unet = UNet2DConditionModel.from_pretrained(unet_path).eval()
    # optimum's pipeline exporter sets these two before it creates the configuration.
    unet.config.text_encoder_projection_dim = unet.config.cross_attention_dim
    unet.config.requires_aesthetics_score = False
    export(unet, UNetOnnxConfig(unet.config, task="semantic-segmentation"), out)


if __name__ == "__main__":
    {"torchscript": torchscript, "optimum": optimum}[sys.argv[1]](Path(sys.argv[2]), Path(sys.argv[3]))
