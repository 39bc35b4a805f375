"""The model for Triton's Python backend: one stream of a `Session` for each open sequence."""

import importlib
import json
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sws_export.errors import SwsExportError
from sws_export.runtime import Session, Stream


class TritonPythonModel:
    """Called by Triton; the README of its python_backend describes the methods."""

    def initialize(self, arguments: dict[str, str]) -> None:
        """Load the artefact beside `model.py`.

        Args:
            arguments: Triton's arguments, among them the model's configuration as JSON.
        """
        parameters = json.loads(arguments["model_config"])["parameters"]
        folder = Path(arguments["model_repository"]) / arguments["model_version"]
        # Repositories of earlier versions do not have this parameter.
        allowed = parameters.get("engine_host_code_allowed", {}).get("string_value") == "True"
        self._session = Session.load(
            folder / parameters["file"]["string_value"], engine_host_code_allowed=allowed
        )
        # Triton opens at most this many sequences: further streams belong to sequences that were dropped.
        self._limit = int(parameters["max_sequences"]["string_value"])
        self._streams: OrderedDict[int, Stream] = OrderedDict()

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Run one step for each request, with the stream of its sequence."""
        return [self._answer(request) for request in requests]

    def _answer(self, request: Any) -> Any:
        # This module exists in Triton only.
        triton = importlib.import_module("triton_python_backend_utils")
        # DLPack in both directions: a Triton built for numpy 1 reads and writes numpy 2 arrays incorrectly.
        given: dict[str, Any] = {tensor.name(): np.from_dlpack(tensor) for tensor in request.inputs()}
        start, end = (bool(given.pop(name).item()) for name in ("START", "END"))
        sequence = int(given.pop("CORRID").item())
        try:
            outputs = self._step(self._stream(sequence, start), given)
        except SwsExportError as error:
            return triton.InferenceResponse(output_tensors=[], error=triton.TritonError(str(error)))
        finally:
            if end:
                self._streams.pop(sequence, None)
        tensors = [triton.Tensor.from_dlpack(name, array) for name, array in outputs.items()]
        return triton.InferenceResponse(output_tensors=tensors)

    def _step(self, stream: Stream, given: dict[str, Any]) -> dict[str, Any]:
        """The prediction, and the site metrics if the artefact has them, by output name."""
        contract = self._session.contract
        outputs = {contract.prediction.name: stream.step(**given)}
        if contract.metrics:
            metrics = stream.metrics()
            outputs |= {spec.name: metrics[name] for name, spec in contract.metrics.items()}
        return outputs

    def _stream(self, sequence: int, start: bool) -> Stream:
        if start or sequence not in self._streams:
            self._streams[sequence] = self._session.stream()
        self._streams.move_to_end(sequence)
        while len(self._streams) > self._limit:
            self._streams.popitem(last=False)
        return self._streams[sequence]
