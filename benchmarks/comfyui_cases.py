"""The cases of benchmarks.comfyui; imports ComfyUI, which `import_comfyui` makes importable."""

import importlib.util
import logging
import sys
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import comfy.controlnet
import comfy.hooks
import comfy.ldm.modules.attention
import comfy.model_management
import comfy.model_patcher
import torch

from benchmarks.comfyui import (
    SIDE,
    SMALL_UNETS,
    STEPS,
    TOKENS,
    SmallModel,
    difference,
    torch_model,
    with_intensity,
    write_lora,
)
from sws_export import SourceOptions, SwsOptions

Case = dict[str, Any]


class Residuals(comfy.controlnet.ControlBase):
    """A ControlNet with fixed residuals."""

    def __init__(self, output: Sequence[torch.Tensor], middle: torch.Tensor) -> None:
        super().__init__()
        self.output, self.middle = output, middle

    def get_control(self, x: Any, t: Any, cond: Any, batched: int, options: Any) -> dict[str, list[Any]]:
        """The residuals of each sample, as lists that the UNet consumes."""
        count = len(x)
        repeated = [tensor.expand(count, -1, -1, -1).clone() for tensor in (*self.output, self.middle)]
        return {"input": [], "output": repeated[:-1], "middle": repeated[-1:]}

    def copy(self) -> "Residuals":
        """The same residuals."""
        return Residuals(self.output, self.middle)


def run_cases(
    directory: Path, models: Sequence[str], samplers: Sequence[str], published: Path | None
) -> dict[str, Any]:
    """All cases: their differences by model, case and sampler."""
    results: list[Case] = []
    for name in models:
        model = SmallModel(directory, name)
        results += [case | {"model": name} for case in _cases(model, samplers, published)]
    import comfyui_version

    return {
        "comfyui": comfyui_version.__version__,
        "torch": torch.__version__,
        "steps": STEPS,
        "cases": results,
    }


def _cases(model: SmallModel, samplers: Sequence[str], published: Path | None) -> list[Case]:
    source = SourceOptions(controlnet=True)
    engine, plain = model.engine("sws", source=source), model.torch_model
    at = {intensity: with_intensity(engine, intensity) for intensity in (0.0, 1.0)}
    live = with_intensity(plain, 1.0)
    found: list[Case] = []

    def add(case: str, sampler: str, value: Any, expected: Any) -> None:
        rms = float((value - expected).norm() / expected.norm())
        found.append(
            {"case": case, "sampler": sampler, "difference": difference(value, expected), "rms": rms}
        )
        sys.stderr.write(f"{model.name} {sampler} {case}: {found[-1]['difference']:.2g}\n")

    for sampler in samplers:
        expected = model.sample(plain, sampler)
        add("intensity 0 = torch UNet", sampler, model.sample(at[0.0], sampler), expected)
        shuffled = model.sample(at[1.0], sampler)
        add("intensity 1 = live node", sampler, model.sample(live, sampler), shuffled)
        add("intensity 1 and torch UNet (effect)", sampler, shuffled, expected)
        add("second run = first run", sampler, model.sample(at[1.0], sampler), shuffled)
        add(
            "second run of the live node = first run",
            sampler,
            model.sample(live, sampler),
            model.sample(live, sampler),
        )
    first = samplers[0]
    _state_cases(model, at[1.0], live, first, add)
    _input_cases(model, at[0.0], plain, first, add)
    _memory_case(model, at[1.0], first, add)
    _patch_case(model, at[1.0], first, add)
    _float16_cases(model, first, add)
    _own_export_case(model, first, add)
    _convert_cases(model, first, add)
    if published is not None:
        _published_case(model, published, first, add)
    return found


def _state_cases(model: SmallModel, engine: Any, live: Any, sampler: str, add: Any) -> None:
    """Conditions that are called together and apart, and that join the run late."""
    expected = model.sample(engine, sampler)
    apart = with_intensity(engine, 1.0)
    apart.model.memory_required, before = (lambda *_, **__: 1e18), apart.model.memory_required
    try:
        add("conditions one after the other", sampler, model.sample(apart, sampler), expected)
    finally:
        apart.model.memory_required = before
    # The second positive condition starts in the middle of the run: the partner of the others changes.
    late = [[model.negative[0][0] * 0.5, model.negative[0][1] | {"start_percent": 0.6, "end_percent": 1.0}]]
    late = [*model.positive, *late]
    add(
        "a condition joins the run = live node",
        sampler,
        model.sample(live, sampler, positive=late),
        model.sample(engine, sampler, positive=late),
    )


