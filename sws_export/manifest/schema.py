"""The fields of a manifest, with the bounds that msgspec checks when one is read."""

from typing import Annotated, Any, Literal, NotRequired, TypedDict

from msgspec import Meta

from graph_passes.weight_formats import WeightFormat
from sws_export.documents import Count, FileName, Sha256
from sws_export.tensors import Precision

MAX_TENSORS = 4096
MAX_RANK = 8
MAX_PROFILES = 256

TensorName = Annotated[str, Meta(min_length=1, max_length=1024)]
Size = Annotated[int, Meta(ge=0, lt=2**31)]
Dimension = Size | Annotated[str, Meta(pattern=r"^(batch|height|width|tokens)(/[1-9][0-9]{0,4})?$")]
"""A static size, or a symbol as in `TensorSpec`."""
Dtype = Literal["bfloat16", "bool", "float16", "float32", "float64", "int32", "int64"]
Shape = Annotated[list[Size], Meta(max_length=MAX_RANK)]


class TensorEntry(TypedDict):
    """An input or output; `shape` as in `TensorSpec`."""

    name: TensorName
    dtype: Dtype
    shape: Annotated[list[Dimension], Meta(max_length=MAX_RANK)]


class StateEntry(TypedDict):
    """A state: an input of the graph and the output that is fed back into it at the next step.

    `downsampling` is the latent's size divided by that of the state's grid; None for the text, and for a
    state that is no transport, whose `grid` is `none`. A `persistent` state continues from image to image and
    is shared across the batch, the others are reset to zeros at the first step of each image. `reset`
    describes the same in words.
    """

    input: TensorName
    output: TensorName
    grid: str
    downsampling: Annotated[int, Meta(ge=1, le=2**16)] | None
    initial: Literal["zeros"]
    persistent: bool
    reset: str


class GuardEntry(TypedDict):
    """Form of the key guard, and the share of the query rows that it evaluates, such as `1/8`.

    `kl:1/8` is that of the KL divergence alone.
    """

    form: Literal["literal", "fused"]
    rows: Annotated[str, Meta(pattern=r"^(1|(kl:)?1/(2|4|8|16))$")]


class SwsEntry(TypedDict, total=False):
    """The parameters of SWS that the preset uses, see `SwsParameters`."""

    sigma_min: float
    sigma_max: float
    tau: float
    sinkhorn_iters: int
    rebalance_iters: int
    beta: float
    bisection_steps: int
    key_cap: float
    value_cap: float
    u_stop: float
    kl_floor: float
    kl_slope: float
    theta: float
    scales: Annotated[list[int], Meta(min_length=3, max_length=3)]
    schedule: Literal["progress", "noise"]


class DebugOutputsEntry(TypedDict):
    """Output name of each site metric, and the site of each column of these outputs."""

    outputs: Annotated[dict[str, TensorName], Meta(max_length=64)]
    sites: Annotated[list[str], Meta(max_length=MAX_TENSORS)]


class SkippedSiteEntry(TypedDict):
    """An attention site without SWS, and the reason."""

    name: str
    reason: str


class SamplingEntry(TypedDict, total=False):
    """Noise levels and latents of the checkpoint, see `Prediction.sampling`."""

    sigma_data: float
    sigma_min: float
    sigma_max: float
    zero_terminal_snr: bool
    latents_mean: Annotated[list[float], Meta(max_length=1024)]
    latents_std: Annotated[list[float], Meta(max_length=1024)]


class CalibrationEntry(TypedDict):
    """Where the inputs of the calibration came from, and the number of steps."""

    source: str
    steps: Count


class QuantizationEntry(TypedDict):
    """8-bit weights: their format, the number of layers by operator, and the other layers by reason.

    With 8-bit activations also their format, what they were calibrated with, and the error of each layer.
    """

    weights: WeightFormat
    layers: dict[str, Count]
    skipped_layers: dict[str, list[str]]
    activations: NotRequired[WeightFormat]
    calibration: NotRequired[CalibrationEntry]
    layer_errors: NotRequired[dict[str, float]]


