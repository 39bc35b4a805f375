"""An artefact that ComfyUI's memory management can load and unload."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sws_export.engines.gpu_memory import GpuMemory
from sws_export.runtime.contract import Contract, read_contract
from sws_export.runtime.session import Session
from sws_export.tensors import SIZE_AXES, ProfileShapes

_STABLE_DIFFUSION = 8


class Engine:
    """An artefact whose session is created when it is first needed, and again after `unload`.

    Attributes:
        contract: Inputs, outputs and manifest, which need no runtime library.
    """

    def __init__(self, contract: Contract, **session_options: Any) -> None:
        """An artefact that is not loaded yet; options of `Session.load`."""
        self.contract = contract
        self._options = session_options
        self._session: Session | None = None
        self._lock = threading.Lock()

    @classmethod
    def open(cls, path: Path | str, **session_options: Any) -> "Engine":
        """Read and check the manifest and the files of an artefact.

        Args:
            path: The artefact.
            session_options: Of `Session.load`, except `verify`.

        Raises:
            EngineError: As `Session.load`, except for what the library and the driver find.
        """
        return cls(read_contract(Path(path)), **session_options)

    @property
    def is_loaded(self) -> bool:
        """Whether the session exists."""
        return self._session is not None

    def session(self) -> Session:
        """The session; loads the artefact if it is not loaded. Raises the errors of `Session.load`."""
        with self._lock:
            if self._session is None:
                # `open` has compared the digests.
                self._session = Session.load(self.contract.path, verify=False, **self._options)
            return self._session

    def unload(self) -> None:
        """Release the session. Streams over it must be dropped by the caller: they refer to its weights."""
        with self._lock:
            self._session = None

    def device_bytes(self) -> int:
        """Memory of the loaded artefact and one stream, at the largest sizes.

        What the builder of an engine measured, where the manifest has that; else the size of the files, which
        is that of the weights: the memory of a step is then not known.
        """
        engine: Any = self.contract.manifest.get("engine") or {}
        if engine.get("gpu_memory"):
            memory = GpuMemory.from_json(engine["gpu_memory"])
            return memory.total(memory.largest)
        return sum(entry["bytes"] for entry in self.contract.manifest.get("files", ()))

    def summary(self) -> str:
        """Precision, method, sizes in pixels and profile, on one line."""
        manifest = self.contract.manifest
        engine = self.contract.backend if self.contract.backend != "onnxruntime" else "ONNX graph"
        method = manifest["preset"] or "plain"
        return f"{engine}, {manifest['precision']}, {method}, {', '.join(self._sizes())}"

    def _sizes(self) -> list[str]:
        contract = self.contract
        if contract.profiles:
            return [" or ".join(", ".join(self._profile(profile)) for profile in contract.profiles)]
        fixed = contract.static_sizes
        return [f"{name} {size * self._scale(name)}" for name, size in fixed.items()] or ["any size"]

    def _profile(self, profile: ProfileShapes) -> Iterator[str]:
        for name, (tensor, axis) in SIZE_AXES.items():
            if tensor in profile:
                low, best, high = (shape[axis] * self._scale(name) for shape in profile[tensor])
                yield f"{name} {low}" if low == high else f"{name} {low} to {high}, best {best}"

    def _scale(self, name: str) -> int:
        """Pixels per latent element, 8 if it is not recorded; 1 for sizes that are not of an image."""
        scale = self.contract.manifest["source"].get("vae_scale") or _STABLE_DIFFUSION
        return scale if name in ("height", "width") else 1