def _input_cases(model: SmallModel, engine: Any, plain: Any, sampler: str, add: Any) -> None:
    """What a workflow passes besides the latent."""
    area = [[model.positive[0][0], model.positive[0][1] | {"area": (SIDE // 2, SIDE, 0, 0), "strength": 1.0}]]
    residuals = _residuals(model)
    controlled = {
        name: [
            [cond, extra | {"control": residuals, "control_apply_to_uncond": False}] for cond, extra in conds
        ]
        for name, conds in (("positive", model.positive), ("negative", model.negative))
    }
    mask = torch.zeros(1, 1, SIDE, SIDE)
    mask[..., SIDE // 2 :] = 1
    for case, given in (
        ("batch of 3", {"batch": 3}),
        ("an area", {"positive": [*model.positive, *area]}),
        ("ControlNet", controlled),
        ("a noise mask", {"noise_mask": mask}),
        ("cfg 1", {"cfg": 1.0}),
    ):
        add(case, sampler, model.sample(engine, sampler, **given), model.sample(plain, sampler, **given))
    static = with_intensity(model.engine("static", sizes=_static()), 0.0)
    add(
        "batch of 3 in a graph of batch 2",
        sampler,
        model.sample(static, sampler, batch=3),
        model.sample(plain, sampler, batch=3),
    )
    odd = (SIDE, SIDE - 1)
    value = model.sample(engine, sampler, size=odd)
    assert value.shape[-2:] == odd
    add(
        "an odd width, padded (differs by its border)", sampler, value, model.sample(plain, sampler, size=odd)
    )


def _static() -> Any:
    from sws_export import SizeOptions

    side = str(8 * SIDE)
    return SizeOptions(batch="2", height=side, width=side, tokens=str(TOKENS), vae_scale=8)


def _residuals(model: SmallModel) -> Residuals:
    random = torch.Generator().manual_seed(1)
    shapes = [
        spec.shape
        for spec in model.engine("sws", source=SourceOptions(controlnet=True)).unet.engine.contract.inputs
        if "additional_residual" in spec.name
    ]
    tensors = [
        0.3
        * torch.randn(
            1,
            shape[1],
            *(SIDE // int(str(side).partition("/")[2] or 1) for side in shape[2:]),
            generator=random,
        )
        for shape in shapes
    ]
    return Residuals(tensors[:-1], tensors[-1])


def _memory_case(model: SmallModel, engine: Any, sampler: str, add: Any) -> None:
    """Unloaded by ComfyUI's memory management, and loaded again."""
    expected = model.sample(engine, sampler)
    assert engine.unet.engine.is_loaded
    assert engine.loaded_size() == engine.model_size() > 1
    comfy.model_management.unload_all_models()
    assert not engine.unet.engine.is_loaded
    assert engine.loaded_size() == 0
    add("unloaded and loaded again", sampler, model.sample(engine, sampler), expected)


def _patch_case(model: SmallModel, engine: Any, sampler: str, add: Any) -> None:
    """Patches that an engine cannot apply: one with, and one without an effect on its inputs."""
    import comfy.sd
    import comfy.utils
    import comfy_extras.nodes_freelunch
    import comfy_extras.nodes_model_merging
    import comfy_extras.nodes_sag

    (freeu,) = comfy_extras.nodes_freelunch.FreeU_V2().patch(engine, 1.3, 1.4, 0.9, 0.2)
    add("FreeU, without effect", sampler, model.sample(freeu, sampler), model.sample(engine, sampler))
    lora = model.directory / "lora.safetensors"
    write_lora(lora, model.directory)
    weights = comfy.utils.load_torch_file(str(lora))
    with _Warnings() as warnings:
        patched, _ = comfy.sd.load_lora_for_models(engine, None, weights, 0.8, 0.0)
        comfy.sd.load_lora_for_models(patched, None, weights, 0.8, 0.0)
        hooks = comfy.hooks.create_hook_lora(weights, strength_model=1.0, strength_clip=0.0)
        hooked = comfy.hooks.set_hooks_for_conditioning(model.positive, hooks=hooks)
        for _ in range(2):
            with_hook = model.sample(engine, sampler, positive=hooked)
    for warned in ("a LoRA or another weight patch", "a weight hook"):
        assert sum(f"{warned}: it has no effect" in text for text in warnings.texts) == 1, warned
    expected = model.sample(engine, sampler)
    add("a LoRA, without effect", sampler, model.sample(patched, sampler), expected)
    add("a weight hook, without effect", sampler, with_hook, expected)
    for rejected, message in (
        (
            lambda: comfy_extras.nodes_sag.SelfAttentionGuidance.execute(engine, 0.5, 2.0),
            "Self-Attention Guidance reads the attention weights of the UNet",
        ),
        (
            lambda: comfy_extras.nodes_model_merging.ModelMergeSimple().merge(model.torch_model, engine, 0.5),
            f"{engine.unet.engine.contract.path.name} is an engine, whose weights cannot be merged",
        ),
    ):
        assert _rejection(rejected).startswith(message)


class _Warnings(logging.Handler):
    """Collects the warnings that are logged meanwhile."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())

    def __enter__(self) -> "_Warnings":
        logging.getLogger().addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        logging.getLogger().removeHandler(self)


def _rejection(call: Callable[[], Any]) -> str:
    try:
        call()
    except ValueError as error:
        return str(error)
    return "not rejected"


def _float16_cases(model: SmallModel, sampler: str, add: Any) -> None:
    """Engine, live node and torch UNet in float16; the differences of rounding alone, to compare."""
    plain = torch_model(model.directory, model.name, "float16")
    engine = model.engine("fp16", source=SourceOptions(precision="fp16"))
    expected = model.sample(plain, sampler)
    add(
        "float16, intensity 0 = torch UNet",
        sampler,
        model.sample(with_intensity(engine, 0.0), sampler),
        expected,
    )
    live = model.sample(with_intensity(plain, 1.0), sampler)
    add("float16, intensity 1 = live node", sampler, model.sample(with_intensity(engine, 1.0), sampler), live)
    add("float16 and float32, torch UNet", sampler, expected, model.sample(model.torch_model, sampler))
    add(
        "float16 and float32, live node",
        sampler,
        live,
        model.sample(with_intensity(model.torch_model, 1.0), sampler),
    )


def _own_export_case(model: SmallModel, sampler: str, add: Any) -> None:
    """ComfyUI's UNet exported as ComfyUI's TensorRT node does it, and SWS put into that graph."""
    unet = model.torch_model.model.diffusion_model
    names = ["x", "timesteps", "context"]
    example = [
        torch.randn(2, 4, SIDE, SIDE),
        torch.ones(2),
        torch.randn(2, TOKENS, SMALL_UNETS[model.name]["cross_attention_dim"]),
    ]
    if model.name == "sdxl":
        names.append("y")
        example.append(torch.randn(2, SMALL_UNETS[model.name]["projection_class_embeddings_input_dim"]))
    graph = model.directory / "own.onnx"
    sizes = {"x": {0: "batch", 2: "height", 3: "width"}, "context": {0: "batch", 1: "tokens"}}
    # What ComfyUI uses on a GPU, where that node runs.
    attention = comfy.ldm.modules.attention
    before, attention.optimized_attention = attention.optimized_attention, attention.attention_pytorch
    try:
        torch.onnx.export(
            unet.eval(),
            tuple(example),
            str(graph),
            input_names=names,
            output_names=["h"],
            dynamic_axes={name: sizes.get(name, {0: "batch"}) for name in (*names, "h")},
            opset_version=17,
            dynamo=False,
        )
    finally:
        attention.optimized_attention = before
    engine = model.nodes.load.model_from(model.export("of_own", source_file=graph))
    add(
        "SWS put into ComfyUI's own ONNX export = live node",
        sampler,
        model.sample(with_intensity(engine, 1.0), sampler),
        model.sample(with_intensity(model.torch_model, 1.0), sampler),
    )


def _convert_cases(model: SmallModel, sampler: str, add: Any) -> None:
    """A MODEL with a LoRA, converted twice with each kind of sizes: the second time the file is found."""
    import comfy.sd
    import comfy.utils
    import folder_paths

    folder = model.directory / "converted"
    folder_paths.folder_names_and_paths["sws"] = ([str(folder)], {".onnx"})
    lora = model.directory / "lora.safetensors"
    write_lora(lora, model.directory)
    patched, _ = comfy.sd.load_lora_for_models(
        model.torch_model, None, comfy.utils.load_torch_file(str(lora)), 0.8, 0.0
    )
    expected = model.sample(patched, sampler)
    add("with and without the LoRA (effect)", sampler, expected, model.sample(model.torch_model, sampler))
    side = str(8 * SIDE)
    kinds = {
        "static": {"batch": "2", "height": side, "width": side, "tokens": str(TOKENS)},
        "ranged": {
            "batch": "1:2:4",
            "height": f"64:{side}:256",
            "width": f"64:{side}:256",
            "tokens": "77:77:154",
        },
    }
    node = model.nodes.ConvertToSwsEngine()
    for number, (kind, sizes) in enumerate(kinds.items(), start=1):
        settings = {"format": "ONNX graph", "precision": "as the model", "controlnet": False} | sizes
        (converted,) = node.convert(patched, name="a name", **settings)
        path = converted.unet.engine.contract.path
        written = path.stat().st_mtime_ns
        (again,) = node.convert(patched, name="a name", **settings)
        assert again.unet.engine is converted.unet.engine
        assert path.stat().st_mtime_ns == written
        assert len(list(folder.glob("*.onnx"))) == number
        assert bool(converted.unet.engine.contract.static_sizes) == (kind == "static")
        add(
            f"converted with the LoRA, {kind} sizes",
            sampler,
            model.sample(with_intensity(converted, 0.0), sampler),
            expected,
        )


def _published_case(model: SmallModel, published: Path, sampler: str, add: Any) -> None:
    """`--preset comfyui-node` and the published node itself, over two runs: the node's state continues."""
    spec = importlib.util.spec_from_file_location("published_node", published / "__init__.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    (node,) = module.SWS().patch(model.torch_model, 0.5)
    for u in ("calls", "sigma"):
        (node,) = module.SWS().patch(model.torch_model, 0.5)
        engine = with_intensity(model.engine(f"node_{u}", sws=SwsOptions(preset="comfyui-node", u=u)), 0.5)
        for run in ("first", "second"):
            expected = model.sample(node, sampler)
            add(f"--u {u} = published node, {run} run", sampler, model.sample(engine, sampler), expected)


def record_calls(directory: Path) -> dict[str, list[dict[str, Any]]]:
    """How ComfyUI calls a diffusion model: two steps of each model, conditions together and with cfg 1."""
    recorded = {}
    for name in SMALL_UNETS:
        model = SmallModel(directory, name)
        engine = model.engine("sws", source=SourceOptions(controlnet=True))
        calls: list[dict[str, Any]] = []
        unet = engine.unet
        engine.model.diffusion_model = _Recorder(unet, calls)
        for cfg in (4.0, 1.0):
            model.sample(engine, steps=2, cfg=cfg, batch=2)
        recorded[name] = calls
    return recorded


class _Recorder:
    """A diffusion model that records its calls."""

    def __init__(self, unet: Any, calls: list[dict[str, Any]]) -> None:
        self._unet, self._calls = unet, calls

    def __getattr__(self, name: str) -> Any:
        return getattr(self._unet, name)

    def __call__(self, x: Any, timesteps: Any, **given: Any) -> Any:
        self._calls.append({"x": _shown(x), "timesteps": _shown(timesteps)} | _shown(given))
        return self._unet(x, timesteps, **given)


def _shown(value: Any) -> Any:
    """A tensor as its shape and dtype, with the numbers of short ones; others as JSON, or as their type."""
    if isinstance(value, torch.Tensor):
        shown: dict[str, Any] = {"shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
        return shown | ({"values": value.tolist()} if value.ndim == 1 else {})
    if isinstance(value, dict):
        return {str(name): _shown(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_shown(part) for part in value]
    if isinstance(value, uuid.UUID):
        return str(value)
    return value if isinstance(value, int | float | str | None) else type(value).__name__