class SourceEntry(TypedDict):
    """What was exported: a checkpoint or a plain ONNX graph. A graph has no `config`.

    `file` is the name of a file, directory or repository; `revision` is the commit of a repository. Height
    and width of the latent must be multiples of `size_multiple`.
    """

    kind: str
    file: str
    sha256: str
    revision: NotRequired[str]
    layout: NotRequired[str]
    family: NotRequired[str | None]
    parameters: NotRequired[Count]
    size_multiple: NotRequired[Annotated[int, Meta(ge=1, le=2**16)]]
    vae_scale: NotRequired[Annotated[int, Meta(ge=1, le=2**16)] | None]
    prediction_type: NotRequired[str | None]
    sampling: NotRequired[SamplingEntry]
    config: NotRequired[dict[str, Any] | None]
    loras: NotRequired[list[dict[str, Any]]]


class ProfileEntry(TypedDict):
    """Smallest, optimal and largest shape of one input of an engine."""

    min: Shape
    opt: Shape
    max: Shape


Profile = Annotated[dict[str, ProfileEntry], Meta(max_length=MAX_TENSORS)]
"""An optimization profile: the shapes of all inputs."""


class FileEntry(TypedDict):
    """A file of the artefact."""

    name: FileName
    bytes: Count
    sha256: Sha256


class ProfileMemoryEntry(TypedDict):
    """GPU memory of one execution context with one profile, see `ProfileMemory`."""

    activations: Count
    scratch: Count
    states: Count


class GpuMemoryEntry(TypedDict):
    """GPU memory of an engine in bytes, by profile, see `GpuMemory`."""

    weights: Count
    profiles: Annotated[list[ProfileMemoryEntry], Meta(min_length=1, max_length=MAX_PROFILES)]


class EngineEntry(TypedDict):
    """How the engine was built; further fields as in `EngineReport`."""

    backend: Literal["tensorrt", "tensorrt-rtx"]
    gpu_memory: NotRequired[GpuMemoryEntry | None]


class OutputDifferenceEntry(TypedDict):
    """The largest and mean difference of one output from the reference, see `OutputDifference`."""

    name: str
    maximum: float
    mean: float
    tolerance: float
    passed: bool


class ValidationEntry(TypedDict, total=False):
    """What `ValidationReport.as_dict` returns; `passed` is None where the validation was skipped."""

    passed: bool | None
    reason: str
    reference: str
    remarks: list[str]
    steps: Count
    sizes: dict[str, Size]
    outputs: Annotated[list[OutputDifferenceEntry], Meta(max_length=MAX_TENSORS)]
    seconds: float
    unquantized: OutputDifferenceEntry


class StageEntry(TypedDict):
    """Cost of one stage of the export, see `StageTiming`."""

    name: str
    seconds: float
    peak_memory: Count
    cached: NotRequired[bool]


class GraphDescription(TypedDict):
    """The part of a manifest that depends on the graph alone, and is stored inside the ONNX file.

    `preset`, `sws` and `guard` are None for a plain export; `quantization` is missing without 8-bit weights.
    `shared_inputs` names the inputs [B] that must have one value for the whole batch. `sites`
    lists the sites with SWS by the name of their state's grid.
    """

    format: int
    precision: Precision
    target: str
    guard: GuardEntry | None
    opset: Annotated[int, Meta(ge=1, le=1000)]
    inputs: Annotated[list[TensorEntry], Meta(max_length=MAX_TENSORS)]
    outputs: Annotated[list[TensorEntry], Meta(max_length=MAX_TENSORS)]
    states: Annotated[list[StateEntry], Meta(max_length=MAX_TENSORS)]
    preset: str | None
    sws: SwsEntry | None
    shared_inputs: Annotated[list[TensorName], Meta(max_length=MAX_TENSORS)]
    sites: dict[str, list[str]]
    skipped_sites: list[SkippedSiteEntry]
    source: SourceEntry
    versions: dict[str, str]
    debug_outputs: DebugOutputsEntry | None
    quantization: NotRequired[QuantizationEntry]


class Manifest(GraphDescription, total=False):
    """A manifest; one that was read from inside an ONNX file has the fields of `GraphDescription` only."""

    artefact: FileName
    files: Annotated[list[FileEntry], Meta(max_length=MAX_TENSORS)]
    validation: ValidationEntry
    engine: EngineEntry | None
    profiles: Annotated[list[Profile], Meta(min_length=1, max_length=MAX_PROFILES)] | None
    stages: Annotated[list[StageEntry], Meta(max_length=MAX_TENSORS)]
