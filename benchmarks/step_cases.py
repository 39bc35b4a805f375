"""The cases of benchmarks/step.py: models, forms of a graph, and one entry per measurement."""

import dataclasses
from fractions import Fraction

MIDDLE = 2.6
"""Noise level at u of about 0.5, where keys and values are mixed most."""
EARLY, LATE = 20.0, 0.5
TINY_BUDGET = {"kl_floor": 0.001, "kl_slope": 0.001}


@dataclasses.dataclass(frozen=True)
class Model:
    """A UNet and the properties of its graphs.

    Attributes:
        family: `--family` of examples/make_checkpoint.py; None for the trained example.
        dtype: Precision of the checkpoint.
        precision: Precision of the graphs.
        target: Target that the graphs are lowered for.
        side: Static height and width of the latent; 77 text tokens are static too, the batch is dynamic.
        logits: Factor on the logits: with random weights attention is flatter than in a trained model.
    """

    family: str | None
    dtype: str
    precision: str
    target: str
    side: int
    logits: float = 4.0


@dataclasses.dataclass(frozen=True)
class Form:
    """Options of a graph; plain if `guard` is None."""

    guard: str | None = None
    rows: Fraction = Fraction(1)
    parameters: dict[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Case:
    """One measurement, run in its own process.

    Attributes:
        group: Cases that are compared with each other; the first is the plain UNet.
        kind: `graph` (ONNX Runtime), `torch` or `rtx`.
        model: A name of `MODELS`.
        form: A name of `FORMS`, or `plain`, `reference` or `node` for torch.
        name: Name within the group.
        batch: Batch size.
        sigma: Noise level.
        intensity: Strength of SWS.
        repeats: Steps timed after the warm-up; 0 times a single step without it.
    """

    group: str
    kind: str
    model: str
    form: str
    name: str
    batch: int = 1
    sigma: float = MIDDLE
    intensity: float = 0.5
    repeats: int = 2

    @property
    def key(self) -> str:
        """Key of the case in the results."""
        return f"{self.group} | {self.name}"


MODELS = {
    "sd15": Model("sd15", "fp32", "fp32", "onnxruntime", 64),
    "sd15-rtx": Model("sd15", "fp32", "fp16", "tensorrt-rtx", 64),
    "sdxl-512": Model("sdxl", "fp16", "fp16", "onnxruntime", 64),
    "sdxl-1024": Model("sdxl", "fp16", "fp16", "onnxruntime", 128),
    "shapes": Model(None, "fp32", "fp32", "onnxruntime", 32, 1.0),
    "shapes-rtx": Model(None, "fp32", "fp16", "tensorrt-rtx", 32, 1.0),
}
FORMS = {
    "plain": Form(),
    "sws": Form("fused"),
    "sws-rows-1/8": Form("fused", Fraction(1, 8)),
    "sws-tiny-budget": Form("fused", parameters=TINY_BUDGET),
    "sws-literal": Form("literal"),
}


def _graphs(group: str, model: str, batch: int, repeats: int) -> list[Case]:
    """Plain UNet, SWS, and SWS with sampled rows at one size."""
    return [
        Case(group, "graph", model, form, form, batch, repeats=repeats)
        for form in ("plain", "sws", "sws-rows-1/8")
    ]


def _steps(group: str, model: str, batch: int, repeats: int) -> list[Case]:
    """Steps that take other branches of the key guard."""
    kinds = {
        "sws, early": ("sws", EARLY, 0.5),
        "sws, late": ("sws", LATE, 0.5),
        "sws, intensity 0": ("sws", MIDDLE, 0.0),
        "sws, binding budget": ("sws-tiny-budget", MIDDLE, 0.5),
    }
    return [
        Case(group, "graph", model, form, name, batch, sigma, intensity, repeats)
        for name, (form, sigma, intensity) in kinds.items()
    ]


def _torch(group: str, model: str, batch: int, repeats: int) -> list[Case]:
    return [
        Case(group, "torch", model, form, f"torch {form}", batch, repeats=0 if form != "plain" else repeats)
        for form in ("plain", "comfyui-node", "reference")
    ]


def _rtx(group: str, model: str) -> list[Case]:
    return [Case(group, "rtx", model, form, form) for form in ("plain", "sws")]


CASES = [
    *_graphs("SD1.5 512, batch 1", "sd15", 1, 2),
    *_steps("SD1.5 512, batch 1", "sd15", 1, 2),
    *_rtx("TensorRT for RTX, SD1.5 512", "sd15-rtx"),
    *_graphs("SD1.5 512, batch 2", "sd15", 2, 2),
    *_steps("SD1.5 512, batch 2", "sd15", 2, 1),
    *_graphs("SDXL 512, batch 1", "sdxl-512", 1, 0),
    *_graphs("example, batch 2", "shapes", 2, 20),
    *_steps("example, batch 2", "shapes", 2, 20),
    Case("example, batch 2", "graph", "shapes", "sws-literal", "sws-literal", 2, repeats=20),
    *_torch("example, batch 2", "shapes", 2, 20),
    *_rtx("TensorRT for RTX, example", "shapes-rtx"),
    *_torch("SD1.5 512, batch 1", "sd15", 1, 1),
    *_graphs("SDXL 1024, batch 1", "sdxl-1024", 1, 0),
    *_torch("SD1.5 512, batch 2", "sd15", 2, 1),
    Case("SD1.5 512, batch 1", "graph", "sd15", "sws-literal", "sws-literal", 1, repeats=0),
]
