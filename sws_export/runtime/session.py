"""Sessions: an exported graph or engine with its state."""

import operator
import threading
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np

from sws_export.errors import OptionError, StepError
from sws_export.runtime.backend import Loop, RuntimeBackend
from sws_export.runtime.contract import Contract, read_contract
from sws_export.runtime.inputs import (
    Array,
    Buffer,
    convert_like,
    crop,
    empty_output,
    is_finite,
    is_tensor,
    numbers,
    prepare_inputs,
    prepare_states,
    state_shapes,
    wait_for_torch,
)
from sws_export.runtime.padding import pad_inputs, padded_sides, reject_sides
from sws_export.runtime.pixels import with_pixels
from sws_export.runtime.providers import PROVIDERS, ProviderName
from sws_export.tensors import concrete_shape

RECOMMENDED_INTENSITY = 0.5

Snapshot = dict[str, Array]
"""State inputs by name, float32, with the shapes of the manifest; empty before the first step."""


class Stream:
    """One trajectory, or a batch of them, with its own state; made by `Session.stream`.

    Thread-safe: calls on one stream run one after the other.
    """

    def __init__(self, contract: Contract, backend: RuntimeBackend, *, pad: bool = True) -> None:
        self._contract = contract
        self._backend = backend
        self._pad = pad
        self._stated_padding: tuple[int, int] | None = None
        self._lock = threading.Lock()
        self._loop: Loop | None = None
        self._shapes: Mapping[str, tuple[int, ...]] = {}
        self._metrics: dict[str, Array] = {}
        # Steps since the state was zero or restored.
        self._steps = 0
        self._text_states = {pair.spec.name for pair in contract.states if "tokens" in pair.spec.shape}
        # Shape of the last sample; None before the first step, and after `restore`.
        self._sample_shape: tuple[int, ...] | None = None

    def step(
        self,
        sample: Any,
        timestep: Any,
        encoder_hidden_states: Any = None,
        *,
        sigma: Any = None,
        intensity: Any = RECOMMENDED_INTENSITY,
        **conditions: Any,
    ) -> Any:
        """Run the UNet once and keep the new state for the next step.

        On a GPU, torch tensors in its memory are read, and the prediction written, at their addresses.

        If the batch, height or width differs from the previous step, the state starts from zeros, unless it
        is persistent (`--preset comfyui-node`). If the number of text tokens differs, only the state of the
        text starts from zeros.

        A latent whose height or width is not a multiple of `Contract.size_multiple` is padded at the bottom
        and the right with its mirror image, and the prediction is cropped; a warning states the sizes.

        Args:
            sample: Latent, scaled for the model, [B, C, H, W], numpy or torch.
            timestep: [B] or one number, in the units of the scheduler.
            encoder_hidden_states: Text embeddings, [B, L, X].
            sigma: Noise level, > 0, [B] or one number; not used by a graph without this input: a plain one,
                or one with `--preset comfyui-node --u calls`, which counts its calls in the state `calls`.
            intensity: Strength of SWS in [0, 1], [B] or one number. At 0 the UNet computes what it computes
                without SWS, except with `--preset comfyui-node`, whose temperature does not depend on it.
            conditions: Other inputs of the manifest, such as `text_embeds` and `time_ids`.

        Returns:
            The prediction [B, C, H, W]: a torch tensor with the device and dtype of `sample` if that is a
            torch tensor, otherwise a numpy array in the precision of the graph.

        Raises:
            StepError: An input is missing, unknown, has a wrong shape or value, or is outside the profiles;
                or the prediction has NaN or Inf, and the state with it: call `reset` or `restore`.
            EngineError: The library failed; the state is unchanged.
        """
        if sample is not None and not is_tensor(sample):
            sample = numbers("input sample", sample)
        given = {"sample": sample, "timestep": timestep, "encoder_hidden_states": encoder_hidden_states}
        if self._contract.takes_intensity:
            given["intensity"] = intensity
        if self._contract.takes_sigma:
            given["sigma"] = sigma
        given |= conditions
        if sides := padded_sides(self._contract, sample):
            given = self._padded(given, sides)
        on_gpu = self._backend.device == "cuda"
        arrays, sizes = prepare_inputs(self._contract, given, on_gpu=on_gpu)
        shapes = state_shapes(self._contract, sizes)
        spec = self._contract.prediction
        shape = (sizes["batch"], spec.shape[1], *arrays["sample"].shape[2:])
        prediction = empty_output(spec, shape, sample, on_gpu=on_gpu)
        metrics = {
            name: np.empty(concrete_shape(output, sizes), np.float32)
            for name, output in self._contract.metrics.items()
        }
        outputs = {self._contract.metrics[name].name: array for name, array in metrics.items()}
        wait_for_torch(arrays.values())
        with self._lock:
            loop = self._loop_of_step(shapes, tuple(np.shape(sample)))
            loop.run(arrays, {spec.name: prediction, **outputs})
            self._steps += 1
            self._metrics = metrics
            self._require_finite(prediction)
        if sides:
            prediction = crop(prediction, *np.shape(sample)[2:])
        return convert_like(prediction, sample)

    def _padded(self, given: dict[str, Any], sides: tuple[int, int]) -> dict[str, Any]:
        """The inputs of a latent with these sides.

        Raises:
            StepError: Padding is off.
        """
        sample = given["sample"]
        if not self._pad:
            reject_sides(self._contract, sample)
        if sides != self._stated_padding:
            self._stated_padding = sides
            found, needed = (
                " x ".join(with_pixels(self._contract, side) for side in both)
                for both in (np.shape(sample)[2:], sides)
            )
            warnings.warn(
                f"the latent of {found} is padded to {needed}, the next multiple of "
                f"{self._contract.size_multiple}, and the prediction cropped; pad=False rejects such sizes",
                stacklevel=3,
            )
        return pad_inputs(self._contract, given, sides)

    def metrics(self) -> dict[str, Array]:
        """Site metrics of the last step, of an artefact exported with `--debug-outputs`.

        Returns:
            Copies, float32: `alpha_k`, `a_v`, `entropy_mean`, `entropy_min`, `entropy_max` and `kl`, each
            [B, sites] with the sites of `Contract.metric_sites`, and `kl_cap` [B]. Entropies and KL
            divergences are in nats.

        Raises:
            StepError: No step has run yet, or the artefact has no debug outputs.
        """
        if not self._contract.metrics:
            raise StepError(
                f"{self._contract.path.name} has no site metrics among its outputs; export it again with "
                "--debug-outputs"
            )
        with self._lock:
            if not self._metrics:
                raise StepError("site metrics are those of the last step, and no step has run yet")
            return {name: values.copy() for name, values in self._metrics.items()}

    def reset(self, samples: Iterable[int] | None = None) -> None:
        """Set the state to zeros: for the whole batch, or for the samples with the indices `samples`.

        Raises:
            StepError: An index is no integer or outside the batch of the last step, or the state is shared
                across the batch.
        """
        if samples is not None and not self._contract.resets_per_image:
            raise StepError(
                f"reset: the samples of a batch share the state of {self._contract.path.name}; call reset() "
                "without indices"
            )
        with self._lock:
            if samples is None:
                self._clear()
                return
            kept = self._snapshot()
            batch = min((len(values) for values in kept.values()), default=(self._sample_shape or (0,))[0])
            rows = _indices(samples, batch)
            for values in kept.values():
                values[rows] = 0.0
            self._fill(kept)

    def state(self) -> Snapshot:
        """A copy of the state in host memory, for `restore`."""
        with self._lock:
            return self._snapshot()

    def restore(self, snapshot: Mapping[str, Array]) -> None:
        """Set the state to one returned by `state`, of this stream or another of the same artefact.

        Raises:
            StepError: The snapshot does not have the states of this artefact, or has other shapes, shapes
                that contradict each other, NaN or Inf.
        """
        if isinstance(snapshot, Mapping) and not snapshot:
            self.reset()
            return
        values = prepare_states(self._contract, snapshot)
        with self._lock:
            shapes = {name: array.shape for name, array in values.items()}
            if self._loop is None or shapes != self._shapes:
                self._allocate(shapes)
            self._fill(values)
            self._steps = 0
            self._sample_shape = None

    def _loop_of_step(self, shapes: Mapping[str, tuple[int, ...]], sample: tuple[int, ...]) -> Loop:
        """The loop for a step of these sizes; states that stay valid are kept, the others are zero."""
        same_sample = self._sample_shape in (None, sample)
        self._sample_shape = sample
        same_images = same_sample or not self._contract.resets_per_image
        if self._loop is not None and same_images and shapes == self._shapes:
            return self._loop
        changed = {name for name, shape in shapes.items() if shape != self._shapes.get(name)}
        kept = {}
        if same_images and changed <= self._text_states:
            kept = {name: values for name, values in self._snapshot().items() if name not in changed}
        loop = self._allocate(shapes)
        self._fill(kept)
        return loop

    def _allocate(self, shapes: Mapping[str, tuple[int, ...]]) -> Loop:
        """Buffers with these shapes, all zero; those of the present loop if it has these shapes."""
        if self._loop is not None and shapes == self._shapes:
            self._clear()
            return self._loop
        # Free the old ones first: the device may not have memory for both.
        self._loop = None
        self._steps = 0
        self._loop = self._backend.loop(shapes)
        self._shapes = dict(shapes)
        return self._loop

    def _clear(self) -> None:
        """Set the state to zeros."""
        self._steps = 0
        self._fill({name: np.zeros(shape, np.float32) for name, shape in self._shapes.items()})

    def _require_finite(self, prediction: Buffer) -> None:
        """Raises StepError where the prediction of the step that just ran has NaN or Inf."""
        if is_finite(prediction):
            return
        precision = self._contract.manifest["precision"]
        cure = (
            "export with --precision bf16 or fp32" if precision == "fp16" else "check the inputs and weights"
        )
        before = "none before it had any" if self._steps > 1 else "the first since the state was zero or set"
        raise StepError(
            f"{self._contract.path.name}: the prediction of step {self._steps} has NaN or Inf ({before}), at "
            f"precision {precision}; call reset() before the next step, and {cure}"
        )

    def _snapshot(self) -> Snapshot:
        loop = self._loop
        return {name: loop.read(name) for name in self._shapes} if loop is not None else {}

    def _fill(self, values: Mapping[str, Array]) -> None:
        if self._loop is not None:
            for name, array in values.items():
                self._loop.write(name, array)


