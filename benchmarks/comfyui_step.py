"""Cost of the live node in ComfyUI on the CPU: time and memory of a step, each variant in its own process.

    COMFYUI_PATH=.../ComfyUI python -m benchmarks.comfyui_step [--out FILE] [--published-node .../sws]

ComfyUI's UNet of SD 1.5 at full size, with random weights, for a latent of 64 x 64. `COMFYUI_PATH` is a
checkout whose requirements are installed. `--published-node` adds the published node, which patches
cross-attention, and one step of its mathematics at self-attention, where the live node works; that takes
minutes.
"""

import argparse
import importlib.util
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.comfyui import import_comfyui, with_intensity

SIDE, TOKENS, WIDTH = 64, 77, 768
SIGMA = 3.0
_BYTES = 1024
AT_SELF_ATTENTION = "published node, at self-attention"


def random_model() -> Any:
    """A MODEL with the architecture of SD 1.5 and weights that keep the size of activations."""
    import comfy.model_patcher
    import comfy.supported_models
    import torch

    from sws_export.adapters.comfyui.family import unet_config_of

    config = {
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": [320, 640, 1280, 1280],
        "layers_per_block": 2,
        "down_block_types": [*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"],
        "cross_attention_dim": WIDTH,
    }
    build = unet_config_of(config) | {
        "num_heads": 8,
        "image_size": 32,
        "dtype": torch.float32,
        "legacy": False,
    }
    supported = comfy.supported_models.SD15(build)
    supported.manual_cast_dtype = None
    model = supported.get_model({}, "").eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for name, weight in model.diffusion_model.named_parameters():
            if weight.ndim > 1:
                weight.normal_(std=weight[0].numel() ** -0.5)
            else:
                weight.fill_(1.0 if name.endswith("weight") else 0.0)
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(model, load_device=cpu, offload_device=cpu)


def measure(variant: str, published: str | None, steps: int) -> dict[str, Any]:
    """Processor seconds of each step after the first, and the peak memory of the process."""
    # ComfyUI's default on the CPU stores logits in chunks, which is slower and takes more memory.
    import_comfyui(Path(os.environ["COMFYUI_PATH"]), "--use-pytorch-cross-attention")
    import torch

    model = random_model()
    if variant == "live node":
        model = with_intensity(model, 1.0)
    elif published is not None and variant.startswith("published node"):
        spec = importlib.util.spec_from_file_location("published", Path(published) / "__init__.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        if variant == AT_SELF_ATTENTION:
            # The node patches a clone.
            model.clone, model.set_model_attn2_patch = (lambda: model), model.set_model_attn1_patch
        (model,) = module.SWS().patch(model, 1.0)
    random = torch.Generator().manual_seed(0)
    x = SIGMA * torch.randn(1, 4, SIDE, SIDE, generator=random)
    context = torch.randn(1, TOKENS, WIDTH, generator=random)
    sigma = torch.tensor([SIGMA])
    model.patch_model()
    model.pre_run()
    options = dict(model.model_options["transformer_options"]) | {"wrappers": model.wrappers, "sigmas": sigma}
    seconds = []
    with torch.no_grad():
        for _ in range(steps + 1):
            begin = time.process_time()
            model.model.apply_model(x, sigma, c_crossattn=context, transformer_options=dict(options))
            seconds.append(time.process_time() - begin)
    timed = seconds[1:] or seconds
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _BYTES
    return {"variant": variant, "seconds": statistics.median(timed), "all": seconds, "peak_memory": peak}


def main() -> None:
    """Measure all variants and write the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="write the results as JSON; default: print them")
    parser.add_argument("--published-node", help="checkout of geltz/sws, to measure too")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--variant", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.variant:
        found = measure(options.variant, options.published_node, options.steps)
        sys.stdout.write(json.dumps(found) + "\n")
        return
    variants = ["plain", "live node"]
    if options.published_node:
        variants += ["published node", AT_SELF_ATTENTION]
    results = []
    for variant in variants:
        steps = 0 if variant == AT_SELF_ATTENTION else options.steps
        command = [sys.executable, "-m", "benchmarks.comfyui_step", "--variant", variant]
        command += [
            "--steps",
            str(steps),
            *(["--published-node", options.published_node] if options.published_node else []),
        ]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        results.append(json.loads(output.splitlines()[-1]))
        plain = results[0]
        results[-1]["times_plain"] = results[-1]["seconds"] / plain["seconds"]
        results[-1]["memory_times_plain"] = results[-1]["peak_memory"] / plain["peak_memory"]
    threads = int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)
    text = json.dumps({"threads": threads, "steps": options.steps, "results": results}, indent=1) + "\n"
    if options.out:
        options.out.write_text(text, encoding="utf-8")
    sys.stdout.write(text)


if __name__ == "__main__":
    main()