def _indices(samples: Iterable[int], batch: int) -> list[int]:
    """`samples` as a list of indices below `batch`.

    Raises:
        StepError: One is no integer, or outside the batch.
    """
    try:
        rows = [operator.index(row) for row in samples]
    except TypeError as error:
        raise StepError(f"reset: expected indices of samples, found {samples!r}") from error
    if wrong := [row for row in rows if not 0 <= row < batch]:
        of = f"the batch of {batch}" if batch else "the batch: no step has run yet"
        raise StepError(f"reset: sample {wrong[0]} is outside {of}")
    return rows


class Session(Stream):
    """A loaded artefact, and its first stream; `stream` makes further streams over the same weights.

    Any thread may use any stream. Streams run concurrently, except with CUDA graphs in ONNX Runtime; calls on
    one stream run one after the other.
    """

    @classmethod
    def load(
        cls,
        path: Path | str,
        *,
        device: str | None = None,
        provider: str | None = None,
        threads: int | None = None,
        cuda_graphs: bool = False,
        engine_host_code_allowed: bool = False,
        verify: bool = True,
        pad: bool = True,
    ) -> Self:
        """Load an artefact.

        Args:
            path: `.onnx` runs in ONNX Runtime, `.plan` and `.engine` in the library that built them.
            device: `cpu` or `cuda`; None uses a GPU if the library finds one. Engines need `cuda`.
            provider: Execution provider of ONNX Runtime for an `.onnx` graph: `cpu`, `cuda` or
                `tensorrt-rtx`; None is that of `device`. `tensorrt-rtx` needs a graph exported with
                `--backend tensorrt-rtx`.
            threads: Threads of one operator in ONNX Runtime, for an `.onnx` graph; None is its default.
            cuda_graphs: Capture the step as two CUDA graphs, one for each buffer of the state: of an engine,
                or of a graph with static shapes that was exported with `--backend onnxruntime-cuda`, which
                then runs with the provider `cuda`.
            engine_host_code_allowed: TensorRT engines only: run the host code that an engine contains if
                plugins are serialized into it or it is version-compatible. It is native code with the rights
                of this process: allow it only for engines whose origin you trust.
            verify: Compare the sha256 of the files with the manifest, which takes about one second per
                gigabyte. That the manifest lists them, and their sizes, are always checked.
            pad: Pad latents to the next size that the UNet takes and crop the prediction; see `step`.

        Raises:
            OptionError: The device or provider is unknown, the artefact cannot run on it, or an option has no
                effect with it.
            EngineError: The artefact or its manifest is missing or damaged, they do not belong together, or
                the artefact is for another library version or GPU; its steps cannot be captured; or the
                library or driver is not installed.
        """
        if device not in (None, "cpu", "cuda"):
            raise OptionError(f"device '{device}' is unknown; use 'cpu' or 'cuda'")
        contract = read_contract(Path(path), verify=verify)
        if contract.backend == "onnxruntime":
            from sws_export.runtime.onnxruntime_backend import OnnxRuntimeBackend

            backend = OnnxRuntimeBackend(
                contract, _provider(device, provider), threads, cuda_graphs=cuda_graphs
            )
            return cls(contract, backend, pad=pad)
        _check_engine_options(contract, device, provider, threads)
        from sws_export.runtime.tensorrt_backend import open_tensorrt

        return cls(
            contract,
            open_tensorrt(
                contract, cuda_graphs=cuda_graphs, engine_host_code_allowed=engine_host_code_allowed
            ),
            pad=pad,
        )

    @property
    def contract(self) -> Contract:
        """Inputs, outputs, states, profiles and manifest."""
        return self._contract

    @property
    def device(self) -> str:
        """Where it runs: `cpu` or `cuda`."""
        return self._backend.device

    def stream(self) -> Stream:
        """A further stream over the same weights, with its own state, which is zero."""
        return Stream(self._contract, self._backend, pad=self._pad)


def _provider(device: str | None, provider: str | None) -> ProviderName | None:
    """The execution provider that two options of `Session.load` name; None where both are None."""
    chosen = provider or device
    if chosen is None:
        return None
    if chosen not in PROVIDERS:
        raise OptionError(f"provider '{chosen}' is unknown; use {', '.join(map(repr, PROVIDERS))}")
    if device is not None and PROVIDERS[chosen].device != device:
        raise OptionError(
            f"provider '{chosen}' runs on device '{PROVIDERS[chosen].device}', found device='{device}'; "
            "leave one of them out"
        )
    return chosen


def _check_engine_options(
    contract: Contract, device: str | None, provider: str | None, threads: int | None
) -> None:
    for name, value in {"provider": provider, "threads": threads}.items():
        if value is not None:
            raise OptionError(
                f"{name}={value!r} is for .onnx graphs; {contract.path} is an engine, which runs in "
                f"{contract.backend}: leave it out"
            )
    if device == "cpu":
        raise OptionError(
            f"{contract.path} is an engine, which runs on a GPU only; on the CPU load the .onnx graph, which "
            "--keep-onnx writes beside it"
        )
